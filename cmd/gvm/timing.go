package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// timing records when each phase of a run ended, for --timing. A nil *timing records nothing. Its
// methods may be called from any goroutine.
type timing struct {
	start time.Time // exec, as precisely as known

	mu     sync.Mutex
	marks  []mark
	stamps [256]bool // codes already marked
}

// maxMarks bounds the marks of guests that reboot again and again.
const maxMarks = 1000

type mark struct {
	name string
	at   time.Duration // since start
}

// processStart is the start time of the process.
var processStart time.Time

// startedEnv names the environment variable by which a gvm that enters a jail tells the one in it
// when it started itself: nanoseconds of CLOCK_MONOTONIC.
const startedEnv = "GVM_STARTED"

// startOfProcess returns the time in startedEnv, or derives the start time from the CPU time that
// the process has used. At the beginning of main it has waited only for the pages of its own
// program. The start time in /proc/self/stat has clock ticks of 10 ms, which is too coarse.
func startOfProcess() time.Time {
	now := time.Now()
	var used unix.Timespec
	if started, err := strconv.ParseInt(os.Getenv(startedEnv), 10, 64); err == nil {
		if age := monotonic() - time.Duration(started); age >= 0 {
			return now.Add(-age)
		}
	}
	if err := unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &used); err == nil {
		return now.Add(-time.Duration(used.Nano()))
	}
	return now
}

// monotonic returns CLOCK_MONOTONIC, which all processes of the host share.
func monotonic() time.Duration {
	var now unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &now) // it cannot fail: clock_gettime(2)
	return time.Duration(now.Nano())
}

// sinceStart returns the age of the process, which --timeout counts too.
func sinceStart() time.Duration {
	if processStart.IsZero() {
		return 0
	}
	return time.Since(processStart)
}

func newTiming() *timing {
	t := &timing{start: processStart}
	t.phase("program start, command line")
	return t
}

// phase records that the phase name has ended.
func (t *timing) phase(name string) {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.add(name)
}

// stamp records the guest's first write of code to port 0x80. A guest can write any number of
// times.
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

// print prints all marks: the duration and the end of each phase, in milliseconds.
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
