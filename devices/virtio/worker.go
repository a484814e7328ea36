package virtio

import (
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"

	"gvm/devices/virtio/virtq"
	"gvm/kvmapi/eventfd"
)

// Handler serves one chain: it calls w.Complete for it, before it returns or
// later from any goroutine. An error says that the driver broke a rule of the
// device; the chain is then dropped and the queue serves no more.
type Handler func(w *Worker, c *virtq.Chain) error

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

	mu       sync.Mutex // guards what follows; the handler runs without it
	q        *virtq.Queue
	barriers []barrier
}

type barrier struct {
	at   uint16 // position of the queue to reach
	done chan struct{}
}

// StartWorker starts a worker on a.Queues[i], which the driver has set up.
// The error is a *virtq.GuestError: the rings are not where they may be.
func StartWorker(a Activation, i int, handle Handler) (*Worker, error) {
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
		if _, err := w.kick.Wait(); err != nil {
			w.broken(err)
			return
		}
	}
}

// drain hands out chains until none is left and the driver has been asked to
// notify of the next, or the worker is to stop.
func (w *Worker) drain() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.q.DisableKicks()
	for !w.stopping.Load() {
		c, ok, err := w.q.Next()
		if err != nil {
			return err
		}
		if !ok {
			w.passBarriers()
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
		w.passBarriers()
	}
	return nil
}

func (w *Worker) passBarriers() {
	for i := 0; i < len(w.barriers); {
		if b := w.barriers[i]; int16(w.q.Position()-b.at) >= 0 {
			close(b.done)
			w.barriers = append(w.barriers[:i], w.barriers[i+1:]...)
		} else {
			i++
		}
	}
}

// Complete gives a chain back to the driver, with the bytes written to the
// front of its device-writable part, and interrupts the driver if it asked for
// that. It may be called from any goroutine, once for a chain.
func (w *Worker) Complete(c *virtq.Chain, written uint32) {
	w.mu.Lock()
	signal := w.q.Push(c, written)
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
// available when Barrier was called, or the worker has stopped. The handler
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
