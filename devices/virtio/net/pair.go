package net

import (
	"encoding/binary"
	"errors"
	"io"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"gvm/devices/iovec"
	"gvm/devices/virtio"
	"gvm/devices/virtio/virtq"
	"gvm/panics"
)

const (
	// overflowLen is the memory for a frame that does not fit into the buffers that are ready: a
	// TAP interface may add a VLAN tag to MaxFrame.
	overflowLen = MaxFrame + 64

	// maxSegs bounds the segments of the buffers of one read, beside those of the last buffer, of
	// which it has queueSize at most: IOV_MAX is 1024.
	maxSegs = 1024 - queueSize - 1
)

// buffer is a chain of a receive queue that has not been filled.
type buffer struct {
	w   *virtio.Worker
	c   *virtq.Chain
	iov [][]byte
	n   int // bytes
}

// pair is a receive queue, a transmit queue and their descriptor.
type pair struct {
	d  *Device
	fd int

	active atomic.Bool // the driver uses the pair; cleared by disable alone

	rxFrames, rxBytes, rxDropped, txFrames, txBytes, txDropped atomic.Uint64

	// mu guards the fields below, all of the receive queue. It is not held while a worker waits.
	mu        sync.Mutex
	mergeable bool     // VIRTIO_NET_F_MRG_RXBUF
	held      []buffer // the oldest first
	room      int      // bytes of held
	segs      int      // segments of held
	expected  int      // length of the next frame, judging by the last ones
	frame     []byte   // part of overflow: a frame that waits for enough buffers
	overflow  []byte
	iov       [][]byte
	done      []virtio.Completion
}

// start has the pair begin or continue.
func (p *pair) start(mergeable bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mergeable = mergeable
	if p.overflow == nil {
		p.overflow = make([]byte, overflowLen)
	}
}

// disable has the pair fill no buffer from here on.
func (p *pair) disable() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.active.Store(false)
}

// forget forgets the driver, and the frame that waited for its buffers.
func (p *pair) forget() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.frame, p.expected = nil, 0
}

// stop drops the buffers that are held. If the device continues, they are taken again.
func (p *pair) stop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.drop()
}

// drop is stop. The caller holds mu.
func (p *pair) drop() {
	for _, b := range p.held {
		b.w.Drop(b.c)
	}
	p.held, p.room, p.segs = p.held[:0], 0, 0
}

// receive serves the receive queue. It returns when every buffer is filled, or the next frame needs
// more of them, or the worker is to stop.
func (p *pair) receive(w *virtio.Worker, c *virtq.Chain) error {
	n := c.In.Len()
	switch {
	case c.Out.Len() > 0:
		return guestErr("5.1.6.3", "device-readable buffer in a receive queue")
	case n < HeaderLen:
		return guestErr("5.1.6.3.1", "receive buffer of %d bytes: no room for a header", n)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	b := buffer{w, c, c.In.Take(n), n}
	p.held = append(p.held, b)
	p.room += n
	p.segs += len(b.iov)
	for len(p.held) > 0 {
		fd := -1
		if p.active.Load() && !p.d.down.Load() {
			if len(p.frame) == 0 {
				if p.mergeable && p.room < p.expected && p.segs <= maxSegs && w.More() {
					return nil // for the next buffer
				}
				n, err := p.read()
				switch {
				case err == unix.EAGAIN:
					fd = p.fd
				case err != nil:
					p.d.fail(err)
					continue
				case n <= p.room:
					p.expected = max(n, p.expected-p.expected/8)
					p.deliver(w, n)
					continue
				case !p.mergeable:
					p.rxDropped.Add(1)
					continue
				default:
					p.expected = n
					iovec.Gather(p.overflow[:p.room], p.iov)
					p.frame = p.overflow[:n]
				}
			}
			if len(p.frame) > p.room {
				return nil // for the next buffer
			}
			if len(p.frame) > 0 {
				iovec.Scatter(p.buffers(), p.frame)
				p.deliver(w, len(p.frame))
				p.frame = nil
				continue
			}
		}
		var goOn bool
		var err error
		panics.Unlocked(&p.mu, func() { goOn, err = w.Await(fd, unix.POLLIN) })
		if err != nil {
			last := p.held[len(p.held)-1] // is c, which the worker drops
			p.held, p.room, p.segs = p.held[:len(p.held)-1], p.room-last.n, p.segs-len(last.iov)
			return err
		}
		if !goOn {
			p.drop()
			return nil
		}
	}
	return nil
}

// buffers returns the memory of all buffers that are held. The caller holds mu.
func (p *pair) buffers() [][]byte {
	p.iov = p.iov[:0]
	for _, b := range p.held {
		p.iov = append(p.iov, b.iov...)
	}
	return p.iov
}

// read reads a frame into the buffers that are held, and where they end into overflow, at the place
// that this part of the frame has in the whole. The caller holds mu.
func (p *pair) read() (n int, err error) {
	p.buffers()
	if p.room < overflowLen {
		p.iov = append(p.iov, p.overflow[p.room:])
	}
	for {
		n, err = unix.Readv(p.fd, p.iov)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return 0, err
		case n == 0:
			return 0, io.EOF
		case n < HeaderLen:
			p.rxDropped.Add(1)
		default:
			return n, nil
		}
	}
}

// deliver gives the driver the first buffers that are held, which have a frame of n bytes. The
// caller holds mu.
func (p *pair) deliver(w *virtio.Worker, n int) {
	p.done = p.done[:0]
	for left := n; left > 0; {
		b := p.held[len(p.done)]
		used := min(left, b.n)
		p.done = append(p.done, virtio.Completion{Chain: b.c, Written: uint32(used)})
		left -= used
		p.room -= b.n
		p.segs -= len(b.iov)
	}
	// The backend writes the header without its num_buffers (5.1.6.4.1).
	var num [2]byte
	binary.LittleEndian.PutUint16(num[:], uint16(len(p.done)))
	var at [2][]byte
	iovec.Scatter(iovec.Cut(at[:0], p.held[0].iov, numBuffersOff, len(num)), num[:])
	p.held = append(p.held[:0], p.held[len(p.done):]...)
	p.rxFrames.Add(1)
	p.rxBytes.Add(uint64(n - HeaderLen))
	w.CompleteAll(p.done...)
}

// transmit serves the transmit queue.
func (p *pair) transmit(w *virtio.Worker, c *virtq.Chain) error {
	n := c.Out.Len()
	switch {
	case c.In.Len() > 0:
		return guestErr("5.1.6.2", "device-writable buffer in a transmit queue")
	case n < HeaderLen:
		return guestErr("5.1.6.2", "frame of %d bytes: no header", n)
	}
	sent := false
	if n <= MaxFrame {
		iov := c.Out.Take(n)
		for p.active.Load() && !p.d.down.Load() {
			_, err := unix.Writev(p.fd, iov)
			if err == unix.EAGAIN {
				if goOn, err := w.Await(p.fd, unix.POLLOUT); err != nil {
					return err
				} else if !goOn {
					w.Drop(c)
					return nil
				}
				continue
			}
			if err == unix.EINTR {
				continue
			}
			if sent = err == nil; !sent && !refused(err) {
				p.d.fail(err)
			}
			break
		}
	}
	if sent {
		p.txFrames.Add(1)
		p.txBytes.Add(uint64(n - HeaderLen))
	} else {
		p.txDropped.Add(1)
	}
	w.Complete(c, 0)
	return nil
}

// refused reports whether a failed write is the frame's matter, or one that passes: a header
// without sense, or an interface that is down or lacks memory.
func refused(err error) bool {
	for _, e := range []error{unix.EINVAL, unix.EIO, unix.EMSGSIZE, unix.ENOBUFS, unix.ENOMEM, unix.EFAULT} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
