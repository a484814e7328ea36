package scsi

import (
	"sync"

	"gvm/panics"
)

// laterFlush is the flush of commands with IMMED, which have been answered and have left the task
// set. For any number of them one flush runs, and one queued flush covers all that were answered
// meanwhile.
type laterFlush struct {
	mu    sync.Mutex
	whose map[NexusID]bool // nexuses of the commands that the queued flush is for
	done  chan struct{}    // closed when nothing is left to flush; nil: no flush runs
}

// flushLater begins a flush for a command of id. A failure is a deferred error of that nexus.
func (u *Unit) flushLater(id NexusID) {
	l := &u.later
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.whose == nil {
		l.whose = map[NexusID]bool{}
	}
	l.whose[id] = true
	if l.done != nil {
		return
	}
	l.done = make(chan struct{})
	panics.Go(func() { // Detach and Target.End wait for it
		for ids := u.later.next(); ids != nil; ids = u.later.next() {
			if err := u.flush(); err != nil {
				sense := senseOf(err)
				sense.Deferred = true
				u.set.attention(sense, func(id NexusID) bool { return ids[id] })
			}
		}
	})
}

// next returns the nexuses of the commands that the next flush is for; if there are none, it ends
// the work.
func (l *laterFlush) next() (ids map[NexusID]bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if ids, l.whose = l.whose, nil; ids == nil {
		close(l.done)
		l.done = nil
	}
	return ids
}

// ended returns a channel that is closed when nothing is left to flush.
func (l *laterFlush) ended() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.done == nil {
		return closedChannel
	}
	return l.done
}
