package scsi

import "sync"

// laterFlush is the flush of commands with IMMED, which have been answered and have left the task
// set. However many there are, one flush runs, and one to come covers all that were answered
// meanwhile.
type laterFlush struct {
	mu    sync.Mutex
	whose map[NexusID]bool // whose commands the flush to come is for
	done  chan struct{}    // closed when there is no more to flush; nil: nothing runs
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
	go func() { // Detach and Target.End wait for it
		for ids := u.later.next(); ids != nil; ids = u.later.next() {
			if err := u.flush(); err != nil {
				sense := senseOf(err)
				sense.Deferred = true
				u.set.attention(sense, func(id NexusID) bool { return ids[id] })
			}
		}
	}()
}

// next returns whose commands the next flush is for; without any it ends the work.
func (l *laterFlush) next() (ids map[NexusID]bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if ids, l.whose = l.whose, nil; ids == nil {
		close(l.done)
		l.done = nil
	}
	return ids
}

// ended returns what is closed when nothing is left to flush.
func (l *laterFlush) ended() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.done == nil {
		return closedChannel
	}
	return l.done
}
