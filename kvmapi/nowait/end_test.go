package nowait_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"gvm/kvmapi/nowait"
)

// TestLeft: waits behind the end of a context have one time together, whichever is the first to
// look at it, and each a little in any case. Without an end they have their own.
func TestLeft(t *testing.T) {
	const most = 700 * time.Millisecond
	for name, look := range map[string]func(ctx context.Context) time.Duration{
		"of the context": func(ctx context.Context) time.Duration { return nowait.Left(ctx, most) },
		"of a part of it": func(ctx context.Context) time.Duration {
			part, cancel := context.WithTimeout(ctx, time.Hour)
			defer cancel()
			return nowait.Left(part, most)
		},
		"of another one": func(ctx context.Context) time.Duration { return nowait.Left(nowait.WithOneEnd(ctx), most) },
	} {
		synctest.Test(t, func(t *testing.T) {
			parent, cancel := context.WithCancel(t.Context())
			ctx := nowait.WithOneEnd(parent)
			want := func(want time.Duration) {
				t.Helper()
				if got := look(ctx); got != want {
					t.Errorf("%s: %v, want %v", name, got, want)
				}
			}
			time.Sleep(time.Hour)
			want(most)
			cancel()
			synctest.Wait()
			time.Sleep(50 * time.Millisecond)
			want(most)
			time.Sleep(500 * time.Millisecond)
			want(200 * time.Millisecond)
			time.Sleep(time.Hour)
			want(50 * time.Millisecond)
			if got := nowait.Left(ctx, time.Millisecond); got != time.Millisecond {
				t.Errorf("%s: %v of a millisecond", name, got)
			}
			nowait.Extend(ctx)
			time.Sleep(500 * time.Millisecond)
			want(250 * time.Millisecond)
			inside := func(want time.Duration) {
				t.Helper()
				if got := nowait.LeftInside(ctx, 400*time.Millisecond); got != want {
					t.Errorf("inside: %v, want %v", got, want)
				}
			}
			inside(100 * time.Millisecond)
			nowait.Extend(ctx)
			inside(400 * time.Millisecond)
			time.Sleep(300 * time.Millisecond)
			inside(300 * time.Millisecond)
			time.Sleep(time.Hour)
			inside(50 * time.Millisecond)
			if got := nowait.Left(parent, most); got != most {
				t.Errorf("%v of a context without one end", got)
			}
		})
	}
	// A part that ends alone begins the time of all.
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		ctx = nowait.WithOneEnd(ctx)
		part, end := context.WithCancel(ctx)
		end()
		nowait.Left(part, most)
		time.Sleep(650 * time.Millisecond)
		if got := nowait.Left(ctx, most); got != most {
			t.Errorf("%v before the end", got)
		}
		cancel()
		if got := nowait.Left(ctx, most); got != 100*time.Millisecond {
			t.Errorf("%v after the end", got)
		}
	})
}
