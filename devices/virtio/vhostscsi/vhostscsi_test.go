package vhostscsi_test

import (
	"bytes"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"gvm/devices/virtio/vhostscsi"
	"gvm/devices/virtio/virtqtest"
	"gvm/kvmapi/vhost"
)

const wwn = "naa.5001405000000001"

func TestDisks(t *testing.T) {
	for _, tag := range []byte{0, 1, 255} {
		tg := newTarget(t, wwn[:len(wwn)-1]+string('a'+tag%16))
		group := tg.group(int(tag), true)
		files := map[uint16]string{}
		for _, lun := range []uint16{0, 3, 300} {
			files[lun], _ = tg.lun(group, int(lun), pattern(byte(lun)+tag, 64))
		}
		r := newRig(t, vhostscsi.Config{WWPN: tg.wwpn, Queues: 2, MaxTarget: tag})
		r.mustStart()
		for i, lun := range []uint16{0, 3, 300} {
			q := requestQueue + i%2
			r.ready(q, tag, lun)
			a := r.request(q, tag, lun, []byte{0x12, 0, 0, 0, 96, 0}, nil, 96)
			if a.String() != "response 0 status 0x0" || a.residual != 0 || string(a.data[8:16]) != "LIO-ORG " {
				t.Errorf("tpgt_%d lun %d: INQUIRY: %v, % x", tag, lun, a, a.data[:36])
			}
			a = r.request(q, tag, lun, []byte{0x25, 9: 0}, nil, 8)
			if !bytes.Equal(a.data, []byte{0, 0, 0, 63, 0, 0, 2, 0}) {
				t.Errorf("tpgt_%d lun %d: READ CAPACITY(10): %v, % x", tag, lun, a, a.data)
			}
			a = r.request(q, tag, lun, read10(5, 3), nil, 3*512)
			if want := pattern(byte(lun)+tag, 64)[5*512 : 8*512]; !bytes.Equal(a.data, want) {
				t.Errorf("tpgt_%d lun %d: READ(10): %v, not the disk's data", tag, lun, a)
			}
			fresh := pattern(byte(lun)+tag+100, 2)
			if a = r.request(q, tag, lun, write10(61, 2), fresh, 0); a.String() != "response 0 status 0x0" {
				t.Errorf("tpgt_%d lun %d: WRITE(10): %v", tag, lun, a)
			}
			b, err := os.ReadFile(files[lun])
			want := slices.Concat(pattern(byte(lun)+tag, 64)[:61*512], fresh, pattern(byte(lun)+tag, 64)[63*512:])
			if err != nil || !bytes.Equal(b, want) {
				t.Errorf("tpgt_%d lun %d: the file is not the data written to the disk (%v)", tag, lun, err)
			}
			if a = r.request(q, tag, lun, read10(63, 2), nil, 1024); a.String() != "response 0 status 0x2 sense 5/21/00" {
				t.Errorf("tpgt_%d lun %d: READ(10) past the end: %v", tag, lun, a)
			}
		}
		a := r.request(requestQueue, tag, 7, make([]byte, 6), nil, 0)
		if a.String() != "response 0 status 0x2 sense 5/25/00" {
			t.Errorf("no such LUN: %v", a)
		}
		if a := r.request(requestQueue, tag^2, 0, make([]byte, 6), nil, 0); a.String() != "response 3 status 0x0" {
			t.Errorf("no such target: %v", a)
		}
		if len(r.broken) > 0 {
			t.Errorf("broken: %v", r.broken)
		}
	}
}

// TestConfig reads the configuration, byte by byte.
func TestConfig(t *testing.T) {
	tg := newTarget(t, wwn)
	tg.group(1, true)
	for _, c := range []struct {
		ring uint16
		want string
	}{
		{0, "02000000 7e000000 20380000 80000000 10000000 60000000 20000000 0000ff00 ff3f0000"},
		{4, "02000000 02000000 e03f0000 04000000 10000000 60000000 20000000 0000ff00 ff3f0000"},
		{1024, "02000000 00020000 00200000 00040000 10000000 60000000 20000000 0000ff00 ff3f0000"},
	} {
		d, err := vhostscsi.New(vhostscsi.Config{WWPN: wwn, Queues: 2, RingSize: c.ring, MaxTarget: 255})
		if err != nil {
			t.Fatal(err)
		}
		if got := hexWords(d.Config()); got != c.want {
			t.Errorf("ring of %d: configuration\n%s, not\n%s", c.ring, got, c.want)
		}
		if got := d.Features(); got != 1<<1|1<<28|1<<29 {
			t.Errorf("features %#x", got)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestAgain activates and resets the device a hundred times, as drivers
// do that are unbound and bound, or a guest that reboots; every other driver leaves
// the last queue alone and has its memory for something else.
func TestAgain(t *testing.T) {
	tg := newTarget(t, wwn)
	tg.lun(tg.group(0, true), 0, pattern(9, 8))
	r := newRig(t, vhostscsi.Config{WWPN: wwn, Queues: 2, RingSize: 4})
	var fds int
	for i := range 100 {
		all := len(r.d.QueueSizes())
		used := all - i%2
		old := r.mem.Regions()[0].Bytes[all*ringStep : (all+1)*ringStep]
		if used < all {
			copy(old, bytes.Repeat([]byte{0xa5}, len(old)))
		}
		if err := r.start(used); err != nil {
			t.Fatalf("time %d: %v", i, err)
		}
		q := used - 1
		r.ready(q, 0, 0)
		if a := r.request(q, 0, 0, read10(uint32(i%8), 1), nil, 512); !bytes.Equal(a.data, pattern(9, 8)[i%8*512:][:512]) {
			t.Fatalf("time %d: READ(10): %v", i, a)
		}
		r.mustReset()
		if used < all && bytes.ContainsFunc(old, func(c rune) bool { return c != '\uFFFD' }) {
			t.Fatalf("time %d: the kernel wrote to memory that the driver gave it in the life before", i)
		}
		if n := descriptors(t); i == 1 {
			fds = n
		} else if i > 1 && i%2 == 1 && n > fds+2*(i/2) { // two for each queue left alone, until the test's end
			t.Fatalf("time %d: %d descriptors, %d before", i, n, fds)
		}
	}
}

func TestNewSaysWhatIsWrong(t *testing.T) {
	if _, err := vhostscsi.New(vhostscsi.Config{WWPN: wwn}); err == nil ||
		!strings.Contains(err.Error(), "there is no /sys/kernel/config/target/vhost/"+wwn) {
		t.Errorf("no such target: %v", err)
	}
	tg := newTarget(t, wwn)
	if _, err := vhostscsi.New(vhostscsi.Config{WWPN: wwn}); err == nil ||
		!strings.Contains(err.Error(), "it has no portal group; mkdir ") {
		t.Errorf("no portal group: %v", err)
	}
	tg.group(1, false)
	if _, err := vhostscsi.New(vhostscsi.Config{WWPN: wwn}); err == nil ||
		!strings.Contains(err.Error(), "it has no nexus; write ") {
		t.Errorf("no nexus: %v", err)
	}
	tg.group(2, true)
	r := newRig(t, vhostscsi.Config{WWPN: wwn})
	r.mustStart()
	if _, err := vhostscsi.New(vhostscsi.Config{WWPN: wwn}); err == nil ||
		!strings.Contains(err.Error(), "another process uses it") {
		t.Errorf("in use: %v", err)
	}
	r.mustReset()
	fds := descriptors(t)
	for _, c := range []struct {
		cfg  vhostscsi.Config
		want string
	}{
		{vhostscsi.Config{}, `target name ""`},
		{vhostscsi.Config{WWPN: "5001405000000001"}, "not of the form"},
		{vhostscsi.Config{WWPN: "naa."}, "not of the form"},
		{vhostscsi.Config{WWPN: "naa.5001/../x"}, "not of the form"},
		{vhostscsi.Config{WWPN: "naa.*"}, "not of the form"},
		{vhostscsi.Config{WWPN: wwn + "\n"}, "not of the form"},
		{vhostscsi.Config{WWPN: "iqn." + strings.Repeat("a", 220)}, "not of the form"},
		{vhostscsi.Config{Queues: -1}, "-1 request queues: want 1 to 1024"},
		{vhostscsi.Config{Queues: 1025}, "1025 request queues: want 1 to 1024"},
		{vhostscsi.Config{Queues: 1000}, "1000 request queues: more than this kernel serves"},
		{vhostscsi.Config{RingSize: 2}, "ring size 2: want a power of two"},
		{vhostscsi.Config{RingSize: 100}, "ring size 100: want a power of two"},
		{vhostscsi.Config{RingSize: 2048}, "ring size 2048: want a power of two"},
		{vhostscsi.Config{Queues: 2, Workers: 3}, "3 workers: want 1"},
		{vhostscsi.Config{Workers: -2}, "-2 workers: want 1"},
		{vhostscsi.Config{ABI: vhostscsi.PinABI(0)}, "speaks version 1 of its interface, and version 0 is asked for"},
		{vhostscsi.Config{ABI: vhostscsi.PinABI(2)}, "speaks version 1 of its interface, and version 2 is asked for"},
	} {
		if c.cfg.WWPN == "" && !strings.HasPrefix(c.want, "target name") {
			c.cfg.WWPN = wwn
		}
		_, err := vhostscsi.New(c.cfg)
		if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%+v: %v: want %q", c.cfg, err, c.want)
		}
	}
	if n := descriptors(t); n != fds {
		t.Errorf("%d descriptors, %d before", n, fds)
	}
	for _, p := range []vhostscsi.ABIPolicy{vhostscsi.AnyABI(), vhostscsi.PinABI(1)} {
		d, err := vhostscsi.New(vhostscsi.Config{WWPN: wwn, ABI: p})
		if err != nil {
			t.Errorf("%+v: %v", p, err)
			continue
		}
		d.Close()
	}
}

// TestErrors has the kernel report errors of both kinds.
func TestErrors(t *testing.T) {
	tg := newTarget(t, wwn)
	tg.lun(tg.group(0, true), 0, pattern(1, 8))
	looked := make(chan string, 1000)
	r := newRig(t, vhostscsi.Config{WWPN: wwn, RingSize: 16, Before: func(name string) error {
		looked <- name
		return nil
	}})
	r.mustStart()
	for len(looked) > 0 {
		<-looked
	}
	// An operation with a length of its own that is more than the kernel takes.
	for range 20 {
		if a := r.request(requestQueue, 0, 0, []byte{0x7f, 7: 200}, nil, 0); a.String() != "response 3 status 0x0" {
			t.Errorf("CDB of 208 bytes: %v", a)
		}
	}
	if name := <-looked; name != "VHOST_GET_VRING_BASE" {
		t.Errorf("%s instead of a look at the ring", name)
	}
	r.ready(requestQueue, 0, 0)
	if a := r.request(requestQueue, 0, 0, read10(3, 1), nil, 512); !bytes.Equal(a.data, pattern(1, 8)[3*512:][:512]) {
		t.Errorf("READ(10) after an error: %v", a)
	}
	if len(r.broken) != 0 {
		t.Errorf("a CDB that is too long breaks the device: %v", r.broken)
	}
	r.mustReset()

	for _, c := range []struct {
		name  string
		queue int
		broke func(d *virtqtest.Driver)
	}{
		{"a descriptor outside of memory", requestQueue, func(d *virtqtest.Driver) {
			d.Add(virtqtest.Seg{Addr: 1 << 40, Len: 51}, virtqtest.Seg{Addr: 1 << 40, Len: 108, Write: true})
		}},
		{"a chain without an end", requestQueue, func(d *virtqtest.Driver) {
			head, _ := d.Add(virtqtest.Seg{Addr: 0, Len: 51})
			d.SetDesc(head, virtqtest.Desc{Len: 51, Flags: 1, Next: head})
		}},
		{"an index past the table", controlQueue, func(d *virtqtest.Driver) {
			d.Add(virtqtest.Seg{Addr: 0, Len: 51})
			d.SetAvail(0, 1000)
		}},
	} {
		r.mustStart()
		c.broke(r.queues[c.queue])
		if _, err := r.queues[c.queue].Publish(); err != nil {
			t.Fatal(err)
		}
		<-r.broke
		r.mustReset()
		if len(r.broken) != 1 ||
			!strings.Contains(r.broken[0].Error(), "the kernel cannot take entry 0 of the available ring") {
			t.Errorf("%s: %v", c.name, r.broken)
		}
		r.broken = nil
	}
	r.mustStart()
	r.ready(requestQueue, 0, 0)
}

// TestUnanswered has the kernel drop chains that are no request, and tell so once, at a
// reset.
func TestUnanswered(t *testing.T) {
	tg := newTarget(t, wwn)
	tg.lun(tg.group(0, true), 0, pattern(1, 8))
	var notes []string
	r := newRig(t, vhostscsi.Config{WWPN: wwn, Note: func(s string) { notes = append(notes, s) }})
	for range 3 {
		r.mustStart()
		r.ready(requestQueue, 0, 0)
		if r.mustReset(); len(notes) > 0 {
			t.Fatalf("nothing was dropped, and gvm says %q", notes)
		}
	}
	for range 3 {
		r.mustStart()
		d := r.queues[requestQueue]
		r.add(d, r.put(d, make([]byte, 10))) // shorter than a request's header
		r.ready(requestQueue, 0, 0)
		r.mustReset()
	}
	if len(notes) != 1 ||
		!strings.Contains(notes[0], "queue 2: the kernel stopped with 1 of the guest's requests taken and not answered") {
		t.Errorf("%q", notes)
	}
}

// TestEarlyRequest has a request in the ring before the device starts, whose
// doorbell the kernel has not heard.
func TestEarlyRequest(t *testing.T) {
	tg := newTarget(t, wwn)
	tg.group(0, true)
	r := newRig(t, vhostscsi.Config{WWPN: wwn, RingSize: 16})
	r.early = func(d *virtqtest.Driver) {
		d.Add(r.put(d, append([]byte{1}, make([]byte, 50)...)), virtqtest.Seg{Addr: d.Alloc(108), Len: 108, Write: true})
		d.SetAvailIdx(1)
	}
	r.mustStart()
	if _, _, err := r.queues[requestQueue].Wait(); err != nil {
		t.Error(err)
	}
}

// TestEvents unplugs and plugs a LUN; buffers come late, so that an event is
// missed.
func TestEvents(t *testing.T) {
	tg := newTarget(t, wwn)
	group := tg.group(0, true)
	_, store := tg.lun(group, 5, pattern(1, 8))
	r := newRig(t, vhostscsi.Config{WWPN: wwn, RingSize: 16})
	r.mustStart()
	d := r.queues[eventQueue]
	want := func(what string) {
		t.Helper()
		addr := d.Alloc(16)
		r.add(d, virtqtest.Seg{Addr: addr, Len: 16, Write: true})
		switch {
		case strings.HasPrefix(what, "01000000 01000005 00000000 01"):
			tg.plug(group, 5, store)
		case strings.HasPrefix(what, "01000000"):
			tg.unplug(group, 5)
		}
		if _, _, err := d.Wait(); err != nil {
			t.Fatal(err)
		}
		if got := hexWords(d.Bytes(addr, 16)); got != what {
			t.Errorf("event %s, not %s", got, what)
		}
	}
	want("01000000 01000005 00000000 02000000") // transport reset: removed
	want("01000000 01000005 00000000 01000000") // transport reset: rescan
	tg.unplug(group, 5)                         // without an event
	want("00000080 00000000 00000000 00000000") // events were missed
	tg.unplug(group, 5)
	r.mustReset()
	r.mustStart()
	d = r.queues[eventQueue]
	tg.plug(group, 5, store)
	r.mustReset() // the event that this driver missed is not the next one's
	r.mustStart()
	d = r.queues[eventQueue]
	want("01000000 01000005 00000000 02000000")

	// What changes while the device is stopped counts as missed.
	addr := d.Alloc(16)
	r.add(d, virtqtest.Seg{Addr: addr, Len: 16, Write: true})
	bases, err := r.d.Stop(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	tg.plug(group, 5, store)
	if err := r.resume(bases); err != nil {
		t.Fatal(err)
	}
	if _, _, err := d.Wait(); err != nil {
		t.Fatal(err)
	}
	if got := hexWords(d.Bytes(addr, 16)); got != "00000080 00000000 00000000 00000000" {
		t.Errorf("after a stop: event %s", got)
	}
}

// TestWorkers gives each request queue a thread, where the kernel can.
func TestWorkers(t *testing.T) {
	tg := newTarget(t, wwn)
	tg.lun(tg.group(0, true), 0, pattern(1, 8))
	d, err := vhostscsi.New(vhostscsi.Config{WWPN: wwn, Queues: 3, Workers: vhostscsi.SharedWorker})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	d, err = vhostscsi.New(vhostscsi.Config{WWPN: wwn, Queues: 3, Workers: 2})
	if !hasWorkers(t) {
		if !errors.Is(err, unix.ENOTTY) || !strings.Contains(err.Error(), "boot Linux 6.5 or newer, or ask for no number") {
			t.Errorf("a kernel without workers: %v", err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	r := newRig(t, vhostscsi.Config{WWPN: wwn, Queues: 3, Workers: 3})
	for range 3 {
		r.mustStart()
		for q := range 3 {
			r.ready(requestQueue+q, 0, 0)
		}
		r.mustReset()
	}
}

// TestEveryIoctlFails fails one ioctl after the other, and then all from one
// on. After each nothing is left behind and the target can be used.
func TestEveryIoctlFails(t *testing.T) {
	tg := newTarget(t, wwn)
	tg.lun(tg.group(0, true), 0, pattern(1, 8))
	workers := 0
	if hasWorkers(t) {
		workers = 1
	}
	mem := newMemory(t)
	fault := errors.New("it fails")
	for _, ever := range []bool{false, true} {
		step := 1
		if ever {
			step = 5 // it takes long
		}
		for n := 1; ; n += step {
			fds := descriptors(t)
			count := 0
			var failed []string
			cfg := vhostscsi.Config{WWPN: wwn, RingSize: 4, Workers: workers, Before: func(name string) error {
				count++
				if count == n || ever && count > n {
					failed = append(failed, name)
					return fault
				}
				return nil
			}}
			life := func(d *vhostscsi.Device) {
				r := &rig{t: t, d: d, mem: mem}
				before := len(failed)
				failsWith := func(what string, err error) {
					if before == len(failed) || !errors.Is(err, fault) || !strings.Contains(err.Error(), failed[before]) {
						t.Errorf("%q fail: %s: %v", failed, what, err)
					}
				}
				if err := r.start(3); err != nil {
					failsWith("Activate", err)
				} else {
					r.ready(requestQueue, 0, 0)
					if bases, err := d.Stop(t.Context()); err != nil {
						failsWith("Stop", err)
					} else if err := r.resume(bases); err != nil {
						failsWith("Activate of a stopped device", err)
					} else {
						r.ready(requestQueue, 0, 0)
					}
				}
				if err := d.Reset(); err != nil {
					t.Errorf("%q fail: Reset: %v", failed, err)
				}
				r.forget()
			}
			if d, err := vhostscsi.New(cfg); err == nil {
				life(d)
				life(d)
				if err := d.Close(); err != nil {
					t.Errorf("%q fail: Close: %v", failed, err)
				}
			} else if failed == nil || !errors.Is(err, fault) || !strings.Contains(err.Error(), failed[0]) {
				t.Errorf("%q fail: New: %v", failed, err)
			}
			if now := descriptors(t); now != fds {
				t.Fatalf("%q fail: %d descriptors, %d before", failed, now, fds)
			}
			d, err := vhostscsi.New(vhostscsi.Config{WWPN: wwn})
			if err != nil {
				t.Fatalf("%q fail: the target after that: %v", failed, err)
			}
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			if failed == nil {
				if n < 30 {
					t.Errorf("only %d ioctls", n)
				}
				break
			}
		}
	}
}

func hasWorkers(t *testing.T) bool {
	t.Helper()
	dev, err := vhost.OpenSCSI()
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	if err := dev.SetOwner(); err != nil {
		t.Fatal(err)
	}
	_, err = dev.NewWorker()
	if err != nil && !errors.Is(err, unix.ENOTTY) {
		t.Fatal(err)
	}
	return err == nil
}

// TestControl has the kernel do task management: it resets logical units, and
// rejects the rest.
func TestControl(t *testing.T) {
	tg := newTarget(t, wwn)
	tg.lun(tg.group(0, true), 0, pattern(1, 8))
	r := newRig(t, vhostscsi.Config{WWPN: wwn, RingSize: 4})
	r.mustStart()
	d := r.queues[controlQueue]
	for _, c := range []struct {
		subtype, want byte
	}{
		{5, 10}, // LOGICAL UNIT RESET: VIRTIO_SCSI_S_FUNCTION_SUCCEEDED
		{0, 11}, // ABORT TASK: VIRTIO_SCSI_S_FUNCTION_REJECTED
		{6, 11}, // QUERY TASK
	} {
		req := []byte{0, 0, 0, 0, c.subtype, 0, 0, 0, 1, 0, 0x40, 23: 0}
		resp := d.Alloc(1)
		r.send(d, r.put(d, req), virtqtest.Seg{Addr: resp, Len: 1, Write: true})
		if got := d.Bytes(resp, 1)[0]; got != c.want {
			t.Errorf("task management function %d: %d, not %d", c.subtype, got, c.want)
		}
	}
}
