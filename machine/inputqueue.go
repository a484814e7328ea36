package machine

import (
	"bytes"
	"sync"

	"gvm/panics"
	"gvm/vmm"
)

// maxQueued bounds the input of an InputQueue, in bytes; a break counts as one.
const maxQueued = 1 << 20

// InputQueue holds input for a serial port until the guest takes it. During a reset it waits for
// the guest's next life.
type InputQueue struct {
	mu     sync.Mutex
	change sync.Cond
	to     vmm.Input // nil: none
	queue  [][]byte  // nil is a break
	queued int
	done   bool
}

// NewInputQueue returns an empty queue. Feed moves its input to the guest.
func NewInputQueue() *InputQueue {
	q := new(InputQueue)
	q.change.L = &q.mu
	return q
}

// Connect sets the guest's input; nil: none.
func (q *InputQueue) Connect(in vmm.Input) {
	q.mu.Lock()
	q.to = in
	q.mu.Unlock()
	q.change.Broadcast()
}

// Put adds input; nil is a break. While there is no room it waits, unless giveUp returns true: the
// input is dropped then. Changed makes it call giveUp again.
func (q *InputQueue) Put(p []byte, giveUp func() bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.queued >= maxQueued && !q.done && !giveUp() {
		q.change.Wait()
	}
	if q.queued < maxQueued {
		q.queue = append(q.queue, bytes.Clone(p))
		q.queued += max(1, len(p))
		q.change.Broadcast()
	}
}

// Changed has every Put that waits call its giveUp.
func (q *InputQueue) Changed() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.change.Broadcast()
}

// Feed passes the input to the guest until Close.
func (q *InputQueue) Feed() {
	q.mu.Lock()
	defer q.mu.Unlock()
	for {
		for !q.done && (q.to == nil || len(q.queue) == 0) {
			q.change.Wait()
		}
		if q.done {
			return
		}
		to, p := q.to, q.queue[0]
		var n int
		var err error
		panics.Unlocked(&q.mu, func() { n, err = give(to, p) })
		if q.queued -= n; err == nil {
			q.queued -= max(1, len(p)) - len(p)
			q.queue = q.queue[1:]
		} else if p != nil {
			q.queue[0] = p[n:]
		}
		if err != nil && q.to == to {
			q.to = nil
		}
		q.change.Broadcast()
	}
}

func give(to vmm.Input, p []byte) (int, error) {
	if p != nil {
		return to.Write(p)
	}
	return 0, to.Break()
}

// Close ends Feed, once the guest's input has ended, and every Put.
func (q *InputQueue) Close() {
	q.mu.Lock()
	q.done = true
	q.mu.Unlock()
	q.change.Broadcast()
}
