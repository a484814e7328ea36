package scsi

import (
	"errors"
	"fmt"
	"math"
	"sync"
	"time"

	"gvm/panics"
)

// Limit bounds the work of a unit per second. The zero value is no limit.
type Limit struct {
	Rate uint64 // in a second
	// Burst is the amount that may be done at once after a time without commands; 0 means a tenth
	// of a second's worth of Rate, and at least one.
	Burst uint64
}

// MaxRate is the largest rate and burst of a Limit, beyond any storage.
const MaxRate = 1 << 40

// bucket keeps a Limit by the generic cell rate algorithm: admitted work fills it, and it drains at
// the rate.
type bucket struct {
	rate  float64       // in a nanosecond; 0: no limit
	burst time.Duration // time to drain a burst
	empty time.Duration // time at which it is empty
}

func newBucket(l Limit) (bucket, error) {
	switch {
	case l == Limit{}:
		return bucket{}, nil
	case l.Rate == 0 || l.Rate > MaxRate || l.Burst > MaxRate:
		return bucket{}, fmt.Errorf("a rate of %d with a burst of %d: want a rate from 1, and neither above %d",
			l.Rate, l.Burst, uint64(MaxRate))
	}
	if l.Burst == 0 {
		l.Burst = max(l.Rate/10, 1)
	}
	b := bucket{rate: float64(l.Rate) / float64(time.Second)}
	b.burst = b.time(l.Burst)
	return b, nil
}

// time returns the time that the rate needs for n.
func (b *bucket) time(n uint64) time.Duration {
	return time.Duration(min(float64(n)/b.rate, math.MaxInt64/4))
}

// due returns the time at which n, requested at the time at, may be done.
func (b *bucket) due(at time.Duration, n uint64) time.Duration {
	if b.rate == 0 {
		return at
	}
	return max(b.empty, at) + b.time(n) - b.burst
}

// fill counts n, and returns the time at which the bucket has drained it.
func (b *bucket) fill(at time.Duration, n uint64) time.Duration {
	if b.rate != 0 {
		b.empty = max(b.empty, at) + b.time(n)
	}
	return b.empty
}

// giveBack undoes fill, which returned until, except for the part drained by now.
func (b *bucket) giveBack(now, until time.Duration, n uint64) {
	if b.rate != 0 && until > now {
		b.empty -= min(until-now, b.time(n))
	}
}

// limiter keeps a unit to its limits. Waiting commands are in a queue, and only the first of them
// has a time: the buckets count admitted commands only, so an aborted command that waited leaves no
// debt.
type limiter struct {
	start time.Time

	mu              sync.Mutex
	commands, bytes bucket
	queue           list[ticket]
	since           time.Duration // since then the first has been first, or could have been
	timer           *time.Timer   // calls tick when first is due; nil: not yet needed
}

// ticket is a place under a limit. The zero value is no place. limiter.mu guards it.
type ticket struct {
	state   ticketState
	n       uint64        // bytes
	arrived time.Duration // since limiter.start
	turn    chan struct{} // closed when it is let through; nil if that was at once
	node    node[ticket]  // in limiter.queue
	// Times at which the buckets have drained it, once it was let through.
	commands, bytes time.Duration
}

type ticketState uint8

const (
	noTicket ticketState = iota
	queued
	letThrough
)

// newLimiter returns nil if cfg has no limits.
func newLimiter(cfg UnitConfig) (*limiter, error) {
	if cfg.IOPS == (Limit{}) && cfg.Bandwidth == (Limit{}) {
		return nil, nil
	}
	l := &limiter{start: time.Now()}
	var err, err2 error
	l.commands, err = newBucket(cfg.IOPS)
	l.bytes, err2 = newBucket(cfg.Bandwidth)
	return l, errors.Join(err, err2)
}

// take makes k a place for one command of n bytes, unless it is one already, and reports whether it
// is let through.
func (l *limiter) take(k *ticket, n uint64) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if k.state == noTicket {
		now := time.Since(l.start)
		*k = ticket{state: queued, n: n, arrived: now}
		if l.queue.first == nil {
			l.since = now
		}
		l.queue.push(&k.node, k)
		l.serve(now)
		if k.state == queued {
			k.turn = make(chan struct{})
		}
	}
	return k.state == letThrough
}

// giveBack ends k; its command has not begun and never will.
func (l *limiter) giveBack(k *ticket) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Since(l.start)
	switch k.state {
	case queued:
		if l.queue.first == &k.node {
			l.since = now
		}
		l.queue.remove(&k.node)
	case letThrough:
		l.commands.giveBack(now, k.commands, 1)
		l.bytes.giveBack(now, k.bytes, k.n)
	default:
		return
	}
	k.state = noTicket
	l.serve(now)
}

// serve lets due tickets through, and sets the timer for the first of the others. The caller holds
// mu.
func (l *limiter) serve(now time.Duration) {
	for l.queue.first != nil {
		k := l.queue.first.of
		at := max(k.arrived, l.since)
		due := max(l.commands.due(at, 1), l.bytes.due(at, k.n))
		if due > now {
			if l.timer == nil {
				l.timer = time.AfterFunc(due-now, panics.Func(l.tick))
			} else {
				l.timer.Reset(due - now)
			}
			return
		}
		k.commands, k.bytes = l.commands.fill(at, 1), l.bytes.fill(at, k.n)
		k.state = letThrough
		if k.turn != nil {
			close(k.turn)
		}
		l.since = max(l.since, due)
		l.queue.remove(&k.node)
	}
	if l.timer != nil {
		l.timer.Stop()
	}
}

// tick is serve by the timer.
func (l *limiter) tick() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.serve(time.Since(l.start))
}

// charge counts one command that moves n bytes of the medium of u, or twice as many (countsTwice).
// A handler calls it after all of its checks and before it uses the medium, so a refused command
// costs nothing. errWait means that it is not the command's turn; the handler then runs again.
func (tk *task) charge(n int) error {
	l := tk.u.limit
	if l == nil {
		return nil
	}
	if tk.op.flags&countsTwice != 0 {
		n *= 2
	}
	if !l.take(&tk.place, uint64(n)) || tk.now && tk.op.flags&nonBlocking == 0 {
		return errWait
	}
	tk.charged = true
	return nil
}

// await returns when k is let through by the limits of u, or tk has been aborted.
func (tk *task) await(k *ticket) {
	tk.u.set.interruptibly(tk, func(cut <-chan struct{}) {
		select {
		case <-k.turn:
		case <-cut:
		}
	})
}

// limited reports whether the handler charges.
func (o *opcode) limited() bool { return o.data.ofBlocks() || o.flags&counts != 0 }
