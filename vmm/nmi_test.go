package vmm

import (
	"context"
	"errors"
	"testing"
	"time"
)

// TestNMI: an NMI reaches a CPU that halts with interrupts off. Without a handler it is a triple
// fault.
func TestNMI(t *testing.T) {
	i, c := &Inspector{}, &shownConsole{wrote: make(chan struct{}, 1)}
	if err := i.NMI(t.Context()); err != ErrNotRunning {
		t.Errorf("before the start: %v", err)
	}
	raised := make(chan error, 1)
	go func() {
		c.waitFor("halts")
		raised <- i.NMI(t.Context())
	}()
	out, _ := script{}.print("halts").run(t, false, Config{CPUs: 2, Inspector: i, Console: c})
	if err := <-raised; err != nil || out.Ending != GuestCrashed || !out.tripleFault {
		t.Errorf("%v; the guest %s: %v", err, out.Ending, out.Err)
	}
	if err := i.NMI(t.Context()); err != ErrNotRunning {
		t.Errorf("after the end: %v", err)
	}
}

// TestNMIOnBusyHost: an NMI waits for a vCPU whose thread the host does not run for a while.
func TestNMIOnBusyHost(t *testing.T) {
	i, entered, runs := &Inspector{}, make(chan struct{}), make(chan struct{})
	raised := make(chan error, 1)
	go func() {
		defer close(runs)
		<-entered
		go func() { raised <- i.NMI(t.Context()) }()
		select {
		case err := <-raised:
			t.Errorf("it does not wait: %v", err)
			raised <- nil
		case <-time.After(2 * inspectTime):
		}
	}()
	out, _ := script{}.print("halts").run(t, false, Config{Inspector: i, Phase: func(name string) {
		if name == Entered { // on the vCPU's thread
			close(entered)
			<-runs
		}
	}})
	if err := <-raised; err != nil || out.Ending != GuestCrashed {
		t.Errorf("%v; the guest %s: %v", err, out.Ending, out.Err)
	}
}

// TestSysRq: a guest that does not read COM1 holds up a key no longer than its context, nor does a
// paused one.
func TestSysRq(t *testing.T) {
	p, c, stop := pausable(t, "spin", 1)
	c.waitFor("spinning")
	late := errors.New("late")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(late)
	if err := p.SysRq(ctx, 'w'); err != late {
		t.Errorf("not taken: %v", err)
	}
	if err := p.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := p.SysRq(t.Context(), 'w'); err != ErrPaused {
		t.Errorf("paused: %v", err)
	}
	if err := p.Resume(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error)
	go func() { ended <- p.SysRq(t.Context(), 'w') }()
	stop()
	if err := <-ended; err != ErrNotRunning {
		t.Errorf("at the end: %v", err)
	}
}
