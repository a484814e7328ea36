package main

import (
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"gvm/vmm"
)

var timingLine = regexp.MustCompile(`(?m)^gvm: timing +(\d+\.\d{3}) +(\d+\.\d{3})  (.*)$`)

// TestTiming: every phase is printed, in order, and the parts add up to the whole.
func TestTiming(t *testing.T) {
	began := time.Now()
	r := gvmRuns(t, command(t, "run", "--timing"))
	total := ms(time.Since(began))
	if r.status != 0 {
		t.Fatalf("status %d\n%s", r.status, r.errs)
	}
	wantPhases(t, r.errs, total, "program start, command line", "files, disks, control socket",
		"ACPI tables, kernel, initrd", "virtual machine and memory", "platform", "PCI devices", "CPUs", vmm.Entered,
		"the guest's run")
	if r := gvmRuns(t, command(t, "run")); strings.Contains(r.errs, "timing") {
		t.Errorf("unasked:\n%s", r.errs)
	}
}

// TestTestTiming: gvm test has the phases of the agent too. That of the status port does not tell
// of the command's start.
func TestTestTiming(t *testing.T) {
	began := time.Now()
	r := gvmRuns(t, command(t, "test", "--timing", "-k", exitKernel(t, 3), "--", "sh"))
	total := ms(time.Since(began))
	if r.status != 3 {
		t.Fatalf("status %d\n%s", r.status, r.errs)
	}
	wantPhases(t, r.errs, total, "program start, command line", "kernel, command, agent", "ACPI tables, kernel, initrd",
		"virtual machine and memory", "platform", "PCI devices", "CPUs", vmm.Entered, "the agent's hello",
		"the command's end", "the guest's end")
}

// wantPhases fails the test unless standard error has the phases, whose parts add up to the whole,
// and the last ends within total milliseconds.
func wantPhases(t *testing.T, errs string, total float64, want ...string) {
	t.Helper()
	var names []string
	sum, last := 0.0, 0.0
	for _, m := range timingLine.FindAllStringSubmatch(errs, -1) {
		took, err1 := strconv.ParseFloat(m[1], 64)
		at, err2 := strconv.ParseFloat(m[2], 64)
		if err1 != nil || err2 != nil || at < last {
			t.Errorf("%q after %v", m[0], last)
		}
		names = append(names, m[3])
		sum, last = sum+took, at
	}
	if !slices.Equal(names, want) {
		t.Errorf("phases %q, want %q", names, want)
	}
	if diff := sum - last; diff < -0.1 || diff > 0.1 || last > total {
		t.Errorf("the phases add up to %.3f ms, the last ends at %.3f, the process took %.3f", sum, last, total)
	}
}

func TestTimingStamps(t *testing.T) {
	x := newTiming()
	for _, code := range []byte{0x40, 0x41, 0x41, 0x00, 0x40} {
		x.stamp(code)
	}
	var names []string
	for _, m := range x.marks[1:] {
		names = append(names, m.name)
	}
	if want := []string{"guest stamp 0x40", "guest stamp 0x41", "guest stamp 0x00"}; !slices.Equal(names, want) {
		t.Errorf("%q, want %q", names, want)
	}
	for range 2 * maxMarks {
		x.phase("again")
	}
	if len(x.marks) != maxMarks {
		t.Errorf("%d marks", len(x.marks))
	}
	var none *timing
	none.stamp(1)
	none.phase("x")
	none.print()
}

// TestStartOfProcess: --timeout counts from the start of the gvm that entered the jail, if there is
// one, and no word of the environment puts the start into the future.
func TestStartOfProcess(t *testing.T) {
	for _, tt := range []struct {
		started string
		hourAgo bool
	}{
		{strconv.FormatInt(int64(monotonic()-time.Hour), 10), true},
		{strconv.FormatInt(int64(monotonic()+time.Hour), 10), false},
		{"1h", false},
		{"", false},
	} {
		t.Setenv(startedEnv, tt.started)
		got := startOfProcess()
		if age := time.Since(got); age < 0 || (age >= time.Hour) != tt.hourAgo {
			t.Errorf("%s=%s: started %v ago", startedEnv, tt.started, age)
		}
	}
}
