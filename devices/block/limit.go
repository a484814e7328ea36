package block

import (
	"container/list"
	"errors"
	"fmt"
	"math"
	"sync"
	"time"

	"gvm/panics"
)

// Limit bounds an amount of work per second. The zero value is no limit.
type Limit struct {
	Rate uint64 // in a second
	// Burst is the amount that may be done at once after a time without work; 0 means a tenth of a
	// second's worth of Rate, and at least one.
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

// Limiter keeps the requests of a disk to limits. Waiting requests are in a queue, and only the
// first of them has a time: the buckets count admitted requests only, so an aborted request that
// waited leaves no debt. Its methods may be called from any goroutine.
type Limiter struct {
	start time.Time

	mu              sync.Mutex
	requests, bytes bucket
	queue           list.List     // of *Place
	since           time.Duration // since then the first has been first, or could have been
	timer           *time.Timer   // calls tick when first is due; nil: not yet needed
}

// Place is the place of a request under a Limiter, which guards it. The zero value is no place.
type Place struct {
	state   placeState
	n       uint64        // bytes
	arrived time.Duration // since Limiter.start
	turn    chan struct{} // closed when it is admitted; nil if that was at once
	waits   *list.Element // in Limiter.queue
	// Times at which the buckets have drained it, once it was admitted.
	requests, bytes time.Duration
}

type placeState uint8

const (
	noPlace placeState = iota
	queued
	admitted
)

// NewLimiter returns a Limiter for requests and bytes per second; nil if neither has a limit.
func NewLimiter(requests, bytes Limit) (*Limiter, error) {
	if requests == (Limit{}) && bytes == (Limit{}) {
		return nil, nil
	}
	l := &Limiter{start: time.Now()}
	var err, err2 error
	l.requests, err = newBucket(requests)
	l.bytes, err2 = newBucket(bytes)
	return l, errors.Join(err, err2)
}

// Take makes p a place for one request of n bytes, unless it is one already, and reports whether
// the request is admitted.
func (l *Limiter) Take(p *Place, n uint64) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if p.state != noPlace {
		return p.state == admitted
	}
	now := time.Since(l.start)
	*p = Place{state: queued, n: n, arrived: now}
	if l.queue.Len() == 0 {
		if l.since = now; l.admit(p, now) <= now {
			return true
		}
	}
	p.turn = make(chan struct{})
	p.waits = l.queue.PushBack(p)
	l.serve(now)
	return false
}

// Turn returns a channel that is closed when the request of p is admitted; nil if Take has not made
// it wait.
func (p *Place) Turn() <-chan struct{} { return p.turn }

// GiveBack ends p; its request has not begun and never will.
func (l *Limiter) GiveBack(p *Place) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Since(l.start)
	switch p.state {
	case queued:
		if l.queue.Front() == p.waits {
			l.since = now
		}
		l.queue.Remove(p.waits)
	case admitted:
		l.requests.giveBack(now, p.requests, 1)
		l.bytes.giveBack(now, p.bytes, p.n)
	default:
		return
	}
	p.state = noPlace
	l.serve(now)
}

// Drained returns the times since the Limiter was made at which the work admitted so far has had
// its time at the two rates. Tests of the amount that a request counts for read it.
func (l *Limiter) Drained() (requests, bytes time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.requests.empty, l.bytes.empty
}

// admit counts the request of p, which is first, if it is due, and returns when it is. The caller
// holds mu.
func (l *Limiter) admit(p *Place, now time.Duration) (due time.Duration) {
	at := max(p.arrived, l.since)
	if due = max(l.requests.due(at, 1), l.bytes.due(at, p.n)); due <= now {
		p.requests, p.bytes = l.requests.fill(at, 1), l.bytes.fill(at, p.n)
		p.state = admitted
		l.since = max(l.since, due)
	}
	return due
}

// serve admits due requests, and sets the timer for the first of the others. The caller holds mu.
func (l *Limiter) serve(now time.Duration) {
	for l.queue.Len() > 0 {
		p := l.queue.Front().Value.(*Place)
		if due := l.admit(p, now); due > now {
			if l.timer == nil {
				l.timer = time.AfterFunc(due-now, panics.Func(l.tick))
			} else {
				l.timer.Reset(due - now)
			}
			return
		}
		close(p.turn)
		l.queue.Remove(p.waits)
	}
	if l.timer != nil {
		l.timer.Stop()
	}
}

// tick is serve by the timer.
func (l *Limiter) tick() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.serve(time.Since(l.start))
}
