package virtio

import (
	"runtime"
	"time"
)

// maxTurn bounds the time for which a queue's thread does not pass through Go's scheduler, whose
// monitor takes 10 ms for too long.
const maxTurn = 5 * time.Millisecond

// turn has a goroutine scheduled now and then that never waits in Go, but in system calls alone.
// The runtime's monitor takes such a goroutine for one that occupies its processor, and takes that
// away at each system call of 20 µs. For that the monitor and another thread wake some ten thousand
// times a second, beside the goroutine's own thread or its guest's.
type turn struct {
	began time.Duration
	yield func()
}

// at ends a turn at now if it has been long.
func (t *turn) at(now time.Duration) {
	if now-t.began >= maxTurn {
		t.began = now
		t.yield()
	}
}

// reschedule passes a goroutine that is locked to its thread through Go's scheduler. While it is
// locked, another thread would have to hand it back.
func reschedule() {
	runtime.UnlockOSThread()
	runtime.Gosched()
	runtime.LockOSThread()
}
