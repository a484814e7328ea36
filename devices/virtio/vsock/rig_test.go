package vsock

import (
	"bytes"
	"errors"
	"io"
	"sync"
	"testing"

	"gvm/devices/virtio"
	"gvm/devices/virtio/virtq"
	"gvm/devices/virtio/virtqtest"
	"gvm/guestmem"
)

const (
	queueSpan = 1 << 20 // of guest memory for each queue
	rxData    = 4096    // payload of a buffer of the driver
	guestCID  = 3
)

// rig is a device and the driver's side of its queues.
type rig struct {
	t      testing.TB
	dev    *Device
	a      virtio.Activation
	q      []*virtqtest.Driver
	rxAt   map[uint16]uint64 // the buffer of a chain
	txAt   uint64
	broken chan error

	mu       sync.Mutex
	accepted map[uint32]*Conn // by the port of the host
}

// newRig returns a device with a driver that has given it buffers to receive with. Accept takes
// what goes to ports above 1000.
func newRig(t testing.TB, buffers int) *rig {
	r := &rig{t: t, rxAt: map[uint16]uint64{}, accepted: map[uint32]*Conn{}, broken: make(chan error, 10)}
	dev, err := New(Config{Accept: func(port uint32, c *Conn) bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		if port > 1000 {
			r.accepted[port] = c
		}
		return port > 1000
	}})
	if err != nil {
		t.Fatal(err)
	}
	r.dev = dev
	r.a = virtio.Activation{
		Mem: guestmem.Heap(0, 3*queueSpan), Features: virtio.FeatureEventIdx | featureStream,
		Broken: func(err error) { r.broken <- err },
	}
	for i, size := range dev.QueueSizes() {
		d, err := virtqtest.New(r.a.Mem, uint64(i)*queueSpan, size, r.a.Features)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(d.Close)
		r.q = append(r.q, d)
		r.a.Queues = append(r.a.Queues, virtio.Queue{Layout: d.Layout, Kick: d.Kick, Call: d.Call})
	}
	r.txAt = r.q[txQueue].Alloc(headerLen + maxPacket)
	r.activate()
	t.Cleanup(func() {
		if err := dev.Reset(); err != nil {
			t.Error(err)
		}
	})
	for range buffers {
		r.addBuffer(r.q[rxQueue].Alloc(headerLen + rxData))
	}
	return r
}

func (r *rig) activate() {
	if err := r.dev.Activate(r.a); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) addBuffer(at uint64) {
	r.t.Helper()
	d := r.q[rxQueue]
	head, ok := d.Add(virtqtest.Seg{Addr: at, Len: headerLen + rxData, Write: true})
	if !ok {
		r.t.Fatal("no room for a buffer")
	}
	r.rxAt[head] = at
	if _, err := d.Publish(); err != nil {
		r.t.Fatal(err)
	}
}

// send sends a packet, whose CIDs and type are those of a stream to the host if they are 0, and
// waits until the device has handled it. It uses an indirect table or not.
func (r *rig) send(h header, data ...byte) {
	r.t.Helper()
	if h.srcCID == 0 {
		h.srcCID = guestCID
	}
	if h.dstCID == 0 {
		h.dstCID = hostCID
	}
	if h.kind == 0 {
		h.kind = typeStream
	}
	if h.len == 0 {
		h.len = uint32(len(data))
	}
	d := r.q[txQueue]
	var b [headerLen]byte
	h.encode(&b)
	copy(d.Bytes(r.txAt, headerLen), b[:])
	segs := []virtqtest.Seg{{Addr: r.txAt, Len: headerLen}}
	if len(data) > 0 {
		copy(d.Bytes(r.txAt+headerLen, len(data)), data)
		segs = append(segs, virtqtest.Seg{Addr: r.txAt + headerLen, Len: uint32(len(data))})
	}
	d.Add(segs...)
	if _, err := d.Publish(); err != nil {
		r.t.Fatal(err)
	}
	if _, n, err := d.Wait(); err != nil || n != 0 {
		r.t.Fatalf("used %d bytes, %v", n, err)
	}
}

// receive waits for a packet.
func (r *rig) receive() (header, []byte) {
	r.t.Helper()
	d := r.q[rxQueue]
	head, n, err := d.Wait()
	if err != nil {
		r.t.Fatal(err)
	}
	return r.take(head, n)
}

func (r *rig) take(head uint16, n uint32) (h header, data []byte) {
	r.t.Helper()
	at := r.rxAt[head]
	b := bytes.Clone(r.q[rxQueue].Bytes(at, int(n)))
	if n < headerLen {
		r.t.Fatalf("a packet of %d bytes", n)
	}
	if h.decode((*[headerLen]byte)(b)); int(h.len) != len(b)-headerLen || h.dstCID != guestCID {
		r.t.Fatalf("packet of %d bytes: %+v", n, h)
	}
	r.addBuffer(at)
	return h, b[headerLen:]
}

// expect waits for a packet with that operation of a connection.
func (r *rig) expect(op uint16, guestPort, hostPort uint32) (header, []byte) {
	r.t.Helper()
	h, data := r.receive()
	want := header{srcCID: hostCID, dstCID: guestCID, srcPort: hostPort, dstPort: guestPort, len: uint32(len(data)),
		kind: typeStream, op: op, flags: h.flags, bufAlloc: h.bufAlloc, fwdCnt: h.fwdCnt}
	if h != want {
		r.t.Fatalf("packet %+v, want %+v", h, want)
	}
	return h, data
}

// quiet checks that no packet comes: all that the device had to say is there when it has handled
// the packets of the driver.
func (r *rig) quiet() {
	r.t.Helper()
	if head, n, ok := r.q[rxQueue].Used(); ok {
		h, _ := r.take(head, n)
		r.t.Fatalf("an unexpected packet: %+v", h)
	}
}

// connect makes a connection of the guest, whose space is alloc, to a port of the host.
func (r *rig) connect(guestPort, hostPort, alloc uint32) *Conn {
	r.t.Helper()
	r.send(header{op: opRequest, srcPort: guestPort, dstPort: hostPort, bufAlloc: alloc})
	if h, _ := r.expect(opResponse, guestPort, hostPort); h.bufAlloc != largeBuffer && h.bufAlloc != smallBuffer {
		r.t.Fatalf("buf_alloc is %d", h.bufAlloc)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.accepted[hostPort]
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

// readAll reads all, or fails.
func readAll(t testing.TB, c *Conn) string {
	t.Helper()
	b, err := io.ReadAll(c)
	if err != nil {
		t.Fatalf("after %d bytes: %v", len(b), err)
	}
	return string(b)
}
