package nowait_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"gvm/kvmapi/nowait"
)

// TestUntil: Until returns the result, also shortly after the end of its context, and does not
// wait longer; a later result is undone.
func TestUntil(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cause, failed := errors.New("told to"), errors.New("failed")
		what := func() string { return "it was done" }
		ctx, cancel := context.WithCancelCause(t.Context())
		undo := func(n int) { t.Errorf("%d is undone", n) }
		if n, err := nowait.Until(ctx, what, func() (int, error) { return 1, nil }, undo); n != 1 || err != nil {
			t.Errorf("done: %d, %v", n, err)
		}
		if _, err := nowait.Until(ctx, what, func() (int, error) { return 0, failed }, undo); err != failed {
			t.Errorf("failed: %v", err)
		}
		cancel(cause)
		if n, err := nowait.Until(ctx, what, func() (int, error) { return 2, nil }, undo); n != 2 || err != nil {
			t.Errorf("done after the end: %d, %v", n, err)
		}
		for _, late := range []error{nil, failed} {
			answer, undone := make(chan struct{}), make(chan int, 1)
			_, err := nowait.Until(ctx, what, func() (int, error) { <-answer; return 3, late }, func(n int) { undone <- n })
			if !errors.Is(err, cause) || err.Error() != "told to while it was done" {
				t.Errorf("not done: %v", err)
			}
			close(answer)
			synctest.Wait()
			if len(undone) > 0 != (late == nil) {
				t.Errorf("%v: %d results are undone", late, len(undone))
			}
		}
	})
}

// TestUntilInside: Until ends before a wait that began at the end, however late it begins itself.
func TestUntilInside(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(nowait.WithOneEnd(t.Context()))
		cancel()
		synctest.Wait()
		end := time.Now().Add(nowait.Left(ctx, time.Second))
		time.Sleep(400 * time.Millisecond)
		never := make(chan struct{})
		defer close(never)
		_, err := nowait.Until(ctx, func() string { return "it was done" },
			func() (int, error) { <-never; return 0, nil }, func(int) {})
		if err == nil || !time.Now().Before(end) {
			t.Errorf("%v, %v behind the end", err, time.Since(end))
		}
	})
}
