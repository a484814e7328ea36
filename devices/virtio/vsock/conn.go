package vsock

import (
	"io"
	"net"
	"slices"
	"sync"
	"syscall"

	"gvm/devices/virtio/virtq"
)

// maxPeerAlloc bounds the guest's buf_alloc, so that the order of two counters is known.
const maxPeerAlloc = 1 << 30

// Conn is a connection with the guest: a stream of bytes in each direction. A guest that sends
// faster than Read takes has to wait, and Write waits for a guest that does not take. Methods may
// be called from any goroutine. When the guest resets the connection, the guest's kernel restarts
// or the machine ends, they return syscall.ECONNRESET. The program closes every Conn, also after an
// error.
type Conn struct {
	d *Device
	key
	bufAlloc           uint32
	readable, writable sync.Cond // of Device.mu, which guards the fields below

	open        bool // in Device.conns
	established bool
	held        bool  // by Hold
	closed      bool  // by Close
	err         error // why it is not open any more
	waiting     bool  // in Device.ready

	in      ring
	rxCnt   uint32 // bytes that the guest has sent; like every counter of bytes modulo 2^32
	fwdCnt  uint32 // of those, the bytes that Read has taken
	toldFwd uint32 // the fwd_cnt that the guest has been told

	owed      uint16 // the operations to send, by bit
	shut      uint32 // flags of the VIRTIO_VSOCK_OP_SHUTDOWN to send or sent
	peerShut  uint32 // flags of those that came
	writing   bool   // a Write is at work
	out       []byte // the rest of it
	txCnt     uint32 // bytes that the guest has been sent
	peerAlloc uint32 // the guest's buf_alloc
	peerFwd   uint32 // the guest's fwd_cnt
}

// Hold leaves the guest without an answer until Accept accepts or Close refuses its connection. It
// is for Config.Accept, before that returns true.
func (c *Conn) Hold() {
	c.d.mu.Lock()
	defer c.d.mu.Unlock()
	c.held = true
}

// Accept accepts a connection after Hold. The error is that of a guest that has given up.
func (c *Conn) Accept() error {
	c.d.mu.Lock()
	defer c.d.mu.Unlock()
	if !c.open {
		return c.err
	}
	c.held, c.established = false, true
	c.owe(opResponse)
	c.d.pump()
	return nil
}

// HostPort returns the connection's port of the host.
func (c *Conn) HostPort() uint32 { return c.hostPort }

// Wait waits until the guest has closed or reset the connection, or Close is called.
func (c *Conn) Wait() {
	c.d.mu.Lock()
	defer c.d.mu.Unlock()
	for c.open && !c.closed {
		c.readable.Wait()
	}
}

// Read reads bytes that the guest has sent; io.EOF follows the last byte of a guest that sends no
// more. It waits if nothing is there.
func (c *Conn) Read(p []byte) (int, error) {
	c.d.mu.Lock()
	defer c.d.mu.Unlock()
	for {
		switch {
		case c.closed || c.shut&shutReceive != 0:
			return 0, net.ErrClosed
		case c.in.n > 0 || len(p) == 0:
			n := c.in.take(p)
			c.fwdCnt += uint32(n)
			// So a guest that waits for space is told of half the buffer at least.
			if c.fwdCnt-c.toldFwd >= c.bufAlloc/2 {
				c.owe(opCreditUpdate)
				c.d.pump()
			}
			return n, nil
		case c.peerShut&shutSend != 0:
			return 0, io.EOF
		case !c.open:
			return 0, c.err
		}
		c.readable.Wait()
	}
}

// Write sends p, and returns when the guest's driver has all of it. It waits for space in the
// guest's buffers. The error is syscall.EPIPE if the guest receives no more.
func (c *Conn) Write(p []byte) (n int, err error) {
	c.d.mu.Lock()
	defer c.d.mu.Unlock()
	for c.writing {
		c.writable.Wait()
	}
	if err := c.writeErr(); err != nil {
		return 0, err
	}
	c.writing, c.out = true, p
	c.offer()
	c.d.pump()
	for len(c.out) > 0 {
		if err = c.writeErr(); err != nil {
			break
		}
		c.writable.Wait()
	}
	n = len(p) - len(c.out)
	c.writing, c.out = false, nil
	c.writable.Broadcast() // for the next Write
	return n, err
}

// writeErr returns why nothing can be sent. The caller holds Device.mu.
func (c *Conn) writeErr() error {
	switch {
	case c.shut&shutSend != 0:
		return net.ErrClosed
	case c.peerShut&shutReceive != 0:
		return syscall.EPIPE
	case !c.open:
		return c.err
	}
	return nil
}

// CloseWrite tells the guest that no more bytes follow; a Write that waits ends.
func (c *Conn) CloseWrite() error {
	c.d.mu.Lock()
	defer c.d.mu.Unlock()
	if err := c.writeErr(); err != nil {
		return err
	}
	c.shutdown(shutSend)
	return nil
}

// CloseRead tells the guest that its bytes are not received any more, and drops those that came. A
// Read that waits ends.
func (c *Conn) CloseRead() error {
	c.d.mu.Lock()
	defer c.d.mu.Unlock()
	if c.closed || c.shut&shutReceive != 0 {
		return net.ErrClosed
	}
	c.in, c.fwdCnt = ring{}, c.rxCnt
	c.shutdown(shutReceive)
	return nil
}

// Close ends the connection. The guest still gets all that Write has sent. A Read or Write that
// waits ends.
func (c *Conn) Close() error {
	c.d.mu.Lock()
	defer c.d.mu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	c.close()
	return nil
}

func (c *Conn) close() {
	c.closed = true
	c.in, c.fwdCnt = ring{}, c.rxCnt
	switch {
	case c.held && c.open:
		c.abort(net.ErrClosed)
	case c.open:
		c.shutdown(shutBoth) // the guest answers with VIRTIO_VSOCK_OP_RST (5.10.6.5)
	default:
		c.release()
	}
}

// shutdown sends VIRTIO_VSOCK_OP_SHUTDOWN.
func (c *Conn) shutdown(flags uint32) {
	c.shut |= flags
	c.owe(opShutdown)
	c.d.pump()
	c.wake()
}

// The caller of the functions below holds Device.mu.

func (c *Conn) wake() {
	c.readable.Broadcast()
	c.writable.Broadcast()
}

// release frees the connection's place.
func (c *Conn) release() {
	c.d.held--
	c.d.promised -= int(c.bufAlloc)
}

// end takes the connection from the device. Bytes that came can still be read.
func (c *Conn) end(err error) {
	if c.d.conns[c.key] != c {
		return
	}
	delete(c.d.conns, c.key)
	c.open, c.err, c.owed = false, err, 0
	if c.waiting {
		i := slices.Index(c.d.ready, c)
		c.d.ready = slices.Delete(c.d.ready, i, i+1)
		c.waiting = false
	}
	if c.closed {
		c.release()
	}
	c.wake()
}

// abort is end that tells the guest.
func (c *Conn) abort(err error) {
	c.end(err)
	c.d.reset(rst{c.key, hostCID, typeStream})
}

// owe has the operation sent.
func (c *Conn) owe(op int) {
	c.owed |= 1 << op
	c.offer()
}

// offer has pump look at the connection, which may have something to send.
func (c *Conn) offer() {
	if c.open && !c.waiting {
		c.waiting = true
		c.d.ready = append(c.d.ready, c)
	}
}

// peerFree returns how many bytes the guest has space for.
func (c *Conn) peerFree() int {
	// The guest may have made its buffer smaller than its contents.
	return max(int(c.peerAlloc)-int(c.txCnt-c.peerFwd), 0)
}

// next returns the next packet to send, of at most room bytes, or opInvalid.
func (c *Conn) next(room int) (op int, data []byte) {
	owes := func(op int) bool { return c.owed&(1<<op) != 0 }
	switch n := min(len(c.out), c.peerFree(), room, maxPacket); {
	case owes(opRequest):
		return opRequest, nil
	case !c.established:
	case owes(opResponse):
		return opResponse, nil
	case owes(opShutdown):
		return opShutdown, nil
	case n > 0 && c.writeErr() == nil:
		return opRW, c.out[:n]
	case owes(opCreditUpdate):
		return opCreditUpdate, nil
	}
	return opInvalid, nil
}

// sent notes that a packet is sent, and returns its header.
func (c *Conn) sent(op int, data []byte) *header {
	// Every packet tells the credit.
	c.owed &^= 1<<op | 1<<opCreditUpdate
	c.toldFwd = c.fwdCnt
	if len(data) > 0 {
		c.out = c.out[len(data):]
		c.txCnt += uint32(len(data))
		if len(c.out) == 0 {
			c.writable.Broadcast()
		}
	}
	h := &header{srcCID: hostCID, srcPort: c.hostPort, dstPort: c.guestPort, kind: typeStream, op: uint16(op),
		bufAlloc: c.bufAlloc, fwdCnt: c.fwdCnt}
	if op == opShutdown {
		h.flags = c.shut
	}
	return h
}

// credit takes the guest's credit from a packet. It returns false if the guest has counted bytes
// that were not sent.
func (c *Conn) credit(h *header) bool {
	if h.fwdCnt-c.peerFwd <= c.txCnt-c.peerFwd {
		c.peerFwd, c.peerAlloc = h.fwdCnt, min(h.bufAlloc, maxPeerAlloc)
		return true
	}
	// Packets that CPUs of the guest send at the same time may overtake each other: this is an older
	// count.
	return int32(h.fwdCnt-c.peerFwd) < 0
}

// receive handles a packet of the guest for the connection.
func (c *Conn) receive(h *header, data *virtq.Buffer) {
	n := int(h.len)
	ok := c.credit(h)
	switch h.op {
	case opResponse:
		ok = ok && !c.established && !c.held && c.owed&(1<<opRequest) == 0 && n == 0
		c.established = ok
		c.writable.Broadcast()
	case opRW:
		if ok = ok && c.established && c.peerShut&shutSend == 0 && n <= int(c.bufAlloc)-c.in.n; !ok {
			break
		}
		c.rxCnt += h.len
		if c.shut&shutReceive != 0 {
			c.fwdCnt = c.rxCnt
		} else {
			c.in.fill(data, n, int(c.bufAlloc))
			c.readable.Broadcast()
		}
	case opShutdown:
		if ok = ok && c.established && n == 0; !ok {
			break
		}
		if c.peerShut |= h.flags & shutBoth; c.peerShut == shutBoth {
			c.abort(syscall.EPIPE) // the answer that the guest waits for
			return
		}
		c.wake()
	case opCreditUpdate:
		ok = ok && c.established && n == 0
	case opCreditRequest:
		ok = ok && c.established && n == 0
		c.owe(opCreditUpdate)
	default:
		ok = false
	}
	if !ok {
		c.abort(syscall.ECONNRESET)
		return
	}
	c.offer()
	c.d.pump()
}
