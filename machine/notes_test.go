package machine

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

// TestGuestNotes lets a guest cause many notes: few are passed on, and the number of dropped ones
// is reported.
func TestGuestNotes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var said []string
		g := guestNotes{say: func(s string) { said = append(said, s) }}
		told := func(what string, want int, last string) {
			t.Helper()
			if len(said) != want || said[want-1] != last {
				t.Fatalf("%s: %d notes, want %d, the last of them %q", what, len(said), want, last)
			}
			said = nil
		}
		for i := range 100000 {
			g.note(fmt.Sprint("trouble ", i))
		}
		told("at once", notesAtOnce, fmt.Sprint("trouble ", notesAtOnce-1))
		for i := range 1000 { // in two minutes
			time.Sleep(120 * time.Millisecond)
			g.note(fmt.Sprint("later ", i))
		}
		told("later", 4, "later 999")
		g.note("left out")
		time.Sleep(24 * time.Hour)
		for i := range 100 {
			g.note(fmt.Sprint("next day ", i))
		}
		told("the next day", notesAtOnce+1, fmt.Sprint("next day ", notesAtOnce-1))
		g.close()
		told("the end", 1, fmt.Sprintf("and %d more notes, of which there were too many", 100-notesAtOnce))
		g.close()
		if said != nil {
			t.Errorf("%q after the end", said)
		}
	})
}
