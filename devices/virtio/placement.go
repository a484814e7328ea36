package virtio

import "time"

// Reviews between two trials of placement, which double while the trials fail.
const (
	minStay = 8
	maxStay = 1024
)

// placement moves a queue's thread to another core when that serves the guest faster. The scheduler
// balances load, and leaves a thread that mostly sleeps where it is, which on a host whose cores
// are all busy is as often the wrong place as the right one:
//
// A driver that polls is held up by this thread on its CPU's core, and so the thread leaves that.
//
// A CPU that waits for an interrupt frees its core meanwhile, and each wakes the other up more
// cheaply on one core than across two, of which another process has one. Which core is better shows
// by trial: the thread moves, and goes back unless the next requests take much less time each.
//
// On the core of the guest's CPU the thread must not look for events, and on another it may. So a
// trial changes both.
//
// Neither gives the thread more of a core than it had.
type placement struct {
	leave  func() int     // moves the thread to another core, and returns the one it was on, or -1
	take   func(core int) // moves it to that core
	quiet  bool           // the thread must not look for events
	from   int            // core before the trial
	was    bool           // quiet there
	before time.Duration  // that a reviewed request took there; 0: no trial is under way
	stay   int            // reviews until the next trial
	next   int            // stay after a trial that fails
}

// newPlacement begins with a trial soon, as the first place is the scheduler's guess.
func newPlacement() placement {
	return placement{leave: leaveCore, take: takeCore, stay: 2, next: minStay}
}

// review is told whether the thread ran on the core of the guest's CPU, whether the driver polled,
// and how long a request took since the last review. It returns whether a trial begins.
func (p *placement) review(beside, polled bool, took time.Duration) (trial bool) {
	switch {
	case polled:
		if p.before, p.quiet = 0, false; beside {
			p.leave()
		}
	case p.before > 0:
		if took > p.before-p.before/5 {
			p.take(p.from)
			p.quiet = p.was
			p.next = min(2*p.next, maxStay)
		} else {
			p.next = minStay
		}
		p.before, p.stay = 0, p.next
	case p.stay > 0:
		p.stay--
	default:
		if p.from = p.leave(); p.from >= 0 {
			p.before, p.was, trial = took, p.quiet, true
			p.quiet = !p.was && !beside
		}
		p.stay = p.next
	}
	return trial
}
