package main

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"
)

// TestSignalGrace: a signal ends a start at once, and a machine in its grace time; a second signal
// ends the machine at once.
func TestSignalGrace(t *testing.T) {
	ctx, stop := context.WithCancelCause(context.Background())
	first, second := errors.New("first"), errors.New("second")
	start := &ending{stop: stop, grace: time.Hour}
	start.signal(first)
	start.signal(second)
	if context.Cause(ctx) != first {
		t.Errorf("ended by %v", context.Cause(ctx))
	}
	var given []time.Duration
	run := &ending{stop: stop, grace: time.Hour}
	run.begin(func(_ error, grace time.Duration) bool { given = append(given, grace); return true })
	run.signal(first)
	run.signal(second)
	if !slices.Equal(given, []time.Duration{time.Hour, 0}) {
		t.Errorf("grace times %v", given)
	}
}
