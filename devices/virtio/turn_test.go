package virtio

import (
	"slices"
	"testing"
	"time"
)

// TestTurn: a turn ends after maxTurn, and the next one begins then.
func TestTurn(t *testing.T) {
	var now time.Duration
	var ends []time.Duration
	turn := turn{yield: func() { ends = append(ends, now) }}
	for ; now < 4*maxTurn; now += time.Millisecond {
		turn.at(now)
	}
	if want := []time.Duration{maxTurn, 2 * maxTurn, 3 * maxTurn}; !slices.Equal(ends, want) {
		t.Errorf("turns end at %v, want %v", ends, want)
	}
	now = time.Hour // a guest that sends nothing
	turn.at(now)
	turn.at(now + maxTurn - 1)
	if len(ends) != 4 {
		t.Errorf("%d turns, want one that takes an hour", len(ends)-3)
	}
}
