package nowait

import (
	"context"
	"sync/atomic"
	"time"

	"gvm/panics"
)

// Bounds of the waits behind the end of a context of WithOneEnd.
const (
	endTime   = 750 * time.Millisecond // of all together
	leastTime = 50 * time.Millisecond  // of each in any case
	innerTime = 150 * time.Millisecond // by which LeftInside is shorter
)

// end is the time at which a context ended; nil: it has not.
type end struct{ at atomic.Pointer[time.Time] }

type endKey struct{}

// begin returns the time of the end, which is now unless it has one.
func (e *end) begin() time.Time {
	now := time.Now()
	e.at.CompareAndSwap(nil, &now)
	return *e.at.Load()
}

// WithOneEnd returns a context like ctx. When it or a context derived from it has ended, all waits
// for the host that come behind, of one part of the process after another, have endTime together:
// see Left.
func WithOneEnd(ctx context.Context) context.Context {
	if ctx.Value(endKey{}) != nil {
		return ctx
	}
	e := &end{}
	context.AfterFunc(ctx, panics.Func(func() { e.begin() }))
	return context.WithValue(ctx, endKey{}, e)
}

// Left returns how long a wait for the host may take: most, or, once a context of WithOneEnd has
// ended, the rest of its time.
func Left(ctx context.Context, most time.Duration) time.Duration {
	e, ok := ctx.Value(endKey{}).(*end)
	if !ok || ctx.Err() == nil {
		return most
	}
	return min(most, max(leastTime, endTime-time.Since(e.begin())))
}

// LeftInside is Left for a wait that another one with Left waits for: it ends first, so that the
// other one sees that it is over.
func LeftInside(ctx context.Context, most time.Duration) time.Duration {
	return max(leastTime, Left(ctx, most+innerTime)-innerTime)
}

// Extend lets the time of the end begin again, after work that may take longer.
func Extend(ctx context.Context) {
	if e, ok := ctx.Value(endKey{}).(*end); ok && ctx.Err() != nil {
		now := time.Now()
		e.at.Store(&now)
	}
}
