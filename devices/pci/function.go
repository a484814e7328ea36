package pci

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"slices"
	"sync"

	"gvm/inspect"
)

// ConfigSize is the size of a function's configuration space in bytes.
const ConfigSize = 4096

// Registers of a type 0 header (PCI 3.0, 6.1) and their bits.
const (
	regVendor     = 0x00
	regDevice     = 0x02
	regCommand    = 0x04
	regStatus     = 0x06
	regRevision   = 0x08
	regCacheLine  = 0x0c
	regBAR        = 0x10
	regSubVendor  = 0x2c
	regSubDevice  = 0x2e
	regCapPtr     = 0x34
	regIntLine    = 0x3c
	regIntPin     = 0x3d
	regFirstCap   = 0x40
	conventional  = 0x100 // capabilities lie below, extended ones above
	statusINTx    = 0x0008
	statusCapList = 0x0010
	statusErrors  = 0xf900 // bits cleared by writing 1
	barWide       = 0x4
	barPrefetch   = 0x8
)

// Bits of the command register (PCI 3.0, 6.2.2).
const (
	CommandMemory      = 0x0002
	CommandMaster      = 0x0004
	commandParity      = 0x0040
	commandSERR        = 0x0100
	commandINTxDisable = 0x0400
)

// FunctionConfig describes a function.
type FunctionConfig struct {
	Name                 string // for messages
	Vendor, Device       uint16
	SubVendor, SubDevice uint16
	Class                uint32 // base class, subclass, interface: 0x010000 is a SCSI controller
	Revision             byte
	// Reset, if set, resets the device behind the function; a function reset calls it first.
	Reset func() error
	// Command, if set, is called with the command register after a write changed it.
	Command func(command uint16)
	// Inspect, if set, returns the state of the device behind the function. It comes without locks.
	Inspect func() inspect.Node
}

// BAR is a memory base address register and its handler.
type BAR struct {
	Index    int    // 0 to 5; a 64-bit one also takes the next
	Size     uint64 // bytes, a power of two from 16
	Wide     bool   // 64-bit
	Prefetch bool   // reads have no side effects and writes may be merged
	Handler  Handler
	// Mapped and Unmapped, if set, follow the BAR in the machine's address
	// space. They are called with the bus's mapping lock held.
	Mapped, Unmapped func(base uint64)
}

// region is a BAR and its place; Bus.mapping guards all but BAR and name.
type region struct {
	BAR
	name   string
	on     bool   // memory decoding is enabled
	want   uint64 // the address in the register
	mapped bool
	at     uint64 // the mapped address
	err    error  // why it is not mapped
}

// Capability is an entry of the capability list (PCI 3.0, 6.7).
type Capability struct {
	ID       byte
	Body     []byte // the bytes after the ID and the next pointer
	Writable []byte // mask of the bits in Body that the guest may write; nil: none
	// OnRead and OnWrite, if set, are called before a read and after a write of n bytes at off in
	// body. The configuration space is locked meanwhile.
	OnRead, OnWrite func(body []byte, off, n int)
}

type placed struct {
	Capability
	at int // of Body in configuration space
}

// Function is a type 0 function: single, number 0 of its device. BARs, capabilities and INTx are
// added before it is put on a bus.
type Function struct {
	FunctionConfig
	bus  *Bus // nil until Add
	slot int
	bars []*region
	caps []placed
	msix *MSIX
	intx *INTx
	next int // offset of the next capability
	link int // offset of the pointer to it

	mu    sync.Mutex
	conf  [ConfigSize]byte
	start [ConfigSize]byte // conf after a reset
	rw    [ConfigSize]byte // bits that the guest may write
	w1c   [ConfigSize]byte // bits cleared by writing 1
}

// NewFunction returns a function without BARs and capabilities.
func NewFunction(c FunctionConfig) *Function {
	f := &Function{FunctionConfig: c, next: regFirstCap, link: regCapPtr}
	le := binary.LittleEndian
	le.PutUint16(f.conf[regVendor:], c.Vendor)
	le.PutUint16(f.conf[regDevice:], c.Device)
	le.PutUint32(f.conf[regRevision:], c.Class<<8|uint32(c.Revision))
	le.PutUint16(f.conf[regSubVendor:], c.SubVendor)
	le.PutUint16(f.conf[regSubDevice:], c.SubDevice)
	le.PutUint16(f.rw[regCommand:], CommandMemory|CommandMaster|commandParity|commandSERR|commandINTxDisable)
	le.PutUint16(f.w1c[regStatus:], statusErrors)
	f.rw[regCacheLine] = 0xff
	f.rw[regIntLine] = 0xff
	return f
}

// AddBAR adds a base address register. It fails for a bad size, or an index that does not exist or
// is in use.
func (f *Function) AddBAR(b BAR) error {
	last := b.Index
	if b.Wide {
		last++
	}
	if f.bus != nil || b.Index < 0 || last > 5 || b.Handler == nil ||
		b.Size < 16 || bits.OnesCount64(b.Size) != 1 || !b.Wide && b.Size > 1<<31 {
		return fmt.Errorf("pci: %s: bad BAR %d of %#x bytes", f.Name, b.Index, b.Size)
	}
	for _, r := range f.bars {
		if b.Index == r.Index || last == r.Index || r.Wide && b.Index == r.Index+1 {
			return fmt.Errorf("pci: %s: BAR %d is taken", f.Name, b.Index)
		}
	}
	reg := regBAR + 4*b.Index
	if b.Wide {
		f.conf[reg] |= barWide
		binary.LittleEndian.PutUint64(f.rw[reg:], -b.Size)
	} else {
		binary.LittleEndian.PutUint32(f.rw[reg:], uint32(-b.Size))
	}
	if b.Prefetch {
		f.conf[reg] |= barPrefetch
	}
	f.bars = append(f.bars, &region{BAR: b, name: fmt.Sprintf("%s BAR %d", f.Name, b.Index)})
	return nil
}

// AddCapability appends c to the capability list and returns its offset. It fails if the 256 bytes
// of conventional configuration space are full.
func (f *Function) AddCapability(c Capability) (int, error) {
	at := f.next
	end := (at + 2 + len(c.Body) + 3) &^ 3
	if f.bus != nil || end > conventional || len(c.Writable) > len(c.Body) {
		return 0, fmt.Errorf("pci: %s: no room for capability %#x", f.Name, c.ID)
	}
	f.conf[regStatus] |= statusCapList
	f.conf[f.link] = byte(at)
	f.conf[at] = c.ID
	copy(f.conf[at+2:], c.Body)
	copy(f.rw[at+2:], c.Writable)
	f.caps = append(f.caps, placed{c, at + 2})
	f.next, f.link = end, at+1
	return at, nil
}

// AddRegisters adds registers of the device itself at an offset of configuration space where there
// are no capabilities. They are described as those of a capability, which is in no list; its ID
// does not count.
func (f *Function) AddRegisters(at int, c Capability) {
	copy(f.conf[at:], c.Body)
	copy(f.rw[at:], c.Writable)
	f.caps = append(f.caps, placed{c, at})
}

// Region returns the handler and the size of BAR i, whether it is mapped or not; nil if there is
// none.
func (f *Function) Region(i int) (Handler, uint64) {
	for _, r := range f.bars {
		if r.Index == i {
			return r.Handler, r.Size
		}
	}
	return nil, 0
}

// BARState is the state of one BAR.
type BARState struct {
	BAR
	Base   uint64 // the address in the register
	Mapped bool   // it decodes at Base
	Err    error  // why it does not decode although the guest enabled it
}

// BARs returns the state of every BAR.
func (f *Function) BARs() []BARState {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.bus != nil {
		f.bus.mapping.Lock()
		defer f.bus.mapping.Unlock()
	}
	var s []BARState
	for _, r := range f.bars {
		s = append(s, BARState{r.BAR, f.base(r), r.mapped, r.err})
	}
	return s
}

// attach puts f in b's slot; Bus.mapping is held, or b is not shared yet.
func (f *Function) attach(b *Bus, slot int) {
	if f.intx != nil && b.lines != nil {
		l := b.lines(slot)
		f.intx.set = l.Set
		f.conf[regIntLine], f.conf[regIntPin] = l.IRQ, 1 // INTA#
	}
	f.bus, f.slot, f.start = b, slot, f.conf
	b.regions = append(b.regions, f.bars...)
	b.slot[slot].Store(f)
}

// Detach removes f from its bus: its BARs leave the address space, and its slot reads as empty.
func (f *Function) Detach() {
	f.mu.Lock()
	defer f.mu.Unlock()
	b := f.bus
	if b == nil {
		return
	}
	b.slot[f.slot].Store(nil)
	b.settle(func() {
		for _, r := range f.bars {
			r.on = false
		}
	})
	b.mapping.Lock()
	defer b.mapping.Unlock()
	b.regions = slices.DeleteFunc(b.regions, func(r *region) bool { return slices.Contains(f.bars, r) })
	f.bus = nil
}

// Reset restores the function's state after Bus.Assign: the device first, so that it stops writing
// to memory, then its interrupts and registers. The error is the Reset hook's.
func (f *Function) Reset() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	var err error
	if f.FunctionConfig.Reset != nil {
		err = f.FunctionConfig.Reset()
	}
	if f.msix != nil {
		f.msix.reset()
	}
	f.conf = f.start
	f.place()
	if f.intx != nil {
		f.intx.disable(false)
	}
	return err
}

func (f *Function) read(reg int, p []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := range f.caps {
		c := &f.caps[i]
		if lo, hi := max(reg, c.at), min(reg+len(p), c.at+len(c.Body)); lo < hi && c.OnRead != nil {
			c.OnRead(f.conf[c.at:c.at+len(c.Body)], lo-c.at, hi-lo)
		}
	}
	if f.intx != nil {
		f.conf[regStatus] &^= statusINTx
		if f.intx.status() {
			f.conf[regStatus] |= statusINTx
		}
	}
	copy(p, f.conf[reg:])
}

func (f *Function) write(reg int, p []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	before := f.command()
	for i, v := range p {
		o := reg + i
		f.conf[o] = (f.conf[o]&^f.rw[o] | v&f.rw[o]) &^ (v & f.w1c[o])
	}
	command := f.command()
	if end := reg + len(p); command != before || reg < regBAR+24 && end > regBAR {
		f.place()
	}
	if command != before && f.intx != nil {
		f.intx.disable(command&commandINTxDisable != 0)
	}
	if f.msix != nil { // before the hook, in which the device may interrupt
		f.msix.setMaster(command&CommandMaster != 0)
	}
	if command != before && f.Command != nil {
		f.Command(command)
	}
	for i := range f.caps {
		c := &f.caps[i]
		if lo, hi := max(reg, c.at), min(reg+len(p), c.at+len(c.Body)); lo < hi && c.OnWrite != nil {
			c.OnWrite(f.conf[c.at:c.at+len(c.Body)], lo-c.at, hi-lo)
		}
	}
}

func (f *Function) command() uint16 { return binary.LittleEndian.Uint16(f.conf[regCommand:]) }

// base returns the address in r's register; mu is held.
func (f *Function) base(r *region) uint64 {
	reg := regBAR + 4*r.Index
	if r.Wide {
		return binary.LittleEndian.Uint64(f.conf[reg:]) &^ 15
	}
	return uint64(binary.LittleEndian.Uint32(f.conf[reg:])) &^ 15
}

// place gives the bus the registers' addresses; mu is held.
func (f *Function) place() {
	if f.bus == nil || len(f.bars) == 0 {
		return
	}
	f.bus.settle(func() {
		for _, r := range f.bars {
			r.on, r.want = f.command()&CommandMemory != 0, f.base(r)
		}
	})
}

// assign sets r's register and the value a reset restores.
func (f *Function) assign(r *region, base uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	reg, le := regBAR+4*r.Index, binary.LittleEndian
	le.PutUint32(f.conf[reg:], uint32(base)|uint32(f.conf[reg]&15))
	if r.Wide {
		le.PutUint32(f.conf[reg+4:], uint32(base>>32))
	}
	copy(f.start[regBAR:regBAR+24], f.conf[regBAR:])
}
