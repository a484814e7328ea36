package virtio

import (
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestPlacement: a driver that takes interrupts is served from the core where the same requests
// take less time, and trials of the other come more rarely while they fail.
func TestPlacement(t *testing.T) {
	core, moves := 0, 0
	p := newPlacement()
	p.leave = func() int { moves++; core = 1 - core; return 1 - core }
	p.take = func(c int) { moves++; core = c }
	cost := [2]time.Duration{100, 50} // on each core
	review := func(n int) {
		for range n {
			p.review(false, false, cost[core])
		}
	}
	review(4)
	if core != 1 {
		t.Fatal("the core that takes half of the time was not tried, or was left")
	}
	moves = 0
	review(1 << 16)
	if want := 2 * (1<<16/maxStay + 10); core != 1 && p.before == 0 || moves < 20 || moves > want {
		t.Errorf("%d moves in %d reviews, want 20 to %d, and core 1: %d", moves, 1<<16, want, core)
	}
	cost[1] = 1000 // another process has come
	review(2*maxStay + 2)
	if core != 0 {
		t.Error("it stays on a core that has become slow")
	}
	cost[1] = 81 // not much less than 100
	moves = 0
	for moves < 2 {
		review(1)
	}
	if core != 0 {
		t.Error("it moves for a gain that may be chance")
	}
}

// TestPlacementPolled: a driver that polls is left alone on its core, at once and without trials,
// and one that begins to poll during a trial ends that.
func TestPlacementPolled(t *testing.T) {
	left := 0
	p := newPlacement()
	p.leave = func() int { left++; return 0 }
	p.take = func(int) { t.Error("it goes back to the guest's core") }
	for range 10 * maxStay {
		p.review(false, true, 100)
	}
	if left != 0 {
		t.Errorf("it left a core that it did not share %d times", left)
	}
	if p.review(true, true, 100); left != 1 {
		t.Errorf("it left the guest's core %d times, want 1", left)
	}
	for range 3 {
		p.review(false, false, 100)
	}
	if p.review(false, true, 1000); p.before != 0 || left != 2 {
		t.Errorf("a trial at %v goes on although the driver polls; %d moves, want 2", p.before, left)
	}
}

// TestPlacementQuiet: looks are tried with the core. They are off on the core of the guest's CPU,
// and a trial that fails leaves them as they were.
func TestPlacementQuiet(t *testing.T) {
	core := 0
	p := newPlacement()
	p.leave = func() int { core = 1 - core; return 1 - core }
	p.take = func(c int) { core = c }
	const guest = 1 // core of the guest's CPU
	cost := [2]time.Duration{100, 50}
	trial := func() {
		for !p.review(core == guest, false, cost[core]) {
		}
		if p.quiet != (core == guest) {
			t.Errorf("on trial on core %d it is quiet: %v", core, p.quiet)
		}
		p.review(core == guest, false, cost[core])
		if core != guest {
			t.Fatal("it left the better core")
		}
	}
	if trial(); !p.quiet {
		t.Error("it looks on the core of the guest's CPU")
	}
	if trial(); !p.quiet {
		t.Error("it looks on the core of the guest's CPU after a trial of another")
	}
}

// TestCores: the thread moves, and may run on all its cores again.
func TestCores(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var before, after unix.CPUSet
	if err := unix.SchedGetaffinity(0, &before); err != nil {
		t.Fatal(err)
	}
	core := leaveCore()
	if alone := before.Count() == 1; alone != (core < 0) {
		t.Errorf("%d cores: it left core %d", before.Count(), core)
	}
	takeCore(max(core, 0))
	takeCore(1 << 20) // none that exists
	if err := unix.SchedGetaffinity(0, &after); err != nil || after != before {
		t.Errorf("it may run on %v afterwards (%v), want %v", after, err, before)
	}
}
