package machine

import (
	"fmt"
	"sync"
	"time"
)

// Notes that a guest can cause: so many at once, and one in so long after them.
const (
	notesAtOnce = 40
	noteEvery   = time.Minute
)

// guestNotes passes notes on that a guest can cause, however often it does, and it may reboot to
// begin anew: what is too much is counted and told with the next one, or at the end.
type guestNotes struct {
	say func(string)

	mu     sync.Mutex
	used   time.Duration // of the next notes, as a leaky bucket
	last   time.Time
	silent int // notes left out since the last one
}

func (g *guestNotes) note(s string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := time.Now()
	g.used, g.last = max(g.used-now.Sub(g.last), 0), now
	if g.used > (notesAtOnce-1)*noteEvery {
		g.silent++
		return
	}
	g.used += noteEvery
	g.more()
	g.say(s)
}

// more tells what was left out. The caller holds mu.
func (g *guestNotes) more() {
	if g.silent > 0 {
		g.say(fmt.Sprintf("and %d more notes, of which there were too many", g.silent))
		g.silent = 0
	}
}

// close tells what was left out at the end.
func (g *guestNotes) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.more()
}
