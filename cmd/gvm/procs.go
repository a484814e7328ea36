package main

import (
	"os"
	"runtime"
)

// spareProcs is the number of the Go runtime's processors, on which goroutines run, beyond one for
// each CPU.
//
// A thread in a system call keeps its processor as long as another one is idle. If none is, the
// runtime takes it away after 20 µs, starts a thread that finds no work for it, and the first one
// has to get a processor when it returns. A disk's queue thread and a virtual CPU's, which sleep
// for microseconds, have all processors of a host of two CPUs. One more takes some 200 KiB.
const spareProcs = 1

// addProcs adds spareProcs, unless the user has set the number (package runtime).
func addProcs() {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + spareProcs)
	}
}
