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
	// The place is reviewed after so many events, of which fewer than aloneAgain took a sleep.
	reviewed = 256
	// The first ones of a trial do not count: the thread may have waited for its new core.
	settled = 8
	// A trial ends after so many more if they were slower than those before it.
	slower = 16
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
	events    int // since the last review, or settled ones later
	sleeps    int // that they took
	slept     time.Duration
	began     time.Duration // when the first of these events had come
	// interrupts counts the guest's from this queue, and interrupted is the count before those events.
	interrupts  func() uint64
	interrupted uint64
	asked       func() bool // whether the driver has asked for interrupts since the last call
	place       placement
	unsettled   bool // a trial has had no settled events yet
}

// started is for spin.clock: time.Since reads the monotonic clock alone, in half the time of
// time.Now.
var started = time.Now()

// newSpin looks for max at most, and never on one CPU: the other side could not run. interrupts
// counts those that the queue's driver got, and asked reports whether it has asked for any since
// the last call.
func newSpin(max time.Duration, interrupts func() uint64, asked func() bool) spin {
	if runtime.NumCPU() == 1 {
		max = 0
	}
	return spin{max: max, rest: minRest, next: minRest,
		clock:      func() time.Duration { return time.Since(started) },
		switches:   func() int64 { return involuntarySwitches(unix.RUSAGE_THREAD) },
		all:        func() int64 { return involuntarySwitches(unix.RUSAGE_SELF) },
		interrupts: interrupts, asked: asked, place: newPlacement()}
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
			s.event()
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
	s.sleeps++
	switch {
	case s.crowd > 0:
		s.now = 0
		s.crowd--
	case s.place.quiet:
		s.now = 0
	case s.now+d <= s.max:
		s.now = min(max(2*s.now, minSpin), s.max)
	case s.rest <= 0:
		s.now, s.rest, s.next = s.max, s.next, min(2*s.next, maxRest)
	default:
		s.now = 0
	}
	s.event()
}

// event counts an event, and has the place reviewed after as many as tell something: in a trial
// fewer, as the place may be a bad one.
func (s *spin) event() {
	s.events++
	switch trial := s.place.before > 0; {
	case s.sleeps == aloneAgain, s.events == reviewed, trial && s.events == aloneAgain:
		s.account()
	case trial && s.unsettled:
		if s.events == settled {
			s.unsettled = false
			s.count(s.all(), s.interrupts(), s.clock())
		}
	case trial && s.events == slower && s.clock()-s.began > slower*s.place.before:
		s.account()
	}
}

// count begins to count events anew.
func (s *spin) count(switches int64, interrupts uint64, now time.Duration) {
	s.allBefore, s.interrupted, s.events, s.sleeps, s.slept, s.began = switches, interrupts, 0, 0, 0, now
}

// account finds out whether the sleeps since the last call ended on the core of the guest's CPU.
func (s *spin) account() {
	switches, interrupts, now := s.all(), s.interrupts(), s.clock()
	beside := s.sleeps == aloneAgain && switches-s.allBefore >= aloneAgain/sleepsBeside && s.slept <= maxBeside
	if beside {
		s.crowd = max(s.crowd, aloneAgain)
	}
	polled := !s.asked() && interrupts-s.interrupted < uint64(s.events/sleepsBeside)
	ends := s.place.before > 0
	begins := s.place.review(beside, polled, (now-s.began)/time.Duration(s.events))
	if begins && !s.place.quiet && s.crowd <= aloneAgain {
		s.crowd = 0 // it was for the core that the thread has left
	}
	switch {
	case s.place.quiet || s.crowd > 0:
		s.now = 0
	case begins || ends:
		s.now = s.max
	}
	s.unsettled = begins
	s.count(switches, interrupts, now)
}
