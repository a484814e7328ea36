package scsi

import (
	"errors"
	"fmt"
	"math"
	"sync"
	"time"
)

// Limit bounds how much a unit does in a second. The zero value is no limit.
type Limit struct {
	Rate uint64 // in a second
	// Burst is how much more may be done at once after a time without commands;
	// 0 is what Rate gives in a tenth of a second, and one at least.
	Burst uint64
}

// MaxRate is the largest rate and burst of a Limit: more than any storage does.
const MaxRate = 1 << 40

// bucket keeps a Limit by the generic cell rate algorithm: what is taken fills
// it, and it empties at the rate.
type bucket struct {
	rate  float64       // in a nanosecond; 0: no limit
	burst time.Duration // how long it takes to empty what a burst has filled
	empty time.Duration // when it will be empty
}

func newBucket(l Limit) (bucket, error) {
	switch {
	case l == Limit{}:
		return bucket{}, nil
	case l.Rate == 0 || l.Rate > MaxRate || l.Burst > MaxRate:
		return bucket{}, fmt.Errorf("a rate of %d with a burst of %d: want a rate from 1, and neither above %d", l.Rate, l.Burst, uint64(MaxRate))
	}
	if l.Burst == 0 {
		l.Burst = max(l.Rate/10, 1)
	}
	b := bucket{rate: float64(l.Rate) / float64(time.Second)}
	b.burst = b.time(l.Burst)
	return b, nil
}

// time is how long the rate needs for n.
func (b *bucket) time(n uint64) time.Duration {
	return time.Duration(min(float64(n)/b.rate, math.MaxInt64/4))
}

// take fills in n at the time now and returns when that may be done.
func (b *bucket) take(now time.Duration, n uint64) time.Duration {
	if b.rate == 0 {
		return now
	}
	b.empty = max(b.empty, now) + b.time(n)
	return b.empty - b.burst
}

// limiter is what keeps a unit to its limits.
type limiter struct {
	start time.Time

	mu              sync.Mutex
	commands, bytes bucket
}

// newLimiter returns nil where nothing is limited.
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

// reserve takes one command of n bytes and returns when it may be done, as the
// time since start.
func (l *limiter) reserve(n uint64) time.Duration {
	now := time.Since(l.start)
	l.mu.Lock()
	defer l.mu.Unlock()
	return max(l.commands.take(now, 1), l.bytes.take(now, n))
}

// throttle waits until u may do what reserve has said, or the command is aborted.
func (tk *task) throttle(u *Unit, due time.Duration) {
	if d := due - time.Since(u.limit.start); d > 0 {
		tk.u.set.delay(tk, d)
	}
}

// limited says whether a command counts: if it uses the medium.
func (o *opcode) limited() bool { return o != nil && o.flags&(medium|always) == medium }

// cost is how many bytes a limit counts for the command: what is transferred, and
// what VERIFY reads and WRITE SAME writes of the medium beside that.
func (tk *task) cost() uint64 {
	n := uint64(tk.inLen + tk.outLen)
	if len(tk.CDB) < tk.op.length() {
		return n // it is refused
	}
	switch tk.CDB[0] {
	case 0x41, 0x93: // WRITE SAME
		if tk.CDB[1]&0x08 != 0 { // UNMAP
			return n
		}
	case 0x2f, 0xaf, 0x8f: // VERIFY
	default:
		return n
	}
	if _, blocks := extent(tk.CDB); blocks <= maxWriteSame {
		n += blocks * uint64(tk.u.blockSize)
	}
	return n
}
