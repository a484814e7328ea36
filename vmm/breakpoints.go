package vmm

import (
	"errors"
	"fmt"
	"slices"

	"gvm/gdbstub"
	"gvm/kvmapi"
	"gvm/vmm/x86"
)

// softPoint is an int3 in guest memory.
type softPoint struct {
	addr, gpa uint64
	original  byte
}

// hardPoint is a use of a debug register.
type hardPoint struct {
	gdbstub.Point
	addr uint64 // of the part of Point that the register watches
	size uint64 // 1, 2, 4 or 8
}

// softAt returns the software breakpoint at a linear address of a vCPU, on its thread; nil: none.
func (d *Debugger) softAt(m *machine, c *kvmapi.VCPU, linear uint64) (*softPoint, error) {
	s, err := c.Sregs()
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	gpa, ok := x86.Translate(m.mem.Read, &s, linear)
	for _, p := range d.soft {
		if ok && p.gpa == gpa {
			return &p, nil
		}
	}
	return nil, nil
}

// hit returns the index in hard of a point that DR6 names, or -1. A processor may set the bits of
// unused registers.
func (d *Debugger) hit(dr6 uint64) int {
	for i := range d.hard {
		if dr6>>i&1 != 0 {
			return i
		}
	}
	return -1
}

// Insert is of gdbstub.Target. A software breakpoint at an address that is not mapped (yet) takes a
// debug register: so a kernel's function can be named before the kernel has made its page tables.
func (d *Debugger) Insert(thread int, p gdbstub.Point) error {
	if p.Kind == gdbstub.SoftwareBreakpoint {
		err := d.pages(thread, p.Addr, 1, func(m *machine, gpa uint64, _, _ int) error {
			s := softPoint{p.Addr, gpa, 0}
			if slices.ContainsFunc(d.soft, func(o softPoint) bool { return o.addr == s.addr }) {
				return nil
			}
			var b [1]byte
			if err := m.mem.Read(gpa, b[:]); err != nil {
				return err
			}
			s.original = b[0]
			for _, o := range d.soft { // one page, two addresses
				if o.gpa == gpa {
					s.original = o.original
				}
			}
			d.soft = append(d.soft, s)
			return m.mem.Write(gpa, []byte{int3})
		})
		if err == nil || errors.Is(err, errNotStopped) {
			return err
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if slices.ContainsFunc(d.hard, func(h hardPoint) bool { return h.Point == p }) {
		return nil
	}
	parts := hardParts(p)
	if len(d.hard)+len(parts) > 4 {
		return fmt.Errorf("no free debug register: %d of 4 are in use, and this needs %d", len(d.hard), len(parts))
	}
	d.hard = append(d.hard, parts...)
	return nil
}

// hardParts divides a point into parts that a debug register can watch: 1, 2, 4 or 8 bytes,
// aligned.
func hardParts(p gdbstub.Point) (parts []hardPoint) {
	if p.Kind <= gdbstub.HardwareBreakpoint {
		return []hardPoint{{p, p.Addr, 1}}
	}
	for at, left := p.Addr, min(p.Len, 64); left > 0; {
		size := uint64(8)
		for at%size != 0 || size > left {
			size /= 2
		}
		parts = append(parts, hardPoint{p, at, size})
		at, left = at+size, left-size
	}
	return parts
}

// Remove is of gdbstub.Target.
func (d *Debugger) Remove(thread int, p gdbstub.Point) error {
	d.mu.Lock()
	n := len(d.hard)
	d.hard = slices.DeleteFunc(d.hard, func(h hardPoint) bool { return h.Point == p })
	removed := n != len(d.hard)
	d.mu.Unlock()
	if removed || p.Kind != gdbstub.SoftwareBreakpoint {
		return nil
	}
	return d.do(thread, func(m *machine, _ *kvmapi.VCPU) error {
		d.mu.Lock()
		defer d.mu.Unlock()
		i := slices.IndexFunc(d.soft, func(s softPoint) bool { return s.addr == p.Addr })
		if i < 0 {
			return nil
		}
		s := d.soft[i]
		d.soft = slices.Delete(d.soft, i, i+1)
		if !slices.ContainsFunc(d.soft, func(o softPoint) bool { return o.gpa == s.gpa }) {
			removeInt3(m, s)
		}
		return nil
	})
}

// removeLost removes the software breakpoints of a client that has gone, on a vCPU's thread. The
// caller holds mu.
func (d *Debugger) removeLost(m *machine) {
	for _, p := range d.lost {
		removeInt3(m, p)
	}
	d.lost = nil
}

// removeInt3 restores the guest's byte, unless the guest has written another since. The memory was
// RAM when the breakpoint was inserted, and stays it.
func removeInt3(m *machine, p softPoint) {
	var b [1]byte
	if m.mem.Read(p.gpa, b[:]) == nil && b[0] == int3 {
		_ = m.mem.Write(p.gpa, []byte{p.original})
	}
}
