package lio

import (
	"testing"
	"time"

	"gvm/devices/scsi/trace"
	"gvm/kvmapi/tracefs"
)

// counter counts records and lost records.
type counter struct{ records, lost uint64 }

func (*counter) Now() time.Duration { return 0 }

func (c *counter) Observe(r *trace.Record) {
	if r.Kind == trace.Lost {
		c.lost += r.Count
	} else {
		c.records++
	}
}

// TestTracerKeepsLittle has commands begin that never end, as aborted ones do: they are not kept
// for ever, and are counted as lost.
func TestTracerKeepsLittle(t *testing.T) {
	start, complete, c := &tracefs.Format{ID: 1}, &tracefs.Format{ID: 2}, &counter{}
	tr := &Tracer{to: c, complete: complete, open: map[string][]tracefs.Event{}}
	kept := func() (n int) {
		for _, list := range tr.open {
			n += len(list)
		}
		return n
	}
	const begun = 3*maxOpen + 5
	for range begun {
		tr.event(tracefs.Event{Format: start})
	}
	if n := kept(); n != 5 || c.lost != 3*maxOpen {
		t.Errorf("%d commands are kept and %d lost, want 5 and %d", n, c.lost, 3*maxOpen)
	}
	for range 10 {
		tr.event(tracefs.Event{Format: complete})
	}
	if n := kept(); n != 0 || tr.opened != 0 || c.records != 5 {
		t.Errorf("%d commands are kept (%d), and %d records", n, tr.opened, c.records)
	}
}
