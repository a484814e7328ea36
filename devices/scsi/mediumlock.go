package scsi

import "sync"

// mediumLock orders commands that use the medium: one holds it alone, or several share it. It is
// granted in order of arrival. Unlike a sync.RWMutex, a wait for it can be given up, so that
// earlier commands do not delay the abort of a waiting one.
type mediumLock struct {
	mu     sync.Mutex
	shared int
	alone  bool
	queue  list[mediumWait]
}

type mediumWait struct {
	alone bool
	got   chan struct{} // closed when the lock is granted
	node  node[mediumWait]
}

// try takes the lock if it is free, and reports whether it did.
func (l *mediumLock) try(alone bool) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.queue.first == nil && l.take(alone)
}

// take is try that ignores the queue. The caller holds mu.
func (l *mediumLock) take(alone bool) bool {
	switch {
	case l.alone || alone && l.shared > 0:
		return false
	case alone:
		l.alone = true
	default:
		l.shared++
	}
	return true
}

// lock takes the lock, and returns false without it if cut is closed first; a nil cut never is.
func (l *mediumLock) lock(alone bool, cut <-chan struct{}) bool {
	l.mu.Lock()
	if l.queue.first == nil && l.take(alone) {
		l.mu.Unlock()
		return true
	}
	w := &mediumWait{alone: alone, got: make(chan struct{})}
	l.queue.push(&w.node, w)
	l.mu.Unlock()
	select {
	case <-w.got:
		return true
	case <-cut:
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-w.got: // at the same time
		return true
	default:
	}
	l.queue.remove(&w.node)
	l.grant() // those behind it may share the lock now
	return false
}

// unlock releases the lock of lock or try.
func (l *mediumLock) unlock(alone bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if alone {
		l.alone = false
	} else {
		l.shared--
	}
	l.grant()
}

// grant hands the lock on. The caller holds mu.
func (l *mediumLock) grant() {
	for l.queue.first != nil {
		w := l.queue.first.of
		if !l.take(w.alone) {
			return
		}
		l.queue.remove(&w.node)
		close(w.got)
	}
}
