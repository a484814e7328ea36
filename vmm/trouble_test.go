package vmm

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

// TestTroubles has a guest break its rings in ever new ways: the number of messages printed and
// kept stays small.
func TestTroubles(t *testing.T) {
	var notes []string
	m := machine{cfg: Config{Note: func(s string) { notes = append(notes, s) }}}
	const times = 100000
	for i := range times {
		m.deviceTrouble(fmt.Errorf("queue 2: indirect table: no memory at %#x", i))
		m.deviceTrouble(errors.New("always the same"))
	}
	if n := len(m.troubles.told); n != maxTroubles {
		t.Errorf("%d texts are kept, want %d", n, maxTroubles)
	}
	if len(notes) != maxTroubles || notes[0] == notes[1] {
		t.Errorf("%d notes, want %d: %q", len(notes), maxTroubles, notes[:2])
	}
	m.tellMore()
	if last, want := notes[len(notes)-1], fmt.Sprint(times-(maxTroubles-1)); !strings.Contains(last, want+" more") {
		t.Errorf("the last note is %q, want the number %s", last, want)
	}
}
