package lio

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/kvmapi/vhost"
	"gvm/text"
)

// kernelTree returns all of the real target: every path, the contents of readable files, and the
// targets of links.
func kernelTree(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(DefaultRoot, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		text := ""
		switch {
		case d.Type()&fs.ModeSymlink != 0:
			text, err = os.Readlink(path)
		case d.Type().IsRegular():
			var data []byte
			data, err = os.ReadFile(path)
			text = string(data)
		}
		fmt.Fprintf(&b, "%s %q %v\n", path, text, err)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// unchanged fails the test if the target has changed.
func unchanged(t *testing.T, before, when string) {
	t.Helper()
	after := kernelTree(t)
	if after == before {
		return
	}
	was, is := strings.Split(before, "\n"), strings.Split(after, "\n")
	var diff []string
	for _, l := range was {
		if !slices.Contains(is, l) {
			diff = append(diff, "-"+l)
		}
	}
	for _, l := range is {
		if !slices.Contains(was, l) {
			diff = append(diff, "+"+l)
		}
	}
	t.Fatalf("%s:\n%s", when, strings.Join(diff, "\n"))
}

// others makes objects of another tool: a disk, and a target without a fabric
// directory of its own if vhost is false.
func others(t *testing.T, withVhost bool) (wwn string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "other.img")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	k := kernel(DefaultRoot)
	wwn = "naa.5001405a1b2c3d4e"
	disk, tpg := "core/fileio_3/theirs", "vhost/"+wwn+"/tpgt_1"
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	made := func(dir string) {
		t.Helper()
		do(k.mkdir(dir))
		t.Cleanup(func() {
			if err := k.rmdir(dir); err != nil {
				t.Errorf("rmdir %s: %v", dir, err)
			}
		})
	}
	made("core/fileio_3")
	made(disk)
	do(k.write(disk+"/control", "fd_dev_name="+path+",fd_dev_size=1048576"))
	do(k.write(disk+"/enable", "1"))
	if withVhost {
		for _, d := range []string{"vhost", filepath.Dir(tpg), tpg, tpg + "/lun/lun_0"} {
			made(d)
		}
		do(k.write(tpg+"/nexus", "naa.5001405a1b2c3d4f"))
		do(k.symlink(disk, tpg+"/lun/lun_0/x"))
		t.Cleanup(func() { do(k.unlink(tpg + "/lun/lun_0/x")) })
	}
	return wwn
}

// loopDevice puts a block device on a file.
func loopDevice(t *testing.T, path string) string {
	t.Helper()
	out, err := exec.Command("losetup", "--find", "--show", path).CombinedOutput()
	if err != nil {
		t.Fatalf("losetup: %v: %s", err, out)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "-d", dev).CombinedOutput(); err != nil {
			t.Errorf("losetup -d: %v: %s", err, out)
		}
	})
	return dev
}

// kernelUnits are a file with a comma in its name, a block device, and a file
// that is read only.
func kernelUnits(t *testing.T) []Unit {
	t.Helper()
	lower, readOnly := image(t, "b.img"), image(t, "c.img")
	lower.Close()
	readOnly.Close()
	units := []Unit{
		unit(0, image(t, "a, b.img")),
		unit(1, reopen(t, loopDevice(t, lower.Path()), block.Options{Raw: true})),
		unit(300, reopen(t, readOnly.Path(), block.Options{Raw: true, ReadOnly: true})),
	}
	units[2].ReadOnly = true
	return units
}

func TestKernelProvision(t *testing.T) {
	others(t, false)
	before := kernelTree(t)
	units := kernelUnits(t)
	units[0].Serial, units[0].BlockSize, units[0].Cache = "disk-1", 4096, scsi.WriteThrough
	tg, err := Provision(Config{Units: units})
	if err != nil {
		t.Fatal(err)
	}
	if len(tg.Notes()) > 1 { // the block device's cache is up to the kernel
		t.Errorf("notes: %q", tg.Notes())
	}
	disk := func(plugin string, lun int) string {
		return core + "/" + tg.owner.adapter(plugin, true) + "/" + tg.owner.disk(lun)
	}
	for _, c := range []struct{ path, want string }{
		{disk(fileio, 0) + "/enable", "1"},
		{disk(fileio, 0) + "/attrib/block_size", "4096"},
		{disk(fileio, 0) + "/attrib/emulate_write_cache", "0"},
		{disk(fileio, 0) + "/attrib/emulate_pr", "1"},
		{disk(fileio, 0) + "/attrib/emulate_3pc", "0"},
		{disk(fileio, 0) + "/attrib/emulate_tpu", "1"},
		{disk(fileio, 0) + "/attrib/max_unmap_lba_count", "524288"},
		{disk(fileio, 0) + "/wwn/vendor_id", "GVM"},
		{disk(fileio, 0) + "/wwn/product_id", "DISK"},
		{disk(fileio, 0) + "/wwn/revision", "1"},
		{disk(fileio, 0) + "/wwn/vpd_unit_serial", "T10 VPD Unit Serial Number: disk-1"},
		{disk(fileio, 0) + "/udev_path", units[0].Backend.(*block.File).Path()},
		{disk(iblock, 1) + "/attrib/block_size", "512"},
		{disk(iblock, 1) + "/attrib/emulate_tpws", "1"},
		{disk(iblock, 300) + "/enable", "1"},
		{disk(iblock, 300) + "/attrib/emulate_tpu", "0"},
		{disk(iblock, 300) + "/udev_path", units[2].Backend.(*block.File).Path()},
		{"vhost/" + tg.WWN + "/tpgt_0/nexus", tg.owner.initiator()},
	} {
		if got, err := tg.h.read(c.path); got != c.want || err != nil {
			t.Errorf("%s is %q, %v; want %q", c.path, got, err, c.want)
		}
	}
	objects, err := List("")
	if err != nil {
		t.Fatal(err)
	}
	me := &Owner{PID: os.Getpid(), Alive: true}
	for _, want := range []Object{
		{Kind: KindTarget, Name: text.Name("vhost/" + tg.WWN), Owner: me,
			LUNs: []LUN{{0, 0, text.Name(disk(fileio, 0))}, {0, 1, text.Name(disk(iblock, 1))},
				{0, 300, text.Name(disk(iblock, 300))}}},
		{Kind: KindDisk, Name: text.Name(disk(iblock, 300)), Owner: me,
			Image: text.Name(units[2].Backend.(*block.File).Path())},
	} {
		found := false
		for _, o := range objects {
			found = found || reflect.DeepEqual(o, want)
		}
		if !found {
			t.Errorf("%+v is not in %+v", want, objects)
		}
	}
	if removed, err := Collect(""); len(removed) > 0 || err != nil {
		t.Errorf("collected %v, %v of a living gvm", removed, err)
	}
	if err := tg.Close(); err != nil {
		t.Fatal(err)
	}
	unchanged(t, before, "after Close")
	// The loop device of the read-only disk goes when the kernel gets to it.
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		loops, _ := exec.Command("losetup", "--list", "--noheadings").Output()
		if strings.Count(string(loops), "\n") == 1 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("loop devices after Close:\n%s", loops)
		}
	}
}

// failing is the kernel's target with a fault in the nth change.
type failing struct {
	configfs
	n  int
	op string // that failed
}

func (f *failing) next(op string, do func() error) error {
	if f.n--; f.n == 0 {
		f.op = op
		return errInjected
	}
	return do()
}

func (f *failing) mkdir(p string) error {
	return f.next("mkdir "+p, func() error { return f.configfs.mkdir(p) })
}
func (f *failing) rmdir(p string) error {
	return f.next("rmdir "+p, func() error { return f.configfs.rmdir(p) })
}
func (f *failing) unlink(p string) error {
	return f.next("unlink "+p, func() error { return f.configfs.unlink(p) })
}
func (f *failing) write(p, text string) error {
	return f.next("write "+p, func() error { return f.configfs.write(p, text) })
}
func (f *failing) symlink(to, p string) error {
	return f.next("symlink "+p, func() error { return f.configfs.symlink(to, p) })
}

// TestKernelEveryFailure has each change that Provision and Close make fail in
// turn. When it was one of Close's, Close is called again.
func TestKernelEveryFailure(t *testing.T) {
	others(t, false)
	units := kernelUnits(t)
	before := kernelTree(t)
	for n := 1; ; n++ {
		h := newHost("")
		f := &failing{configfs: h.configfs, n: n}
		h.configfs = f
		tg, err := h.provision(units)
		if tg != nil {
			if err = tg.Close(); err != nil {
				if err := tg.Close(); err != nil {
					t.Fatalf("second Close: %v", err)
				}
			}
		}
		if f.op == "" && err == nil {
			t.Logf("%d changes failed", n-1)
			return
		}
		if !errors.Is(err, errInjected) || strings.Contains(err.Error(), "\n") {
			t.Fatalf("failing %s: %v", f.op, err)
		}
		unchanged(t, before, "after a failure of "+f.op)
	}
}

const (
	childEnv  = "GVM_LIO_TEST_CHILD" // a directory for images, or
	checkOnly = "check"
)

func TestKernelPermission(t *testing.T) {
	before := kernelTree(t)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"="+checkOnly)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if want := "true " + DefaultRoot + ": " + needsRoot + ": permission denied\n"; err != nil || string(out) != want {
		t.Errorf("Check without privileges: %v, %q, want %q", err, out, want)
	}
	unchanged(t, before, "after that")
}

// child makes and removes targets until it is killed; each has an endpoint of
// vhost-scsi for a while.
func child() {
	dir := os.Getenv(childEnv)
	if dir == checkOnly {
		fmt.Println(errors.Is(Check(""), ErrPermission), Check(""))
		os.Exit(0)
	}
	die := func(err error) {
		if err != nil {
			fmt.Println("child:", err)
			os.Exit(1)
		}
	}
	var images []block.Backend
	for i := range 3 {
		b, err := block.Open(filepath.Join(dir, fmt.Sprint(i)), block.Options{Size: 1 << 20})
		die(err)
		images = append(images, b)
	}
	fmt.Println("ready")
	for {
		tg, err := Provision(Config{Units: []Unit{unit(0, images[0]), unit(1, images[1])}})
		die(err)
		s, err := vhost.OpenSCSI()
		die(err)
		die(errors.Join(s.SetOwner(), s.SetMemTable(nil), s.SetEndpoint(tg.WWN)))
		die(tg.Add(unit(2, images[2])))
		die(tg.Remove(0))
		die(s.Close())
		die(tg.Close())
	}
}

// startChild starts a process that runs child, and waits until it does.
func startChild(t *testing.T) (cmd *exec.Cmd, out io.Reader) {
	t.Helper()
	cmd = exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"="+t.TempDir())
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 6)
	if n, err := out.Read(line); err != nil || string(line[:n]) != "ready\n" {
		t.Fatalf("child: %q %v", line[:n], err)
	}
	return cmd, out
}

// kill ends a child that must have had nothing to say.
func kill(t *testing.T, cmd *exec.Cmd, out io.Reader) {
	t.Helper()
	if err := cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	rest, _ := io.ReadAll(out)
	if err := cmd.Wait(); err == nil || len(rest) > 0 {
		t.Errorf("child: %v: %s", err, rest)
	}
}

// TestKernelTogether has two processes work on targets of theirs while this one collects the
// objects of a third.
func TestKernelTogether(t *testing.T) {
	before := kernelTree(t)
	a, outA := startChild(t)
	b, outB := startChild(t)
	for range 3 {
		c, outC := startChild(t)
		kill(t, c, outC)
		removed, err := Collect("")
		if err != nil {
			t.Error(err)
		}
		for _, name := range removed {
			if strings.Contains(name, fmt.Sprintf("gvm-%d-", a.Process.Pid)) ||
				strings.Contains(name, fmt.Sprintf("gvm-%d-", b.Process.Pid)) {
				t.Errorf("%s of a living process is gone", name)
			}
		}
	}
	kill(t, a, outA)
	kill(t, b, outB)
	if _, err := Collect(""); err != nil {
		t.Error(err)
	}
	unchanged(t, before, "after Collect")
}

// TestKernelKill kills a process at random moments of its work on a target.
func TestKernelKill(t *testing.T) {
	others(t, true)
	before := kernelTree(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	const kills = 15
	left := 0
	for range kills {
		cmd, out := startChild(t)
		time.Sleep(time.Duration(random.Int64N(int64(150 * time.Millisecond))))
		kill(t, cmd, out)
		if kernelTree(t) != before {
			left++
		}
		removed, err := Collect("")
		if err != nil {
			t.Fatalf("Collect removed %v, and: %v", removed, err)
		}
		unchanged(t, before, "after Collect")
	}
	t.Logf("%d of %d killed processes had left something", left, kills)
	if left == 0 {
		t.Error("no kill came while there was a target")
	}
}

// TestKernelNextRun has Provision remove the objects of a dead gvm, and Collect leave those of the
// new one.
func TestKernelNextRun(t *testing.T) {
	before := kernelTree(t)
	h := newHost("")
	dead := newHost("")
	dead.running = func(int) (uint64, bool) { return 4711, true } // this process, at another time
	left, err := dead.provision([]Unit{unit(0, image(t, "a.img"))})
	if err != nil {
		t.Fatal(err)
	}
	left.unlock() // as its end would
	tg, err := h.provision([]Unit{unit(0, image(t, "b.img"))})
	if err != nil {
		t.Fatal(err)
	}
	wwns, err := h.wwns()
	if err != nil || !reflect.DeepEqual(wwns, []string{tg.WWN}) {
		t.Errorf("targets are %v, %v", wwns, err)
	}
	if err := tg.Close(); err != nil {
		t.Fatal(err)
	}
	unchanged(t, before, "after Close")
}

func TestKernelHotPlug(t *testing.T) {
	units := kernelUnits(t)
	tg, err := Provision(Config{Units: units[:1]})
	if err != nil {
		t.Fatal(err)
	}
	defer tg.Close()
	s := endpoint(t, tg.WWN)
	for i := range 3 {
		before := kernelTree(t)
		for _, u := range units[1:] {
			if err := tg.Add(u); err != nil {
				t.Fatal(err)
			}
		}
		for _, u := range units[1:] {
			if err := tg.Remove(u.LUN); err != nil {
				t.Fatal(err)
			}
		}
		if i > 0 { // the first one leaves an adapter for iblock
			unchanged(t, before, "after Add and Remove")
		}
	}
	tg.h.patience = 50 * time.Millisecond
	if err := tg.Close(); !errors.Is(err, ErrBusy) {
		t.Errorf("Close with an endpoint: %v", err)
	}
	s.Close()
	if err := tg.Close(); err != nil {
		t.Error(err)
	}
}

// endpoint has the target for vhost-scsi, as a guest's device would.
func endpoint(t *testing.T, wwn string) *vhost.SCSI {
	t.Helper()
	s, err := vhost.OpenSCSI()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	if err := errors.Join(s.SetOwner(), s.SetMemTable(nil), s.SetEndpoint(wwn)); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestKernelLookup(t *testing.T) {
	wwn := others(t, true)
	before := kernelTree(t)
	tg, err := Lookup("", wwn)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(tg.LUNs(), []int{0}) || tg.TPGT != 1 {
		t.Errorf("found %d %v", tg.TPGT, tg.LUNs())
	}
	if _, err := Lookup("", wwn); !errors.Is(err, ErrBusy) {
		t.Errorf("found twice: %v", err)
	}
	if err := tg.Close(); err != nil {
		t.Error(err)
	}
	s := endpoint(t, wwn)
	if _, err := Lookup("", wwn); !errors.Is(err, ErrBusy) {
		t.Errorf("with an endpoint: %v", err)
	}
	s.Close()
	unchanged(t, before, "after Lookup")
	tpg := filepath.Join(DefaultRoot, "vhost", wwn, "tpgt_1")
	lun := kernel(tpg + "/lun/lun_0")
	if err := lun.unlink("x"); err != nil {
		t.Fatal(err)
	}
	if _, err := Lookup("", wwn); !errors.Is(err, ErrNoLUN) {
		t.Errorf("without a disk: %v", err)
	}
	if err := kernel(tpg).write("nexus", "NULL"); err != nil {
		t.Fatal(err)
	}
	if _, err := Lookup("", wwn); !errors.Is(err, ErrNoNexus) {
		t.Errorf("without a nexus: %v", err)
	}
	if err := kernel(tpg).write("nexus", "naa.5001405a1b2c3d4f"); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(DefaultRoot, "core/fileio_3/theirs"), string(lun)+"/x"); err != nil {
		t.Fatal(err)
	}
}

// TestKernelBusy has images that are in use by LIO, by a mount, and by this
// process's other target.
func TestKernelBusy(t *testing.T) {
	before := kernelTree(t)
	k := kernel(DefaultRoot)
	a := image(t, "a.img")
	if err := errors.Join(k.mkdir("core/fileio_5"), k.mkdir("core/fileio_5/x"),
		k.write("core/fileio_5/x/control", "fd_dev_name="+a.Path()+",fd_dev_size=1048576"),
		k.write("core/fileio_5/x/enable", "1")); err != nil {
		t.Fatal(err)
	}
	theirs := kernelTree(t)
	expect := func(b *block.File, words string) {
		t.Helper()
		_, err := Provision(Config{Units: []Unit{unit(0, b)}})
		if !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), words) || strings.Contains(err.Error(), "\n") {
			t.Errorf("error is %v, want %q", err, words)
		}
		unchanged(t, theirs, "after that")
	}
	expect(a, "core/fileio_5/x")
	if err := errors.Join(k.rmdir("core/fileio_5/x"), k.rmdir("core/fileio_5")); err != nil {
		t.Fatal(err)
	}
	theirs = before

	a.Close()
	dev := loopDevice(t, a.Path())
	b := reopen(t, dev, block.Options{Raw: true})
	claim, err := os.OpenFile(dev, os.O_RDONLY|unix.O_EXCL, 0) // as a mount would
	if err != nil {
		t.Fatal(err)
	}
	expect(b, "lsblk")
	claim.Close()

	tg, err := Provision(Config{Units: []Unit{unit(0,
		reopen(t, filepath.Join(t.TempDir(), "x"), block.Options{Size: 1 << 20}))}})
	if err != nil {
		t.Fatal(err)
	}
	if err := Check(""); err != nil {
		t.Errorf("Check: %v", err)
	}
	if err := tg.Close(); err != nil {
		t.Error(err)
	}
	if err := Check(""); err != nil {
		t.Errorf("Check: %v", err)
	}
	unchanged(t, before, "at the end")
}
