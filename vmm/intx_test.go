package vmm

import (
	"slices"
	"testing"
)

// TestINTxLine: a line that slots share is high while one of them asserts it.
func TestINTxLine(t *testing.T) {
	for again, want := range map[bool][]bool{
		false: {true, false, true, false},
		true:  {true, true, true, true, true, false, true, false}, // edges: another one while the line stays high
	} {
		var levels []bool
		l := intxLine{set: func(level bool) { levels = append(levels, level) }, again: again}
		for _, level := range []bool{true, true, false, true, false, false, true, false} {
			l.drive(level)
		}
		if !slices.Equal(levels, want) {
			t.Errorf("edges %v: levels %v, want %v", again, levels, want)
		}
	}
}
