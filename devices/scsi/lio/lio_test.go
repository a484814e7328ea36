package lio

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/text"
)

// process is a process of a fake host.
type process struct {
	pid   int
	start uint64
}

func fakeHost(f *fake, running ...process) *host {
	return &host{configfs: f, root: "/fake/target", running: func(pid int) (uint64, bool) {
		if pid == os.Getpid() {
			return 4711, true
		}
		for _, p := range running {
			if p.pid == pid {
				return p.start, true
			}
		}
		return 0, false
	}}
}

// image opens a new image with data of its own.
func image(t *testing.T, name string) *block.File {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, bytes.Repeat([]byte(name[:1]), 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	return reopen(t, path, block.Options{Raw: true})
}

func reopen(t *testing.T, path string, o block.Options) *block.File {
	t.Helper()
	o.Lend = true
	b, err := block.Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

func unit(lun int, b block.Backend) Unit {
	return Unit{LUN: lun, UnitConfig: scsi.UnitConfig{Backend: b}}
}

// threeUnits are files with a comma and a space in their names, among others.
func threeUnits(t *testing.T) []Unit {
	return []Unit{unit(0, image(t, "a.img")), unit(1, image(t, "b, c.img")), unit(300, image(t, "d.img"))}
}

// TestNoCompanyID: a kernel before 5.11 has no wwn/company_id, and is refused by a line.
func TestNoCompanyID(t *testing.T) {
	f := newFake(t)
	f.hook = func(op string) error {
		if strings.HasPrefix(op, "write ") && strings.HasSuffix(op, "/wwn/company_id") {
			return fault("open", op, unix.ENOENT)
		}
		return nil
	}
	_, err := fakeHost(f).provision(threeUnits(t))
	if !errors.Is(err, ErrNoBackstore) || !strings.Contains(fmt.Sprint(err), "Linux 5.11") {
		t.Error(err)
	}
}

// foreign makes objects of another tool, which gvm must not touch.
func foreign(t *testing.T, h *host) {
	t.Helper()
	for _, err := range []error{
		h.mkdir("core/fileio_0"), h.mkdir("core/fileio_0/disk0"),
		h.write("core/fileio_0/disk0/control", "fd_dev_name=/x"), h.write("core/fileio_0/disk0/enable", "1"),
		h.mkdir("core/iblock_1"),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestProvisionAndClose(t *testing.T) {
	f := newFake(t)
	h := fakeHost(f)
	foreign(t, h)
	before := f.snapshot()
	units := threeUnits(t)
	units[1].Serial, units[1].BlockSize, units[1].Cache = "disk-1", 4096, scsi.WriteThrough
	tg, err := h.provision(units)
	if err != nil {
		t.Fatal(err)
	}
	adapter := fmt.Sprintf("core/fileio_1%07d000000471101", os.Getpid())
	disk := func(lun int) string { return fmt.Sprintf("%s/gvm-%d-4711-0-lun%d", adapter, os.Getpid(), lun) }
	tpg := "vhost/" + tg.WWN + "/tpgt_0"
	if tg.TPGT != 0 || !strings.HasPrefix(tg.WWN, "naa.5001405") || len(tg.WWN) != 20 {
		t.Errorf("target is %s, %d", tg.WWN, tg.TPGT)
	}
	for _, lun := range []int{0, 1, 300} {
		link := fmt.Sprintf("%s/lun/lun_%d/%s", tpg, lun, filepath.Base(disk(lun)))
		if n := f.nodes[link]; n == nil || n.link != disk(lun) {
			t.Errorf("%s is %v, want a link to %s", link, n, disk(lun))
		}
	}
	for _, c := range []struct{ path, want string }{
		{tpg + "/nexus", tg.owner.initiator()},
		{disk(0) + "/attrib/block_size", "512"},
		{disk(0) + "/attrib/emulate_write_cache", "1"},
		{disk(0) + "/attrib/emulate_pr", "1"},
		{disk(0) + "/attrib/emulate_3pc", "0"},
		{disk(0) + "/attrib/optimal_sectors", "2048"},
		{disk(0) + "/attrib/max_write_same_len", "65535"},
		{disk(0) + "/wwn/vendor_id", "GVM"},
		{disk(0) + "/wwn/product_id", "DISK"},
		{disk(0) + "/wwn/revision", "1"},
		{disk(1) + "/attrib/block_size", "4096"},
		{disk(1) + "/attrib/emulate_write_cache", "0"},
		{disk(1) + "/attrib/optimal_sectors", "256"},
		{disk(1) + "/wwn/vpd_unit_serial", "disk-1"},
		{disk(1) + "/wwn/company_id", "0xfec507"},
		{disk(1) + "/udev_path", units[1].Backend.(*block.File).Path()},
	} {
		if got, err := f.read(c.path); got != c.want {
			t.Errorf("%s is %q, %v; want %q", c.path, got, err, c.want)
		}
	}
	for lun, want := range map[int]bool{0: true, 1: false} {
		if got, _ := f.read(disk(lun) + "/control"); want !=
			strings.HasSuffix(got, ",fd_dev_size=1048576,fd_buffered_io=1") {
			t.Errorf("control of LUN %d is %q", lun, got)
		}
	}
	if err := tg.Close(); err != nil {
		t.Fatal(err)
	}
	if got := f.snapshot(); got != before {
		t.Errorf("after Close:\n%s\nbefore:\n%s", got, before)
	}
	if len(f.locks) > 0 {
		t.Errorf("locks are left: %v", f.locks)
	}
	if err := tg.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
}

// TestEveryFailure has each change fail in turn, once: nothing may be left.
func TestEveryFailure(t *testing.T) {
	units := threeUnits(t)
	n := 0
	for failed := true; failed; n++ {
		f := newFake(t)
		h := fakeHost(f)
		foreign(t, h)
		before, start := f.snapshot(), f.ops
		failed = false
		var op string
		f.hook = func(o string) error {
			if f.ops == start+n+1 {
				failed, op = true, o
				return errInjected
			}
			return nil
		}
		tg, err := h.provision(units)
		switch {
		case failed != (err != nil), failed && !errors.Is(err, errInjected):
			t.Fatalf("failing %q: error is %v", op, err)
		case failed && f.snapshot() != before:
			t.Errorf("after a failure of %q:\n%s", op, f.snapshot())
		case failed && len(f.locks) > 0:
			t.Errorf("after a failure of %q, locks: %v", op, f.locks)
		case !failed:
			f.hook = nil
			if err := tg.Close(); err != nil {
				t.Error(err)
			}
		}
	}
	if n < 40 {
		t.Errorf("there were %d changes to fail, want many", n)
	}
}

// TestEveryCrash has the process die before each change in turn, of a whole life: Collect of
// another process leaves the objects that were there before. A process with the same id and another
// start time does not keep the dead one's objects; a living one does.
func TestEveryCrash(t *testing.T) {
	units := threeUnits(t)
	more := unit(7, image(t, "e.img"))
	n := 0
	for died := true; died; n++ {
		f := newFake(t)
		h := fakeHost(f)
		foreign(t, h)
		before, start := f.snapshot(), f.ops
		died = false
		f.hook = func(string) error {
			if died = died || f.ops > start+n; died {
				return errInjected
			}
			return nil
		}
		if tg, err := h.provision(units); err == nil {
			_ = tg.Add(more)
			_ = tg.Remove(0)
			_ = tg.Close()
		}
		f.hook = nil
		left := f.snapshot()
		clear(f.locks) // with the process
		for _, c := range []struct {
			what string
			h    *host
			want string
		}{
			{"by a living one", fakeHost(f), left},
			{"after its id was used again",
				&host{configfs: f, running: func(pid int) (uint64, bool) { return 4712, true }}, before},
		} {
			if removed, err := c.h.collect(); err != nil || f.snapshot() != c.want {
				t.Fatalf("collected %s, dead before change %d: removed %v, %v; left:\n%s",
					c.what, n, removed, err, f.snapshot())
			}
		}
	}
	if n < 60 {
		t.Errorf("there were %d changes to die before, want more", n)
	}
}

// TestLockMeansAlive has an owner whose process id means nothing here, as in another container: the
// lock on its adapter decides.
func TestLockMeansAlive(t *testing.T) {
	f := newFake(t)
	h := fakeHost(f)
	if _, err := h.provision(threeUnits(t)); err != nil {
		t.Fatal(err)
	}
	other := fakeHost(f)
	other.running = func(int) (uint64, bool) { return 0, false }
	before := f.snapshot()
	if removed, err := other.collect(); removed != nil || err != nil || f.snapshot() != before {
		t.Errorf("collect removed %v, %v of a locked owner", removed, err)
	}
	clear(f.locks)
	removed, err := other.collect()
	if len(removed) != 5 || err != nil { // target, three disks, adapter
		t.Errorf("collect removed %v, %v of an unlocked owner", removed, err)
	}
}

// TestTwoOwners checks that the vhost directory, made by the first of two, goes
// with the last, whichever that is.
func TestTwoOwners(t *testing.T) {
	for _, firstLeavesFirst := range []bool{true, false} {
		f := newFake(t)
		h := fakeHost(f)
		before := f.snapshot()
		a, err := h.provision([]Unit{unit(0, image(t, "a.img"))})
		if err != nil {
			t.Fatal(err)
		}
		b, err := h.provision([]Unit{unit(0, image(t, "b.img"))})
		if err != nil {
			t.Fatal(err)
		}
		if a.WWN == b.WWN {
			t.Errorf("both are %s", a.WWN)
		}
		if !firstLeavesFirst {
			a, b = b, a
		}
		if err := a.Close(); err != nil {
			t.Error(err)
		}
		if f.nodes["vhost/"+b.WWN+"/tpgt_0/lun/lun_0"] == nil {
			t.Error("the second target went with the first")
		}
		if err := b.Close(); err != nil {
			t.Error(err)
		}
		if got := f.snapshot(); got != before {
			t.Errorf("left:\n%s", got)
		}
	}
}

func TestForeignFabricStays(t *testing.T) {
	f := newFake(t)
	h := fakeHost(f)
	if err := h.mkdir("vhost"); err != nil {
		t.Fatal(err)
	}
	before := f.snapshot()
	tg, err := h.provision(nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := tg.Close(); err != nil || f.snapshot() != before {
		t.Errorf("%v; left:\n%s", err, f.snapshot())
	}
}

func TestHotPlug(t *testing.T) {
	f := newFake(t)
	h := fakeHost(f)
	tg, err := h.provision([]Unit{unit(0, image(t, "a.img"))})
	if err != nil {
		t.Fatal(err)
	}
	before := f.snapshot()
	b := image(t, "b.img")
	for range 2 {
		if err := tg.Add(unit(5, b)); err != nil {
			t.Fatal(err)
		}
		if got := tg.LUNs(); !reflect.DeepEqual(got, []int{0, 5}) {
			t.Errorf("LUNs are %v", got)
		}
		if err := tg.Add(unit(5, image(t, "c.img"))); !errors.Is(err, ErrUnit) {
			t.Errorf("a LUN that is taken: %v", err)
		}
		if err := tg.Add(unit(6, b)); !errors.Is(err, ErrBusy) {
			t.Errorf("an image that is served: %v", err)
		}
		if err := tg.Remove(5); err != nil {
			t.Fatal(err)
		}
		if got := f.snapshot(); got != before {
			t.Errorf("after Remove:\n%s", got)
		}
	}
	if err := tg.Remove(5); !errors.Is(err, ErrNoLUN) {
		t.Errorf("a LUN that is not there: %v", err)
	}
	for n := 1; ; n++ { // each change of Add fails in turn
		start := f.ops
		f.hook = func(string) error {
			if f.ops == start+n {
				return errInjected
			}
			return nil
		}
		err := tg.Add(unit(5, b))
		f.hook = nil
		if err == nil {
			break
		}
		if got := f.snapshot(); got != before || !reflect.DeepEqual(tg.LUNs(), []int{0}) {
			t.Fatalf("after a failed Add, LUNs %v:\n%s", tg.LUNs(), got)
		}
	}
}

// TestCloseBusy has a target whose endpoint a process still has.
func TestCloseBusy(t *testing.T) {
	f := newFake(t)
	h := fakeHost(f)
	before := f.snapshot()
	tg, err := h.provision(threeUnits(t))
	if err != nil {
		t.Fatal(err)
	}
	tpg := f.nodes["vhost/"+tg.WWN+"/tpgt_0"]
	tpg.busy = true
	if err := tg.Close(); !errors.Is(err, ErrBusy) {
		t.Errorf("Close: %v", err)
	}
	tpg.busy = false
	if err := tg.Close(); err != nil || f.snapshot() != before {
		t.Errorf("Close: %v; left:\n%s", err, f.snapshot())
	}
}

func TestLookup(t *testing.T) {
	const wwn = "naa.5001405a1b2c3d4e"
	f := newFake(t)
	h := fakeHost(f)
	foreign(t, h)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	expect := func(kind error, words string) {
		t.Helper()
		before := f.snapshot()
		if _, err := h.lookup(wwn); !errors.Is(err, kind) || !strings.Contains(err.Error(), words) ||
			strings.Contains(err.Error(), "\n") {
			t.Errorf("lookup: %v, want %v and %q", err, kind, words)
		}
		if f.snapshot() != before {
			t.Error("lookup changed something")
		}
	}
	expect(ErrNoTarget, wwn)
	must(h.mkdir("vhost"))
	must(h.mkdir("vhost/" + wwn))
	expect(ErrNoNexus, "mkdir")
	must(h.mkdir("vhost/" + wwn + "/tpgt_3"))
	expect(ErrNoNexus, "> /fake/target/vhost/"+wwn+"/tpgt_3/nexus")
	must(h.write("vhost/"+wwn+"/tpgt_3/nexus", "naa.5001405a1b2c3d4f"))
	must(h.mkdir("vhost/" + wwn + "/tpgt_3/lun/lun_2"))
	expect(ErrNoLUN, "ln -s")
	must(h.symlink("core/fileio_0/disk0", "vhost/"+wwn+"/tpgt_3/lun/lun_2/x"))
	f.nodes["vhost/"+wwn+"/tpgt_3"].busy = true
	expect(ErrBusy, "another process")
	f.nodes["vhost/"+wwn+"/tpgt_3"].busy = false
	before := f.snapshot()
	tg, err := h.lookup(wwn)
	if err != nil {
		t.Fatal(err)
	}
	if tg.WWN != wwn || tg.TPGT != 3 || !reflect.DeepEqual(tg.LUNs(), []int{2}) {
		t.Errorf("found %s %d %v", tg.WWN, tg.TPGT, tg.LUNs())
	}
	expect(ErrBusy, "another gvm")
	if err := tg.Remove(2); !errors.Is(err, ErrUnit) {
		t.Errorf("Remove of a target that is not ours: %v", err)
	}
	must(tg.Close())
	if f.snapshot() != before || len(f.locks) > 0 {
		t.Errorf("Close changed something: %s %v", f.snapshot(), f.locks)
	}
	own, err := h.provision(nil)
	must(err)
	if _, err := h.lookup(own.WWN); !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), "belongs to gvm") {
		t.Errorf("lookup of a gvm's own: %v", err)
	}
	must(own.Close())
}

func TestList(t *testing.T) {
	f := newFake(t)
	h := fakeHost(f, process{77, 5})
	foreign(t, h)
	a := image(t, "a.img")
	tg, err := h.provision([]Unit{unit(3, a)})
	if err != nil {
		t.Fatal(err)
	}
	dead := owner{pid: 77, start: 6} // its id belongs to another process now
	if err := h.mkdir("core/" + dead.adapter(iblock, false)); err != nil {
		t.Fatal(err)
	}
	got, err := h.objects()
	if err != nil {
		t.Fatal(err)
	}
	me := &Owner{PID: os.Getpid(), Alive: true}
	name := "core/" + tg.owner.adapter(fileio, true)
	disk := name + "/" + tg.owner.disk(3)
	want := []Object{
		{Kind: KindTarget, Name: text.Name("vhost/" + tg.WWN), Owner: me,
			LUNs: []LUN{{TPGT: 0, LUN: 3, Disk: text.Name(disk)}}},
		{Kind: KindDisk, Name: "core/fileio_0/disk0", Image: "X"},
		{Kind: KindDisk, Name: text.Name(disk), Owner: me, Image: text.Name(a.Path())},
		{Kind: KindAdapter, Name: "core/iblock_10000077000000000600", Owner: &Owner{PID: 77}},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("objects are\n%+v, want\n%+v", got, want)
	}
}

func TestParseAdapter(t *testing.T) {
	max := owner{4194304, 9999999999, 49}
	if got := max.adapter(iblock, true); got != "iblock_14194304999999999999" {
		t.Errorf("the largest adapter is %s", got)
	}
	for _, c := range []struct {
		name string
		ok   bool
	}{
		{"fileio_10001234000000567803", true},
		{"fileio_0", false}, {"iblock_4194304", false}, {"alua", false}, {"rd_mcp_10001234000000567803", false},
		{"fileio_20001234000000567803", false}, {"fileio_1000123400000056780x", false},
		{"fileio_100012340000005678031", false}, {"fileio_1+001234000000567803", false},
	} {
		o, made, ok := parseAdapter(c.name)
		if ok != c.ok || ok && (o != owner{1234, 5678, 1} || !made) {
			t.Errorf("%s: %+v %v %v", c.name, o, made, ok)
		}
	}
}

func TestUnsuitable(t *testing.T) {
	a := image(t, "a.img")
	for _, c := range []struct {
		what string
		u    []Unit
		kind error
	}{
		{"memory", []Unit{unit(0, block.NewMem(1<<20))}, ErrUnit},
		{"LUN", []Unit{unit(16384, a)}, ErrUnit},
		{"LUN twice", []Unit{unit(1, a), unit(1, image(t, "b.img"))}, ErrUnit},
		{"image twice", []Unit{unit(1, a), unit(2, a)}, ErrBusy},
		{"block size", []Unit{{UnitConfig: scsi.UnitConfig{Backend: a, BlockSize: 520}}}, ErrUnit},
		{"serial", []Unit{{UnitConfig: scsi.UnitConfig{Backend: a, Serial: "x "}}}, ErrUnit},
	} {
		f := newFake(t)
		if _, err := fakeHost(f).provision(c.u); !errors.Is(err, c.kind) || strings.Contains(fmt.Sprint(err), "\n") {
			t.Errorf("%s: %v", c.what, err)
		}
		if f.ops > 0 {
			t.Errorf("%s: %d changes", c.what, f.ops)
		}
	}
	u := unit(0, a)
	u.Cache = scsi.Unsafe
	tg, err := fakeHost(newFake(t)).provision([]Unit{u})
	if err != nil || len(tg.Notes()) != 1 || !strings.Contains(tg.Notes()[0], "cache=unsafe") {
		t.Errorf("cache=unsafe: %v", err)
	}
}

func TestMissing(t *testing.T) {
	for _, c := range []struct {
		op   string
		err  error
		kind error
		say  string
	}{
		{"mkdir core/fileio", unix.EINVAL, ErrNoBackstore, "modprobe target_core_file (CONFIG_TCM_FILEIO)"},
		{"mkdir vhost", unix.EINVAL, ErrNoFabric, "modprobe vhost_scsi (CONFIG_VHOST_SCSI)"},
		{"mkdir core/fileio", unix.EACCES, ErrPermission, "run gvm as root"},
		{"write core/", unix.EBUSY, ErrBusy, "in use"},
	} {
		f := newFake(t)
		f.hook = func(op string) error {
			if strings.HasPrefix(op, c.op) && (c.op != "write core/" || strings.HasSuffix(op, "/enable")) {
				return fault("mkdir", "x", c.err)
			}
			return nil
		}
		before := f.snapshot()
		_, err := fakeHost(f).provision([]Unit{unit(0, image(t, "a.img"))})
		if !errors.Is(err, c.kind) || !strings.Contains(fmt.Sprint(err), c.say) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", c.op, err)
		}
		if f.snapshot() != before {
			t.Errorf("%s left:\n%s", c.op, f.snapshot())
		}
	}
	if err := Check(filepath.Join(t.TempDir(), "config", "target")); !errors.Is(err, ErrNoConfigfs) {
		t.Errorf("no configfs: %v", err)
	}
}

// TestReplaced: another file has the image's name by now.
func TestReplaced(t *testing.T) {
	a := image(t, "a.img")
	a2 := a.Path() + ".old"
	if err := errors.Join(os.Rename(a.Path(), a2), unix.Mkfifo(a.Path(), 0o600)); err != nil {
		t.Fatal(err)
	}
	u := unit(0, a)
	u.ReadOnly = true
	f := newFake(t)
	if _, err := fakeHost(f).provision([]Unit{u}); !errors.Is(err, ErrBusy) ||
		!strings.Contains(err.Error(), "was replaced") || f.ops > 0 {
		t.Errorf("%d changes, %v", f.ops, err)
	}
}

// TestLookers: processes that look at the same time whether an owner lives do not take each other
// for it. gvm lio list, which looks without the lock of all changes, has once kept a janitor from
// its work.
func TestLookers(t *testing.T) {
	h := newHost(t.TempDir())
	o := owner{pid: 4242}
	h.running = func(int) (uint64, bool) { return 0, false }
	name := o.adapter("fileio", false)
	if err := os.MkdirAll(filepath.Join(h.root, core, name), 0o755); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	var lookers sync.WaitGroup
	for range 4 {
		lookers.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				if alive, err := h.alive(o, []string{name}); alive || err != nil {
					t.Errorf("alive: %v, %v", alive, err)
					return
				}
			}
		})
	}
	for range 1000 {
		if alive, err := h.alive(o, []string{name}); alive || err != nil {
			t.Errorf("alive: %v, %v", alive, err)
			break
		}
	}
	close(done)
	lookers.Wait()
	l, err := h.lock(core + "/" + name)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if alive, err := h.alive(o, []string{name}); !alive || err != nil {
		t.Errorf("with its lock: %v, %v", alive, err)
	}
}
