package virtio

import (
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

const (
	minSpin = 4 * time.Microsecond // a look begins with it
	minRest = 16                   // sleeps between two trials
	maxRest = 1024
	// A look that was away from its core for more than slice, and gave it up to another thread, waited
	// for that one's time slice. A host that runs another virtual machine there takes as long.
	slice = 500 * time.Microsecond
	// There is no look for crowdRest sleeps after two such waits, if they took a quarter of the time
	// and events did not come within max on average all the same.
	crowdRest = 8192
	// After aloneAgain sleeps on the core of the guest's CPU there are none for as many.
	aloneAgain = 64
	// The core is that of the guest's CPU if the process had one involuntary switch for every
	// sleepsBeside of the last aloneAgain sleeps. Sleeps of more than maxBeside in all tell nothing:
	// meanwhile other threads have had as many.
	sleepsBeside = 2
	maxBeside    = aloneAgain * time.Millisecond
)

// spin decides how long to look for the next event before sleeping until it comes.
// A sleep costs both sides: the doorbell is an exit from the guest, and waking up
// takes the host a while. While events come within max of each other a look finds
// them; once they do not, it ends with the next one, and the core is free.
//
// The cost of the sleep can keep events further apart than max, which would be
// closer without it. So a look of max is tried now and then, more rarely the more often
// that fails. A look that shares its core with another thread is worse than a sleep: the
// other thread may be the CPU of the guest that the event has to come from. When all cores are busy
// the scheduler wakes this thread on that CPU's core, and the look ends before that CPU runs again.
// It shows by that CPU's involuntary switches, one for each sleep of this thread.
type spin struct {
	max   time.Duration        // 0: never
	now   time.Duration        // of the next look
	rest  int                  // sleeps until a trial
	next  int                  // rest after a trial that fails
	crowd int                  // sleeps until the core is looked at as free again
	clock func() time.Duration // since some time before
	// switches counts how often the thread had to give up its core, and switched is the last count.
	switches func() int64
	switched int64
	found    int           // events since the last wait for another thread's slice
	regained time.Duration // when that wait ended
	// all counts the same for all threads of the process, and allBefore is the count before the last
	// sleeps, which took slept.
	all       func() int64
	allBefore int64
	sleeps    int
	slept     time.Duration
	began     time.Duration // when the first of these sleeps ended
	// interrupts counts the guest's from this queue, and interrupted is the count before those sleeps.
	interrupts  func() uint64
	interrupted uint64
	place       placement
}

// started is for spin.clock: time.Since reads the monotonic clock alone, in half the time of
// time.Now.
var started = time.Now()

// newSpin looks for max at most, and never on one CPU: the other side could not run. interrupts
// counts those that the queue's driver got.
func newSpin(max time.Duration, interrupts func() uint64) spin {
	if runtime.NumCPU() == 1 {
		max = 0
	}
	return spin{max: max, rest: minRest, next: minRest,
		clock:      func() time.Duration { return time.Since(started) },
		switches:   func() int64 { return involuntarySwitches(unix.RUSAGE_THREAD) },
		all:        func() int64 { return involuntarySwitches(unix.RUSAGE_SELF) },
		interrupts: interrupts, place: newPlacement()}
}

// involuntarySwitches returns ru_nivcsw of the thread or of the process (getrusage(2)).
func involuntarySwitches(of int) int64 {
	var u unix.Rusage
	if unix.Getrusage(of, &u) != nil {
		return 0
	}
	return u.Nivcsw
}

// until calls event until it says true, but no longer than pays, and reports whether it did.
func (s *spin) until(event func() bool) bool {
	if s.now == 0 {
		return false
	}
	start := s.clock()
	for last := start; last-start < s.now; {
		if event() {
			s.next = minRest
			s.found++
			return true
		}
		now := s.clock()
		if now-last > slice {
			if n := s.switches(); n != s.switched {
				s.switched = n
				s.lost(now, now-last)
			}
		}
		last = now
	}
	return false
}

// lost is told that a look has waited for its core until now.
func (s *spin) lost(now, waited time.Duration) {
	d, soon := now-s.regained, s.max*time.Duration(s.found)
	if s.regained, s.found = now, 0; d < 4*waited && d > soon {
		s.now, s.crowd = 0, crowdRest
	}
}

// waited is told how long the event took after a sleep began.
func (s *spin) waited(d time.Duration) {
	if s.max == 0 {
		return
	}
	s.rest--
	s.slept += d
	if s.sleeps++; s.sleeps == aloneAgain {
		s.account()
	}
	switch {
	case s.crowd > 0:
		s.now = 0
		s.crowd--
	case s.now+d <= s.max:
		s.now = min(max(2*s.now, minSpin), s.max)
	case s.rest <= 0:
		s.now, s.rest, s.next = s.max, s.next, min(2*s.next, maxRest)
	default:
		s.now = 0
	}
}

// account is called once in aloneAgain sleeps, and finds out whether they ended on the core of the
// guest's CPU.
func (s *spin) account() {
	switches, interrupts, now := s.all(), s.interrupts(), s.clock()
	beside := switches-s.allBefore >= aloneAgain/sleepsBeside && s.slept <= maxBeside
	if beside {
		s.crowd = max(s.crowd, aloneAgain)
	}
	// A trial of the core of the guest's CPU must not be of a look there.
	if s.place.review(beside, interrupts-s.interrupted < aloneAgain/sleepsBeside, now-s.began) {
		s.crowd = max(s.crowd, aloneAgain)
	}
	s.allBefore, s.interrupted, s.sleeps, s.slept, s.began = switches, interrupts, 0, 0, now
}
