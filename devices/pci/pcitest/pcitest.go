// Package pcitest provides both sides of package pci for tests: an address space, MSI-X vectors
// that check how they are used, and accesses to configuration space by both mechanisms.
package pcitest

import (
	"encoding/binary"
	"fmt"
	"sync"

	"gvm/devices/pci"
	"gvm/kvmapi/eventfd"
)

// Access reads and writes n bytes at a register of one function's configuration space.
type Access struct {
	Read  func(reg, n int) uint64
	Write func(reg, n int, v uint64)
}

// CF8 uses ports 0xcf8 and 0xcfc, without the guest's own lock around the two.
func CF8(b *pci.Bus, slot int) Access {
	h := b.Ports()
	at := func(reg int) uint64 {
		Store(h, 0, 4, 1<<31|uint64(slot)<<11|uint64(reg&^3))
		return uint64(4 + reg&3)
	}
	return Access{
		func(reg, n int) uint64 { return Load(h, at(reg), n) },
		func(reg, n int, v uint64) { Store(h, at(reg), n, v) },
	}
}

// ECAM uses the memory-mapped mechanism.
func ECAM(b *pci.Bus, slot int) Access {
	h, base := b.ECAM(), uint64(slot)<<15
	return Access{
		func(reg, n int) uint64 { return Load(h, base+uint64(reg), n) },
		func(reg, n int, v uint64) { Store(h, base+uint64(reg), n, v) },
	}
}

// Load reads n bytes from h.
func Load(h pci.Handler, off uint64, n int) uint64 {
	var b [8]byte
	h.Read(off, b[:n:n])
	return binary.LittleEndian.Uint64(b[:])
}

// Store writes n bytes to h.
func Store(h pci.Handler, off uint64, n int, v uint64) {
	b := binary.LittleEndian.AppendUint64(nil, v)
	h.Write(off, b[:n:n])
}

// Caps returns the offsets of the capabilities with the given ID.
func Caps(a Access, id byte) (at []int) {
	if a.Read(0x06, 2)&0x10 == 0 {
		return nil
	}
	for p, n := int(a.Read(0x34, 1)), 0; p != 0 && n < 48; p, n = int(a.Read(p+1, 1)), n+1 {
		if byte(a.Read(p, 1)) == id {
			at = append(at, p)
		}
	}
	return at
}

type span struct {
	name string
	size uint64
	h    pci.Handler
}

// Space is an address space in which ranges must not overlap.
type Space struct {
	mu    sync.Mutex
	spans map[uint64]span
}

// Map implements pci.Space. A nil h reserves the range.
func (s *Space) Map(name string, base, size uint64, h pci.Handler) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for b, o := range s.spans {
		if base < b+o.size && b < base+size {
			return fmt.Errorf("%s overlaps %s", name, o.name)
		}
	}
	if s.spans == nil {
		s.spans = make(map[uint64]span)
	}
	s.spans[base] = span{name, size, h}
	return nil
}

// Unmap implements pci.Space.
func (s *Space) Unmap(base uint64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.spans[base]; !ok {
		return fmt.Errorf("nothing is mapped at %#x", base)
	}
	delete(s.spans, base)
	return nil
}

// Mapped returns the base and the name of every range.
func (s *Space) Mapped() map[uint64]string {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := make(map[uint64]string)
	for b, o := range s.spans {
		m[b] = o.name
	}
	return m
}

func (s *Space) find(addr uint64, n int) (pci.Handler, uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for b, o := range s.spans {
		if addr >= b && addr-b <= o.size-uint64(n) {
			return o.h, addr - b
		}
	}
	return nil, 0
}

// Read reads n bytes at addr, all ones if nothing is mapped.
func (s *Space) Read(addr uint64, n int) uint64 {
	if h, off := s.find(addr, n); h != nil {
		return Load(h, off, n)
	}
	return ^uint64(0) >> (64 - 8*n)
}

// Write writes n bytes at addr.
func (s *Space) Write(addr uint64, n int, v uint64) {
	if h, off := s.find(addr, n); h != nil {
		Store(h, off, n, v)
	}
}

// Vectors makes vectors and keeps them.
type Vectors struct {
	All []*Vector
	Max int // limit on the vectors made; 0: none
	// Refuse, if set, returns the error of Unmask.
	Refuse func(pci.Message) error
}

// New is a pci.Vectors.
func (vs *Vectors) New() (pci.Vector, error) {
	if vs.Max > 0 && len(vs.All) == vs.Max {
		return nil, fmt.Errorf("only %d vectors", vs.Max)
	}
	ev, err := eventfd.New()
	if err != nil {
		return nil, err
	}
	v := &Vector{set: vs, ev: ev}
	vs.All = append(vs.All, v)
	return v, nil
}

// Calls returns how often Mask and Unmask were called on all vectors since its last call.
func (vs *Vectors) Calls() (n int) {
	for _, v := range vs.All {
		v.mu.Lock()
		n, v.calls = n+v.calls, 0
		v.mu.Unlock()
	}
	return n
}

// Vector acts as an irqfd: while it is unmasked, a signal is delivered.
type Vector struct {
	set    *Vectors
	ev     *eventfd.FD
	mu     sync.Mutex
	live   bool
	msg    pci.Message
	calls  int
	fault  string
	closed bool
}

// Event implements pci.Vector.
func (v *Vector) Event() *eventfd.FD { return v.ev }

// Unmask implements pci.Vector.
func (v *Vector) Unmask(m pci.Message) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.calls++
	if v.live && v.msg == m {
		v.fault = fmt.Sprintf("unmasked with %v twice", m)
	}
	if v.set.Refuse != nil {
		if err := v.set.Refuse(m); err != nil {
			return err
		}
	}
	v.live, v.msg = true, m
	return nil
}

// Mask implements pci.Vector.
func (v *Vector) Mask() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.calls++
	if !v.live {
		v.fault = "masked twice"
	}
	v.live = false
	return nil
}

// Close implements pci.Vector.
func (v *Vector) Close() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.closed {
		v.fault = "closed twice"
	}
	v.closed = true
	return v.ev.Close()
}

// Take returns the message that an irqfd would have delivered since the last
// call, if any.
func (v *Vector) Take() (pci.Message, bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if !v.live {
		return pci.Message{}, false
	}
	was, err := v.ev.Drain()
	return v.msg, was && err == nil
}

// Live reports whether the vector is connected.
func (v *Vector) Live() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.live
}

// Closed reports whether Close was called.
func (v *Vector) Closed() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.closed
}

// Fault describes a violation of the vector's contract, or returns "".
func (v *Vector) Fault() string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.fault
}
