package scsi

import (
	"sync"
	"sync/atomic"
)

// mediumLock orders commands that use the medium: one holds it alone, or several share it. It is
// granted in order of arrival. Unlike a sync.RWMutex, a wait for it can be given up, so that
// earlier commands do not delay the abort of a waiting one.
type mediumLock struct {
	// state counts the commands that share the lock. They change it without mu while ordered is not
	// set, and give the lock back without mu even then.
	state atomic.Int64
	mu    sync.Mutex
	alone bool
	queue list[mediumWait]
}

// ordered is set in mediumLock.state while a command holds the lock alone or waits for it.
const ordered = 1 << 62

type mediumWait struct {
	alone bool
	got   chan struct{} // closed when the lock is granted
	node  node[mediumWait]
}

// try takes the lock if it is free, and reports whether it did.
func (l *mediumLock) try(alone bool) bool {
	if s := l.state.Load(); !alone && s&ordered == 0 && l.state.CompareAndSwap(s, s+1) {
		return true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.settle()
	return l.queue.first == nil && l.take(alone)
}

// take is try that ignores the queue. The caller holds mu, and calls settle.
func (l *mediumLock) take(alone bool) bool {
	switch shared := l.state.Or(ordered) &^ ordered; {
	case l.alone || alone && shared > 0:
		return false
	case alone:
		l.alone = true
	default:
		l.state.Add(1)
	}
	return true
}

// settle lets commands share the lock without mu, if none holds it alone or waits. The caller holds
// mu.
func (l *mediumLock) settle() {
	if !l.alone && l.queue.first == nil {
		l.state.And(^ordered)
	}
}

// lock takes the lock, and returns false without it if cut is closed first; a nil cut never is.
func (l *mediumLock) lock(alone bool, cut <-chan struct{}) bool {
	l.mu.Lock()
	if l.queue.first == nil && l.take(alone) {
		l.settle()
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
	if !alone && l.state.Add(-1)&ordered == 0 {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if alone {
		l.alone = false
	}
	l.grant()
}

// grant hands the lock on. The caller holds mu.
func (l *mediumLock) grant() {
	defer l.settle()
	for l.queue.first != nil {
		w := l.queue.first.of
		if !l.take(w.alone) {
			return
		}
		l.queue.remove(&w.node)
		close(w.got)
	}
}
