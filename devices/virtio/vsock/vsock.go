// Package vsock is the virtio socket device (virtio 1.3, 5.10) with stream sockets: connections of
// the guest to the host are given to Config.Accept, and Device.Dial connects to the guest. There
// are no seqpacket sockets.
//
// The device has no goroutines but the workers of its queues. The worker of the tx queue handles
// the guest's packets. A packet to the guest is put into a buffer of the rx queue by the goroutine
// that has something to send, or by the worker that got the buffer. So a Write ends when its last
// byte is in the guest's memory, and the device keeps nothing of it.
//
// A guest can make the device keep maxConns connections, with the bytes that their buf_alloc
// promises, and maxRSTs replies.
package vsock

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"sync"
	"syscall"
	"time"

	"gvm/devices/virtio"
	"gvm/devices/virtio/virtq"
	"gvm/panics"
)

// Queue numbers (5.10.2) and sizes.
const (
	rxQueue = iota
	txQueue
	eventQueue

	queueSize      = 256
	eventQueueSize = 16
)

// Feature bits (5.10.3).
const (
	featureStream          = 1 << 0 // VIRTIO_VSOCK_F_STREAM
	featureNoImpliedStream = 1 << 2 // VIRTIO_VSOCK_F_NO_IMPLIED_STREAM
)

const eventLen = 4 // struct virtio_vsock_event, whose only id is 0: VIRTIO_VSOCK_EVENT_TRANSPORT_RESET

// Bounds of the state that a guest makes the device keep.
const (
	maxConns = 1024
	maxRSTs  = 1024

	// buf_alloc of a connection is largeBuffer while those of all are less than largeBuffers, and
	// smallBuffer then: 64 MiB for all.
	largeBuffer  = 256 << 10
	smallBuffer  = 32 << 10
	largeBuffers = 32 << 20
)

// defaultCID is the first one that is not reserved.
const defaultCID = 3

// Config is the configuration of a device.
type Config struct {
	CID uint64 // the guest's; 0 is 3
	// Accept takes a connection of the guest to a port of the host, or refuses it with false. It is
	// called by the worker of a queue, and does not wait: other packets, and the device's stop, wait
	// for it. It may start a goroutine that uses c; c is of no use after false. If whether to accept c
	// takes time to find out, it calls c.Hold and returns true. nil refuses all.
	Accept func(port uint32, c *Conn) bool
}

// ErrNoDriver is the error of Dial when the guest has no driver that uses the device.
var ErrNoDriver = errors.New("the guest has no vsock driver")

// key identifies a connection.
type key struct{ guestPort, hostPort uint32 }

// buffer is a chain that waits for something to write.
type buffer struct {
	w *virtio.Worker
	c *virtq.Chain
}

// rst is a VIRTIO_VSOCK_OP_RST that waits for a buffer.
type rst struct {
	key
	cid  uint64 // the source
	kind uint16
}

// counters are those of Inspect. As in the names of the queues, tx is from the guest.
type counters struct {
	txPackets, rxPackets uint64
	txBytes, rxBytes     uint64 // payload
	foreign              uint64 // packets whose source is not the guest
	droppedRSTs          uint64
}

// Device is a socket device.
type Device struct {
	cfg     Config
	workers virtio.Workers

	// mu guards the fields below and all of every Conn. It is taken before a worker's lock, and not
	// held while Accept runs.
	mu       sync.Mutex
	driven   bool // from Activate to Reset
	streams  bool // the driver has stream sockets
	rx       []buffer
	events   []buffer
	resetDue bool // the driver is to be told of a transport reset
	conns    map[key]*Conn
	held     int // connections in conns, and those that the program has not closed
	promised int // buf_alloc of those
	lastPort uint32
	ready    []*Conn // those that may have something to send, in turns
	rsts     []rst
	counters
}

// New returns a device. The error names the field and its fault.
func New(cfg Config) (*Device, error) {
	if cfg.CID == 0 {
		cfg.CID = defaultCID
	}
	if cfg.CID <= hostCID || cfg.CID >= math.MaxUint32 {
		return nil, fmt.Errorf("virtio-vsock: CID %d is reserved: want 3 to %d", cfg.CID, uint32(math.MaxUint32-1))
	}
	return &Device{cfg: cfg, conns: make(map[key]*Conn)}, nil
}

// ID implements virtio.Device.
func (*Device) ID() virtio.ID { return virtio.IDVsock }

// Features implements virtio.Device.
func (*Device) Features() uint64 {
	return featureStream | featureNoImpliedStream | virtio.FeatureIndirectDesc | virtio.FeatureEventIdx
}

// QueueSizes implements virtio.Device: rx, tx and event queue.
func (*Device) QueueSizes() []uint16 { return []uint16{queueSize, queueSize, eventQueueSize} }

// Config implements virtio.Device: guest_cid.
func (d *Device) Config() []byte { return binary.LittleEndian.AppendUint64(nil, d.cfg.CID) }

// Activate implements virtio.Device.
func (d *Device) Activate(a virtio.Activation) error {
	d.mu.Lock()
	d.driven = true
	d.streams = a.Features&(featureStream|featureNoImpliedStream) != featureNoImpliedStream // 5.10.3.2
	d.mu.Unlock()
	handlers := []virtio.Handler{rxQueue: d.addBuffer, txQueue: d.packet, eventQueue: d.addEvent}
	err := d.workers.Start(a, func(i int) (virtio.Handler, time.Duration) { return handlers[i], 0 })
	if err != nil {
		d.forget()
		return fmt.Errorf("virtio-vsock: %w", err)
	}
	return nil
}

// Stop implements virtio.Device. Connections and packets that wait for a buffer stay.
func (d *Device) Stop(ctx context.Context) ([]uint16, error) { return d.stop(ctx, d.dropBuffers) }

// Reset implements virtio.Device. It ends every connection. Packets that the driver has made
// available are handled first: they may be the last words of a guest that has powered off.
func (d *Device) Reset() error {
	if len(d.workers) > txQueue && d.workers[txQueue] != nil {
		if err := d.workers[txQueue].Barrier(); err != nil {
			return fmt.Errorf("virtio-vsock: %w", err)
		}
	}
	_, err := d.stop(context.Background(), func() {
		d.dropBuffers()
		d.forget()
	})
	return err
}

func (d *Device) stop(ctx context.Context, halted func()) ([]uint16, error) {
	bases, err := d.workers.Stop(ctx, halted)
	if err != nil {
		return nil, fmt.Errorf("virtio-vsock: %w", err)
	}
	return bases, nil
}

// dropBuffers drops the chains that wait. If the device continues, they are taken again.
func (d *Device) dropBuffers() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, buffers := range []*[]buffer{&d.rx, &d.events} {
		for _, b := range *buffers {
			b.w.Drop(b.c)
		}
		*buffers = nil
	}
}

// forget forgets the driver.
func (d *Device) forget() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.driven, d.resetDue = false, false
	d.disconnect()
}

// disconnect ends every connection without a word to the guest. The caller holds mu.
func (d *Device) disconnect() {
	for _, c := range d.conns {
		c.end(syscall.ECONNRESET)
	}
	d.rsts = nil
}

// TransportReset ends every connection and tells the driver to do the same: communication was
// interrupted (5.10.6.7), as by a restore of the machine's state.
func (d *Device) TransportReset() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.disconnect()
	d.resetDue = d.driven
	d.sendEvent()
}

// addEvent serves the event queue.
func (d *Device) addEvent(w *virtio.Worker, c *virtq.Chain) error {
	if n := c.In.Len(); n < eventLen {
		return guestErr("5.10.6.7", "event buffer of %d bytes", n)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.events = append(d.events, buffer{w, c})
	d.sendEvent()
	return nil
}

// sendEvent reports a transport reset that is due if there is a buffer. The caller holds mu.
func (d *Device) sendEvent() {
	if !d.resetDue || len(d.events) == 0 {
		return
	}
	b := d.events[0]
	d.events, d.resetDue = d.events[1:], false
	b.c.In.Write(make([]byte, eventLen))
	b.w.Complete(b.c, eventLen)
}

// addBuffer serves the rx queue.
func (d *Device) addBuffer(w *virtio.Worker, c *virtq.Chain) error {
	switch n := c.In.Len(); {
	case c.Out.Len() > 0:
		return guestErr("5.10.6.4", "device-readable buffer in the rx queue")
	case n <= headerLen:
		return guestErr("5.10.6.4", "rx buffer of %d bytes: no room for a header and data", n)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.rx = append(d.rx, buffer{w, c})
	d.pump()
	return nil
}

// pump sends packets while there are buffers for them. The caller holds mu, and calls pump
// whenever there is a new buffer or packet.
func (d *Device) pump() {
	for len(d.rx) > 0 {
		switch {
		case len(d.rsts) > 0:
			r := d.rsts[0]
			d.rsts = d.rsts[1:]
			d.send(&header{op: opRST, kind: r.kind, srcCID: r.cid, srcPort: r.hostPort, dstPort: r.guestPort}, nil)
		case len(d.ready) > 0:
			c := d.ready[0]
			d.ready, c.waiting = d.ready[1:], false
			op, data := c.next(d.rx[0].c.In.Len() - headerLen)
			if op == opInvalid {
				continue
			}
			d.send(c.sent(op, data), data)
			c.offer()
		default:
			return
		}
	}
}

// send fills the first buffer. The caller holds mu.
func (d *Device) send(h *header, data []byte) {
	h.dstCID, h.len = d.cfg.CID, uint32(len(data))
	var b [headerLen]byte
	h.encode(&b)
	to := d.rx[0]
	d.rx = d.rx[1:]
	to.c.In.Write(b[:])
	to.c.In.Write(data)
	d.rxPackets++
	d.rxBytes += uint64(len(data))
	to.w.Complete(to.c, uint32(headerLen+len(data)))
}

// reject replies to a packet with VIRTIO_VSOCK_OP_RST. Without a buffer the reply waits, and one
// too many is dropped. The device could stop serving the tx queue instead (5.10.6.1), but a driver
// may do the same with the rx queue, and both would wait for ever. The caller holds mu.
func (d *Device) reject(h *header) {
	if h.op == opRST {
		return // which has no reply
	}
	d.reset(rst{key{h.srcPort, h.dstPort}, h.dstCID, h.kind})
}

func (d *Device) reset(r rst) {
	if len(d.rsts) == maxRSTs {
		d.droppedRSTs++
		return
	}
	d.rsts = append(d.rsts, r)
	d.pump()
}

// packet serves the tx queue.
func (d *Device) packet(w *virtio.Worker, c *virtq.Chain) error {
	var b [headerLen]byte
	if n := c.Out.Len(); n < headerLen {
		return guestErr("5.10.6", "packet of %d bytes", n)
	}
	if c.In.Len() > 0 {
		return guestErr("5.10.6.4", "device-writable buffer in the tx queue")
	}
	c.Out.Read(b[:])
	var h header
	if h.decode(&b); uint64(h.len) > uint64(c.Out.Len()) {
		return guestErr("5.10.6", "payload of %d bytes in buffers of %d", h.len, c.Out.Len())
	}
	d.receive(&h, &c.Out)
	w.Complete(c, 0)
	return nil
}

// receive handles a packet of the guest.
func (d *Device) receive(h *header, data *virtq.Buffer) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.txPackets++
	d.txBytes += uint64(h.len)
	c := d.conns[key{h.srcPort, h.dstPort}]
	switch {
	case h.srcCID != d.cfg.CID:
		d.foreign++ // 5.10.6.4.1; the guest has no socket that a reply could reach
	case h.dstCID != hostCID || h.kind != typeStream || !d.streams:
		d.reject(h)
	case h.op == opRST:
		if c != nil {
			c.end(syscall.ECONNRESET)
		}
	case c != nil:
		c.receive(h, data)
	case h.op == opRequest:
		d.accept(h)
	default:
		d.reject(h)
	}
}

// accept handles a VIRTIO_VSOCK_OP_REQUEST. The caller holds mu.
func (d *Device) accept(h *header) {
	if d.cfg.Accept == nil {
		d.reject(h)
		return
	}
	c := d.connect(key{h.srcPort, h.dstPort})
	if c == nil {
		d.reject(h)
		return
	}
	ok := c.credit(h)
	if ok {
		panics.Unlocked(&d.mu, func() { ok = d.cfg.Accept(h.dstPort, c) })
	}
	switch {
	case !ok:
		if !c.closed {
			c.close()
		}
		if c.open {
			c.abort(nil)
		}
	case c.open && !c.held && !c.established:
		c.established = true
		c.owe(opResponse)
		d.pump()
	}
}

// connect returns a new connection, or nil if there are too many. The caller holds mu.
func (d *Device) connect(k key) *Conn {
	if d.held >= maxConns {
		// A connection that the program has closed, but the guest has not, is the one to lose: its
		// guest has had time to answer (5.10.6.5).
		for _, c := range d.conns {
			if c.closed {
				c.abort(nil)
				break
			}
		}
		if d.held >= maxConns {
			return nil
		}
	}
	c := &Conn{d: d, key: k, open: true, bufAlloc: largeBuffer}
	if d.promised >= largeBuffers {
		c.bufAlloc = smallBuffer
	}
	c.readable.L, c.writable.L = &d.mu, &d.mu
	d.conns[k] = c
	d.held++
	d.promised += int(c.bufAlloc)
	return c
}

// firstPort is the lowest port of the host that Dial uses.
const firstPort = 49152

// Dial connects to a port of the guest. It waits for the answer of the guest's driver until ctx
// ends. The error is syscall.ECONNREFUSED if nothing listens there, and ErrNoDriver if the guest
// has no driver yet or any more.
func (d *Device) Dial(ctx context.Context, port uint32) (*Conn, error) {
	c, err := d.dial(ctx, port)
	if err != nil {
		return nil, fmt.Errorf("dial vsock port %d of the guest: %w", port, err)
	}
	return c, nil
}

func (d *Device) dial(ctx context.Context, port uint32) (*Conn, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.driven {
		return nil, ErrNoDriver
	}
	k := key{guestPort: port}
	for taken := true; taken; _, taken = d.conns[k] {
		d.lastPort = max(d.lastPort+1, firstPort)
		k.hostPort = d.lastPort
	}
	c := d.connect(k)
	if c == nil {
		return nil, fmt.Errorf("%d connections are open", maxConns)
	}
	c.owe(opRequest)
	d.pump()
	defer context.AfterFunc(ctx, panics.Func(func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		c.writable.Broadcast()
	}))()
	for c.open && !c.established && ctx.Err() == nil {
		c.writable.Wait()
	}
	switch {
	case c.established:
		return c, nil
	case c.open:
		// An answer that comes after this is one for an unknown connection.
		c.end(context.Cause(ctx))
	case !d.driven:
		c.err = ErrNoDriver
	case c.err == syscall.ECONNRESET:
		c.err = syscall.ECONNREFUSED
	}
	c.close()
	return nil, c.err
}
