package nowait

import (
	"context"
	"fmt"
	"time"

	"gvm/panics"
)

// patience bounds how long Until goes on after the end of its context.
const patience = 500 * time.Millisecond

// Until is Within for half a second, or as LeftInside says: another wait, such as that of a command
// for all of its start, does not end first, whose error names no file.
func Until[T any](ctx context.Context, what func() string, do func() (T, error), undo func(T)) (T, error) {
	return within(ctx, patience, LeftInside, what, do, undo)
}

// Within returns the result of do, which may wait for storage that does not answer. It returns
// patience after the end of ctx at the latest, or earlier as Left says: with the cause of ctx and
// the work, such as "FILE was opened". Then undo gets the later result of do, if it has no error.
func Within[T any](ctx context.Context, patience time.Duration, what func() string, do func() (T, error),
	undo func(T)) (T, error) {
	return within(ctx, patience, Left, what, do, undo)
}

func within[T any](ctx context.Context, patience time.Duration, left func(context.Context, time.Duration) time.Duration,
	what func() string, do func() (T, error), undo func(T)) (T, error) {
	type result struct {
		value T
		err   error
	}
	done := make(chan result, 1)
	panics.Go(func() { // ends with the process at the latest
		value, err := do()
		done <- result{value, err}
	})
	select {
	case r := <-done:
		return r.value, r.err
	case <-ctx.Done():
	}
	select {
	case r := <-done:
		return r.value, r.err
	case <-time.After(left(ctx, patience)):
	}
	panics.Go(func() { // likewise
		if r := <-done; r.err == nil {
			undo(r.value)
		}
	})
	var none T
	return none, fmt.Errorf("%w while %s", context.Cause(ctx), what())
}
