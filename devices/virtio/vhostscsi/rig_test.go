package vhostscsi_test

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"

	"gvm/devices/virtio"
	"gvm/devices/virtio/vhostscsi"
	"gvm/devices/virtio/virtqtest"
	"gvm/guestmem"
	"gvm/kvmapi/eventfd"
)

const (
	version1 = 1 << 32
	ringStep = 1 << 20 // memory of each queue, with its buffers

	controlQueue = 0
	eventQueue   = 1
	requestQueue = 2
)

// rig is a driver of a device, with the rings in this process's memory.
type rig struct {
	t      testing.TB
	d      *vhostscsi.Device
	mem    *guestmem.Memory
	a      virtio.Activation         // the last one
	queues []*virtqtest.Driver       // those that are used
	early  func(d *virtqtest.Driver) // the driver's use of a request queue before DRIVER_OK

	mu     sync.Mutex
	broken []error
	broke  chan struct{} // gets a value at each call of Broken
}

func newRig(t testing.TB, c vhostscsi.Config) *rig {
	t.Helper()
	d, err := vhostscsi.New(c)
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, d: d, mem: newMemory(t), broke: make(chan struct{}, 100)}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		r.forget()
	})
	return r
}

func newMemory(t testing.TB) *guestmem.Memory {
	t.Helper()
	mem, err := guestmem.Map(guestmem.Config{Size: 16 << 20})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { mem.Close() })
	return mem
}

// start does a driver's steps up to DRIVER_OK; queues from used on are left
// alone. It returns Activate's error.
func (r *rig) start(used int) error {
	r.t.Helper()
	features := r.d.Features() | version1
	r.a = virtio.Activation{Mem: r.mem, Features: features, Broken: func(err error) {
		r.mu.Lock()
		r.broken = append(r.broken, err)
		r.mu.Unlock()
		r.broke <- struct{}{}
	}}
	r.queues = nil
	for i, size := range r.d.QueueSizes() {
		if i >= used {
			kick, call := newEvent(r.t), newEvent(r.t)
			r.a.Queues = append(r.a.Queues, virtio.Queue{Kick: kick, Call: call})
			continue
		}
		q, err := virtqtest.New(r.mem, uint64(1+i)*ringStep, size, features)
		if err != nil {
			r.t.Fatal(err)
		}
		r.a.Queues = append(r.a.Queues, virtio.Queue{Layout: q.Layout, Kick: q.Kick, Call: q.Call})
		r.queues = append(r.queues, q)
		if i >= requestQueue && r.early != nil {
			r.early(q)
		}
	}
	return r.d.Activate(r.a)
}

// resume has the device continue where it stopped.
func (r *rig) resume(bases []uint16) error {
	for i := range bases {
		r.a.Queues[i].Base = bases[i]
	}
	return r.d.Activate(r.a)
}

func (r *rig) mustStart() {
	r.t.Helper()
	if err := r.start(len(r.d.QueueSizes())); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) mustReset() {
	r.t.Helper()
	if err := r.d.Reset(); err != nil {
		r.t.Fatal(err)
	}
	r.forget()
}

// forget closes what start opened.
func (r *rig) forget() {
	for _, q := range r.queues {
		q.Close()
	}
	r.queues = nil
}

func newEvent(t testing.TB) *eventfd.FD {
	t.Helper()
	fd, err := eventfd.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { fd.Close() })
	return fd
}

// answer is a response to a request (virtio 1.3, 5.6.6.1).
type answer struct {
	response, status byte
	sense            []byte
	residual         uint32
	data             []byte
}

// String is the part that says how it went.
func (a answer) String() string {
	s := fmt.Sprintf("response %d status %#x", a.response, a.status)
	if len(a.sense) >= 14 {
		s += fmt.Sprintf(" sense %x/%02x/%02x", a.sense[2]&0xf, a.sense[12], a.sense[13])
	}
	return s
}

// request sends a command to target:lun on queue q and waits for the answer. out
// is the data to write; in is how many bytes may come back.
func (r *rig) request(q int, target byte, lun uint16, cdb, out []byte, in int) answer {
	r.t.Helper()
	d := r.queues[q]
	header := make([]byte, 19+32)
	header[0], header[1] = 1, target
	binary.BigEndian.PutUint16(header[2:], 0x4000|lun)
	copy(header[19:], cdb)
	segs := []virtqtest.Seg{r.put(d, header)}
	if len(out) > 0 {
		segs = append(segs, r.put(d, out))
	}
	const responseLen = 12 + 96
	resp := d.Alloc(responseLen)
	copy(d.Bytes(resp, responseLen), bytes.Repeat([]byte{0xee}, responseLen))
	segs = append(segs, virtqtest.Seg{Addr: resp, Len: responseLen, Write: true})
	data := d.Alloc(in)
	if in > 0 {
		segs = append(segs, virtqtest.Seg{Addr: data, Len: uint32(in), Write: true})
	}
	r.send(d, segs...)
	b := d.Bytes(resp, responseLen)
	n := binary.LittleEndian.Uint32(b)
	return answer{
		sense: bytes.Clone(b[12 : 12+min(n, 96)]), residual: binary.LittleEndian.Uint32(b[4:]),
		status: b[10], response: b[11], data: bytes.Clone(d.Bytes(data, in)),
	}
}

func (r *rig) put(d *virtqtest.Driver, b []byte) virtqtest.Seg {
	addr := d.Alloc(len(b))
	copy(d.Bytes(addr, len(b)), b)
	return virtqtest.Seg{Addr: addr, Len: uint32(len(b))}
}

// send has the device serve one chain, and waits until it has.
func (r *rig) send(d *virtqtest.Driver, segs ...virtqtest.Seg) {
	r.t.Helper()
	r.add(d, segs...)
	if _, _, err := d.Wait(); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) add(d *virtqtest.Driver, segs ...virtqtest.Seg) {
	r.t.Helper()
	if _, ok := d.Add(segs...); !ok {
		r.t.Fatal("no room in the ring")
	}
	if _, err := d.Publish(); err != nil {
		r.t.Fatal(err)
	}
}

// ready sends TEST UNIT READY until nothing is left to report (SAM-5, 5.14).
func (r *rig) ready(q int, target byte, lun uint16) {
	r.t.Helper()
	for range 4 {
		a := r.request(q, target, lun, make([]byte, 6), nil, 0)
		if a.response != 0 {
			r.t.Fatalf("TEST UNIT READY: %v", a)
		}
		if a.status == 0 {
			return
		}
	}
	r.t.Fatal("the unit does not get ready")
}

func read10(lba uint32, blocks uint16) []byte  { return rw10(0x28, lba, blocks) }
func write10(lba uint32, blocks uint16) []byte { return rw10(0x2a, lba, blocks) }

func rw10(op byte, lba uint32, blocks uint16) []byte {
	cdb := binary.BigEndian.AppendUint32([]byte{op, 0}, lba)
	return append(binary.BigEndian.AppendUint16(append(cdb, 0), blocks), 0)
}

// pattern is content that differs from block to block and from disk to disk.
func pattern(disk byte, blocks int) []byte {
	b := make([]byte, 512*blocks)
	for i := range b {
		b[i] = disk ^ byte(i/512*7) ^ byte(i)
	}
	return b
}

// descriptors counts this process's, those of the kernel's workers' files too.
func descriptors(t testing.TB) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(fds)
}

// hexWords prints 32-bit words as they lie in memory.
func hexWords(b []byte) string {
	var w []string
	for ; len(b) >= 4; b = b[4:] {
		w = append(w, hex.EncodeToString(b[:4]))
	}
	return strings.Join(w, " ")
}
