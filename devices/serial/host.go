package serial

import (
	"fmt"
	"io"
	"time"
)

const (
	// lineSize bounds what has left the transmitter and is not written yet.
	lineSize = 64 << 10

	// gather is how long the first byte of a batch waits for others: a guest
	// sends them one by one, and one host write each would cost more than all
	// the rest of the device.
	gather = time.Millisecond
)

// drain moves what the line has room for out of the transmitter: all of it
// once nobody waits for room any more.
func (u *UART) drain() {
	n := len(u.tx)
	if !u.stopped {
		n = min(n, lineSize-len(u.out))
	}
	u.send(n)
}

func (u *UART) send(n int) {
	if n <= 0 {
		return
	}
	if !u.closed {
		u.out = append(u.out, u.tx[:n]...)
		u.work.Signal()
	}
	if u.tx = u.tx[n:]; len(u.tx) == 0 {
		u.tx, u.thre = nil, true
	}
	u.txRoom.Broadcast()
}

// run writes the output. After an error it discards: a guest whose console has
// gone away runs on.
func (u *UART) run() {
	defer close(u.done)
	u.mu.Lock()
	defer u.mu.Unlock()
	var spare []byte
	for {
		for len(u.out) == 0 && !u.closing {
			u.work.Wait()
		}
		if len(u.out) == 0 {
			u.closed = true
			return
		}
		if !u.stopped {
			u.mu.Unlock()
			time.Sleep(gather)
			u.mu.Lock()
		}
		batch := u.out
		u.out, spare = spare[:0], batch
		u.drain()
		u.update()
		if u.err != nil {
			continue
		}
		u.mu.Unlock()
		n, err := u.cfg.Out.Write(batch)
		if err == nil && n < len(batch) {
			err = io.ErrShortWrite
		}
		u.mu.Lock()
		if err != nil {
			u.err = fmt.Errorf("serial: write output: %w", err)
		}
	}
}

// Stop ends all waiting, so that vCPUs and input can be joined: a vCPU that
// waits for room goes on, its byte kept, and input returns ErrStopped.
func (u *UART) Stop() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.stopped = true
	u.drain()
	u.rxEmpty.Broadcast()
	u.txRoom.Broadcast()
	u.work.Signal()
}

// Close stops the port, waits until all output is written, and returns the
// first error of Config.Out. It waits as long as Config.Out does; output that
// the guest sends after it is lost.
func (u *UART) Close() error {
	u.Stop()
	u.mu.Lock()
	u.closing = true
	u.work.Signal()
	u.mu.Unlock()
	<-u.done
	return u.err
}

// Input returns the terminal's side. A Write returns when the receiver has
// taken everything, or with ErrStopped and how much it has taken. Like a
// terminal with hardware flow control it sends only while the guest asserts
// RTS: what is typed before the guest's driver is ready is not lost to the
// driver's clearing of the receiver. A driver that polls the receiver (see
// pollsAlone) gets one character at a time without RTS.
func (u *UART) Input() Input { return Input{u} }

// Input is the terminal's side of a UART.
type Input struct{ u *UART }

// Break sends a break, which Linux takes as SysRq on a console. It waits for
// its turn as Write does.
func (in Input) Break() error {
	_, err := in.u.give([]char{{errs: lsrBI}})
	return err
}

// Write sends characters.
func (in Input) Write(p []byte) (int, error) {
	cs := make([]char, len(p))
	for i, b := range p {
		cs[i].data = b
	}
	return in.u.give(cs)
}

// give waits for an empty receiver, not for room for one character: each fill
// is then a rise of the interrupt line, even for a driver that leaves its
// interrupt handler after so many characters, and costs one wake-up.
func (u *UART) give(cs []char) (n int, err error) {
	u.feed.Lock()
	defer u.feed.Unlock()
	u.mu.Lock()
	defer u.mu.Unlock()
	for n < len(cs) {
		for !u.stopped && (len(u.rx) > 0 || u.room() == 0) {
			u.rxEmpty.Wait()
		}
		if u.stopped {
			return n, ErrStopped
		}
		for _, c := range cs[n:min(n+u.room(), len(cs))] {
			u.accept(c)
			n++
		}
		u.update()
	}
	return n, nil
}

// room is how many characters the guest lets the terminal send to an empty
// receiver.
func (u *UART) room() int {
	switch {
	case u.mcr&mcrLoop != 0:
		return 0
	case u.mcr&mcrRTS != 0:
		return u.capacity()
	case u.polls >= pollsAlone:
		return 1
	}
	return 0
}
