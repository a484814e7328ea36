package machine

import (
	"sync"
	"testing"

	"gvm/devices/serial"
)

// guestInput is the input of a machine. A nil channel takes nothing.
type guestInput chan string

func (g guestInput) Write(p []byte) (int, error) {
	if g == nil {
		return 0, serial.ErrStopped
	}
	g <- string(p)
	return len(p), nil
}

func (g guestInput) Break() error {
	_, err := g.Write([]byte("break"))
	return err
}

// TestBreakQueue: a break that one machine did not take goes to the next one, and breaks are
// bounded as characters are.
func TestBreakQueue(t *testing.T) {
	q, drop := NewInputQueue(), func() bool { return true }
	for range maxQueued + 1000 {
		q.Put(nil, drop)
	}
	if n := len(q.queue); n > maxQueued {
		t.Errorf("%d breaks wait", n)
	}
	q.queue, q.queued = nil, 0
	q.Put(nil, drop)
	q.Put([]byte("g"), drop)
	var feed sync.WaitGroup
	feed.Go(q.Feed)
	q.Connect(guestInput(nil))
	q.mu.Lock()
	for q.to != nil {
		q.change.Wait()
	}
	q.mu.Unlock()
	next := make(guestInput)
	q.Connect(next)
	for _, want := range []string{"break", "g"} {
		if got := <-next; got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	q.Close()
	feed.Wait()
}
