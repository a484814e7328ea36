package boot

import (
	"slices"
	"sort"

	"gvm/guestmem"
)

const pageSize = 4096

// E820 types (ACPI 6.5, 15.1); PVH's memory map uses the same numbers.
const (
	E820RAM      uint32 = 1
	E820Reserved uint32 = 2
	E820ACPI     uint32 = 3
)

// maxE820 is E820_MAX_ENTRIES_ZEROPAGE. The kernel copies a PVH map into the zero page, so the
// limit holds for PVH too.
const maxE820 = 128

const (
	ebda    = 0x9fc00  // start of the area reserved by PC firmware
	highRAM = 0x100000 // and its end: VGA, option ROMs, ACPI tables
)

// E820Entry is a row of the memory map: [Addr, Addr+Size) is of type Type.
type E820Entry struct {
	Addr, Size uint64
	Type       uint32
}

// E820 returns the memory map of mem in ascending order: its regions as RAM, except for PC
// firmware's area 0x9fc00-0x100000, and the rows of reserved, which override RAM.
func E820(mem *guestmem.Memory, reserved ...E820Entry) []E820Entry {
	reserved = append([]E820Entry{{ebda, highRAM - ebda, E820Reserved}}, reserved...)
	var ram layout
	for _, r := range mem.Regions() {
		ram.free = append(ram.free, span{r.Base, r.End()})
	}
	for _, r := range reserved {
		ram.remove(r.Addr, r.Addr+r.Size)
	}
	out := reserved
	for _, s := range ram.free {
		out = append(out, E820Entry{s.start, s.end - s.start, E820RAM})
	}
	sort.SliceStable(out, func(i, j int) bool { return out[i].Addr < out[j].Addr })
	return out
}

// span is [start, end) of guest physical memory.
type span struct{ start, end uint64 }

// layout is the free part of the guest's memory, ascending.
type layout struct{ free []span }

// newLayout returns the memory that is RAM in the memory map and backed by mem, without the first
// page: zero means "none" in every boot protocol.
func newLayout(mem *guestmem.Memory, e820 []E820Entry) layout {
	var l layout
	for _, r := range mem.Regions() {
		l.free = append(l.free, span{r.Base, r.End()})
	}
	var at uint64
	ram := slices.Clone(e820)
	ram = slices.DeleteFunc(ram, func(e E820Entry) bool { return e.Type != E820RAM })
	sort.SliceStable(ram, func(i, j int) bool { return ram[i].Addr < ram[j].Addr })
	for _, e := range ram {
		l.remove(at, e.Addr)
		at = max(at, e.Addr+e.Size)
	}
	l.remove(at, ^uint64(0))
	for _, e := range e820 {
		if e.Type != E820RAM {
			l.remove(e.Addr, e.Addr+e.Size)
		}
	}
	l.remove(0, pageSize)
	return l
}

// remove removes [start, end) from the free memory.
func (l *layout) remove(start, end uint64) {
	if start >= end {
		return
	}
	var out []span
	for _, s := range l.free {
		if s.start < min(start, s.end) {
			out = append(out, span{s.start, min(start, s.end)})
		}
		if max(end, s.start) < s.end {
			out = append(out, span{max(end, s.start), s.end})
		}
	}
	l.free = out
}

// take takes [start, start+size), and reports whether all of it was free.
func (l *layout) take(start, size uint64) bool {
	for _, s := range l.free {
		if start >= s.start && start < s.end && size <= s.end-start {
			l.remove(start, start+size)
			return true
		}
	}
	return false
}

// low takes size bytes in [from, to) at the lowest multiple of align, a power of two.
func (l *layout) low(size, align, from, to uint64) (uint64, bool) {
	for _, s := range l.free {
		start := (max(s.start, from) + align - 1) &^ (align - 1)
		if end := min(s.end, to); start >= s.start && start < end && size <= end-start {
			l.remove(start, start+size)
			return start, true
		}
	}
	return 0, false
}

// high takes size bytes in [from, to) at the highest multiple of align, a power of two.
func (l *layout) high(size, align, from, to uint64) (uint64, bool) {
	for _, s := range slices.Backward(l.free) {
		start, end := max(s.start, from), min(s.end, to)
		if start >= end || size > end-start {
			continue
		}
		if at := (end - size) &^ (align - 1); at >= start {
			l.remove(at, at+size)
			return at, true
		}
	}
	return 0, false
}
