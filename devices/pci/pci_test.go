package pci_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"

	"gvm/devices/pci"
	"gvm/devices/pci/pcitest"
)

// memory is a BAR's registers.
type memory []byte

func (m memory) Read(off uint64, p []byte)  { copy(p, m[off:]) }
func (m memory) Write(off uint64, p []byte) { copy(m[off:], p) }

var (
	w32 = pci.Window{Base: 0xc000_0000, Size: 0x1000_0000}
	w64 = pci.Window{Base: 0x10_0000_0000, Size: 0x10_0000_0000}
)

func function(t *testing.T, c pci.FunctionConfig, bars ...pci.BAR) *pci.Function {
	t.Helper()
	f := pci.NewFunction(c)
	for _, b := range bars {
		if b.Handler == nil {
			b.Handler = make(memory, 0x1000)
		}
		if err := f.AddBAR(b); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

func add(t *testing.T, b *pci.Bus, fs ...*pci.Function) {
	t.Helper()
	for _, f := range fs {
		if _, err := b.Add(f); err != nil {
			t.Fatal(err)
		}
	}
}

func expect(t *testing.T, what string, got, want any) {
	t.Helper()
	if fmt.Sprintf("%#x", got) != fmt.Sprintf("%#x", want) {
		t.Errorf("%s: got %#x, want %#x", what, got, want)
	}
}

// both runs f with each configuration mechanism.
func both(t *testing.T, b *pci.Bus, slot int, f func(*testing.T, pcitest.Access)) {
	t.Run("CF8", func(t *testing.T) { f(t, pcitest.CF8(b, slot)) })
	t.Run("ECAM", func(t *testing.T) { f(t, pcitest.ECAM(b, slot)) })
}

func TestIdentity(t *testing.T) {
	b := pci.NewBus(&pcitest.Space{}, nil)
	f := function(t, pci.FunctionConfig{Vendor: 0x1234, Device: 0x5678, SubVendor: 0x9abc, SubDevice: 0xdef0,
		Class: 0x010203, Revision: 4})
	if slot, err := b.Add(f); slot != 1 || err != nil {
		t.Fatal(slot, err)
	}
	if _, err := b.Add(f); err == nil {
		t.Error("one function is in two slots")
	}
	for _, tt := range []struct {
		slot, reg, n int
		want         uint64
	}{
		{0, 0x00, 4, 0x29c08086}, {0, 0x08, 4, 0x06000000}, {0, 0x0e, 1, 0}, {0, 0x3d, 1, 0},
		{1, 0x00, 4, 0x56781234}, {1, 0x00, 2, 0x1234}, {1, 0x02, 2, 0x5678}, {1, 0x01, 1, 0x12}, {1, 0x03, 1, 0x56},
		{1, 0x01, 2, 0x7812},
		{1, 0x08, 4, 0x01020304}, {1, 0x0b, 1, 0x01}, {1, 0x2c, 4, 0xdef09abc}, {1, 0x34, 1, 0}, {1, 0x06, 2, 0},
		{1, 0x3d, 1, 0},
		{2, 0x00, 4, 0xffffffff}, {2, 0x0e, 1, 0xff}, {31, 0x00, 2, 0xffff},
	} {
		both(t, b, tt.slot, func(t *testing.T, a pcitest.Access) {
			expect(t, fmt.Sprintf("slot %d reg %#x", tt.slot, tt.reg), a.Read(tt.reg, tt.n), tt.want)
		})
	}
	e := b.ECAM()
	for _, tt := range []struct {
		off  uint64
		n    int
		want uint64
	}{
		{1 << 15, 8, 0x00000000_56781234}, {1<<15 | 0x100, 4, 0}, {1<<15 | 0xffc, 4, 0}, {1<<15 | 0xffe, 4, 0xffff0000},
		{1<<15 | 1<<12, 4, 0xffffffff}, {1 << 20, 4, 0xffffffff}, {255 << 20, 8, 0xffffffff_ffffffff}, {1 << 40, 1, 0xff},
	} {
		expect(t, fmt.Sprintf("ECAM %#x", tt.off), pcitest.Load(e, tt.off, tt.n), tt.want)
	}
	pcitest.Store(e, 1<<15|1<<12|0x04, 4, 0xffffffff) // function 1
	pcitest.Store(e, 1<<20|1<<15|0x04, 4, 0xffffffff) // bus 1
	pcitest.Store(e, 1<<15, 8, 0xffffffff_00000000)   // crosses into the command register
	expect(t, "command", pcitest.ECAM(b, 1).Read(4, 2), 0x546)
}

func TestConfigAddress(t *testing.T) {
	cf9 := make(memory, 1)
	b := pci.NewBus(&pcitest.Space{}, cf9)
	p := b.Ports()
	pcitest.Store(p, 0, 4, 0xffffffff)
	expect(t, "latch", pcitest.Load(p, 0, 4), 0x80fffffc)
	pcitest.Store(p, 0, 4, 0x80000008)
	pcitest.Store(p, 3, 1, 0x01) // Linux' probe writes a byte here
	pcitest.Store(p, 0, 2, 0x1234)
	pcitest.Store(p, 0, 1, 0x56)
	pcitest.Store(p, 1, 1, 0x0e)
	expect(t, "latch", pcitest.Load(p, 0, 4), 0x80000008)
	expect(t, "byte of the latch", pcitest.Load(p, 3, 1), 0x80)
	expect(t, "reset control", cf9[0], 0x0e)
	expect(t, "reset control", pcitest.Load(p, 1, 1), 0x0e)
	expect(t, "class", pcitest.Load(p, 6, 2), 0x0600)
	expect(t, "across both", pcitest.Load(p, 0, 8), uint64(0x00000000_80000008))
	for _, latch := range []uint64{0x00000008, 0x80010008, 0x80000108, 0x80000808} {
		pcitest.Store(p, 0, 4, latch)
		expect(t, fmt.Sprintf("data at latch %#x", latch), pcitest.Load(p, 4, 4), 0xffffffff)
	}
}

func TestCommandAndReadOnly(t *testing.T) {
	b := pci.NewBus(&pcitest.Space{}, nil)
	var told []uint16
	add(t, b, function(t, pci.FunctionConfig{Vendor: 0x1111, Device: 0x2222, Command: func(c uint16) {
		told = append(told, c)
	}}))
	a := pcitest.ECAM(b, 1)
	a.Write(4, 2, 0xffff)
	expect(t, "command", a.Read(4, 2), 0x546) // no I/O space, no special cycles
	a.Write(4, 2, 0x546)
	a.Write(5, 1, 0x00)
	expect(t, "command", a.Read(4, 2), 0x046)
	a.Write(4, 1, 0x04)
	expect(t, "command", a.Read(4, 2), 0x004)
	if !slices.Equal(told, []uint16{0x546, 0x046, 0x004}) {
		t.Errorf("the hook saw %#x", told)
	}
	a.Write(0x3c, 4, 0xffffff0b)
	expect(t, "interrupt line", a.Read(0x3c, 4), 0x0b)
	for reg := 0; reg < pci.ConfigSize; reg += 4 {
		if reg == 0x04 || reg == 0x0c || reg == 0x3c {
			continue
		}
		was := a.Read(reg, 4)
		a.Write(reg, 4, ^was)
		if got := a.Read(reg, 4); got != was {
			t.Errorf("register %#x changed from %#x to %#x", reg, was, got)
		}
	}
}

func TestAssign(t *testing.T) {
	bars := func() []*pci.Function {
		return []*pci.Function{
			function(t, pci.FunctionConfig{Name: "a"}, pci.BAR{Index: 0, Size: 0x4000, Wide: true},
				pci.BAR{Index: 2, Size: 0x1000}),
			function(t, pci.FunctionConfig{Name: "b"}, pci.BAR{Index: 1, Size: 0x10},
				pci.BAR{Index: 4, Size: 0x10_0000, Wide: true, Prefetch: true}),
		}
	}
	for _, tt := range []struct {
		name     string
		w32, w64 pci.Window
		want     []uint64 // in order; empty: an error
	}{
		{"both", w32, w64, []uint64{0x10_0010_0000, 0xc000_0000, 0xc000_1000, 0x10_0000_0000}},
		{"no 64-bit window", w32, pci.Window{}, []uint64{0xc010_0000, 0xc010_4000, 0xc010_5000, 0xc000_0000}},
		{"small 64-bit window", w32, pci.Window{Base: 1 << 32, Size: 0x4000},
			[]uint64{0x1_0000_0000, 0xc010_0000, 0xc010_1000, 0xc000_0000}},
		{"unaligned", pci.Window{Base: 0xc000_0800, Size: 0x3000}, w64,
			[]uint64{0x10_0010_0000, 0xc000_1000, 0xc000_2000, 0x10_0000_0000}},
		{"full", pci.Window{Base: 0xc000_0000, Size: 0x1000}, w64, nil},
		{"nowhere", pci.Window{}, pci.Window{}, nil},
		{"from address 0", pci.Window{Size: 0x10_0000}, w64, nil},
		{"wraps", w32, pci.Window{Base: ^uint64(0) - 0xfff, Size: 0x2000}, nil},
		{"above 4 GiB", pci.Window{Base: 0xffff_f000, Size: 0x2000}, w64, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := &pcitest.Space{}
			b := pci.NewBus(s, nil)
			fs := bars()
			add(t, b, fs...)
			err := b.Assign(tt.w32, tt.w64)
			if tt.want == nil {
				if err == nil {
					t.Fatal("no error")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var got []uint64
			for _, f := range fs {
				for _, s := range f.BARs() {
					got = append(got, s.Base)
				}
			}
			expect(t, "addresses", got, tt.want)
			expect(t, "mapped", len(s.Mapped()), 0)
		})
	}
}

func TestSizing(t *testing.T) {
	s := &pcitest.Space{}
	b := pci.NewBus(s, nil)
	add(t, b, function(t, pci.FunctionConfig{}, pci.BAR{Index: 0, Size: 0x4000, Wide: true},
		pci.BAR{Index: 2, Size: 0x1000},
		pci.BAR{Index: 3, Size: 1 << 33, Wide: true, Prefetch: true}))
	if err := b.Assign(w32, w64); err != nil {
		t.Fatal(err)
	}
	for _, decoding := range []uint64{0, pci.CommandMemory} {
		both(t, b, 1, func(t *testing.T, a pcitest.Access) {
			a.Write(4, 2, decoding)
			for i, want := range []uint64{0xffffc004, 0xffffffff, 0xfffff000, 0x0000000c, 0xfffffffe, 0} {
				reg := 0x10 + 4*i
				was := a.Read(reg, 4)
				a.Write(reg, 4, 0xffffffff)
				expect(t, fmt.Sprintf("size of BAR %d", i), a.Read(reg, 4), want)
				a.Write(reg, 4, was)
				expect(t, fmt.Sprintf("BAR %d", i), a.Read(reg, 4), was)
			}
			a.Write(0x30, 4, 0xffffffff)
			expect(t, "expansion ROM", a.Read(0x30, 4), 0)
			if want := 3 * int(decoding/pci.CommandMemory); len(s.Mapped()) != want {
				t.Errorf("mapped %v, want %d regions", s.Mapped(), want)
			}
		})
	}
}

// where records the hooks of a BAR.
type where struct{ now uint64 }

func (w *where) bar(b pci.BAR, t *testing.T) pci.BAR {
	b.Mapped = func(base uint64) {
		if w.now != 0 {
			t.Errorf("BAR %d: mapped at %#x while at %#x", b.Index, base, w.now)
		}
		w.now = base
	}
	b.Unmapped = func(base uint64) {
		if w.now != base {
			t.Errorf("BAR %d: unmapped from %#x while at %#x", b.Index, base, w.now)
		}
		w.now = 0
	}
	return b
}

func TestMoveBAR(t *testing.T) {
	s := &pcitest.Space{}
	const taken = 0xc800_0000
	if err := s.Map("other", taken, 0x1000, nil); err != nil {
		t.Fatal(err)
	}
	b := pci.NewBus(s, nil)
	m0, m2 := make(memory, 0x4000), make(memory, 0x1000)
	var at0, at2 where
	f := function(t, pci.FunctionConfig{Name: "dev"}, at0.bar(pci.BAR{Index: 0, Size: 0x4000, Wide: true, Handler: m0}, t),
		at2.bar(pci.BAR{Index: 2, Size: 0x1000, Handler: m2}, t))
	add(t, b, f)
	if err := b.Assign(w32, pci.Window{}); err != nil {
		t.Fatal(err)
	}
	a := pcitest.CF8(b, 1)
	check := func(what string, bar0, bar2 uint64) {
		t.Helper()
		want := map[uint64]string{taken: "other"}
		if bar0 != 0 {
			want[bar0] = "dev BAR 0"
		}
		if bar2 != 0 {
			want[bar2] = "dev BAR 2"
		}
		if got := s.Mapped(); !maps.Equal(got, want) {
			t.Errorf("%s: mapped %v, want %v", what, got, want)
		}
		expect(t, what+": hooks", []uint64{at0.now, at2.now}, []uint64{bar0, bar2})
		for i, want := range []uint64{bar0, bar2} {
			st := f.BARs()[i]
			decoding := a.Read(4, 2)&pci.CommandMemory != 0
			if st.Mapped != (want != 0) || (st.Err != nil) != (decoding && want == 0) {
				t.Errorf("%s: state of BAR %d is %t, %v", what, st.Index, st.Mapped, st.Err)
			}
		}
	}
	check("at start", 0, 0)
	a.Write(0x10, 4, 0xc100_0000)
	check("moved without decoding", 0, 0)
	a.Write(4, 2, pci.CommandMemory)
	check("decoding", 0xc100_0000, 0xc000_4000)
	s.Write(0xc100_0008, 4, 0x11223344)
	s.Write(0xc000_4ffc, 4, 0x55667788)
	expect(t, "BAR 0", binary.LittleEndian.Uint32(m0[8:]), 0x11223344)
	expect(t, "BAR 2", binary.LittleEndian.Uint32(m2[0xffc:]), 0x55667788)
	a.Write(0x13, 1, 0xc2)
	check("moved by one byte", 0xc200_0000, 0xc000_4000)
	a.Write(0x14, 4, 0x10)
	check("above the windows", 0, 0xc000_4000)
	a.Write(0x14, 4, 0)
	check("back", 0xc200_0000, 0xc000_4000)
	a.Write(0x18, 4, taken)
	check("on another device", 0xc200_0000, 0)
	a.Write(0x18, 4, 0x0010_0000)
	check("outside the window", 0xc200_0000, 0)
	a.Write(0x18, 4, 0xcfff_f000)
	check("at the window's end", 0xc200_0000, 0xcfff_f000)
	a.Write(0x10, 4, 0xcfff_c000)
	check("one on the other", 0, 0xcfff_f000)
	a.Write(0x18, 4, 0xc200_0000)
	check("places changed", 0xcfff_c000, 0xc200_0000)
	a.Write(4, 2, 0)
	check("decoding off", 0, 0)
	a.Write(4, 2, pci.CommandMemory)
	check("decoding again", 0xcfff_c000, 0xc200_0000)
	if err := b.Reset(); err != nil {
		t.Fatal(err)
	}
	check("reset", 0, 0)
	expect(t, "BAR 0 after reset", a.Read(0x10, 4), 0xc000_0004)
	a.Write(4, 2, pci.CommandMemory)
	check("decoding after reset", 0xc000_0000, 0xc000_4000)
	f.Detach()
	f.Detach()
	if got := len(s.Mapped()); got != 1 {
		t.Errorf("%d regions after Detach", got)
	}
	expect(t, "empty slot", a.Read(0, 4), 0xffffffff)
	add(t, b, f)
}

func TestBadBARs(t *testing.T) {
	h := make(memory, 0x1000)
	for _, bar := range []pci.BAR{
		{Index: -1, Size: 0x1000, Handler: h}, {Index: 6, Size: 0x1000, Handler: h},
		{Index: 5, Size: 0x1000, Wide: true, Handler: h},
		{Index: 4, Size: 8, Handler: h}, {Index: 4, Size: 0x1001, Handler: h}, {Index: 4, Size: 0, Handler: h},
		{Index: 4, Size: 1 << 32, Handler: h},
		{Index: 4, Size: 0x1000}, {Index: 2, Size: 0x1000, Handler: h}, {Index: 3, Size: 0x1000, Handler: h},
		{Index: 1, Size: 0x1000, Wide: true, Handler: h},
	} {
		f := function(t, pci.FunctionConfig{}, pci.BAR{Index: 2, Size: 0x1000, Wide: true})
		if f.AddBAR(bar) == nil {
			t.Errorf("%+v was taken", bar)
		}
	}
}

func TestSlotsRunOut(t *testing.T) {
	b := pci.NewBus(&pcitest.Space{}, nil)
	for i := range 31 {
		if slot, err := b.Add(pci.NewFunction(pci.FunctionConfig{})); err != nil || slot != i+1 {
			t.Fatal(i, slot, err)
		}
	}
	if _, err := b.Add(pci.NewFunction(pci.FunctionConfig{})); err == nil {
		t.Error("a 32nd function")
	}
}

func TestCapabilities(t *testing.T) {
	b := pci.NewBus(&pcitest.Space{}, nil)
	f := pci.NewFunction(pci.FunctionConfig{})
	var wrote []string
	for i, c := range []pci.Capability{
		{ID: 0x09, Body: []byte{1, 2, 3}},
		{ID: 0x10, Body: []byte{4, 5, 6, 7, 8, 9}, Writable: []byte{0, 0xf0}, OnRead: func(body []byte, off, n int) {
			body[4]++
		}, OnWrite: func(body []byte, off, n int) { wrote = append(wrote, fmt.Sprint(body, off, n)) }},
		{ID: 0x09, Body: []byte{10, 11}},
	} {
		if at, err := f.AddCapability(c); err != nil || at != []int{0x40, 0x48, 0x50}[i] {
			t.Fatal(at, err)
		}
	}
	add(t, b, f)
	a := pcitest.CF8(b, 1)
	if got := pcitest.Caps(a, 9); !slices.Equal(got, []int{0x40, 0x50}) {
		t.Errorf("capabilities 9 at %#x", got)
	}
	expect(t, "first", a.Read(0x40, 4), 0x02014809)
	expect(t, "last", a.Read(0x50, 4), 0x0b0a0009)
	expect(t, "read before the hook", a.Read(0x48, 4), 0x05045010)
	expect(t, "hooked read", a.Read(0x4c, 4), 0x090a0706)
	a.Write(0x48, 4, 0xffffffff)
	a.Write(0x4c, 2, 0xffff)
	a.Write(0x48, 2, 0xffff) // ID and next
	expect(t, "written", a.Read(0x48, 4), 0xf5045010)
	if !slices.Equal(wrote, []string{"[4 245 6 7 10 9] 0 2", "[4 245 6 7 10 9] 2 2"}) {
		t.Errorf("the hook saw %q", wrote)
	}
	if _, err := f.AddCapability(pci.Capability{ID: 9}); err == nil {
		t.Error("a capability appeared on the bus")
	}
	large := pci.Capability{Body: make([]byte, 0xbf)}
	if _, err := pci.NewFunction(pci.FunctionConfig{}).AddCapability(large); err == nil {
		t.Error("a capability reaches into extended space")
	}
}

func TestResetJoinsErrors(t *testing.T) {
	b := pci.NewBus(&pcitest.Space{}, nil)
	first, second := errors.New("first"), errors.New("second")
	add(t, b, pci.NewFunction(pci.FunctionConfig{Reset: func() error { return first }}),
		pci.NewFunction(pci.FunctionConfig{}),
		pci.NewFunction(pci.FunctionConfig{Reset: func() error { return second }}))
	a := pcitest.ECAM(b, 2)
	a.Write(4, 2, 0x406)
	a.Write(0x3c, 1, 5)
	if err := b.Reset(); !errors.Is(err, first) || !errors.Is(err, second) {
		t.Errorf("got %v", err)
	}
	expect(t, "command", a.Read(4, 2), 0)
	expect(t, "interrupt line", a.Read(0x3c, 1), 0)
}
