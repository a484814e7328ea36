package net

import (
	"bytes"
	"encoding/binary"
	"errors"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"gvm/devices/virtio"
	"gvm/devices/virtio/virtq"
	"gvm/devices/virtio/virtqtest"
	"gvm/guestmem"
)

const queueSpan = 1 << 20 // of guest memory for each queue

// rig is a device, the driver's side of its queues, and the other ends of its descriptors.
type rig struct {
	t        testing.TB
	dev      *Device
	a        virtio.Activation
	q        []*virtqtest.Driver
	peer     []int             // blocking
	at       map[slotAt]uint64 // addresses of receive buffers
	changes  atomic.Int32      // of the configuration
	broken   chan error
	failed   chan error
	offloads []uint64 // of SetOffloads
	used     []int    // of SetPairs
}

// slotAt names a chain of a receive queue by its head.
type slotAt struct {
	pair int
	head uint16
}

// socketpair returns the device's end, which does not block, and its peer.
func socketpair(t testing.TB) (ours, peer int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		unix.Close(fds[0])
		unix.Close(fds[1])
	})
	return fds[0], fds[1]
}

// newRig returns an active device whose driver has accepted features.
func newRig(t testing.TB, pairs int, features uint64) *rig {
	t.Helper()
	r := &rig{t: t, at: map[slotAt]uint64{}, broken: make(chan error, 10), failed: make(chan error, 10)}
	c := Config{MAC: [6]byte{2, 0, 0, 0, 0, 9}, MTU: 1400, Offloads: allOffloads,
		SetOffloads: func(f uint64) error { r.offloads = append(r.offloads, f); return nil },
		SetPairs:    func(n int) error { r.used = append(r.used, n); return nil },
		Failed:      func(err error) { r.failed <- err }}
	for range pairs {
		ours, peer := socketpair(t)
		c.Queues, r.peer = append(c.Queues, ours), append(r.peer, peer)
	}
	dev, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	if missing := features &^ dev.Features(); missing != 0 {
		t.Fatalf("features %#x are not offered", missing)
	}
	r.dev = dev
	r.a = virtio.Activation{Mem: guestmem.Heap(0, (2*pairs+1)*queueSpan), Features: features,
		Broken: func(err error) { r.broken <- err }, ConfigChanged: func() { r.changes.Add(1) }}
	for i, size := range dev.QueueSizes() {
		d, err := virtqtest.New(r.a.Mem, uint64(i)*queueSpan, size, features)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(d.Close)
		r.q = append(r.q, d)
		r.a.Queues = append(r.a.Queues, virtio.Queue{Layout: d.Layout, Kick: d.Kick, Call: d.Call})
	}
	r.activate()
	t.Cleanup(func() {
		if err := dev.Reset(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func (r *rig) activate() {
	r.t.Helper()
	if err := r.dev.Activate(r.a); err != nil {
		r.t.Fatal(err)
	}
}

// stop stops the device; activate continues.
func (r *rig) stop() {
	r.t.Helper()
	bases, err := r.dev.Stop(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	for i, base := range bases {
		r.a.Queues[i].Base = base
	}
}

// publish makes the added chains of queue i available.
func (r *rig) publish(i int) {
	r.t.Helper()
	if _, err := r.q[i].Publish(); err != nil {
		r.t.Fatal(err)
	}
}

// add adds a buffer of n bytes, in two descriptors, to the receive queue of a pair.
func (r *rig) add(pair, n int) {
	r.t.Helper()
	d := r.q[2*pair]
	at := d.Alloc(n)
	head, ok := d.Add(virtqtest.Seg{Addr: at, Len: 11, Write: true},
		virtqtest.Seg{Addr: at + 11, Len: uint32(n - 11), Write: true})
	if !ok {
		r.t.Fatal("no room for a buffer")
	}
	r.at[slotAt{pair, head}] = at
	r.publish(2 * pair)
}

// frame returns a header and n bytes.
func frame(n int, seed byte) []byte {
	b := make([]byte, HeaderLen+n)
	for i := range b {
		b[i] = byte(i)*7 + seed
	}
	return b
}

// inject has the backend give a frame.
func (r *rig) inject(pair int, b []byte) {
	r.t.Helper()
	if _, err := unix.Write(r.peer[pair], b); err != nil {
		r.t.Fatal(err)
	}
}

// receive waits for a frame in the driver's buffers, which it must be spread over as want says, and
// checks it.
func (r *rig) receive(pair int, frame []byte, want ...int) {
	r.t.Helper()
	d := r.q[2*pair]
	frame = bytes.Clone(frame)
	binary.LittleEndian.PutUint16(frame[10:], uint16(len(want)))
	var got []byte
	for i, n := range want {
		head, written, ok := d.Used()
		if !ok && i > 0 {
			r.t.Fatalf("buffer %d of the frame comes later than the first", i)
		}
		if !ok {
			var err error
			if head, written, err = d.Wait(); err != nil {
				r.t.Fatal(err)
			}
		}
		if int(written) != n {
			r.t.Fatalf("buffer %d has %d bytes, want %d", i, written, n)
		}
		got = append(got, d.Bytes(r.at[slotAt{pair, head}], n)...)
	}
	if !bytes.Equal(got, frame) {
		r.t.Fatalf("a frame of %d bytes has changed", len(frame))
	}
}

// send adds a frame to the transmit queue of a pair.
func (r *rig) send(pair int, b []byte) {
	r.t.Helper()
	d := r.q[2*pair+1]
	at := d.Alloc(len(b))
	copy(d.Bytes(at, len(b)), b)
	d.Add(virtqtest.Seg{Addr: at, Len: 5}, virtqtest.Seg{Addr: at + 5, Len: uint32(len(b) - 5)})
	r.publish(2*pair + 1)
}

// sent waits until the device has used n frames of a pair.
func (r *rig) sent(pair, n int) {
	r.t.Helper()
	for range n {
		if _, written, err := r.q[2*pair+1].Wait(); err != nil || written != 0 {
			r.t.Fatalf("%d bytes written, %v", written, err)
		}
	}
}

// take reads a frame at the backend.
func (r *rig) take(pair int) []byte {
	r.t.Helper()
	b := make([]byte, MaxFrame+1)
	n, err := unix.Read(r.peer[pair], b)
	if err != nil {
		r.t.Fatal(err)
	}
	return b[:n]
}

// control sends a command, and returns its ack.
func (r *rig) control(queue int, command ...byte) byte {
	r.t.Helper()
	d := r.q[queue]
	at := d.Alloc(len(command) + 1)
	copy(d.Bytes(at, len(command)+1), append(command, 0xff))
	d.Add(virtqtest.Seg{Addr: at, Len: uint32(len(command))},
		virtqtest.Seg{Addr: at + uint64(len(command)), Len: 1, Write: true})
	r.publish(queue)
	if _, n, err := d.Wait(); err != nil || n != 1 {
		r.t.Fatalf("%d bytes of an ack, %v", n, err)
	}
	return d.Bytes(at+uint64(len(command)), 1)[0]
}

func (r *rig) guestError() string {
	r.t.Helper()
	err := <-r.broken
	var g *virtq.GuestError
	if !errors.As(err, &g) {
		r.t.Fatal(err)
	}
	return g.What
}
