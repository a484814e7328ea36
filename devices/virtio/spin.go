package virtio

import (
	"runtime"
	"time"
)

// minSpin is what a spin begins with.
const minSpin = 4 * time.Microsecond

// spin decides how long to look for the next event before sleeping until it comes.
// A sleep costs both sides: the doorbell is an exit from the guest, and waking up
// takes the host a while. While events come within max of each other a look finds
// them; once they do not, it ends with the next one, and the core is free.
type spin struct {
	max time.Duration // 0: never
	now time.Duration
}

// newSpin looks for max at most. On one CPU nobody looks: whoever it waits for could not run.
func newSpin(max time.Duration) spin {
	if runtime.NumCPU() == 1 {
		max = 0
	}
	return spin{max: max}
}

// until calls event until it says true, but no longer than pays, and says whether it did.
func (s *spin) until(event func() bool) bool {
	if s.now == 0 {
		return false
	}
	for start := time.Now(); time.Since(start) < s.now; {
		if event() {
			return true
		}
	}
	return false
}

// waited is told how long the event took after a sleep began.
func (s *spin) waited(d time.Duration) {
	switch {
	case s.max == 0:
	case s.now+d > s.max:
		s.now = 0
	default:
		s.now = min(max(2*s.now, minSpin), s.max)
	}
}
