package serial

import (
	"context"
	"fmt"
	"io"
	"time"

	"gvm/panics"
)

const (
	// lineSize bounds the output that left the transmitter and is not written yet.
	lineSize = 64 << 10

	// gather is how long the first byte of a batch waits for others: a guest sends them one by one,
	// and a host write for each would cost more than the rest of the device.
	gather = time.Millisecond
)

// drain moves bytes from the transmitter to the line, as many as the line has room for, or all of
// them after Stop.
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

// run writes the output. After an error it discards output: a guest that lost its console runs on.
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
			panics.Unlocked(&u.mu, func() { time.Sleep(gather) })
		}
		batch := u.out
		u.out, spare = spare[:0], batch
		u.drain()
		u.update()
		if u.err != nil {
			continue
		}
		var n int
		var err error
		panics.Unlocked(&u.mu, func() { n, err = u.cfg.Out.Write(batch) })
		if err == nil && n < len(batch) {
			err = io.ErrShortWrite
		}
		if err != nil {
			u.err = fmt.Errorf("serial: write output: %w", err)
		}
	}
}

// Stop ends all waiting, so that vCPUs and input can be joined: a vCPU that waits for room
// continues, its byte kept, and input returns ErrStopped.
func (u *UART) Stop() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.stopped = true
	u.drain()
	u.rxEmpty.Broadcast()
	u.txRoom.Broadcast()
	u.work.Signal()
}

// Close stops the port, waits until all output is written, and returns the first error of
// Config.Out. It waits as long as Config.Out does; later output of the guest is lost.
func (u *UART) Close() error {
	u.Stop()
	u.mu.Lock()
	u.closing = true
	u.work.Signal()
	u.mu.Unlock()
	<-u.done
	return u.err
}

// Input returns the terminal's side. A Write returns when the receiver has taken everything, or
// with ErrStopped and the number of bytes taken. Like a terminal with hardware flow control it
// sends only while the guest asserts RTS, so that input typed before the guest's driver is ready is
// not lost when the driver clears the receiver. A driver that polls the receiver (see pollsAlone)
// gets one character at a time without RTS.
func (u *UART) Input() Input { return Input{u} }

// Input is the terminal's side of a UART.
type Input struct{ u *UART }

// Break sends a break, which Linux takes as SysRq on a console. It waits for its turn like Write.
func (in Input) Break() error {
	_, err := in.send([]char{{errs: lsrBI}})
	return err
}

// SysRq sends a break and a key, with no other input between them: Linux takes a key that follows a
// break within 5 s for one of SysRq (uart_handle_sysrq_char). It waits until the driver has read
// both. If ctx ends first, SysRq takes back those that the driver has not read, and returns the
// cause of ctx.
func (in Input) SysRq(ctx context.Context, key byte) error {
	u := in.u
	release, err := u.takeTurn(ctx)
	if err != nil {
		return err
	}
	defer release()
	u.mu.Lock()
	defer u.mu.Unlock()
	if _, err := u.give(ctx, []char{{errs: lsrBI}, {data: key}}); err != nil {
		return err
	}
	for !u.stopped && ctx.Err() == nil && len(u.rx) > 0 {
		u.rxEmpty.Wait()
	}
	switch {
	case len(u.rx) == 0:
		return nil
	case u.stopped:
		return ErrStopped
	}
	u.rx = nil
	u.errs &= lsrOE
	u.update()
	return context.Cause(ctx)
}

// Write sends characters.
func (in Input) Write(p []byte) (int, error) {
	cs := make([]char, len(p))
	for i, b := range p {
		cs[i].data = b
	}
	return in.send(cs)
}

// takeTurn waits until no other input is under way. Until release, waits for the receiver end with
// ctx.
func (u *UART) takeTurn(ctx context.Context) (release func(), err error) {
	select {
	case u.feed <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	stop := context.AfterFunc(ctx, panics.Func(func() {
		u.mu.Lock() // not between the check of ctx and the wait
		defer u.mu.Unlock()
		u.rxEmpty.Broadcast()
	}))
	return func() { stop(); <-u.feed }, nil
}

// send gives characters to the receiver.
func (in Input) send(cs []char) (int, error) {
	release, err := in.u.takeTurn(context.Background())
	if err != nil {
		return 0, err
	}
	defer release()
	in.u.mu.Lock()
	defer in.u.mu.Unlock()
	return in.u.give(context.Background(), cs)
}

// give waits for an empty receiver, not for room for one character. Each fill then raises the
// interrupt line, even for a driver that leaves its interrupt handler after a number of characters,
// and costs one wake-up. The caller has its turn, and mu.
func (u *UART) give(ctx context.Context, cs []char) (n int, err error) {
	for n < len(cs) {
		for !u.stopped && ctx.Err() == nil && (len(u.rx) > 0 || u.room() == 0) {
			u.rxEmpty.Wait()
		}
		switch {
		case u.stopped:
			return n, ErrStopped
		case ctx.Err() != nil:
			return n, context.Cause(ctx)
		}
		for _, c := range cs[n:min(n+u.room(), len(cs))] {
			u.accept(c)
			n++
		}
		u.update()
	}
	return n, nil
}

// room returns how many characters the guest lets the terminal send to an empty receiver.
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
