package main

import (
	"runtime"
	"strconv"
	"testing"
)

// TestAddProcs: there is a spare processor, but not if the user has set their number.
func TestAddProcs(t *testing.T) {
	before := runtime.GOMAXPROCS(0)
	defer runtime.GOMAXPROCS(before)
	t.Setenv("GOMAXPROCS", "")
	addProcs()
	if n := runtime.GOMAXPROCS(0); n != before+1 {
		t.Errorf("%d processors, want %d", n, before+1)
	}
	t.Setenv("GOMAXPROCS", strconv.Itoa(before))
	runtime.GOMAXPROCS(before)
	addProcs()
	if n := runtime.GOMAXPROCS(0); n != before {
		t.Errorf("%d processors, want the user's %d", n, before)
	}
}
