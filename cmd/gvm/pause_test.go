package main

import (
	"errors"
	"strings"
	"testing"
	"time"

	"gvm/guestmem"
	"gvm/machine"
	"gvm/vmm"
)

// TestPausePatience: a pause that waits for a CPU or a device ends at its bound, and the machine
// runs on.
func TestPausePatience(t *testing.T) {
	t.Parallel()
	entered, free := make(chan struct{}), make(chan struct{})
	m, err := machine.Start(t.Context(), machine.Spec{
		Memory: guestmem.Config{Size: 64 << 20}, GuestArgs: []string{"spin"},
		Phase: func(name string) {
			if name == vmm.Entered { // on the CPU's thread, like a console whose output no program takes
				close(entered)
				<-free
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	<-entered
	r := &remote{Machine: m, pausePatience: time.Millisecond}
	if err := r.Pause(t.Context()); !errors.Is(err, errNotPausing) || m.Paused() {
		t.Errorf("paused %v: %v", m.Paused(), err)
	}
	close(free)
	r.pausePatience = time.Minute
	if err := r.Pause(t.Context()); err != nil || !m.Paused() {
		t.Errorf("paused %v: %v", m.Paused(), err)
	}
	r.info.Name = "vm"
	for want, err := range map[string]error{
		"virtio device 0 (type 8) does not finish the guest's requests: does its storage answer, " +
			"and are iops= and bps= not too low?": &vmm.BusyError{Device: "virtio device 0 (type 8)", Err: errNotPausing},
		"machine vm: it was resumed before it had paused": vmm.ErrResumed,
		"machine vm is not paused":                        vmm.ErrNotPaused,
	} {
		if err := r.pauseError(err); err.Error() != want || exitStatus(refused(err)) != map[bool]int{
			true: exitUsage, false: exitHost}[strings.HasPrefix(want, "machine")] {
			t.Errorf("%v, want %s", err, want)
		}
	}
	m.Stop(errors.New("over"), 0)
	if out, err := m.Wait(); err != nil || out.Ending != vmm.Stopped {
		t.Errorf("%+v, %v", out, err)
	}
}
