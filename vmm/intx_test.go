package vmm

import (
	"slices"
	"testing"
)

// TestINTxLine: a line that slots share is high while one of them asserts it.
func TestINTxLine(t *testing.T) {
	var levels []bool
	l := intxLine{set: func(level bool) { levels = append(levels, level) }}
	for _, level := range []bool{true, true, false, true, false, false, true, false} {
		l.drive(level)
	}
	if want := []bool{true, false, true, false}; !slices.Equal(levels, want) {
		t.Errorf("levels %v, want %v", levels, want)
	}
}
