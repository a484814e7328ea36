package vpci_test

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"gvm/devices/pci"
	"gvm/devices/pci/pcitest"
	"gvm/devices/virtio"
	"gvm/devices/virtio/vpci"
	"gvm/guestmem"
)

func TestCapabilities(t *testing.T) {
	dev := scsi(t)
	r := newRig(t, dev, dev)
	cfg := pcitest.ECAM(r.bus, 1)
	var got []string
	for _, c := range pcitest.Caps(cfg, 9) {
		s := ""
		for i := 2; i < int(cfg.Read(c+2, 1)); i += 2 {
			s += fmt.Sprintf(" %04x", cfg.Read(c+i, 2))
		}
		got = append(got, s[1:])
	}
	want := []string{ // cap_len and type, bar and id, padding, offset, length, then the type's own
		"0110 0000 0000 0000 0000 0040 0000",
		"0214 0000 0000 3000 0000 0010 0000 0004 0000",
		"0310 0000 0000 1000 0000 0001 0000",
		"0410 0000 0000 2000 0000 000c 0000",
		"0514 0000 0000 0000 0000 0000 0000 ffff ffff",
	}
	if !slices.Equal(got, want) {
		t.Errorf("capabilities\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	equal(t, "MSI-X vectors", cfg.Read(pcitest.Caps(cfg, 0x11)[0]+2, 2), 4)
	for i, want := range []uint64{0x4000, 0x1000} {
		equal(t, "BAR size", r.v.Function().BARs()[i].Size, want)
	}

	rng := &device{t: t, id: virtio.IDRNG, sizes: []uint16{8}}
	r = newRig(t, rng, rng)
	cfg = pcitest.ECAM(r.bus, 1)
	equal(t, "ID", cfg.Read(0, 4), 0x10441af4)
	equal(t, "class", cfg.Read(8, 4), 0xff000001)
	equal(t, "capabilities of a device without configuration", len(pcitest.Caps(cfg, 9)), 4)
	equal(t, "read of no configuration", r.attach(cfg, false).load(0x2000, 4), 0)
}

func TestFeatures(t *testing.T) {
	dev := scsi(t)
	dev.features |= 1 << 35
	r := newRig(t, dev, dev)
	d := r.attach(pcitest.CF8(r.bus, 1), false)
	for sel, want := range map[uint64]uint64{0: 0x20000002, 1: 0x9, 2: 0, 3: 0, 0x8000000: 0, 0xffffffff: 0} {
		d.set(deviceFeatureSelect, 4, sel)
		equal(t, "select", d.get(deviceFeatureSelect, 4), sel)
		equal(t, fmt.Sprintf("offered, page %d", sel), d.get(deviceFeature, 4), want)
		d.set(deviceFeature, 4, 0)
	}
	for sel, want := range map[uint64]uint64{0: 0x20000002, 1: 0x9, 2: 0, 0xffffffff: 0} {
		d.set(driverFeatureSelect, 4, sel)
		d.set(driverFeature, 4, 0xffffffff)
		equal(t, fmt.Sprintf("accepted, page %d", sel), d.get(driverFeature, 4), want)
	}
	d.set(driverFeatureSelect, 4, 1)
	d.set(driverFeature, 4, 0x8)
	equal(t, "FEATURES_OK without VERSION_1", d.status(8|3), 3)
	equal(t, "DRIVER_OK without FEATURES_OK", d.status(8|4|3), 3)
	d.set(driverFeature, 4, 0x001)
	equal(t, "FEATURES_OK", d.status(8|3), 11)
	d.set(driverFeature, 4, 0)
	d.set(driverFeatureSelect, 4, 0)
	d.set(driverFeature, 4, 0)
	equal(t, "DRIVER_OK", d.status(15), 15)
	equal(t, "features are fixed by FEATURES_OK", dev.active.Features, 0x1_20000002)
}

func TestStatus(t *testing.T) {
	for _, tt := range []struct {
		name   string
		write  []uint64
		want   uint64
		starts int
	}{
		{"step by step", []uint64{1, 3, 11, 15}, 15, 1},
		{"at once", []uint64{15}, 15, 1},
		{"twice", []uint64{15, 15}, 15, 1},
		{"bits taken back", []uint64{3, 1, 2, 8}, 3, 0},
		{"DRIVER_OK taken back", []uint64{15, 11}, 15, 1},
		{"DEVICE_NEEDS_RESET from the driver", []uint64{64, 67}, 3, 0},
		{"reserved bits", []uint64{0x31}, 1, 0},
		{"FAILED", []uint64{3, 0x83}, 0x83, 0},
		{"FAILED while active", []uint64{15, 0x8f}, 0x8f, 1},
		{"DRIVER_OK after FAILED", []uint64{0x8b, 0x8f}, 0x8b, 0},
		{"reset and again", []uint64{15, 0, 1}, 1, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dev := scsi(t)
			r := newRig(t, dev, dev)
			d := r.attach(pcitest.CF8(r.bus, 1), false)
			d.set(driverFeatureSelect, 4, 1)
			d.set(driverFeature, 4, 1)
			for _, v := range tt.write {
				d.set(deviceStatus, 1, v)
			}
			equal(t, "status", d.get(deviceStatus, 1), tt.want)
			equal(t, "activations", dev.starts, tt.starts)
			r.logged()
		})
	}
}

func TestQueueRegisters(t *testing.T) {
	dev := scsi(t)
	r := newRig(t, dev, dev)
	d := r.attach(pcitest.ECAM(r.bus, 1), false)
	equal(t, "num_queues", d.get(numQueues, 2), 4)
	for i, want := range []uint64{64, 64, 256, 256, 0} {
		d.set(queueSelect, 2, uint64(i))
		equal(t, "size", d.get(queueSize, 2), want)
		equal(t, "vector", d.get(queueVector, 2), 0xffff)
		if want != 0 {
			equal(t, "notify offset", d.get(queueNotifyOff, 2), uint64(i))
		}
	}
	for _, sel := range []uint64{4, 0x7fff, 0xffff} { // no such queue
		d.set(queueSelect, 2, sel)
		for _, off := range []uint64{queueSize, queueEnable, queueDesc, queueDriver, queueDevice} {
			d.set(off, 2, 1)
			d.set(off, 4, 1)
		}
		d.set(queueVector, 2, 1)
		equal(t, "select", d.get(queueSelect, 2), sel)
		equal(t, "vector", d.get(queueVector, 2), 0xffff)
		equal(t, "the rest", d.get(queueSize, 2)|d.get(queueEnable, 2)|d.get(queueNotifyOff, 2)|
			d.get(queueDesc, 8)|d.get(queueDriver, 8)|d.get(queueDevice, 8), 0)
	}
	d.set(queueSelect, 2, 2)
	type at struct {
		off uint64
		n   int
	}
	for _, tt := range []struct {
		write at
		v     uint64
		read  at
		want  uint64
	}{
		{at{queueSize, 2}, 512, at{queueSize, 2}, 256},
		{at{queueSize, 2}, 100, at{queueSize, 2}, 256},
		{at{queueSize, 2}, 0, at{queueSize, 2}, 256},
		{at{queueSize, 2}, 16, at{queueSize, 2}, 16},
		{at{queueSize, 1}, 8, at{queueSize, 2}, 16},
		{at{queueSize, 4}, 8, at{queueSize, 4}, 0xffff_0010},
		{at{queueVector, 2}, 3, at{queueVector, 2}, 3},
		{at{queueVector, 2}, 4, at{queueVector, 2}, 4},
		{at{queueVector, 2}, 5, at{queueVector, 2}, 0xffff},
		{at{queueVector, 2}, 0, at{queueVector, 2}, 0},
		{at{queueVector, 2}, 0xfffe, at{queueVector, 2}, 0xffff},
		{at{configVector, 2}, 4, at{configVector, 2}, 4},
		{at{configVector, 2}, 5, at{configVector, 2}, 0xffff},
		{at{queueEnable, 2}, 0, at{queueEnable, 2}, 0},
		{at{queueEnable, 2}, 2, at{queueEnable, 2}, 0},
		{at{queueEnable, 1}, 1, at{queueEnable, 1}, 0},
		{at{queueNotifyOff, 2}, 7, at{queueNotifyOff, 2}, 2},
		{at{numQueues, 2}, 7, at{numQueues, 2}, 4},
		{at{queueDesc, 4}, 0x11111110, at{queueDesc, 8}, 0x11111110},
		{at{queueDesc + 4, 4}, 0x22, at{queueDesc, 8}, 0x22_11111110},
		{at{queueDesc, 8}, 0x33_44444440, at{queueDesc + 4, 4}, 0x33},
		{at{queueDriver, 8}, 0x66_77777776, at{queueDriver, 8}, 0x66_77777776},
		{at{queueDriver, 1}, 0, at{queueDriver, 8}, 0x66_77777776},
		{at{queueDriver, 2}, 0, at{queueDriver + 1, 2}, 0x7777},
		{at{queueDriver + 2, 4}, 0, at{queueDriver + 7, 1}, 0},
		{at{queueDriver + 4, 8}, 0, at{queueDriver, 8}, 0x66_77777776},
		{at{queueDevice + 4, 4}, 0x88, at{queueDevice, 8}, 0x88_00000000},
		{at{queueDevice, 4}, 0x99999994, at{queueDevice, 8}, 0x88_99999994},
		{at{56, 2}, 0xffff, at{56, 8}, 0}, // queue_notif_config_data to admin_queue_num
		{at{58, 2}, 1, at{58, 2}, 0},
		{at{64, 4}, 1, at{64, 4}, 0}, // behind the structure
	} {
		d.set(tt.write.off, tt.write.n, tt.v)
		equal(t, fmt.Sprintf("%d bytes at %d after %#x to %v", tt.read.n, tt.read.off, tt.v, tt.write),
			d.get(tt.read.off, tt.read.n), tt.want)
	}
	fixed := func(what string, vector uint64) {
		t.Helper()
		for _, off := range []uint64{queueDesc, queueDriver, queueDevice} {
			d.set(off, 8, 0)
		}
		d.set(queueSize, 2, 64)
		d.set(queueEnable, 2, 0)
		d.set(queueVector, 2, 2)
		equal(t, what+": desc", d.get(queueDesc, 8), 0x33_44444440)
		equal(t, what+": driver", d.get(queueDriver, 8), 0x66_77777776)
		equal(t, what+": device", d.get(queueDevice, 8), 0x88_99999994)
		equal(t, what+": size", d.get(queueSize, 2), 16)
		equal(t, what+": enable", d.get(queueEnable, 2), 1)
		equal(t, what+": vector", d.get(queueVector, 2), vector)
	}
	d.set(queueEnable, 2, 1)
	fixed("enabled", 2)
	d.set(queueVector, 2, 1)
	d.set(driverFeatureSelect, 4, 1)
	d.set(driverFeature, 4, 1)
	equal(t, "status", d.status(15), 15)
	fixed("active", 1)
	d.set(queueSelect, 2, 0)
	d.set(queueEnable, 2, 1)
	equal(t, "enable after DRIVER_OK", d.get(queueEnable, 2), 0)
	d.status(0)
	d.set(queueSelect, 2, 2)
	equal(t, "after reset", d.get(queueSize, 8), 0x0002_0000_ffff_0100)
	equal(t, "after reset", d.get(queueDesc, 8)|d.get(queueDriver, 8)|d.get(queueDevice, 8), 0)
}

func TestDoorbells(t *testing.T) {
	dev := scsi(t)
	r := newRig(t, dev, dev)
	cfg := pcitest.CF8(r.bus, 1)
	bells := func(what string, at uint64) {
		t.Helper()
		var want []uint64
		if at != 0 {
			want = []uint64{at + 0x3000, at + 0x3004, at + 0x3008, at + 0x300c}
		}
		if got := r.bells.addresses(); !slices.Equal(got, want) {
			t.Errorf("%s: doorbells at %#x, want %#x", what, got, want)
		}
	}
	bells("decoding off", 0)
	d := r.attach(cfg, false)
	bells("decoding on", base)
	equal(t, "status", d.start(), 15)
	a := dev.active
	for i := range a.Queues {
		equal(t, "doorbell", r.bells.at[base+0x3000+uint64(i)*4], a.Queues[i].Kick)
	}
	cfg.Write(0x10, 4, 0x10_0000)
	bells("moved", base+0x10_0000)
	r.store(base+0x10_0000+0x3008, 2, 2)
	r.store(base+0x3004, 2, 1)
	equal(t, "rung", rung(t, a), "2")
	cfg.Write(0x14, 4, 0x77)
	bells("outside the window", 0)
	cfg.Write(0x14, 4, 0)
	cfg.Write(0x10, 4, 0xc000_0000)
	bells("on the MSI-X BAR", 0)
	cfg.Write(0x10, 4, 0xc100_0000)
	bells("below 4 GiB", 0xc100_0000)
	cfg.Write(4, 2, 4)
	bells("decoding off", 0)
	r.logged()

	r.bells.limit = 2
	cfg.Write(4, 2, 6)
	r.logged("vpci: dev: doorbell of queue 2: no more", "vpci: dev: doorbell of queue 3: no more")
	rung(t, a)
	r.store(0xc100_3004, 4, 1)
	r.store(0xc100_300c, 2, 3) // by way of the handler
	equal(t, "rung", rung(t, a), "13")
	for _, off := range []uint64{0x2ffc, 0x3001, 0x300e, 0x3010, 0x3ffc} {
		r.space.Write(0xc100_0000+off, 2, 1)
	}
	equal(t, "rung by writes elsewhere", rung(t, a), "")
	equal(t, "read of a doorbell", d.rig.space.Read(0xc100_3000, 4), 0)
	cfg.Write(4, 2, 4)
	bells("decoding off", 0)
	r.logged()
}

func TestNeedsReset(t *testing.T) {
	dev := scsi(t)
	r := newRig(t, dev, dev)
	d := r.attach(pcitest.CF8(r.bus, 1), false)
	isr := func(want uint64) {
		t.Helper()
		equal(t, "ISR status", d.load(d.isr, 1), want)
		equal(t, "ISR status read again", d.load(d.isr, 1), 0)
	}
	dev.startErr = errors.New("no such disk")
	equal(t, "status", d.start(), 0x4f)
	r.logged("vpci: dev: activate: no such disk")
	isr(2)
	equal(t, "DRIVER_OK again", d.status(15), 0x4f)
	equal(t, "FAILED", d.status(0x8f), 0xcf)
	equal(t, "attempts", dev.starts, 1)
	d.interrupts()
	equal(t, "status", d.start(), 0x4f)
	r.logged("vpci: dev: activate: no such disk")
	r.took("failed activation", 0x40)
	isr(0)

	dev.startErr = nil
	equal(t, "status", d.start(), 0x0f)
	r.took("start")
	old := dev.active
	old.Broken(errors.New("a loop in queue 2"))
	old.Broken(errors.New("and in queue 3"))
	equal(t, "status", d.get(deviceStatus, 1), 0x4f)
	r.logged("vpci: dev: a loop in queue 2")
	r.took("broken", 0x40)
	equal(t, "status after reset", d.status(0), 0)
	equal(t, "status", d.start(), 0x0f)
	gen := d.get(configGeneration, 1)
	old.Broken(errors.New("late"))
	old.ConfigChanged()
	equal(t, "status", d.get(deviceStatus, 1), 0x0f)
	equal(t, "generation", d.get(configGeneration, 1), gen)
	r.took("later reports of a broken activation")
	old = dev.active
	d.status(0)
	equal(t, "status", d.start(), 0x0f)
	old.Broken(errors.New("late"))
	r.took("reports of an earlier activation")
	r.logged()
	d.set(configVector, 2, 0xffff)
	dev.active.Broken(errors.New("unheard"))
	r.took("without a vector")
	equal(t, "status", d.get(deviceStatus, 1), 0x4f)
	r.logged("vpci: dev: unheard")
}

func TestDeviceConfig(t *testing.T) {
	for _, canWrite := range []bool{false, true} {
		dev := scsi(t)
		var v virtio.Device = dev
		if canWrite {
			v = writable{dev}
		}
		r := newRig(t, dev, v)
		d := r.attach(pcitest.CF8(r.bus, 1), false)
		d.interrupts()
		equal(t, "status", d.start(), 15)
		for _, tt := range []struct {
			off  uint64
			n    int
			want uint64
		}{{0, 1, 0x11}, {1, 2, 0x1312}, {4, 4, 0x18171615}, {0, 8, 0x18171615_14131211},
			{8, 8, 0x1c1b1a19}, {11, 4, 0x1c}, {12, 4, 0}, {0xff8, 8, 0}} {
			equal(t, fmt.Sprintf("%d bytes at %d", tt.n, tt.off), d.load(d.device+tt.off, tt.n), tt.want)
		}
		gen := d.get(configGeneration, 1)
		d.put(d.device+4, 4, 0x44332211)
		d.put(d.device+11, 1, 0xaa)
		d.put(d.device+10, 4, 0xbbbbbbbb) // reaches past the end
		d.put(d.device+12, 4, 0xcccccccc)
		d.put(d.device+0x1000-8, 8, 0xdddddddd)
		want := uint64(0x1c1b1a19_18171615)
		if canWrite {
			want = 0xaa1b1a19_44332211
		}
		equal(t, "configuration", d.load(d.device+4, 8), want)
		equal(t, "generation after the driver's own writes", d.get(configGeneration, 1), gen)
		dev.config[0] = 0x99 // and the device has not told yet
		equal(t, "generation", d.get(configGeneration, 1), gen+1)
		equal(t, "changed configuration", d.load(d.device, 1), 0x99)
		equal(t, "generation", d.get(configGeneration, 1), gen+1)
		r.took("before ConfigChanged")
		dev.active.ConfigChanged()
		equal(t, "generation", d.get(configGeneration, 1), gen+2)
		r.took("ConfigChanged", 0x40)
		dev.config = dev.config[:2]
		equal(t, "shrunk configuration", d.load(d.device, 4), 0x1299)
		equal(t, "shrunk configuration", d.load(d.device+8, 4), 0)
		dev.config = make([]byte, 64)
		dev.config[12] = 0xee
		equal(t, "grown configuration", d.load(d.device+8, 8), 0)
	}
}

func TestPolling(t *testing.T) {
	dev := scsi(t)
	r := newRig(t, dev, dev)
	d := r.attach(pcitest.CF8(r.bus, 1), false)
	d.set(driverFeatureSelect, 4, 1)
	d.set(driverFeature, 4, 1)
	d.setQueue(0, 64, 0xffff, 0x1000, 0x2000, 0x3000)
	equal(t, "status", d.status(15), 15)
	dev.active.Queues[0].Call.Signal()
	dev.active.Queues[0].Call.Signal()
	equal(t, "ISR status", d.load(d.isr, 4), 1)
	equal(t, "ISR status", d.load(d.isr, 1), 0)
	dev.active.ConfigChanged()
	dev.active.Queues[0].Call.Signal()
	equal(t, "ISR status", d.load(d.isr, 1), 3)
	dev.active.ConfigChanged()
	dev.active.Queues[0].Call.Signal()
	d.status(0)
	equal(t, "ISR status after reset", d.load(d.isr, 1), 0)
	d.put(d.isr, 1, 0xff)
	equal(t, "ISR status after a write", d.load(d.isr, 1), 0)
	d.interrupts()
	d.set(driverFeatureSelect, 4, 1)
	d.set(driverFeature, 4, 1)
	equal(t, "status", d.status(15), 15)
	dev.active.Queues[0].Call.Signal()
	equal(t, "ISR status with MSI-X", d.load(d.isr, 1), 0)
}

func TestPendingOverReset(t *testing.T) {
	dev := scsi(t)
	r := newRig(t, dev, dev)
	d := r.attach(pcitest.CF8(r.bus, 1), false)
	d.interrupts()
	d.start()
	h, _ := r.v.Function().Region(2)
	pcitest.Store(h, 16+12, 4, 1)
	dev.active.Queues[0].Call.Signal()
	equal(t, "pending bits", pcitest.Load(h, 2048, 8), 2)
	d.status(0)
	equal(t, "pending bits after reset", pcitest.Load(h, 2048, 8), 0)
	d.start()
	dev.active.Queues[0].Call.Signal()
	pcitest.Store(h, 16+12, 4, 0)
	r.took("unmasked", 0x41)
}

func TestWindow(t *testing.T) {
	dev := scsi(t)
	r := newRig(t, dev, dev)
	cfg := pcitest.ECAM(r.bus, 1)
	d := r.attach(cfg, false)
	caps := pcitest.Caps(cfg, 9)
	at := caps[len(caps)-1]
	for _, tt := range []struct {
		name        string
		bar, off, n uint64
		size        int
		want        uint64
	}{
		{"num_queues", 0, 18, 2, 2, 4},
		{"device configuration", 0, 0x2000, 4, 4, 0x14131211},
		{"a byte of it", 0, 0x2003, 1, 1, 0x14},
		{"MSI-X vector control", 2, 12, 4, 4, 1},
		{"end of the BAR", 0, 0x3ffc, 4, 4, 0},
		{"past the end", 0, 0x4000, 4, 4, 0xffffffff},
		{"unaligned", 0, 0x2001, 2, 2, 0xffff},
		{"unaligned", 0, 0x2002, 4, 4, 0xffffffff},
		{"no length", 0, 0x2000, 0, 4, 0xffffffff},
		{"length 3", 0, 0x2000, 3, 4, 0xffffffff},
		{"length 8", 0, 0x2000, 8, 4, 0xffffffff},
		{"huge length", 0, 0x2000, 0xffffffff, 4, 0xffffffff},
		{"huge offset", 0, 0xfffffffc, 4, 4, 0xffffffff},
		{"second half of BAR 0", 1, 0, 4, 4, 0xffffffff},
		{"no such BAR", 6, 0, 4, 4, 0xffffffff},
		{"no such BAR", 255, 0, 4, 4, 0xffffffff},
	} {
		cfg.Write(at+4, 1, tt.bar)
		cfg.Write(at+8, 4, tt.off)
		cfg.Write(at+12, 4, tt.n)
		equal(t, tt.name, cfg.Read(at+16, tt.size), tt.want)
		cfg.Write(at+16, tt.size, 0)
	}
	h, _ := r.v.Function().Region(2)
	equal(t, "MSI-X vector control", pcitest.Load(h, 12, 4), 0)

	// Only pci_cfg_data makes an access; so does a write that reaches it.
	cfg.Write(at+4, 1, 0)
	cfg.Write(at+8, 4, deviceStatus)
	cfg.Write(at+12, 4, 1)
	cfg.Write(at+16, 1, 3)
	cfg.Write(at+8, 4, deviceStatus)
	cfg.Write(at+12, 4, 1)
	equal(t, "status", d.get(deviceStatus, 1), 3)
	cfg.Write(at+12, 8, 0x83_00000001)
	equal(t, "status", d.get(deviceStatus, 1), 0x83)
	equal(t, "length and data", cfg.Read(at+12, 8), 0x83_00000001)
	cfg.Write(at+16, 4, 0)
	equal(t, "status", d.get(deviceStatus, 1), 0)
}

func TestNewErrors(t *testing.T) {
	fds := func() int {
		e, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(e)
	}
	before := fds()
	for _, tt := range []struct {
		name    string
		dev     *device
		vectors int
		want    string
	}{
		{"no queue", &device{}, 0, "vpci: d: 0 queues, 0 bytes of configuration"},
		{"too many queues", &device{sizes: make([]uint16, 2048)}, 0, "vpci: d: 2048 queues, 0 bytes of configuration"},
		{"too much configuration", &device{sizes: []uint16{8}, config: make([]byte, 4097)}, 0,
			"vpci: d: 1 queues, 4097 bytes of configuration"},
		{"bad size", &device{sizes: []uint16{8, 12}}, 0, "vpci: d: queue 1 has a bad size 12"},
		{"no size", &device{sizes: []uint16{0}}, 0, "vpci: d: queue 0 has a bad size 0"},
		{"too few vectors", &device{sizes: []uint16{8, 8}}, 2, "vpci: d: pci: d: vector 2: only 2 vectors"},
	} {
		tt.dev.t = t
		_, err := vpci.New(vpci.Config{Name: "d", Device: tt.dev, Mem: guestmem.Heap(0, 4096),
			Vectors: (&pcitest.Vectors{Max: tt.vectors}).New, Doorbells: &bells{}})
		if err == nil || err.Error() != tt.want {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	dev := &device{t: t, sizes: slices.Repeat([]uint16{1 << 15}, 200)}
	d, err := vpci.New(vpci.Config{Name: "d", Device: dev, Mem: guestmem.Heap(0, 4096), Vectors: (&pcitest.Vectors{}).New,
		Doorbells: &bells{}})
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "descriptors", fds()-before, 200+201+2)
	if _, err := pci.NewBus(nil, nil).Add(d.Function()); err != nil {
		t.Error(err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	equal(t, "descriptors after Close", fds()-before, 0)
}
