package console

import (
	"io"
	"sync"

	"gvm/devices/virtio"
	"gvm/devices/virtio/virtq"
	"gvm/panics"
)

// port is a port of a Device, whose mu guards the fields from owed on.
type port struct {
	d       *Device
	id      int
	name    string
	console bool
	stream  io.ReadWriteCloser
	wake    sync.Cond // for the port's goroutines

	owed      uint16 // control messages to send, by bit
	ready     bool   // the driver has set it up
	guestOpen bool
	hostGone  bool // the stream has failed or ended

	rx      []buffer // of the driver, to fill
	in      []byte   // read from the stream, and not sent yet
	rxBytes uint64   // sent

	tx      []buffer // of the driver; the device has taken the first skip bytes of the first one
	skip    int
	out     []byte // taken from chains, and not given to the stream yet
	writing bool   // bytes are being given to the stream
	txBytes uint64 // taken
}

func newPort(d *Device, id int, p Port) *port {
	q := &port{d: d, id: id, name: p.Name, console: p.Console, stream: p.Stream}
	q.wake.L = &d.mu
	return q
}

// owe has a control message sent by the next Device.tell. The caller holds mu.
func (p *port) owe(event uint16) { p.owed |= 1 << event }

// forget forgets the driver. Bytes that it has given back, or that the stream has for the guest,
// stay. The caller holds mu.
func (p *port) forget() { p.owed, p.ready, p.guestOpen, p.skip = 0, false, false, 0 }

// driven reports whether the driver knows the port's kind: without multiple ports it takes port 0
// for a console. The caller holds mu.
func (p *port) driven() bool { return p.d.multiport || p.console }

// gone notes that the stream has ended, and tells the guest. The caller holds mu.
func (p *port) gone() {
	if p.hostGone {
		return
	}
	p.hostGone, p.out = true, nil
	if p.d.multiport {
		p.owe(portOpen)
		p.d.tell()
	}
	p.take()
	p.d.drained.Broadcast()
	p.wake.Broadcast()
}

// addRx serves the queue of buffers for the stream's bytes.
func (p *port) addRx(w *virtio.Worker, c *virtq.Chain) error {
	if n := c.In.Len(); n == 0 || c.Out.Len() > 0 {
		return guestErr("5.3.6.1", "receive buffer of %d bytes, and %d that are readable", n, c.Out.Len())
	}
	p.d.mu.Lock()
	defer p.d.mu.Unlock()
	p.rx = append(p.rx, buffer{w, c})
	p.send()
	return nil
}

// send fills the driver's buffers. Linux drops bytes for a port that no program has open. The
// caller holds mu.
func (p *port) send() {
	for p.guestOpen && len(p.in) > 0 && len(p.rx) > 0 {
		to := p.rx[0]
		p.rx = p.rx[1:]
		n, _ := to.c.In.Write(p.in) // as much as fits
		p.in = p.in[n:]
		p.rxBytes += uint64(n)
		to.w.Complete(to.c, uint32(n))
	}
	if len(p.in) == 0 {
		p.wake.Broadcast()
	}
}

// readStream is a goroutine of the port: it reads the stream while the guest takes its bytes.
func (p *port) readStream() {
	b := make([]byte, bufferLen)
	for {
		n, err := p.stream.Read(b)
		if !p.sendAll(b[:n]) {
			return
		}
		if err != nil {
			p.d.mu.Lock()
			p.gone()
			p.d.mu.Unlock()
			return
		}
	}
}

// sendAll sends bytes to the guest, and waits until it has them. It is false once the device is
// closed.
func (p *port) sendAll(b []byte) bool {
	p.d.mu.Lock()
	defer p.d.mu.Unlock()
	p.in = b
	p.send()
	for len(p.in) > 0 && !p.d.closed {
		p.wake.Wait()
	}
	return !p.d.closed
}

// addTx serves the queue of the guest's bytes.
func (p *port) addTx(w *virtio.Worker, c *virtq.Chain) error {
	if c.In.Len() > 0 {
		return guestErr("5.3.6.1", "device-writable buffer in a transmit queue")
	}
	p.d.mu.Lock()
	defer p.d.mu.Unlock()
	if len(p.tx) == 0 {
		c.Out.Take(p.skip) // taken before a stop of the device
	}
	p.tx = append(p.tx, buffer{w, c})
	p.take()
	return nil
}

// take takes bytes from the driver's chains while there is room. The caller holds mu.
func (p *port) take() {
	discard := p.hostGone || !p.driven()
	for len(p.tx) > 0 {
		from := p.tx[0]
		n := from.c.Out.Len()
		if !discard {
			n = min(n, bufferLen-len(p.out))
		}
		for _, part := range from.c.Out.Take(n) {
			if !discard {
				p.out = append(p.out, part...)
			}
		}
		p.txBytes += uint64(n)
		p.skip += n
		if from.c.Out.Len() > 0 {
			break
		}
		p.skip = 0
		p.tx = p.tx[1:]
		from.w.Complete(from.c, 0)
	}
	if len(p.out) > 0 {
		p.wake.Broadcast()
	}
}

// writeStream is a goroutine of the port: it writes the guest's bytes to the stream.
func (p *port) writeStream() {
	p.d.mu.Lock()
	defer p.d.mu.Unlock()
	var b []byte
	for {
		for len(p.out) == 0 && !p.hostGone && !p.d.closed {
			p.wake.Wait()
		}
		if p.hostGone || p.d.closed {
			return
		}
		b, p.out = p.out, b[:0]
		p.writing = true
		p.take()
		err := p.write(b)
		p.writing = false
		p.d.drained.Broadcast()
		if err != nil {
			p.gone()
			return
		}
	}
}

// write writes to the stream without holding mu.
func (p *port) write(b []byte) (err error) {
	panics.Unlocked(&p.d.mu, func() { _, err = p.stream.Write(b) })
	return err
}
