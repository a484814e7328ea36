package every_test

import (
	"fmt"
	"slices"
	"testing"

	"gvm/devices/internal/every"
)

// TestRun has a choice that only one value of another one asks for.
func TestRun(t *testing.T) {
	var got []string
	runs := every.Run(func(pick func(int) int) {
		a, b := pick(2), 0
		if a == 1 {
			b = pick(3)
		}
		got = append(got, fmt.Sprint(a, b, pick(2)))
	})
	want := []string{"0 0 0", "0 0 1", "1 0 0", "1 0 1", "1 1 0", "1 1 1", "1 2 0", "1 2 1"}
	if !slices.Equal(got, want) || runs != len(want) {
		t.Errorf("%d runs: %q", runs, got)
	}
	if runs := every.Run(func(func(int) int) {}); runs != 1 {
		t.Errorf("%d runs without a choice", runs)
	}
}

// TestRunSees has choices that depend on more than the choices before.
func TestRunSees(t *testing.T) {
	for name, choices := range map[string][]int{"fewer values": {3, 2}, "no values": {0}, "fewer choices": {2, 0}} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: unseen", name)
				}
			}()
			run := 0
			every.Run(func(pick func(int) int) {
				if n := choices[run%len(choices)]; n > 0 || run == 0 {
					pick(n)
				}
				run++
			})
		}()
	}
}
