package machine

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// stopper ends a run: by the power button and a grace time, or at once.
type stopper struct {
	pauser powerButton
	stop   context.CancelCauseFunc
	note   func(string)

	mu       sync.Mutex
	timer    *time.Timer // nil: the guest has not been asked
	deadline time.Time   // of the timer
}

// powerButton is what a stopper needs of a *vmm.Pauser.
type powerButton interface {
	Paused() bool
	PowerButton() bool // presses it, and reports whether the guest listens
}

// ask presses the power button, and stops the machine when the guest has not powered itself off
// within grace. A guest that has been asked before keeps the shorter time. The machine is stopped at once,
// and the answer false, without a grace time, or when the guest is paused or has no driver for the button.
func (s *stopper) ask(cause error, grace time.Duration) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	again := s.timer != nil
	if grace <= 0 || s.pauser.Paused() || !again && !s.pauser.PowerButton() {
		s.stop(cause)
		return false
	}
	deadline := time.Now().Add(grace)
	switch {
	case !again:
		s.note(fmt.Sprintf("%v: pressed the guest's power button, which has %v to power off", cause, grace))
	case !deadline.Before(s.deadline):
		return true
	default:
		s.note(fmt.Sprintf("%v: the guest has %v left to power off", cause, grace))
		s.timer.Stop()
	}
	s.deadline = deadline
	s.timer = time.AfterFunc(grace, func() { s.stop(fmt.Errorf("%w; the guest did not power off within %v", cause, grace)) })
	return true
}

// close ends the grace time, once the machine has ended.
func (s *stopper) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.timer != nil {
		s.timer.Stop()
	}
}
