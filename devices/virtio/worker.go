package virtio

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"gvm/devices/virtio/virtq"
	"gvm/kvmapi/eventfd"
)

// Handler serves one chain: it calls w.Complete for it, before it returns or
// later from any goroutine. One that may wait, or takes long, calls w.Interrupt before. An error
// says that the driver broke a rule of the device; the chain is then dropped and the
// queue serves no more.
type Handler func(w *Worker, c *virtq.Chain) error

// maxOwed is how long the driver waits for an interrupt that it asked for, while the
// worker has more chains to hand out, besides what the handler takes for one of them: interrupts are the dearest part of a
// small request, and a driver that is woken for each finds one request each time.
const maxOwed = 5 * time.Microsecond

// Worker serves one queue on an OS thread of its own: it waits for the
// doorbell, hands each chain to the handler and interrupts the driver when a
// completed one asks for it. When the driver breaks a rule it reports that
// once and stops serving until the device is reset.
type Worker struct {
	kick, call *eventfd.FD
	handle     Handler
	broken     func(error)
	stopping   atomic.Bool
	done       chan struct{}  // closed when the thread has stopped
	inFlight   sync.WaitGroup // chains that the handler has and has not completed
	poll       spin

	mu       sync.Mutex // guards what follows; the handler runs without it
	q        *virtq.Queue
	barriers []barrier
	serving  bool // the thread is in drain, and interrupts for what is completed meanwhile
	owed     bool // the driver has asked for an interrupt, and not got it yet
}

type barrier struct {
	at   uint16 // position of the queue to reach
	done chan struct{}
}

// StartWorker starts a worker on a.Queues[i], which the driver has set up.
// Before it sleeps it looks for more chains, for poll at most and only while that pays.
// The error is a *virtq.GuestError: the rings are not where they may be.
func StartWorker(a Activation, i int, poll time.Duration, handle Handler) (*Worker, error) {
	q, err := virtq.New(a.Mem, a.Queues[i].Layout, a.Features)
	if err != nil {
		return nil, fmt.Errorf("queue %d: %w", i, err)
	}
	w := &Worker{
		kick:   a.Queues[i].Kick,
		call:   a.Queues[i].Call,
		handle: handle,
		broken: func(err error) { a.Broken(fmt.Errorf("queue %d: %w", i, err)) },
		done:   make(chan struct{}),
		poll:   newSpin(poll),
		q:      q,
	}
	go w.run()
	return w, nil
}

func (w *Worker) run() {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer close(w.done)
	// The driver may have filled the queue before DRIVER_OK, so the first
	// look comes before the first wait.
	for {
		if err := w.drain(); err != nil {
			w.broken(err)
			return
		}
		if w.stopping.Load() {
			return
		}
		start := time.Now()
		if _, err := w.kick.Wait(); err != nil {
			w.broken(err)
			return
		}
		w.poll.waited(time.Since(start))
	}
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
	var since time.Time // when the thread first saw what is owed now
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
		w.mu.Unlock()
		err = w.handle(w, c)
		w.mu.Lock()
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

// look polls the queue for as long as that pays, and says whether the driver has
// made a chain available. The caller holds mu, which is free meanwhile.
func (w *Worker) look() bool {
	position := w.q.Position()
	w.serving = false
	w.mu.Unlock()
	found := w.poll.until(func() bool { return w.q.Available() != position || w.stopping.Load() })
	w.mu.Lock()
	w.serving = true
	return found
}

// pay interrupts the driver if that is owed. The caller holds mu.
func (w *Worker) pay() error {
	if !w.owed {
		return nil
	}
	w.owed = false
	return w.call.Signal()
}

// Interrupt interrupts the driver now for what was completed, if it asked for that. A
// handler calls it before it waits for something.
func (w *Worker) Interrupt() {
	w.mu.Lock()
	err := w.pay()
	w.mu.Unlock()
	if err != nil {
		w.broken(err)
	}
}

// passBarriers releases who waits for chains that the handler has been given by now. When
// the queue is empty that is everybody: a driver that takes its index back leaves a position
// that is never reached. The caller holds mu.
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

// Complete gives a chain back to the driver, with the bytes written to the
// front of its device-writable part, and has the driver interrupted if it asked for
// that: at once, or soon while the worker's thread has more chains to hand out. It may
// be called from any goroutine, once for a chain.
func (w *Worker) Complete(c *virtq.Chain, written uint32) {
	w.mu.Lock()
	signal := w.q.Push(c, written)
	if w.serving {
		w.owed = w.owed || signal
		signal = false
	}
	w.mu.Unlock()
	if signal {
		if err := w.call.Signal(); err != nil {
			w.broken(err)
		}
	}
	// Last: once the count is zero, Wait's caller may close the eventfds.
	w.inFlight.Done()
}

// Drop takes back a chain that a handler kept, without telling the driver. It
// is for a device that is being reset, between Halt and Wait.
func (w *Worker) Drop(c *virtq.Chain) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.drop(c)
}

func (w *Worker) drop(c *virtq.Chain) {
	w.q.Drop(c)
	w.inFlight.Done()
}

// Barrier returns once the handler has been given every chain that was
// available when Barrier was called and still is, or the worker has stopped. The handler
// of the same worker must not call it.
func (w *Worker) Barrier() error {
	b := barrier{done: make(chan struct{})}
	w.mu.Lock()
	b.at = w.q.Available()
	w.barriers = append(w.barriers, b)
	w.mu.Unlock()
	if err := w.kick.Signal(); err != nil {
		return err
	}
	select {
	case <-b.done:
	case <-w.done:
	}
	return nil
}

// Halt tells the worker to hand out no more chains, wakes it and waits until
// its thread has stopped. Chains may still be in flight: see Wait.
func (w *Worker) Halt() error {
	w.stopping.Store(true)
	if err := w.kick.Signal(); err != nil {
		return err // without the signal the thread may never look
	}
	<-w.done
	return nil
}

// Wait waits, after Halt, until every chain that was handed out has been
// completed or dropped.
func (w *Worker) Wait() { w.inFlight.Wait() }

// Stop is Halt and Wait.
func (w *Worker) Stop() error {
	if err := w.Halt(); err != nil {
		return err
	}
	w.Wait()
	return nil
}
