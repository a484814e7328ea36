package pci_test

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"gvm/devices/pci"
	"gvm/devices/pci/pcitest"
	"gvm/kvmapi/eventfd"
)

const (
	enable  = 0x8000
	maskAll = 0x4000
)

type rig struct {
	*pci.MSIX
	vs      *pcitest.Vectors
	reports []string
	cfg     pcitest.Access
	fn      *pci.Function
	bus     *pci.Bus
	cap     int
}

func newMSIX(t *testing.T, n int) *rig {
	t.Helper()
	r := &rig{vs: &pcitest.Vectors{}, fn: pci.NewFunction(pci.FunctionConfig{Name: "dev"}),
		bus: pci.NewBus(&pcitest.Space{}, nil)}
	var err error
	if r.MSIX, err = r.fn.AddMSIX(2, n, r.vs.New, func(err error) {
		r.reports = append(r.reports, err.Error())
	}); err != nil {
		t.Fatal(err)
	}
	add(t, r.bus, r.fn)
	r.cfg = pcitest.CF8(r.bus, 1)
	caps := pcitest.Caps(r.cfg, 0x11)
	if len(caps) != 1 {
		t.Fatalf("MSI-X capabilities at %#x", caps)
	}
	r.cap = caps[0]
	r.master(true)
	t.Cleanup(func() {
		for i, v := range r.vs.All {
			if v.Fault() != "" {
				t.Errorf("vector %d: %s", i, v.Fault())
			}
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func (r *rig) master(on bool) {
	command := uint64(pci.CommandMemory)
	if on {
		command |= pci.CommandMaster
	}
	r.cfg.Write(4, 2, command)
}

func (r *rig) control(v uint64) { r.cfg.Write(r.cap+2, 2, v) }

// message writes vector i's entry as a driver does and does not change its mask.
func (r *rig) message(i int, addr, data uint64) {
	pcitest.Store(r.MSIX, uint64(16*i), 4, addr)
	pcitest.Store(r.MSIX, uint64(16*i+4), 4, addr>>32)
	pcitest.Store(r.MSIX, uint64(16*i+8), 4, data)
}

func (r *rig) mask(i int, v uint64) { pcitest.Store(r.MSIX, uint64(16*i+12), 4, v) }

func (r *rig) pending() uint64 { return pcitest.Load(r.MSIX, 2048, 8) }

// calls checks that the machine was called want times since the last check.
func (r *rig) calls(t *testing.T, what string, want int) {
	t.Helper()
	if got := r.vs.Calls(); got != want {
		t.Errorf("%s: %d calls of the machine, want %d", what, got, want)
	}
}

func (r *rig) delivered(t *testing.T, what string, i int, want string) {
	t.Helper()
	got := ""
	if m, ok := r.vs.All[i].Take(); ok {
		got = fmt.Sprintf("%#x to %#x", m.Data, m.Addr)
	}
	if got != want {
		t.Errorf("%s: vector %d delivered %q, want %q", what, i, got, want)
	}
}

// bare is a vector for tests of the layout only.
type bare struct {
	pci.Vector
	ev *eventfd.FD
}

func (b bare) Event() *eventfd.FD { return b.ev }
func (bare) Close() error         { return nil }

func TestMSIXCapability(t *testing.T) {
	ev, err := eventfd.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ev.Close()
	for _, tt := range []struct {
		n         int
		size, pba uint64
	}{{1, 4096, 2048}, {5, 4096, 2048}, {128, 4096, 2048}, {129, 8192, 4096}, {2048, 65536, 32768}} {
		f := pci.NewFunction(pci.FunctionConfig{})
		m, err := f.AddMSIX(2, tt.n, func() (pci.Vector, error) { return bare{ev: ev}, nil }, nil)
		if err != nil {
			t.Fatal(err)
		}
		b := pci.NewBus(&pcitest.Space{}, nil)
		add(t, b, f)
		a := pcitest.ECAM(b, 1)
		expect(t, "vectors", m.Len(), tt.n)
		expect(t, "message control", a.Read(0x42, 2), uint64(tt.n-1))
		expect(t, "table", a.Read(0x44, 4), 2)
		expect(t, "pending bits", a.Read(0x48, 4), tt.pba|2)
		expect(t, "BAR", f.BARs()[0].Size, tt.size)
		a.Write(0x40, 4, 0xffffffff)
		a.Write(0x44, 4, 0xffffffff)
		a.Write(0x48, 4, 0xffffffff)
		expect(t, "message control", a.Read(0x42, 2), uint64(tt.n-1)|enable|maskAll)
		expect(t, "table", a.Read(0x44, 4), 2)
		expect(t, "pending bits", a.Read(0x48, 4), tt.pba|2)
	}
}

func TestMSIXErrors(t *testing.T) {
	vs := &pcitest.Vectors{Max: 3}
	if _, err := pci.NewFunction(pci.FunctionConfig{}).AddMSIX(0, 4, vs.New, nil); err == nil {
		t.Error("four vectors of three")
	}
	if _, err := pci.NewFunction(pci.FunctionConfig{}).AddMSIX(6, 1, (&pcitest.Vectors{}).New, nil); err == nil {
		t.Error("a BAR 6")
	}
	for _, n := range []int{0, -1, 2049} {
		if _, err := pci.NewFunction(pci.FunctionConfig{}).AddMSIX(0, n, vs.New, nil); err == nil {
			t.Errorf("%d vectors", n)
		}
	}
	if len(vs.All) != 3 {
		t.Fatalf("%d vectors were made", len(vs.All))
	}
	for i, v := range vs.All {
		if !v.Closed() {
			t.Errorf("vector %d is left open", i)
		}
	}
}

func TestMSIXTable(t *testing.T) {
	r := newMSIX(t, 3)
	expect(t, "vector control at start", pcitest.Load(r.MSIX, 12, 4), 1)
	r.message(0, 0x1_fee0_1000, 0x31)
	r.message(2, 0xfee0_3000, 0x33)
	pcitest.Store(r.MSIX, 16, 8, 0x2_fee0_2000)
	pcitest.Store(r.MSIX, 24, 8, 0xfffffffe_00000032)
	for _, tt := range []struct {
		off  uint64
		n    int
		want uint64
	}{
		{0, 8, 0x1_fee0_1000}, {0, 4, 0xfee0_1000}, {4, 4, 1}, {8, 4, 0x31}, {8, 8, 0x1_00000031}, {10, 2, 0}, {8, 1, 0x31},
		{16, 8, 0x2_fee0_2000}, {24, 8, 0x32}, {32, 4, 0xfee0_3000}, {40, 4, 0x33}, {44, 4, 1},
		{44, 8, 1}, {48, 4, 0}, {2044, 8, 0}, {2048, 8, 0}, {2056, 8, 0}, {4088, 8, 0},
	} {
		expect(t, fmt.Sprintf("%d bytes at %d", tt.n, tt.off), pcitest.Load(r.MSIX, tt.off, tt.n), tt.want)
	}
	for _, w := range []struct {
		off uint64
		n   int
	}{{8, 1}, {8, 2}, {10, 4}, {9, 8}, {48, 4}, {2048, 8}, {4088, 8}} {
		pcitest.Store(r.MSIX, w.off, w.n, ^uint64(0))
	}
	expect(t, "data after bad writes", pcitest.Load(r.MSIX, 8, 8), uint64(0x1_00000031))
	expect(t, "pending after a write", r.pending(), 0)
	pcitest.Store(r.MSIX, 12, 8, 0xaaaa_0000_0000_0000) // control of 0 and address of 1
	expect(t, "control of 0", pcitest.Load(r.MSIX, 12, 4), 0)
	expect(t, "address of 1", pcitest.Load(r.MSIX, 16, 8), uint64(0x2_aaaa_0000))
	pcitest.Store(r.MSIX, 44, 8, 0) // the table's last dword
	expect(t, "control of 2", pcitest.Load(r.MSIX, 44, 4), 0)
	r.calls(t, "while MSI-X is disabled", 0)
}

func TestMSIXMasks(t *testing.T) {
	r := newMSIX(t, 3)
	for i := range 3 {
		r.message(i, 0xfee0_0000+uint64(i)<<12, 0x41+uint64(i))
	}
	r.control(enable | maskAll)
	r.mask(0, 0)
	r.mask(1, 0)
	r.calls(t, "under the function mask", 0)
	if !r.Enabled() {
		t.Error("not enabled")
	}
	r.Event(1).Signal()
	r.Event(2).Signal()
	expect(t, "pending under the function mask", r.pending(), 0b110)
	r.control(enable)
	r.calls(t, "function mask off", 2)
	expect(t, "pending", r.pending(), 0b100)
	r.delivered(t, "function mask off", 0, "")
	r.delivered(t, "function mask off", 1, "0x42 to 0xfee01000")
	r.delivered(t, "function mask off", 2, "")
	r.control(enable)
	r.mask(0, 0)
	r.mask(2, 1)
	r.calls(t, "nothing new", 0)
	r.mask(2, 0)
	r.calls(t, "unmask 2", 1)
	r.delivered(t, "unmask 2", 2, "0x43 to 0xfee02000")
	r.Event(0).Signal()
	expect(t, "pending on a connected vector", r.pending(), 0)
	r.delivered(t, "unmasked", 0, "0x41 to 0xfee00000")

	r.master(false)
	r.calls(t, "bus mastering off", 3)
	r.master(false)
	r.Event(0).Signal()
	r.Event(0).Signal()
	expect(t, "pending without bus mastering", r.pending(), 0b001)
	r.master(true)
	r.calls(t, "bus mastering on", 3)
	r.delivered(t, "bus mastering on", 0, "0x41 to 0xfee00000")
	r.delivered(t, "once", 0, "")

	r.mask(0, 1)
	r.Event(0).Signal()
	r.Event(0).Signal()
	r.delivered(t, "masked", 0, "")
	expect(t, "pending", r.pending(), 0b001)
	r.message(0, 0xfee0_7000, 0x77)
	r.calls(t, "mask and change", 1)
	r.mask(0, 0)
	r.calls(t, "unmask", 1)
	r.delivered(t, "with the new message", 0, "0x77 to 0xfee07000")
	r.delivered(t, "once", 0, "")

	pcitest.Store(r.MSIX, 8, 4, 0x78) // while it is unmasked
	pcitest.Store(r.MSIX, 0, 8, 0xfee0_8000)
	pcitest.Store(r.MSIX, 0, 8, 0xfee0_8000)
	pcitest.Store(r.MSIX, 12, 8, 0xfee0_9000<<32) // vector 1's address, behind the mask of 0
	r.calls(t, "change unmasked", 3)
	r.Event(1).Signal()
	r.delivered(t, "changed unmasked", 1, "0x42 to 0xfee09000")
	r.Event(0).Signal()
	r.delivered(t, "changed unmasked", 0, "0x78 to 0xfee08000")

	r.control(0)
	r.calls(t, "disable", 3)
	r.Event(1).Signal()
	expect(t, "pending while disabled", r.pending(), 0)
	r.control(enable)
	r.calls(t, "enable", 3)
	r.delivered(t, "signalled while disabled", 1, "")
	r.mask(1, 1)
	r.Event(1).Signal()
	r.Discard()
	expect(t, "pending after Discard", r.pending(), 0)
	r.Event(2).Signal()
	r.Discard()
	r.delivered(t, "on its way at Discard", 2, "0x43 to 0xfee02000")

	r.Event(1).Signal()
	if err := r.fn.Reset(); err != nil {
		t.Fatal(err)
	}
	if r.Enabled() || r.cfg.Read(r.cap+2, 2) != 2 {
		t.Error("enabled after reset")
	}
	for i := range 3 {
		expect(t, "entry after reset", pcitest.Load(r.MSIX, uint64(16*i), 8), 0)
		expect(t, "entry after reset", pcitest.Load(r.MSIX, uint64(16*i+8), 8), uint64(1<<32))
		if r.vs.All[i].Live() {
			t.Errorf("vector %d is connected after reset", i)
		}
	}
	r.vs.Calls()
	r.control(enable)
	expect(t, "pending after reset", r.pending(), 0)
	r.message(0, 0xfee0_0000, 0x41)
	r.mask(0, 0)
	r.calls(t, "bus mastering is off after reset", 0)
	if len(r.reports) != 0 {
		t.Errorf("reports %q", r.reports)
	}
}

func TestMSIXPendingBits(t *testing.T) {
	r := newMSIX(t, 70)
	r.control(enable)
	for _, i := range []int{0, 9, 63, 64, 69} {
		r.Event(i).Signal()
	}
	for _, tt := range []struct {
		off  uint64
		n    int
		want uint64
	}{{2048, 8, 0x8000_0000_0000_0201}, {2056, 8, 0x21}, {2049, 1, 2}, {2052, 4, 0x8000_0000}, {2064, 8, 0}} {
		expect(t, fmt.Sprintf("%d bytes at %d", tt.n, tt.off), pcitest.Load(r.MSIX, tt.off, tt.n), tt.want)
	}
}

func TestMSIXRefused(t *testing.T) {
	r := newMSIX(t, 1)
	r.vs.Refuse = func(m pci.Message) error {
		if m.Addr < 0xfee0_0000 {
			return errors.New("not an APIC")
		}
		return nil
	}
	r.control(enable)
	r.message(0, 0x1000, 0x51)
	r.mask(0, 0)
	want := []string{"pci: dev: MSI-X vector 0, message 0x51 to 0x1000: not an APIC"}
	if !slices.Equal(r.reports, want) {
		t.Errorf("reports %q", r.reports)
	}
	r.mask(0, 0)
	r.calls(t, "refused", 1)
	r.Event(0).Signal()
	expect(t, "pending on a vector without a message", r.pending(), 1)
	pcitest.Store(r.MSIX, 0, 4, 0xfee0_0000)
	r.calls(t, "good message", 1)
	r.delivered(t, "good message", 0, "0x51 to 0xfee00000")
	pcitest.Store(r.MSIX, 0, 4, 0x2000) // was connected: the old message must not be sent
	r.calls(t, "refused again", 2)
	if r.vs.All[0].Live() || len(r.reports) != 2 {
		t.Errorf("connected %t, reports %q", r.vs.All[0].Live(), r.reports)
	}
	r.mask(0, 1)
	r.calls(t, "mask of a vector that is not connected", 0)
}
