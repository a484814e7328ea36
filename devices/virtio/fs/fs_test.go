package fs

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvm/devices/virtio"
	"gvm/devices/virtio/fs/hostfs/hostfstest"
	"gvm/devices/virtio/virtiotest"
	"gvm/devices/virtio/virtq"
	"gvm/devices/virtio/virtqtest"
	"gvm/guestmem"
)

func newDevice(t testing.TB) *Device {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := New(Share{Tag: "tree", Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	return d
}

// message makes a FUSE message for the root.
func message(opcode uint32, unique uint64, body string) []byte {
	b := binary.LittleEndian.AppendUint32(nil, uint32(40+len(body)))
	b = binary.LittleEndian.AppendUint32(b, opcode)
	b = binary.LittleEndian.AppendUint64(b, unique)
	b = binary.LittleEndian.AppendUint64(b, 1)
	return append(append(b, make([]byte, 16)...), body...)
}

// lookup is a request that looks for a file, or forgets the root, which has no answer.
type lookup struct {
	d      *virtqtest.Driver
	addr   uint64
	unique uint64
	forget bool
}

func (l *lookup) Next() []virtqtest.Seg {
	l.unique += 2
	m := message(1, l.unique, "file\x00")
	if l.forget {
		m = message(2, l.unique, "\x01\x00\x00\x00\x00\x00\x00\x00")
	}
	copy(l.d.Bytes(l.addr, 256), m)
	return []virtqtest.Seg{{Addr: l.addr, Len: 40}, {Addr: l.addr + 40, Len: uint32(len(m) - 40)},
		{Addr: l.addr + 64, Len: 16, Write: true}, {Addr: l.addr + 80, Len: 128, Write: true}}
}

func (l *lookup) Check(written uint32) error {
	if l.forget {
		if written != 0 {
			return fmt.Errorf("FORGET is answered with %d bytes", written)
		}
		return nil
	}
	b := l.d.Bytes(l.addr+64, 16)
	if no := int32(binary.LittleEndian.Uint32(b[4:])); written != 144 || no != 0 ||
		binary.LittleEndian.Uint64(b[8:]) != l.unique {
		return fmt.Errorf("%d bytes, error %d: % x", written, no, b)
	}
	return nil
}

func TestStopAndContinue(t *testing.T) {
	for features, rounds := range map[uint64]int{0: 100, virtio.FeatureEventIdx: 300} {
		d := newDevice(t)
		virtiotest.StopAndContinue(t, d, guestmem.Heap(0, 2*virtiotest.QueueSpan), virtiotest.Load{
			Rounds: rounds, Features: features,
			Slots: func(queue int, d *virtqtest.Driver) (slots []virtiotest.Slot) {
				for range 2 * MaxRequests * (queue + 1) / 2 {
					slots = append(slots, &lookup{d: d, addr: d.Alloc(256), forget: queue == 0})
				}
				return slots
			},
		})
		if c := d.tree.Counts(); c.Inodes != 1 || c.Files != 1 {
			t.Errorf("after the reset: %+v", c)
		}
	}
}

// rig is an active device with drivers of its request queue and its hiprio queue.
type rig struct {
	*virtqtest.Driver
	hiprio *virtqtest.Driver
	dev    *Device
	broken chan error
}

func newRig(t testing.TB) *rig {
	t.Helper()
	mem := guestmem.Heap(0, 4<<20)
	r := &rig{dev: newDevice(t), broken: make(chan error, 100)}
	a := virtio.Activation{Mem: mem, Features: virtio.FeatureIndirectDesc, Broken: func(err error) { r.broken <- err }}
	for i, size := range r.dev.QueueSizes() {
		d, err := virtqtest.New(mem, uint64(i)<<21, size, a.Features)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(d.Close)
		a.Queues = append(a.Queues, virtio.Queue{Layout: d.Layout, Kick: d.Kick, Call: d.Call})
		if i == 0 {
			r.hiprio = d
		}
		r.Driver = d
	}
	if err := r.dev.Activate(a); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.dev.Reset(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// send sends a message in pieces of those lengths, and returns the used length when it is used.
func (r *rig) send(t testing.TB, m []byte, out, in []int) uint32 {
	t.Helper()
	var segs []virtqtest.Seg
	addr := r.Alloc(len(m) + 1)
	copy(r.Bytes(addr, len(m)), m)
	for _, n := range out {
		n = min(n, len(m))
		segs = append(segs, virtqtest.Seg{Addr: addr, Len: uint32(n)})
		addr, m = addr+uint64(n), m[n:]
	}
	for _, n := range in {
		segs = append(segs, virtqtest.Seg{Addr: r.Alloc(n + 1), Len: uint32(n), Write: true})
	}
	if _, ok := r.AddIndirect(len(segs), segs...); !ok {
		t.Fatal("no room")
	}
	if _, err := r.Publish(); err != nil {
		t.Fatal(err)
	}
	for {
		if _, written, ok := r.Used(); ok {
			return written
		}
		if !r.EnableCalls() {
			if _, err := r.Call.Wait(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestMalformed(t *testing.T) {
	for _, tt := range []struct {
		name    string
		m       []byte
		out, in []int
	}{
		{"short header", message(1, 1, "")[:39], []int{39}, []int{100}},
		{"no room", message(3, 1, strings.Repeat("\x00", 16)), []int{56}, []int{15}},
	} {
		r := newRig(t)
		if n := r.send(t, tt.m, tt.out, tt.in); n != 0 {
			t.Errorf("%s: used length %d", tt.name, n)
		}
		var g *virtq.GuestError
		if err := <-r.broken; !errors.As(err, &g) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

// TestHungHost: a file system of the host that does not answer keeps the device from stopping,
// which the caller can give up, and from nothing else.
func TestHungHost(t *testing.T) {
	r := newRig(t)
	hung := filepath.Join(r.dev.share.Dir, "hung")
	if err := os.Mkdir(hung, 0o700); err != nil {
		t.Fatal(err)
	}
	dev, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skipf("needs /dev/fuse: %v", err)
	}
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", dev)
	if err := unix.Mount("hung", hung, "fuse", 0, options); err != nil {
		unix.Close(dev)
		t.Skipf("needs to mount: %v", err)
	}
	defer unix.Unmount(hung, unix.MNT_DETACH)
	m := message(1, 2, "hung\x00")
	addr := r.Alloc(512)
	copy(r.Bytes(addr, 256), m)
	r.Add(virtqtest.Seg{Addr: addr, Len: uint32(len(m))}, virtqtest.Seg{Addr: addr + 256, Len: 144, Write: true})
	if n := r.send(t, message(1, 4, "file\x00"), []int{45}, []int{144}); n != 144 {
		t.Errorf("beside the hung request: used length %d", n)
	}
	ctx, cancel := context.WithTimeoutCause(t.Context(), 10*time.Millisecond, errors.New("given up"))
	defer cancel()
	if _, err := r.dev.Stop(ctx); err == nil || !strings.HasSuffix(err.Error(), "given up") {
		t.Errorf("stop: %v", err)
	}
	if n := r.send(t, message(1, 6, "file\x00"), []int{45}, []int{144}); n != 144 {
		t.Errorf("after the stop that was given up: used length %d", n)
	}
	if node, _ := r.dev.Inspect(); fmt.Sprint(node[4].Value) != "1" {
		t.Errorf("serving %v", node[4])
	}
	unix.Close(dev) // the host gives up too
}

// TestHungClose: a file that the host does not close keeps neither Close nor the end of a machine.
func TestHungClose(t *testing.T) {
	d := newDevice(t)
	asked := make(chan struct{}, 1)
	hostfstest.Mount(t, filepath.Join(d.share.Dir, "hung"), func(opcode uint32) unix.Errno {
		if opcode != hostfstest.Flush {
			return 0
		}
		asked <- struct{}{}
		return hostfstest.Hang
	})
	out := make([]byte, 256)
	node := uint64(1)
	open := message(14, 3, strings.Repeat("\x00", 8))
	for _, m := range [][]byte{message(1, 1, "hung\x00"), message(1, 2, "file\x00"), open} {
		binary.LittleEndian.PutUint64(m[16:], node)
		if _, err := d.tree.Serve([][]byte{m}, [][]byte{out}); err != nil || out[4] != 0 {
			t.Fatalf("%v, % x", err, out[:16])
		}
		node = binary.LittleEndian.Uint64(out[16:])
	}
	d.Close()
	<-asked
}

// TestPriority: a request of the hiprio queue is served while those of the request queue are as
// many as the host serves at a time, all of which wait (5.11.6.2).
func TestPriority(t *testing.T) {
	r := newRig(t)
	for range cap(r.dev.slots[1]) {
		r.dev.slots[1] <- struct{}{}
	}
	request := rig{Driver: r.hiprio, dev: r.dev}
	for name, m := range map[string][]byte{
		"FORGET":    message(2, 2, "\x01\x00\x00\x00\x00\x00\x00\x00"),
		"INTERRUPT": message(36, 5, "\x04\x00\x00\x00\x00\x00\x00\x00"),
	} {
		if n := request.send(t, m, []int{48}, nil); n != 0 {
			t.Errorf("%s: used length %d", name, n)
		}
	}
	if n := request.send(t, message(36, 5, "\x04\x00\x00\x00\x00\x00\x00\x00"), []int{48}, []int{16}); n != 16 {
		t.Errorf("an answered INTERRUPT: used length %d", n)
	}
	for range cap(r.dev.slots[1]) {
		<-r.dev.slots[1]
	}
	select {
	case err := <-r.broken:
		t.Error(err)
	default:
	}
}

func TestConfig(t *testing.T) {
	tag := strings.Repeat("t", maxTag)
	d, err := New(Share{Tag: tag, Dir: t.TempDir(), Requests: 3})
	if err != nil {
		t.Fatal(err)
	}
	d.Close()
	if n := cap(d.slots[1]); n != 3 {
		t.Errorf("%d requests at a time", n)
	}
	if b := d.Config(); !bytes.Equal(b, append([]byte(tag), 1, 0, 0, 0)) {
		t.Errorf("% x", b)
	}
	for _, s := range []Share{{Dir: t.TempDir()}, {Tag: tag + "t", Dir: t.TempDir()}, {Tag: "a\x00b", Dir: t.TempDir()},
		{Tag: "t", Dir: "/nonexistent"}, {Tag: "t", Dir: "/dev/null"}, {Tag: "t", Dir: "/proc"}} {
		if d, err := New(s); err == nil {
			d.Close()
			t.Errorf("%+v", s)
		} else {
			t.Log(err)
		}
	}
}

// FuzzRequest sends messages in any pieces. Each is used, and not with more bytes than it has room
// for.
func FuzzRequest(f *testing.F) {
	f.Add([]byte("file\x00"), uint8(1), uint8(40), uint8(16), uint8(200))
	f.Add(make([]byte, 16), uint8(26), uint8(3), uint8(0), uint8(255))
	f.Add(make([]byte, 40), uint8(16), uint8(80), uint8(16), uint8(8))
	f.Fuzz(func(t *testing.T, body []byte, opcode, cut, in1, in2 uint8) {
		r := newRig(t)
		m := message(uint32(opcode), 1, string(body[:min(len(body), 4096)]))
		if cut < 20 {
			m = m[:cut]
		}
		n := r.send(t, m, []int{int(cut), len(m)}, []int{int(in1), int(in2)})
		if n > uint32(in1)+uint32(in2) {
			t.Errorf("used length %d of %d and %d", n, in1, in2)
		}
	})
}
