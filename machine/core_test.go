package machine_test

import (
	"errors"
	"io"
	"testing"

	"gvm/machine"
	"gvm/vmm"
)

// TestCore: the machine is paused while a core of it is read, and only then; a reader that stalls
// delays no end.
func TestCore(t *testing.T) {
	g := launch(t, "echo")
	g.expect("ready", 1)
	core, err := g.Core(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(core, make([]byte, 1)); err != nil || !g.Paused() {
		t.Errorf("paused %v, %v", g.Paused(), err)
	}
	if err := g.Resume(); err != machine.ErrDumping {
		t.Errorf("resume: %v", err)
	}
	if _, err := g.Core(t.Context()); err != machine.ErrDumping {
		t.Errorf("twice: %v", err)
	}
	if n, err := io.Copy(io.Discard, core); err != nil || n < 1<<10 || g.Paused() {
		t.Errorf("%d bytes, %v, paused %v", n, err, g.Paused())
	}
	if err := g.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	if core, err = g.Core(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, core); err != nil || !g.Paused() {
		t.Errorf("paused before: %v, paused %v", err, g.Paused())
	}
	if err := g.Resume(); err != nil {
		t.Error(err)
	}
	if core, err = g.Core(t.Context()); err != nil {
		t.Fatal(err)
	}
	g.stop(errStopped)
	if out := g.wait(); out.Ending != vmm.Stopped {
		t.Errorf("%+v", out)
	}
	if _, err := io.Copy(io.Discard, core); !errors.Is(err, vmm.ErrNotRunning) {
		t.Errorf("cut short: %v", err)
	}
	if _, err := g.Core(t.Context()); !errors.Is(err, vmm.ErrNotRunning) {
		t.Errorf("after the end: %v", err)
	}
}
