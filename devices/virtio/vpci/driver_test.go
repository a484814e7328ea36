package vpci_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"gvm/devices/pci"
	"gvm/devices/pci/pcitest"
	"gvm/devices/virtio"
	"gvm/devices/virtio/virtq"
	"gvm/devices/virtio/vpci"
	"gvm/guestmem"
	"gvm/kvmapi/eventfd"
)

// device is a virtio device that records the calls of the transport, and
// notices when two of its methods run at the same time.
type device struct {
	t        testing.TB
	id       virtio.ID
	features uint64
	sizes    []uint16

	alone  sync.Mutex // held by every method
	config []byte
	active *virtio.Activation // nil unless activated and neither stopped nor reset
	starts int
	bases  []uint16                          // what Stop returns
	stops  func(context.Context) error       // what Stop waits for; nil: nothing
	last   atomic.Pointer[virtio.Activation] // for goroutines that do not hold it

	startErr, stopErr error
}

func (d *device) enter() func() {
	if !d.alone.TryLock() {
		d.t.Error("two methods of the device run at once")
		d.alone.Lock()
	}
	return d.alone.Unlock
}

func (d *device) ID() virtio.ID        { return d.id }
func (d *device) Features() uint64     { return d.features }
func (d *device) QueueSizes() []uint16 { return d.sizes }

func (d *device) Config() []byte {
	defer d.enter()()
	return slices.Clone(d.config)
}

func (d *device) Activate(a virtio.Activation) error {
	defer d.enter()()
	d.starts++
	if d.active != nil {
		d.t.Error("activated twice without a stop")
	}
	if d.startErr != nil {
		return d.startErr
	}
	if a.Features&virtio.FeatureVersion1 == 0 || a.Features&^(d.features|virtio.FeatureVersion1) != 0 ||
		len(a.Queues) != len(d.sizes) {
		d.t.Errorf("bad activation %+v", a)
	}
	for i, q := range a.Queues {
		if q.Size&(q.Size-1) != 0 || q.Size > d.sizes[i] || q.Kick == nil || q.Call == nil {
			d.t.Errorf("bad queue %d: %+v", i, q)
		}
	}
	d.active = &a
	d.last.Store(&a)
	return nil
}

func (d *device) Stop(ctx context.Context) ([]uint16, error) {
	defer d.enter()()
	if d.active == nil {
		d.t.Error("stopped without being active")
	}
	if d.stops != nil {
		if err := d.stops(ctx); err != nil {
			return nil, err
		}
	}
	d.active = nil
	return d.bases, nil
}

func (d *device) Reset() error {
	defer d.enter()()
	d.active = nil
	return d.stopErr
}

// writable is a device with a ConfigWriter.
type writable struct{ *device }

func (w writable) WriteConfig(off uint32, p []byte) {
	defer w.enter()()
	if int(off)+len(p) > len(w.config) {
		w.t.Errorf("write of %d bytes at %d of configuration", len(p), off)
		return
	}
	copy(w.config[off:], p)
}

// bells plays KVM's ioeventfds.
type bells struct {
	mu    sync.Mutex
	at    map[uint64]*eventfd.FD
	limit int
}

func (b *bells) AddDoorbell(addr uint64, fd *eventfd.FD) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.at[addr] != nil {
		return errors.New("taken")
	}
	if b.limit > 0 && len(b.at) == b.limit {
		return errors.New("no more")
	}
	b.at[addr] = fd
	return nil
}

func (b *bells) RemoveDoorbell(addr uint64, fd *eventfd.FD) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.at[addr] != fd {
		return errors.New("not there")
	}
	delete(b.at, addr)
	return nil
}

func (b *bells) addresses() (a []uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for addr := range b.at {
		a = append(a, addr)
	}
	slices.Sort(a)
	return a
}

var (
	w32 = pci.Window{Base: 0xc000_0000, Size: 0x1000_0000}
	w64 = pci.Window{Base: 0x10_0000_0000, Size: 0x10_0000_0000}
)

const base = 0x10_0000_0000 // where Assign puts BAR 0

// rig is a machine with one virtio device in slot 1.
type rig struct {
	t     testing.TB
	dev   *device
	v     *vpci.Device
	mem   *guestmem.Memory
	space pcitest.Space
	bells bells
	vs    pcitest.Vectors
	bus   *pci.Bus

	mu   sync.Mutex
	logs []string
}

func scsi(t testing.TB) *device {
	return &device{t: t, id: virtio.IDSCSI, features: 1<<1 | virtio.FeatureEventIdx, sizes: []uint16{64, 64, 256, 256},
		config: []byte{0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18, 0x19, 0x1a, 0x1b, 0x1c}}
}

func newRig(t testing.TB, dev *device, d virtio.Device) *rig {
	t.Helper()
	return rigWith(t, dev, d, func(int) pci.Line { return pci.Line{Set: func(bool) {}} })
}

// rigWith is newRig with lines for INTx#.
func rigWith(t testing.TB, dev *device, d virtio.Device, lines func(slot int) pci.Line) *rig {
	t.Helper()
	r := &rig{t: t, dev: dev, mem: guestmem.Heap(0, 1<<16), bells: bells{at: make(map[uint64]*eventfd.FD)}}
	r.bus = pci.NewBus(&r.space, nil)
	r.bus.Wire(lines)
	var err error
	r.v, err = vpci.New(vpci.Config{Name: "dev", Device: d, Mem: r.mem, Vectors: r.vs.New, Doorbells: &r.bells,
		Log: r.log})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.bus.Add(r.v.Function()); err != nil {
		t.Fatal(err)
	}
	if err := r.bus.Assign(w32, w64); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.v.Close(); err != nil && dev.stopErr == nil {
			t.Error(err)
		}
		if dev.active != nil {
			t.Error("Close left the device active")
		}
		if n := len(r.bells.addresses()); n != 0 {
			t.Errorf("%d doorbells are left", n)
		}
		if m := r.space.Mapped(); len(m) != 0 {
			t.Errorf("left mapped: %v", m)
		}
		for i, v := range r.vs.All {
			if v.Fault() != "" || !v.Closed() {
				t.Errorf("vector %d: closed %t, %s", i, v.Closed(), v.Fault())
			}
		}
	})
	return r
}

func (r *rig) log(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.logs = append(r.logs, err.Error())
}

// logged checks the log since the last time.
func (r *rig) logged(want ...string) {
	r.t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	if !slices.Equal(r.logs, want) {
		r.t.Errorf("logged %q, want %q", r.logs, want)
	}
	r.logs = nil
}

// store is a guest's write: a doorbell takes it, or else the handler.
func (r *rig) store(addr uint64, n int, v uint64) {
	r.bells.mu.Lock()
	fd := r.bells.at[addr]
	r.bells.mu.Unlock()
	if fd == nil {
		r.space.Write(addr, n, v)
	} else if err := fd.Signal(); err != nil {
		r.t.Error(err)
	}
}

// Offsets of the common configuration (virtio 1.3, 4.1.4.3).
const (
	deviceFeatureSelect = 0
	deviceFeature       = 4
	driverFeatureSelect = 8
	driverFeature       = 12
	configVector        = 16
	numQueues           = 18
	deviceStatus        = 20
	configGeneration    = 21
	queueSelect         = 22
	queueSize           = 24
	queueVector         = 26
	queueEnable         = 28
	queueNotifyOff      = 30
	queueDesc           = 32
	queueDriver         = 40
	queueDevice         = 48
)

// driver does the work of a guest's driver. It finds everything by the capability
// list; load and store go to offsets of the BAR that they name.
type driver struct {
	*rig
	cfg                         pcitest.Access
	common, notify, isr, device uint64
	mul                         uint64
	load                        func(off uint64, n int) uint64
	put                         func(off uint64, n int, v uint64)
}

// attach finds the capabilities and turns the function on. With window, BAR 0
// is reached through the PCI_CFG capability only.
func (r *rig) attach(cfg pcitest.Access, window bool) *driver {
	r.t.Helper()
	d := &driver{rig: r, cfg: cfg}
	var via int
	for _, c := range pcitest.Caps(cfg, 9) {
		off := cfg.Read(c+8, 4)
		switch kind := cfg.Read(c+3, 1); kind {
		case 1:
			d.common = off
		case 2:
			d.notify, d.mul = off, cfg.Read(c+16, 4)
		case 3:
			d.isr = off
		case 4:
			d.device = off
		case 5:
			via = c
		default:
			r.t.Fatalf("capability of type %d", kind)
		}
	}
	cfg.Write(4, 2, 6)
	bar := cfg.Read(0x10, 4)&^15 | cfg.Read(0x14, 4)<<32
	d.load = func(off uint64, n int) uint64 { return r.space.Read(bar+off, n) }
	d.put = func(off uint64, n int, v uint64) { r.store(bar+off, n, v) }
	if window {
		at := func(off uint64, n int) {
			cfg.Write(via+4, 1, 0)
			cfg.Write(via+8, 4, off)
			cfg.Write(via+12, 4, uint64(n))
		}
		d.load = func(off uint64, n int) uint64 { at(off, n); return cfg.Read(via+16, n) }
		d.put = func(off uint64, n int, v uint64) { at(off, n); cfg.Write(via+16, n, v) }
	}
	return d
}

func (d *driver) get(off uint64, n int) uint64    { return d.load(d.common+off, n) }
func (d *driver) set(off uint64, n int, v uint64) { d.put(d.common+off, n, v) }
func (d *driver) status(v uint64) uint64          { d.set(deviceStatus, 1, v); return d.get(deviceStatus, 1) }

func (d *driver) setQueue(i, size, vector, desc, driver, device uint64) {
	d.set(queueSelect, 2, i)
	d.set(queueSize, 2, size)
	d.set(queueVector, 2, vector)
	for off, v := range map[uint64]uint64{queueDesc: desc, queueDriver: driver, queueDevice: device} {
		d.set(off, 4, v)
		d.set(off+4, 4, v>>32)
	}
	d.set(queueEnable, 2, 1)
}

// interrupts enables MSI-X with message 0x40+i to 0xfee00000 in each vector.
func (d *driver) interrupts() {
	c := pcitest.Caps(d.cfg, 0x11)[0]
	h, _ := d.v.Function().Region(2)
	d.cfg.Write(c+2, 2, 0xc000)
	for i := range uint64(len(d.vs.All)) {
		pcitest.Store(h, 16*i, 4, 0xfee0_0000)
		pcitest.Store(h, 16*i+8, 8, 0x40+i)
	}
	d.cfg.Write(c+2, 2, 0x8000)
}

// start brings the device up with queues 0, 2 and 3 and vectors 0 (config), 1,
// 2 and 2.
func (d *driver) start() uint64 {
	d.status(0)
	d.status(1)
	d.status(3)
	d.set(driverFeatureSelect, 4, 0)
	d.set(driverFeature, 4, virtio.FeatureEventIdx)
	d.set(driverFeatureSelect, 4, 1)
	d.set(driverFeature, 4, 1)
	d.status(11)
	d.set(configVector, 2, 0)
	d.setQueue(0, 64, 1, 0x1000, 0x2000, 0x3000)
	d.setQueue(2, 128, 2, 0x5_0000_1000, 0x6_0000_2002, 0x7_0000_3004)
	d.setQueue(3, 256, 2, 0xa000, 0xb000, 0xc000)
	return d.status(15)
}

// took checks which messages the guest got since the last time.
func (r *rig) took(what string, want ...uint32) {
	r.t.Helper()
	var got []uint32
	for _, v := range r.vs.All {
		if m, ok := v.Take(); ok {
			got = append(got, m.Data)
		}
	}
	if !slices.Equal(got, want) {
		r.t.Errorf("%s: interrupts %#x, want %#x", what, got, want)
	}
}

func equal[T comparable](t testing.TB, what string, got, want T) {
	t.Helper()
	if got != want {
		t.Errorf("%s: got %#v, want %#v", what, got, want)
	}
}

// rung tells which queues' doorbells were rung since the last time.
func rung(t testing.TB, a *virtio.Activation) (s string) {
	t.Helper()
	for i, q := range a.Queues {
		was, err := q.Kick.Drain()
		if err != nil {
			t.Fatal(err)
		}
		if was {
			s += fmt.Sprint(i)
		}
	}
	return s
}

func TestDriver(t *testing.T) {
	for _, tt := range []struct {
		name   string
		access func(*pci.Bus, int) pcitest.Access
		window bool
	}{
		{"CF8", pcitest.CF8, false}, {"ECAM", pcitest.ECAM, false},
		{"CF8 window", pcitest.CF8, true}, {"ECAM window", pcitest.ECAM, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dev := scsi(t)
			r := newRig(t, dev, dev)
			cfg := tt.access(r.bus, 1)
			equal(t, "ID", cfg.Read(0, 4), 0x10481af4)
			equal(t, "class and revision", cfg.Read(8, 4), 0x01000001)
			equal(t, "subsystem", cfg.Read(0x2c, 4), 0x10481af4)
			equal(t, "interrupt pin", cfg.Read(0x3d, 1), 1)
			d := r.attach(cfg, tt.window)
			d.interrupts()
			for n := range 100 { // unbind and bind
				equal(t, "status", d.start(), 15)
				a := dev.active
				if a == nil || dev.starts != n+1 {
					t.Fatalf("round %d: activated %d times", n, dev.starts)
				}
				if a.Mem != r.mem || len(a.Queues) != 4 {
					t.Fatalf("activation %+v", a)
				}
				equal(t, "features", a.Features, virtio.FeatureEventIdx|virtio.FeatureVersion1)
				for i, want := range []virtq.Layout{{Size: 64, Desc: 0x1000, Driver: 0x2000, Device: 0x3000}, {},
					{Size: 128, Desc: 0x5_0000_1000, Driver: 0x6_0000_2002, Device: 0x7_0000_3004},
					{Size: 256, Desc: 0xa000, Driver: 0xb000, Device: 0xc000}} {
					equal(t, fmt.Sprintf("queue %d", i), a.Queues[i].Layout, want)
				}
				for i, vec := range map[int]int{0: 1, 2: 2, 3: 2} {
					equal(t, fmt.Sprintf("interrupt of queue %d", i), a.Queues[i].Call, r.vs.All[vec].Event())
				}
				rung(t, a)
				d.put(d.notify+2*d.mul, 2, 2)
				d.put(d.notify+0*d.mul, 4, 0)
				equal(t, "doorbells", rung(t, a), "02")
				a.Queues[3].Call.Signal()
				r.took("queue 3", 0x42)
				equal(t, "ISR status", d.load(d.isr, 1), 0)
				equal(t, "status after reset", d.status(0), 0)
				if dev.active != nil {
					t.Error("active after reset")
				}
				equal(t, "size after reset", d.get(queueSize, 2), 64)
				equal(t, "vector after reset", d.get(queueVector, 2), 0xffff)
				equal(t, "configuration vector after reset", d.get(configVector, 2), 0xffff)
			}
			r.logged()
		})
	}
}
