package machine

import (
	"context"
	"errors"
	"testing"
	"time"
)

// fakeButton is a guest that listens to its power button.
type fakeButton struct {
	paused  bool
	presses int
}

func (f *fakeButton) Paused() bool      { return f.paused }
func (f *fakeButton) PowerButton() bool { f.presses++; return true }

// TestStopTwice: of two requests to stop a machine, the one that gives the guest less time counts.
func TestStopTwice(t *testing.T) {
	t.Parallel()
	first, second := errors.New("first"), errors.New("second")
	for _, tt := range []struct {
		name   string
		do     func(s *stopper) bool // reports whether the guest has time
		asked  bool
		stops  error         // the immediate cause, or nil
		within time.Duration // the guest's remaining time, without stops
	}{
		{"longer", func(s *stopper) bool { s.ask(first, time.Hour); return s.ask(second, 2*time.Hour) },
			true, nil, time.Hour},
		{"shorter", func(s *stopper) bool { s.ask(first, 2*time.Hour); return s.ask(second, time.Hour) },
			true, nil, time.Hour},
		{"much shorter", func(s *stopper) bool { s.ask(first, time.Hour); return s.ask(second, time.Nanosecond) },
			true, second, 0},
		{"force", func(s *stopper) bool { s.ask(first, time.Hour); return s.ask(second, 0) }, false, second, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ctx, stop := context.WithCancelCause(context.Background())
			button := &fakeButton{}
			s := &stopper{pauser: button, stop: stop, note: func(string) {}}
			defer s.close()
			before := time.Now()
			if asked := tt.do(s); asked != tt.asked {
				t.Errorf("asked %v", asked)
			}
			if button.presses != 1 {
				t.Errorf("the button is pressed %d times", button.presses)
			}
			if tt.stops != nil {
				<-ctx.Done()
				if !errors.Is(context.Cause(ctx), tt.stops) {
					t.Errorf("stopped by %v", context.Cause(ctx))
				}
				return
			}
			if at := s.deadline.Add(-tt.within); ctx.Err() != nil || at.Before(before) || at.After(time.Now()) {
				t.Errorf("%v from %v on, %v", tt.within, at, context.Cause(ctx))
			}
		})
	}
}
