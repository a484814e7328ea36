package vpci_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"gvm/devices/pci/pcitest"
	"gvm/inspect"
)

// TestEvents: the state has what drivers and the device did, from the negotiation of features to a
// reset.
func TestEvents(t *testing.T) {
	dev := scsi(t)
	r := newRig(t, dev, dev)
	cfg := pcitest.CF8(r.bus, 1)
	d := r.attach(cfg, false)
	d.interrupts()
	seen := 0
	happened := func(want ...string) {
		t.Helper()
		n, err := inspect.Group("", r.bus.Inspect()).Read(t.Context(), "pci/00:01.0/virtio/event")
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, e := range slices.Backward(n.Nodes[:len(n.Nodes)-seen]) {
			var values []string
			for _, v := range e.Nodes[:len(e.Nodes)-1] { // without the age
				values = append(values, fmt.Sprint(v.Value))
			}
			got = append(got, strings.Join(values, " "))
		}
		if seen = len(n.Nodes); !slices.Equal(got, want) {
			t.Errorf("events %q, want %q", got, want)
		}
	}
	d.status(0) // of a device that is reset
	happened()
	d.start()
	happened("FEATURES_OK 0x120000000", "DRIVER_OK 3", "active")
	cfg.Write(4, 2, 2)
	cfg.Write(4, 2, 6)
	happened("stopped", "active")
	dev.active.Broken(errors.New("a loop in queue 2"))
	dev.active.Broken(errors.New("and in queue 3"))
	d.status(0)
	happened("DEVICE_NEEDS_RESET a loop in queue 2", "reset")
	dev.startErr = errors.New("no such disk")
	d.start()
	happened("FEATURES_OK 0x120000000", "DRIVER_OK 3", "DEVICE_NEEDS_RESET activate: no such disk")
	d.status(0x8f)
	d.status(0x8f)
	happened("FAILED")
	dev.stopErr = errors.New("stuck")
	d.status(0)
	happened("reset stuck")
}
