package machine

import (
	"context"
	"fmt"
	"sync"
	"time"

	"gvm/panics"
)

// stopper ends a run, at once or by the power button and a grace time.
type stopper struct {
	pauser powerButton
	stop   context.CancelCauseFunc
	note   func(string)

	mu       sync.Mutex
	timer    *time.Timer // nil: the guest has not been asked
	deadline time.Time   // when timer fires
}

// powerButton is the part of *vmm.Pauser that a stopper uses.
type powerButton interface {
	Paused() bool
	PowerButton() bool // presses the button, and reports whether the guest listens
}

// ask presses the power button, and stops the machine when the guest has not powered itself off
// within grace. A second call can only shorten the time. Without a grace time, or when the guest is
// paused or has no driver for the button, ask stops the machine at once and returns false.
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
	s.timer = time.AfterFunc(grace, panics.Func(
		func() { s.stop(fmt.Errorf("%w; the guest did not power off within %v", cause, grace)) }))
	return true
}

// close cancels the grace time after the machine has ended.
func (s *stopper) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.timer != nil {
		s.timer.Stop()
	}
}
