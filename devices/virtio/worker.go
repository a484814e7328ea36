package virtio

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"gvm/devices/virtio/virtq"
	"gvm/inspect"
	"gvm/kvmapi/eventfd"
	"gvm/panics"
)

// Handler serves one chain: it calls w.Complete for it, before it returns or later from any
// goroutine. A handler that may wait, or takes long, calls w.Interrupt first. An error says that
// the driver broke a rule of the device; the chain is then dropped and the queue serves no more.
type Handler func(w *Worker, c *virtq.Chain) error

// maxOwed bounds how long a requested interrupt is coalesced while chains remain, besides the
// handler's time for one chain. Interrupts are the most expensive part of a small request, and a
// driver that is interrupted for each finds one request each time.
const maxOwed = 5 * time.Microsecond

// The thread reads the clock again, and measures how long a chain takes, after clockEvery chains at
// most, and more often if chains come more than clockPatience apart: a reading takes a good part of
// the time of a small request.
const (
	clockEvery    = 64
	clockPatience = 32 * time.Microsecond
)

// Worker serves one queue on an OS thread of its own: it waits for the
// doorbell, hands each chain to the handler and interrupts the driver when a
// completed one asks for it. When the driver breaks a rule it reports that
// once and serves no more.
type Worker struct {
	kick, call *eventfd.FD
	handle     Handler
	broken     func(error)
	stopping   atomic.Bool
	inFlight   atomic.Int64  // chains that the handler has and has not completed
	landed     chan struct{} // wakes wait, which looks at inFlight again
	poll       spin
	clock      time.Duration // inspect.Clock as the thread last read it
	turn       turn

	mu       sync.Mutex // guards the fields below; the handler runs without it
	q        *virtq.Queue
	done     chan struct{} // closed when the thread has stopped
	stopped  bool          // the thread has stopped because it was told to
	barriers []barrier
	serving  bool // the thread is in drain, and interrupts for chains completed meanwhile
	owed     bool // the driver has asked for an interrupt, and not got it yet

	chains     uint64 // that the thread has handed out
	interrupts uint64
	latency    inspect.Histogram // of measured chains, by their weights
	measure    uint64            // the number of the next chain to measure
	every      uint64            // chains between two measured ones
	measured   time.Duration     // inspect.Clock at the last one
}

type barrier struct {
	at   uint16 // position of the queue to reach
	done chan struct{}
}

func newWorker(a Activation, i int, poll time.Duration, handle Handler) (*Worker, error) {
	q, err := virtq.New(a.Mem, a.Queues[i].Layout, a.Features, a.Queues[i].Base)
	if err != nil {
		return nil, fmt.Errorf("queue %d: %w", i, err)
	}
	w := &Worker{
		kick:   a.Queues[i].Kick,
		call:   a.Queues[i].Call,
		handle: handle,
		broken: func(err error) { a.Broken(fmt.Errorf("queue %d: %w", i, err)) },
		landed: make(chan struct{}, 1),
		done:   make(chan struct{}),
		turn:   turn{yield: reschedule},
		q:      q,
	}
	w.poll = newSpin(poll, w.interruptCount, w.asked)
	return w, nil
}

func (w *Worker) interruptCount() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.interrupts
}

// asked reports whether the driver has asked for interrupts since the last call.
func (w *Worker) asked() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.q.Asked()
}

func (w *Worker) run() {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	stopped := false // it broke, or a handler panicked
	defer func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.stopped = stopped; stopped && !w.stopping.Load() {
			w.restart() // it was told to go on after all
			return
		}
		close(w.done)
	}()
	if err := w.serve(); err != nil {
		w.broken(err)
	} else {
		stopped = true
	}
}

// serve returns when the worker is to stop.
func (w *Worker) serve() error {
	// The driver may have filled the queue before the worker started, so the
	// first look comes before the first wait.
	for {
		if err := w.drain(); err != nil {
			return err
		}
		if w.stopping.Load() {
			return nil
		}
		start := inspect.Clock()
		w.turn.at(start)
		if _, err := w.kick.Wait(); err != nil {
			return err
		}
		w.clock = inspect.Clock()
		w.poll.waited(w.clock - start)
	}
}

// restart starts the thread again. The caller holds mu.
func (w *Worker) restart() {
	w.stopped = false
	panics.Go(w.run)
}

// drain hands out chains until none is left and the driver has been asked to
// notify of the next, or the worker is to stop.
func (w *Worker) drain() (err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.serving = true
	defer func() {
		w.serving = false
		err = errors.Join(err, w.pay())
	}()
	w.q.DisableKicks()
	var since time.Time // when the thread first saw the interrupts owed now
	for !w.stopping.Load() {
		c, ok, err := w.q.Next()
		if err != nil {
			return err
		}
		if !ok {
			if err := w.pay(); err != nil {
				return err
			}
			w.passBarriers(true)
			if w.look() {
				continue
			}
			if !w.q.EnableKicks() {
				return nil
			}
			w.q.DisableKicks()
			continue
		}
		w.inFlight.Add(1)
		if c.Taken = 0; w.chains == w.measure {
			w.begin(c)
		}
		w.chains++
		panics.Unlocked(&w.mu, func() { err = w.handle(w, c) })
		if err != nil {
			w.drop(c)
			return err
		}
		w.passBarriers(false)
		switch {
		case !w.owed:
			since = time.Time{}
		case since.IsZero():
			since = time.Now()
		case time.Since(since) > maxOwed:
			since = time.Time{}
			if err := w.pay(); err != nil {
				return err
			}
		}
	}
	return nil
}

// begin begins to measure a chain, and decides which one is the next. The caller holds mu.
func (w *Worker) begin(c *virtq.Chain) {
	w.clock = inspect.Clock()
	if w.clock-w.measured < time.Duration(w.every)*clockPatience {
		w.every = min(2*w.every, clockEvery)
	} else {
		w.every = max(w.every/2, 1)
	}
	w.measured = w.clock
	w.measure += w.every
	c.Taken, c.Weight = w.clock, w.every
}

// look polls the queue for as long as that pays, and reports whether the driver has
// made a chain available. The caller holds mu, which is free meanwhile.
func (w *Worker) look() (found bool) {
	position := w.q.Position()
	w.serving = false
	panics.Unlocked(&w.mu, func() {
		found = w.poll.until(func() bool { return w.q.Available() != position || w.stopping.Load() })
	})
	w.serving = true
	return found
}

// pay interrupts the driver if that is owed. The caller holds mu.
func (w *Worker) pay() error {
	if !w.owed {
		return nil
	}
	w.owed = false
	w.interrupts++
	return w.call.Signal()
}

// Interrupt interrupts the driver now for completed chains, if it asked for that. A
// handler calls it before it waits for something.
func (w *Worker) Interrupt() {
	w.mu.Lock()
	err := w.pay()
	w.mu.Unlock()
	if err != nil {
		w.broken(err)
	}
}

// More reports whether a chain is available that the handler has not been given.
func (w *Worker) More() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.q.Available() != w.q.Position()
}

// Await waits until fd is ready for the events of poll(2), or has an error, or the driver notifies,
// or the worker is to stop, which it reports by false: the handler then gives back its chains by
// Drop. fd -1 is never ready. A handler calls it, and Await first interrupts the driver for
// completed chains.
func (w *Worker) Await(fd int, events int16) (goOn bool, err error) {
	w.mu.Lock()
	w.serving = false
	err = w.pay()
	w.mu.Unlock()
	defer func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.serving = true
	}()
	if err != nil || w.stopping.Load() {
		return false, err
	}
	w.turn.at(inspect.Clock())
	p := [2]unix.PollFd{{Fd: int32(w.kick.Fd()), Events: unix.POLLIN}, {Fd: int32(fd), Events: events}}
	for {
		if _, err := unix.Poll(p[:], -1); err == nil {
			break
		} else if err != unix.EINTR {
			return false, fmt.Errorf("poll: %w", err)
		}
	}
	if p[0].Revents != 0 {
		if _, err := w.kick.Wait(); err != nil {
			return false, err
		}
	}
	w.clock = inspect.Clock()
	return !w.stopping.Load(), nil
}

// Clock returns about when the worker took the chain that the handler has, by inspect.Clock. A
// handler calls it before it returns.
func (w *Worker) Clock() time.Duration { return w.clock }

// passBarriers ends each Barrier whose chains the handler has been given by now, and all of them
// when the queue is empty: a driver that takes its index back leaves a position that is never
// reached. The caller holds mu.
func (w *Worker) passBarriers(empty bool) {
	for i := 0; i < len(w.barriers); {
		if b := w.barriers[i]; empty || int16(w.q.Position()-b.at) >= 0 {
			close(b.done)
			w.barriers = append(w.barriers[:i], w.barriers[i+1:]...)
		} else {
			i++
		}
	}
}

// Completion is a chain to give back, with the bytes written to the front of its device-writable
// part.
type Completion struct {
	Chain   *virtq.Chain
	Written uint32
}

// Complete gives a chain back to the driver, with the bytes written to the
// front of its device-writable part, and has the driver interrupted if it asked for
// that: at once, or soon while the worker's thread has more chains to hand out. It may
// be called from any goroutine, once for a chain.
func (w *Worker) Complete(c *virtq.Chain, written uint32) { w.CompleteAll(Completion{c, written}) }

// CompleteAll is Complete of several chains, all of which the driver sees at once.
func (w *Worker) CompleteAll(done ...Completion) {
	w.mu.Lock()
	for _, d := range done {
		if d.Chain.Taken != 0 {
			w.latency.Add(inspect.Clock()-d.Chain.Taken, d.Chain.Weight)
		}
		w.q.Add(d.Chain, d.Written)
	}
	signal := w.q.Publish()
	if w.serving {
		w.owed = w.owed || signal
		signal = false
	}
	if signal {
		w.interrupts++
	}
	w.mu.Unlock()
	if signal {
		if err := w.call.Signal(); err != nil {
			w.broken(err)
		}
	}
	// Last: once the count is zero, the caller of wait may close the eventfds.
	for range done {
		w.land()
	}
}

// land counts one chain in flight less.
func (w *Worker) land() {
	if w.inFlight.Add(-1) > 0 || !w.stopping.Load() {
		return
	}
	select {
	case w.landed <- struct{}{}:
	default:
	}
}

// Drop gives back a chain that a handler kept, unused. It is for the function that Workers.Stop
// calls, and for a handler after Await: when a device is reset for any chain, and when it stops for
// the chains of a queue that were taken last, which are then taken again.
func (w *Worker) Drop(c *virtq.Chain) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.drop(c)
}

func (w *Worker) drop(c *virtq.Chain) {
	w.q.Drop(c)
	w.land()
}

// Barrier returns once the handler has been given every chain that was
// available when Barrier was called and still is, or the worker has stopped. The handler
// of the same worker must not call it.
func (w *Worker) Barrier() error {
	b := barrier{done: make(chan struct{})}
	w.mu.Lock()
	b.at = w.q.Available()
	w.barriers = append(w.barriers, b)
	done := w.done
	w.mu.Unlock()
	if err := w.kick.Signal(); err != nil {
		return err
	}
	select {
	case <-b.done:
	case <-done:
	}
	return nil
}

// halt tells the worker to take no more chains, wakes it and waits until its thread has stopped or
// ctx ends. Chains may still be in flight.
func (w *Worker) halt(ctx context.Context) error {
	w.stopping.Store(true)
	if err := w.kick.Signal(); err != nil {
		return err // without the signal the thread may never look
	}
	select {
	case <-w.done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// wait waits, after halt, until every chain that was taken has been completed or dropped, or ctx
// ends, and returns the base.
func (w *Worker) wait(ctx context.Context) (uint16, error) {
	for w.inFlight.Load() > 0 {
		select {
		case <-w.landed:
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.q.Base(), nil
}

// resume undoes halt. Chains that were dropped meanwhile are taken again.
func (w *Worker) resume() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.stopping.Store(false); w.stopped {
		w.done = make(chan struct{})
		w.restart()
	}
}
