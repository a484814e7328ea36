package scsi

import (
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
)

// TestMediumLock: a command that holds the lock alone is alone, and the lock is
// free in the end. A grant that is lost hangs the test.
func TestMediumLock(t *testing.T) {
	var l mediumLock
	var shared, alone atomic.Int32
	never, cut := make(chan struct{}), make(chan struct{})
	close(cut)
	var all sync.WaitGroup
	for i := range uint64(8) {
		all.Go(func() {
			r := rand.New(rand.NewPCG(1, i))
			for range 20000 {
				a := r.IntN(4) == 0
				switch r.IntN(3) {
				case 0:
					if !l.try(a) {
						continue
					}
				case 1:
					if !l.lock(a, cut) {
						continue
					}
				default:
					if !l.lock(a, never) {
						t.Error("gave up a wait that nothing cut")
						return
					}
				}
				if a {
					if alone.Add(1) != 1 || shared.Load() != 0 {
						t.Error("not alone")
					}
					alone.Add(-1)
				} else {
					if shared.Add(1); alone.Load() != 0 {
						t.Error("another command holds the lock alone")
					}
					shared.Add(-1)
				}
				l.unlock(a)
			}
		})
	}
	all.Wait()
	if l.state.Load() != 0 || l.alone || l.queue.first != nil {
		t.Errorf("in the end: state %#x, alone %v, waits %v", l.state.Load(), l.alone, l.queue.first != nil)
	}
}

// TestMediumLockOrder: a command that wants the lock alone goes before those that come later to
// share it.
func TestMediumLockOrder(t *testing.T) {
	var l mediumLock
	if !l.try(false) {
		t.Fatal("the lock is not free")
	}
	got := make(chan struct{})
	go func() {
		l.lock(true, nil)
		close(got)
	}()
	for l.try(false) { // until the other one waits
		l.unlock(false)
	}
	l.unlock(false)
	<-got
	if l.try(false) {
		t.Error("shared although another holds it alone")
	}
	l.unlock(true)
	if !l.try(true) {
		t.Error("the lock is not free")
	}
}
