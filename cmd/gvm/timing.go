package main

import (
	"fmt"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// timing notes when each phase of a run was over, for --timing. A nil one notes
// nothing. Its methods may be called from any goroutine.
type timing struct {
	start time.Time // exec, as far as it can be told

	mu     sync.Mutex
	marks  []mark
	stamps [256]bool // codes that have a mark
}

// maxMarks bounds them for guests that reboot again and again.
const maxMarks = 1000

type mark struct {
	name string
	at   time.Duration // since start
}

// processStart is when the process was started.
var processStart time.Time

// startOfProcess takes the process to be as old as the CPU time that it has used. At
// the beginning of main it has waited for nothing but the pages of its own program, and the
// kernel's own word, /proc/self/stat, has clock ticks of 10 ms.
func startOfProcess() time.Time {
	now := time.Now()
	var used unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &used); err == nil {
		return now.Add(-time.Duration(used.Nano()))
	}
	return now
}

func newTiming() *timing {
	t := &timing{start: processStart}
	t.phase("program start, command line")
	return t
}

// phase notes that name is over.
func (t *timing) phase(name string) {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.add(name)
}

// stamp notes the first time that the guest wrote code to port 0x80: a guest can
// do so any number of times.
func (t *timing) stamp(code byte) {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.stamps[code] {
		t.stamps[code] = true
		t.add(fmt.Sprintf("guest stamp %#02x", code))
	}
}

// add makes a mark. The caller holds mu.
func (t *timing) add(name string) {
	if len(t.marks) < maxMarks {
		t.marks = append(t.marks, mark{name, time.Since(t.start)})
	}
}

// print tells the user all marks, in milliseconds: what each took, and when it was over.
func (t *timing) print() {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	note(fmt.Sprintf("timing %12s %12s", "took, ms", "since exec"))
	last := time.Duration(0)
	for _, m := range t.marks {
		note(strings.TrimRight(fmt.Sprintf("timing %12.3f %12.3f  %s", ms(m.at-last), ms(m.at), m.name), " "))
		last = m.at
	}
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
