package virtio

import (
	"context"
	"fmt"
	"slices"
	"time"

	"gvm/panics"
)

// Workers are the workers of a device's queues, by queue; nil for a queue that the driver left
// alone. There are none while the device is not active.
type Workers []*Worker

// Start starts a worker on every queue that the driver set up, at its Base. serve returns the
// queue's handler, and for how long at most the worker polls for more chains before it sleeps,
// which it does only while that pays. Queue 0 starts last: the handler of a control queue finds the
// workers of the others. After an error none has started; it is a *virtq.GuestError: rings are not
// where they may be.
func (ws *Workers) Start(a Activation, serve func(queue int) (Handler, time.Duration)) error {
	started := make(Workers, len(a.Queues))
	for i, q := range a.Queues {
		if q.Size == 0 {
			continue
		}
		handle, poll := serve(i)
		w, err := newWorker(a, i, poll, handle)
		if err != nil {
			return err
		}
		started[i] = w
	}
	*ws = started
	for i := len(started) - 1; i >= 0; i-- {
		if w := started[i]; w != nil {
			panics.Go(w.run)
		}
	}
	return nil
}

// Stop stops every worker and returns the Base of each queue, 0 for one that has no worker. When no
// more chains are taken it calls halted, unless that is nil, which drops the chains that the device
// keeps and may abort requests in flight. Then Stop waits until the last chain has been given back.
// If ctx ends first, the workers serve as before, and the error is the cause of ctx. Any other
// error is the host's, and some workers may still run.
func (ws *Workers) Stop(ctx context.Context, halted func()) (bases []uint16, err error) {
	defer func() {
		if err != nil && ctx.Err() != nil {
			for _, w := range slices.Backward(*ws) { // as Start does
				if w != nil {
					w.resume()
				}
			}
		}
	}()
	for i, w := range *ws {
		if w == nil {
			continue
		}
		if err := w.halt(ctx); err != nil {
			return nil, fmt.Errorf("stop queue %d: %w", i, err)
		}
	}
	if halted != nil {
		halted()
	}
	bases = make([]uint16, len(*ws))
	for i, w := range *ws {
		if w == nil {
			continue
		}
		if bases[i], err = w.wait(ctx); err != nil {
			return nil, fmt.Errorf("stop queue %d: %w", i, err)
		}
	}
	*ws = nil
	return bases, nil
}
