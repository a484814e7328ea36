// Package pci is the guest's PCI: a host bridge, one root bus with type 0 functions, configuration
// space by ports and by ECAM, base address registers, MSI-X and INTx. "PCI 3.0" below is the PCI
// Local Bus Specification 3.0.
//
// A guest may write anything to configuration space. If it sets a BAR to an address outside the
// bus's windows, or to one in use, the BAR decodes nothing until it is moved.
package pci

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sort"
	"sync"
	"sync/atomic"
)

// Handler is a range of registers: off counts from the range's base, p is 1 to
// 8 bytes, little-endian, that do not cross the range's end. Several vCPUs may
// call at the same time.
type Handler interface {
	Read(off uint64, p []byte)
	Write(off uint64, p []byte)
}

// Space is the machine's memory-mapped address space, where BARs appear. Map fails if the range is
// in use. Neither method waits for a running Handler.
type Space interface {
	Map(name string, base, size uint64, h Handler) error
	Unmap(base uint64) error
}

// Window is a range of addresses that the host bridge forwards to its bus.
type Window struct{ Base, Size uint64 }

func (w Window) holds(base, size uint64) bool {
	return base >= w.Base && size <= w.Size && base-w.Base <= w.Size-size
}

// Ports of the registers of configuration mechanism #1 (PCI 3.0, 3.2.2.3.2), for Bus.Ports.
const (
	PortBase = 0xcf8
	PortSize = 8
)

// ECAMSize is the size of Bus.ECAM for one bus: 32 devices of 8 functions of 4 KiB. In a larger
// ECAM the other buses read as all ones.
const ECAMSize = 1 << 20

const (
	slots        = 32
	latchMask    = 0x80fffffc // the implemented bits of CONFIG_ADDRESS
	latchEnable  = 1 << 31
	resetControl = 1 // offset of port 0xcf9
)

// Bus is bus 0 with the host bridge in slot 0. All methods may be called from any goroutine.
//
// Lock order: a Function's mu (one per function, held for a configuration access and through its
// hooks), then mapping, or the locks of a hook. A BAR's Handler takes neither: a window in
// configuration space may call it with the Function's mu held.
type Bus struct {
	space Space
	reset Handler
	latch atomic.Uint32
	slot  [slots]atomic.Pointer[Function]
	lines func(slot int) Line // nil: INTx# is not wired

	mapping sync.Mutex // guards the fields below and the mutable part of every region
	windows [2]Window  // below 4 GiB, above
	regions []*region
}

// NewBus returns a bus with only the host bridge. Port 0xcf9, the reset control register of PC
// chipsets, lies inside CONFIG_ADDRESS: byte accesses to it go to reset at offset 0, or nowhere if
// reset is nil.
func NewBus(space Space, reset Handler) *Bus {
	b := &Bus{space: space, reset: reset}
	// The bridge of QEMU's q35: every guest knows it, and no driver accesses more than its
	// identity.
	bridge := NewFunction(FunctionConfig{Name: "host bridge", Vendor: 0x8086, Device: 0x29c0, Class: 0x060000})
	bridge.attach(b, 0)
	return b
}

// Wire assigns a line to the INTA# of each slot. It comes before Add.
func (b *Bus) Wire(lines func(slot int) Line) { b.lines = lines }

// Add puts f in the first free slot, counted from 1, and returns its number. It fails if all 31 are
// in use, or f is on a bus already.
func (b *Bus) Add(f *Function) (slot int, err error) {
	b.mapping.Lock()
	defer b.mapping.Unlock()
	if f.bus != nil {
		return 0, fmt.Errorf("pci: %s is on a bus already", f.Name)
	}
	for i := 1; i < slots; i++ {
		if b.slot[i].Load() == nil {
			f.attach(b, i)
			return i, nil
		}
	}
	return 0, fmt.Errorf("pci: no free slot for %s", f.Name)
}

// Assign gives every BAR an address as firmware would: naturally aligned, at least a page each, the
// largest first; 64-bit BARs in w64, or in w32 if w64 is empty or full. It also sets the windows
// outside which no BAR decodes. Memory decoding stays off: a driver enables it after the guest has
// sized the BARs, so that no doorbell has to follow them before. The machine must not run yet.
func (b *Bus) Assign(w32, w64 Window) error {
	if w32.Size > 1<<32 || w32.Base > 1<<32-w32.Size || w64.Base+w64.Size < w64.Base {
		return fmt.Errorf("pci: bad windows %#x+%#x and %#x+%#x", w32.Base, w32.Size, w64.Base, w64.Size)
	}
	type bar struct {
		f *Function
		*region
	}
	var all []bar
	for i := range b.slot {
		if f := b.slot[i].Load(); f != nil {
			for _, r := range f.bars {
				all = append(all, bar{f, r})
			}
		}
	}
	sort.SliceStable(all, func(i, j int) bool { return all[i].Size > all[j].Size })
	next := [2]uint64{w32.Base, w64.Base}
	take := func(i int, w Window, size uint64) (uint64, bool) {
		align := max(size, 4096) - 1
		base := (next[i] + align) &^ align
		if base < next[i] || base == 0 || !w.holds(base, size) {
			return 0, false
		}
		next[i] = base + size
		return base, true
	}
	for _, r := range all {
		base, ok := uint64(0), false
		if r.Wide {
			base, ok = take(1, w64, r.Size)
		}
		if !ok {
			base, ok = take(0, w32, r.Size)
		}
		if !ok {
			return fmt.Errorf("pci: no room for BAR %d of %s, %#x bytes", r.Index, r.f.Name, r.Size)
		}
		r.f.assign(r.region, base)
	}
	b.settle(func() { b.windows = [2]Window{w32, w64} })
	return nil
}

// Reset is the bus's reset line: it restores every function's state after Assign. The error joins
// those of the functions' Reset hooks.
func (b *Bus) Reset() error {
	var errs []error
	for i := range b.slot {
		if f := b.slot[i].Load(); f != nil {
			errs = append(errs, f.Reset())
		}
	}
	b.latch.Store(0)
	return errors.Join(errs...)
}

// settle lets update change the wanted state of the regions and then changes the address space to
// match. It unmaps before it maps, so that two BARs can swap places. A region without a place is
// tried again at every change.
func (b *Bus) settle(update func()) {
	b.mapping.Lock()
	defer b.mapping.Unlock()
	update()
	for _, r := range b.regions {
		if r.mapped && (!r.on || r.want != r.at || !b.decodes(r)) {
			if r.Unmapped != nil {
				r.Unmapped(r.at)
			}
			r.mapped, r.err = false, b.space.Unmap(r.at)
		}
	}
	for _, r := range b.regions {
		if !r.on || r.mapped {
			continue
		}
		if !b.decodes(r) {
			r.err = fmt.Errorf("pci: %s at %#x+%#x is outside the bus's windows", r.name, r.want, r.Size)
			continue
		}
		if r.err = b.space.Map(r.name, r.want, r.Size, r.Handler); r.err == nil {
			r.mapped, r.at = true, r.want
			if r.Mapped != nil {
				r.Mapped(r.at)
			}
		}
	}
}

func (b *Bus) decodes(r *region) bool {
	return b.windows[0].holds(r.want, r.Size) || b.windows[1].holds(r.want, r.Size)
}

// function returns the function with the given routing ID: bus, device and
// function number in 8, 5 and 3 bits.
func (b *Bus) function(id uint64) *Function {
	if id >= slots<<3 || id&7 != 0 {
		return nil
	}
	return b.slot[id>>3].Load()
}

// access does one configuration access. Bytes of p past the end of f's space, or all of them
// without an f, read as ones.
func access(f *Function, reg int, p []byte, write bool) {
	n := 0
	if f != nil {
		n = min(len(p), ConfigSize-reg)
		if write {
			f.write(reg, p[:n])
		} else {
			f.read(reg, p[:n])
		}
	}
	if !write {
		for i := n; i < len(p); i++ {
			p[i] = 0xff
		}
	}
}

type ecam struct{ b *Bus }

// ECAM returns the enhanced configuration access mechanism (PCI Express 3.0,
// 7.2.2). The range starts at bus 0.
func (b *Bus) ECAM() Handler { return ecam{b} }

func (e ecam) Read(off uint64, p []byte) {
	access(e.b.function(off>>12), int(off&(ConfigSize-1)), p, false)
}

func (e ecam) Write(off uint64, p []byte) {
	access(e.b.function(off>>12), int(off&(ConfigSize-1)), p, true)
}

type ports struct{ b *Bus }

// Ports returns CONFIG_ADDRESS and CONFIG_DATA, the eight ports from PortBase.
func (b *Bus) Ports() Handler { return ports{b} }

func (c ports) Read(off uint64, p []byte) {
	switch {
	case off == resetControl && len(p) == 1 && c.b.reset != nil:
		c.b.reset.Read(0, p)
	case off < 4:
		var v [16]byte
		binary.LittleEndian.PutUint32(v[:], c.b.latch.Load())
		copy(p, v[off:])
	default:
		c.data(off, p, false)
	}
}

func (c ports) Write(off uint64, p []byte) {
	switch {
	case off == 0 && len(p) == 4:
		c.b.latch.Store(binary.LittleEndian.Uint32(p) & latchMask)
	case off == resetControl && len(p) == 1 && c.b.reset != nil:
		c.b.reset.Write(0, p)
	case off >= 4: // a byte access below is not a configuration access (PCI 3.0, 3.2.2.3.2)
		c.data(off, p, true)
	}
}

func (c ports) data(off uint64, p []byte, write bool) {
	v := c.b.latch.Load()
	var f *Function
	if v&latchEnable != 0 {
		f = c.b.function(uint64(v>>8) & 0xffff)
	}
	access(f, int(v&0xfc)+int(off-4), p, write)
}
