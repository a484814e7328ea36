package machine_test

import (
	"errors"
	"testing"

	"gvm/inspect"
	"gvm/vmm"
)

// TestInspect reads the state of a machine whose disk is busy for ever.
func TestInspect(t *testing.T) {
	g := launch(t, "sanitize", "null:16T,serial=BUSY")
	g.expect("sanitizing", 1)
	n, err := g.Inspect(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]any{
		"paused": false, "disk/0/storage": "null", "disk/0/serial": "BUSY", "disk/0/size": int64(16 << 40), "disk/0/held": 0,
		"disk/0/sanitize": true, "disk/0/tasks": 1, "disk/0/task/0/command": "SANITIZE, OVERWRITE",
		"disk/0/last/0/command": "TEST UNIT READY", "disk/0/last/0/sense": "NOT READY, sanitize in progress",
		"pci/00:01.0/virtio/device_status": inspect.Hex(15),
	} {
		if got := n.Get(path); got != want {
			t.Errorf("%s is %v (%[2]T), want %v (%[3]T)", path, got, want)
		}
	}
	if commands, ok := n.Get("disk/0/commands").(uint64); !ok || commands < 2 {
		t.Errorf("%v commands", n.Get("disk/0/commands"))
	}
	if _, err := g.Inspect(t.Context(), "disk/7"); err == nil || err.Error() != `no "7" in disk, which has 0` {
		t.Errorf("no disk: %v", err)
	}
	g.stop(errStopped)
	if out := g.wait(); out.Ending != vmm.Stopped {
		t.Errorf("%+v", out)
	}
	if _, err := g.Inspect(t.Context(), "disk"); !errors.Is(err, vmm.ErrNotRunning) {
		t.Errorf("after the end: %v", err)
	}
}
