package machine

import (
	"fmt"
	"sync"
	"time"
)

// A guest can cause at most this many notes at once, and then one in each interval.
const (
	notesAtOnce = 40
	noteEvery   = time.Minute
)

// guestNotes limits the rate of notes that a guest can cause, also by rebooting. It counts the
// dropped ones and reports their number with the next note, or at the end.
type guestNotes struct {
	say func(string)

	mu     sync.Mutex
	used   time.Duration // by the next notes, as in a leaky bucket
	last   time.Time
	silent int // notes dropped since the last one
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

// more reports the number of dropped notes. The caller holds mu.
func (g *guestNotes) more() {
	if g.silent > 0 {
		g.say(fmt.Sprintf("and %d more notes, of which there were too many", g.silent))
		g.silent = 0
	}
}

// close reports the notes dropped at the end.
func (g *guestNotes) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.more()
}
