package vpci_test

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"gvm/devices/pci/pcitest"
	"gvm/devices/virtio"
)

func TestBusMaster(t *testing.T) {
	dev := scsi(t)
	r := newRig(t, dev, dev)
	cfg := pcitest.CF8(r.bus, 1)
	d := r.attach(cfg, false)
	d.interrupts()
	cfg.Write(4, 2, 2)
	equal(t, "status without bus mastering", d.start(), 0x4f)
	r.logged("vpci: dev: activate: bus mastering is off")
	r.took("without bus mastering")
	cfg.Write(4, 2, 6)
	r.took("with it", 0x40)
	equal(t, "status with it", d.start(), 0x0f)
	cfg.Write(4, 2, 0x406)
	if dev.active == nil {
		t.Error("another bit stopped the device")
	}
	before := dev.active
	dev.bases = []uint16{7, 0, 9, 65535}
	cfg.Write(4, 2, 0x402)
	if dev.active != nil {
		t.Error("the device still runs")
	}
	equal(t, "status of a stopped device", d.get(deviceStatus, 1), 0x0f)
	cfg.Write(4, 2, 2) // another bit
	cfg.Write(4, 2, 6)
	continued(t, dev, before)

	cfg.Write(4, 2, 2)
	d.status(0) // forgets the bases
	cfg.Write(4, 2, 6)
	if dev.active != nil {
		t.Error("a reset device runs")
	}
	d.start()
	equal(t, "base after a reset", dev.active.Queues[0].Base, 0)
	r.took("no interrupt is the transport's")
	r.logged()
}

// TestMessagesNeedBusMaster: an interrupt by MSI-X is a write to memory, which the function must
// not make while Bus Master Enable is 0. It is pending until the bit is set, or the device reset.
func TestMessagesNeedBusMaster(t *testing.T) {
	dev := scsi(t)
	r := newRig(t, dev, dev)
	cfg := pcitest.CF8(r.bus, 1)
	d := r.attach(cfg, false)
	d.interrupts()
	table, _ := r.v.Function().Region(2)
	pending := func() uint64 { return pcitest.Load(table, 2048, 8) }
	d.start()
	a := dev.active
	dev.stops = func(context.Context) error { return a.Queues[0].Call.Signal() } // the last request
	cfg.Write(4, 2, 2)
	r.took("from a device that stops")
	equal(t, "pending bits", pending(), 0b10)
	a.ConfigChanged()
	a.ConfigChanged()
	r.took("from one that has stopped")
	equal(t, "pending bits", pending(), 0b11)
	cfg.Write(4, 2, 6)
	r.took("bus mastering on", 0x40, 0x41)
	equal(t, "pending bits", pending(), 0)
	r.took("once")

	dev.stops = nil
	cfg.Write(4, 2, 2)
	a.ConfigChanged()
	d.status(0)
	cfg.Write(4, 2, 6)
	r.took("interrupts that a reset has discarded")

	d.start()
	dev.stops = func(context.Context) error { return errors.New("no stop") }
	cfg.Write(4, 2, 2)
	r.took("from a device that broke")
	cfg.Write(4, 2, 6)
	r.took("bus mastering on", 0x40)
	r.logged("vpci: dev: stop: no stop")
}

// continued checks that the device continues at dev.bases, and that nothing else has changed.
func continued(t *testing.T, dev *device, before *virtio.Activation) {
	t.Helper()
	if dev.active == nil {
		t.Fatal("the device does not run again")
	}
	for i, q := range dev.active.Queues {
		want := before.Queues[i]
		want.Base = dev.bases[i]
		equal(t, fmt.Sprintf("queue %d", i), q, want)
	}
	equal(t, "features", dev.active.Features, before.Features)
}

// TestNewOwner: an owner of the function that turns its memory decoding off, to see the size of its
// BARs, while bus mastering is off is a new one, such as a kernel that another has started. It does
// not know the rings: the device must not continue them when it turns bus mastering on.
func TestNewOwner(t *testing.T) {
	for name, commands := range map[string][]uint64{"then": {2, 0}, "with": {0}, "first": {4, 0}} {
		t.Run(name, func(t *testing.T) {
			dev := scsi(t)
			r := newRig(t, dev, dev)
			cfg := pcitest.CF8(r.bus, 1)
			d := r.attach(cfg, false)
			d.interrupts()
			d.start()
			for _, command := range append(commands, 2, 6) {
				cfg.Write(4, 2, command)
			}
			if dev.active != nil {
				t.Error("the device runs")
			}
			equal(t, "status", d.get(deviceStatus, 1), 0x4f)
			r.logged("vpci: dev: bus mastering and memory decoding were turned off")
			equal(t, "status after a reset", d.start(), 0x0f)
		})
	}
}

// TestStopFails: a device that does not stop is reset, and the driver must reset it too.
func TestStopFails(t *testing.T) {
	dev := scsi(t)
	r := newRig(t, dev, dev)
	cfg := pcitest.CF8(r.bus, 1)
	d := r.attach(cfg, false)
	d.start()
	dev.stops = func(context.Context) error { return errors.New("no stop") }
	cfg.Write(4, 2, 2)
	equal(t, "status", d.get(deviceStatus, 1), 0x4f)
	r.logged("vpci: dev: stop: no stop")
	d.start()
	cfg.Write(4, 2, 6)
	equal(t, "status after a reset", d.start(), 0x0f)
	if err := <-r.v.Pause(t.Context()); err != nil {
		t.Errorf("a device that failed is not in use: %v", err)
	}
	r.logged("vpci: dev: activate: bus mastering is off", "vpci: dev: stop: no stop")
	if dev.active != nil {
		t.Error("the device runs")
	}
}

// TestPause: the device stops, and continues where it was.
func TestPause(t *testing.T) {
	dev := scsi(t)
	r := newRig(t, dev, dev)
	cfg := pcitest.CF8(r.bus, 1)
	d := r.attach(cfg, false)
	resumed := func() { <-r.v.Resume(); r.logged() }
	pause := func() {
		t.Helper()
		if err := <-r.v.Pause(t.Context()); err != nil || dev.active != nil {
			t.Errorf("active %v, %v", dev.active != nil, err)
		}
	}
	pause() // without a driver
	resumed()
	d.start()
	before := dev.active
	dev.bases = []uint16{1, 2, 3, 4}
	pause()
	resumed()
	continued(t, dev, before)

	// Bus mastering off and a pause, in any order: the device runs when both are over.
	dev.bases = []uint16{5, 6, 7, 8}
	pause()
	cfg.Write(4, 2, 2)
	resumed()
	if dev.active != nil {
		t.Error("a device runs without bus mastering")
	}
	pause()
	cfg.Write(4, 2, 6)
	if dev.active != nil {
		t.Error("a device runs in a pause")
	}
	resumed()
	continued(t, dev, before)

	pause()
	d.status(0)
	resumed()
	if dev.active != nil {
		t.Error("a reset device runs")
	}
	pause()
	d.start()
	if dev.active != nil {
		t.Error("a device starts in a pause")
	}
	resumed()
	equal(t, "base", dev.active.Queues[2].Base, 0)
}

// TestPauseGivenUp: a device that gives up its stop is as it was, and one that does not continues
// when it has stopped after all.
func TestPauseGivenUp(t *testing.T) {
	why := errors.New("enough")
	dev := scsi(t)
	dev.bases = []uint16{1, 2, 3, 4}
	r := newRig(t, dev, dev)
	r.attach(pcitest.CF8(r.bus, 1), false).start()
	before := dev.active
	ctx, cancel := context.WithCancelCause(t.Context())
	dev.stops = func(ctx context.Context) error {
		cancel(why)
		<-ctx.Done()
		return fmt.Errorf("stop: %w", context.Cause(ctx))
	}
	if err := <-r.v.Pause(ctx); !errors.Is(err, why) {
		t.Error(err)
	}
	<-r.v.Resume()
	if dev.active != before {
		t.Error("the device is not as it was")
	}

	stopping, free := make(chan struct{}), make(chan struct{})
	dev.stops = func(context.Context) error {
		close(stopping)
		<-free
		return nil
	}
	paused := r.v.Pause(t.Context())
	<-stopping
	resumed := r.v.Resume()
	close(free)
	if err := <-paused; err != nil {
		t.Error(err)
	}
	<-resumed
	continued(t, dev, before)
	r.logged()
}

func TestMachineReset(t *testing.T) {
	dev := scsi(t)
	r := newRig(t, dev, dev)
	cfg := pcitest.ECAM(r.bus, 1)
	for range 100 {
		d := r.attach(cfg, false)
		d.interrupts()
		cfg.Write(0x10, 4, 0x4_0000)
		d = r.attach(cfg, false)
		equal(t, "status", d.start(), 15)
		dev.active.Queues[0].Call.Signal()
		r.took("queue 0", 0x41)
		if err := r.bus.Reset(); err != nil {
			t.Fatal(err)
		}
		if dev.active != nil || len(r.bells.addresses()) != 0 || len(r.space.Mapped()) != 0 {
			t.Fatalf("after reset: active %t, mapped %v", dev.active != nil, r.space.Mapped())
		}
		equal(t, "command", cfg.Read(4, 2), 0)
		equal(t, "BAR 0", cfg.Read(0x10, 8), base|4)
		equal(t, "MSI-X control", cfg.Read(pcitest.Caps(cfg, 0x11)[0]+2, 2), 4)
		equal(t, "status", r.attach(cfg, true).get(deviceStatus, 1), 0)
	}
	r.logged()
}

func TestStuck(t *testing.T) {
	dev := scsi(t)
	r := newRig(t, dev, dev)
	d := r.attach(pcitest.CF8(r.bus, 1), false)
	equal(t, "status", d.start(), 15)
	dev.stopErr = errors.New("endpoint is busy")
	equal(t, "status after reset", d.status(0), 0)
	r.logged("vpci: dev: reset: endpoint is busy")
	d.set(driverFeatureSelect, 4, 1)
	d.set(driverFeature, 4, 1)
	equal(t, "status", d.status(15), 0x4f)
	r.logged("vpci: dev: activate: it did not stop before: endpoint is busy")
	equal(t, "activations", dev.starts, 1)
	if err := r.bus.Reset(); !errors.Is(err, dev.stopErr) {
		t.Errorf("machine reset: %v", err)
	}
	dev.stopErr = nil
	d = r.attach(pcitest.CF8(r.bus, 1), false)
	equal(t, "status", d.start(), 15)
	r.logged()
}
