package vpci_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"runtime"
	"testing"
	"time"

	"gvm/devices/pci"
	"gvm/devices/pci/pcitest"
)

// newWiredRig also returns the levels that the line of its slot is set to.
func newWiredRig(t *testing.T, dev *device) (*rig, <-chan bool) {
	t.Helper()
	levels := make(chan bool, 1000)
	return rigWith(t, dev, dev, func(slot int) pci.Line {
		return pci.Line{IRQ: byte(10 + slot), Set: func(level bool) { levels <- level }}
	}), levels
}

// level checks the changes of a line, the last of which may come from a goroutine.
func level(t *testing.T, what string, levels <-chan bool, want ...bool) {
	t.Helper()
	for _, w := range want {
		select {
		case got := <-levels:
			equal(t, what, got, w)
		case <-time.After(10 * time.Second):
			t.Fatalf("%s: the line does not become %v", what, w)
		}
	}
	if len(levels) > 0 {
		t.Errorf("%s: the line becomes %v", what, <-levels)
	}
}

// followers waits until n goroutines wait for events without MSI-X.
func followers(t *testing.T, what string, n int) {
	t.Helper()
	stacks := make([]byte, 1<<20)
	for range 1000 {
		if bytes.Count(stacks[:runtime.Stack(stacks, true)], []byte("vpci.(*intx).run(")) == n {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("%s: there are not %d goroutines", what, n)
}

// TestINTx drives a device without MSI-X (virtio 1.3, 4.1.5.3, 4.1.5.4).
func TestINTx(t *testing.T) {
	dev := scsi(t)
	r, levels := newWiredRig(t, dev)
	cfg := pcitest.CF8(r.bus, 1)
	equal(t, "interrupt line and pin", cfg.Read(0x3c, 2), 0x010b)
	cfg.Write(0x3c, 2, 0xffff)
	equal(t, "the line is the guest's to write, the pin is not", cfg.Read(0x3c, 2), 0x01ff)
	d := r.attach(cfg, false)
	status := func() uint64 { return cfg.Read(6, 2) & 8 }
	start := func() {
		t.Helper()
		d.set(driverFeatureSelect, 4, 1)
		d.set(driverFeature, 4, 1)
		d.setQueue(0, 64, 0xffff, 0x1000, 0x2000, 0x3000)
		d.setQueue(2, 64, 0xffff, 0x1000, 0x2000, 0x3000)
		equal(t, "status", d.status(15), 15)
	}
	start()
	for _, q := range []int{0, 2} {
		dev.active.Queues[q].Call.Signal()
		level(t, "used buffers", levels, true)
		equal(t, "interrupt status", status(), 8)
		equal(t, "ISR status", d.load(d.isr, 1), 1)
		level(t, "read", levels, false)
		equal(t, "interrupt status", status(), 0)
	}
	dev.active.ConfigChanged()
	level(t, "configuration", levels, true)
	dev.active.Queues[0].Call.Signal()
	equal(t, "both", d.load(d.isr, 1), 3)
	level(t, "read", levels, false)

	cfg.Write(4, 2, 0x406)
	dev.active.ConfigChanged()
	level(t, "disabled by the command register", levels)
	equal(t, "interrupt status when disabled", status(), 8)
	cfg.Write(4, 2, 0x006)
	level(t, "enabled again", levels, true)
	cfg.Write(4, 2, 0x406)
	level(t, "disabled while asserted", levels, false)
	cfg.Write(4, 2, 0x006)
	level(t, "enabled again", levels, true)

	old := dev.active
	equal(t, "reset", d.status(0), 0)
	level(t, "reset", levels, false)
	old.Queues[0].Call.Signal()
	old.ConfigChanged()
	start()
	level(t, "an earlier activation's signals", levels)
	dev.active.ConfigChanged()
	level(t, "asserted", levels, true)
	cfg.Write(4, 2, 0x002)
	level(t, "bus mastering off, which concerns memory", levels)
	cfg.Write(4, 2, 0x000)
	level(t, "a new owner", levels, false)
	cfg.Write(4, 2, 0x002)
	equal(t, "ISR status", d.load(d.isr, 1), 0)
	r.logged("vpci: dev: bus mastering and memory decoding were turned off")
	cfg.Write(4, 2, 0x006)
	d.status(0)
	start()
	dev.active.ConfigChanged()
	level(t, "asserted", levels, true)
	if err := r.v.Function().Reset(); err != nil {
		t.Error(err)
	}
	level(t, "function reset", levels, false)
	r.logged()
}

// TestINTxMSIX enables and disables MSI-X while the device works.
func TestINTxMSIX(t *testing.T) {
	t.Cleanup(func() { followers(t, "after Close", 0) })
	dev := scsi(t)
	r, levels := newWiredRig(t, dev)
	cfg := pcitest.ECAM(r.bus, 1)
	d := r.attach(cfg, false)
	c := pcitest.Caps(cfg, 0x11)[0]
	var earlier func() // signals the queue of the last round
	for round := range 3 {
		what := func(s string) string { return fmt.Sprintf("round %d: %s", round, s) }
		d.interrupts()
		equal(t, what("status"), d.start(), 15)
		if round == 0 {
			followers(t, "MSI-X", 0)
		}
		call := dev.active.Queues[2].Call
		earlier = func() { call.Signal() }
		call.Signal()
		dev.active.ConfigChanged()
		r.took(what("MSI-X"), 0x40, 0x42)
		level(t, what("MSI-X"), levels)
		equal(t, what("ISR status with MSI-X"), d.load(d.isr, 1), 0)

		cfg.Write(c+2, 2, 0xc000) // masked, the event is pending
		call.Signal()
		level(t, what("masked"), levels)
		equal(t, what("interrupt status"), cfg.Read(6, 2)&8, 0)
		cfg.Write(c+2, 2, 0x8000)
		r.took(what("unmasked"), 0x42)

		cfg.Write(c+2, 2, 0)
		call.Signal()
		level(t, what("MSI-X disabled"), levels, true)
		equal(t, what("ISR status"), d.load(d.isr, 1), 1)
		level(t, what("read"), levels, false)
		dev.active.ConfigChanged()
		level(t, what("configuration"), levels, true)
		cfg.Write(c+2, 2, 0x8000)
		level(t, what("MSI-X takes INTx# away"), levels, false)
		call.Signal()
		r.took(what("MSI-X again"), 0x42)
		cfg.Write(c+2, 2, 0)
		equal(t, what("ISR status differs from that before MSI-X"), d.load(d.isr, 1), 0)
		level(t, what("nor is the line"), levels)
		equal(t, what("reset"), d.status(0), 0)
	}
	d.set(driverFeatureSelect, 4, 1)
	d.set(driverFeature, 4, 1)
	d.setQueue(2, 64, 2, 0x1000, 0x2000, 0x3000)
	earlier()
	equal(t, "started without MSI-X", d.status(15), 15)
	level(t, "an earlier activation's signals", levels)
	equal(t, "its ISR status", d.load(d.isr, 1), 0)
	followers(t, "MSI-X was disabled", 1)
	r.logged()
}

// TestINTxNewOwner: messages that wait for bus mastering are their driver's. A new owner that
// disables MSI-X gets no INTx# from the device, whose line another device may share.
func TestINTxNewOwner(t *testing.T) {
	dev := scsi(t)
	r, levels := newWiredRig(t, dev)
	cfg := pcitest.ECAM(r.bus, 1)
	d := r.attach(cfg, false)
	c := pcitest.Caps(cfg, 0x11)[0]
	d.interrupts()
	d.start()
	a := dev.active
	dev.stops = func(context.Context) error { return a.Queues[0].Call.Signal() } // the last request
	cfg.Write(4, 2, 2)
	a.ConfigChanged()
	cfg.Write(4, 2, 0)
	r.logged("vpci: dev: bus mastering and memory decoding were turned off")
	cfg.Write(c+2, 2, 0)
	cfg.Write(4, 2, 6)
	followers(t, "without MSI-X", 1)
	equal(t, "ISR status", d.load(d.isr, 1), 0)
	level(t, "a new owner", levels)
	equal(t, "interrupt status", cfg.Read(6, 2)&8, 0)
	r.took("a new owner")
}

// TestINTxStopFails: the driver of a device that does not stop learns by INTx# that it must reset
// it. A new owner has an idle line.
func TestINTxStopFails(t *testing.T) {
	dev := scsi(t)
	r, levels := newWiredRig(t, dev)
	cfg := pcitest.ECAM(r.bus, 1)
	d := r.attach(cfg, false)
	d.start()
	dev.stops = func(context.Context) error { return errors.New("no stop") }
	cfg.Write(4, 2, 2)
	level(t, "a device that broke", levels, true)
	equal(t, "ISR status", d.load(d.isr, 1), 2)
	level(t, "read", levels, false)
	r.logged("vpci: dev: stop: no stop")

	cfg.Write(4, 2, 6)
	d.start()
	cfg.Write(4, 2, 2)
	level(t, "a device that broke", levels, true)
	cfg.Write(4, 2, 0)
	level(t, "a new owner", levels, false)
	r.logged("vpci: dev: stop: no stop")
}
