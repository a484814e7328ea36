// Package guestmem gives access to guest RAM. Every access names a guest physical address and a
// length, and is checked against the guest's regions. The result is a slice of the mapping itself,
// so that payload is never copied on the way to a backend.
package guestmem

import (
	"fmt"
	"sort"

	"golang.org/x/sys/unix"
)

// Region is one run of guest RAM.
type Region struct {
	Base  uint64 // guest physical address of the first byte
	Bytes []byte // the mapping; its length is the region's size
	FD    int    // memfd that backs it, or -1 for private memory
	Off   int64  // offset of Bytes[0] in FD
}

// End returns the guest physical address one past the region.
func (r Region) End() uint64 { return r.Base + uint64(len(r.Bytes)) }

// Memory is a guest's RAM: regions in ascending order that neither overlap nor adjoin. It is
// immutable and needs no lock.
type Memory struct {
	regions []Region
	unmap   func() error
	advice  int // how Discard gives pages back (madvise(2)); 0: it cannot
}

// RangeError reports that [Addr, Addr+Len) is not inside one region of RAM.
type RangeError struct{ Addr, Len uint64 }

func (e *RangeError) Error() string {
	return fmt.Sprintf("guest memory [%#x, +%#x) is not RAM", e.Addr, e.Len)
}

// Of makes a Memory of regions, which the caller keeps alive. Tests use Go heap, so that the race
// detector sees the ring protocol.
func Of(regions ...Region) (*Memory, error) {
	rs := append([]Region(nil), regions...)
	sort.Slice(rs, func(i, j int) bool { return rs[i].Base < rs[j].Base })
	for i, r := range rs {
		if len(r.Bytes) == 0 || r.End() < r.Base {
			return nil, fmt.Errorf("guest memory region at %#x: bad size %#x", r.Base, len(r.Bytes))
		}
		if i > 0 && rs[i-1].End() > r.Base {
			return nil, fmt.Errorf("guest memory regions at %#x and %#x overlap", rs[i-1].Base, r.Base)
		}
	}
	return &Memory{regions: rs}, nil
}

// Heap makes a Memory of one region of size bytes of Go heap at base, page aligned, for tests.
func Heap(base uint64, size int) *Memory {
	m, err := Of(Region{Base: base, Bytes: heapPages(size), FD: -1})
	if err != nil {
		panic(err) // a mistake of the test
	}
	return m
}

// Regions returns the regions in ascending order. The caller must not change them.
func (m *Memory) Regions() []Region { return m.regions }

// Size returns the bytes of RAM in all regions.
func (m *Memory) Size() uint64 {
	var n uint64
	for _, r := range m.regions {
		n += uint64(len(r.Bytes))
	}
	return n
}

// Slice returns the n bytes of RAM at guest physical address addr. The slice aliases guest memory:
// copy data before checking it, because the guest can change it at the same time. A range that is
// not inside one region is a *RangeError; n = 0 returns an empty slice for an address in RAM.
func (m *Memory) Slice(addr, n uint64) ([]byte, error) {
	for i := range m.regions {
		r := &m.regions[i]
		if addr < r.Base {
			break
		}
		off := addr - r.Base
		if size := uint64(len(r.Bytes)); off < size {
			if n > size-off {
				break
			}
			return r.Bytes[off : off+n : off+n], nil
		}
	}
	return nil, &RangeError{addr, n}
}

// Read copies len(p) bytes of RAM at addr into p, all or nothing.
func (m *Memory) Read(addr uint64, p []byte) error {
	b, err := m.Slice(addr, uint64(len(p)))
	if err != nil {
		return err
	}
	copy(p, b)
	return nil
}

// Write copies p to RAM at addr, all or nothing.
func (m *Memory) Write(addr uint64, p []byte) error {
	b, err := m.Slice(addr, uint64(len(p)))
	if err != nil {
		return err
	}
	copy(b, p)
	return nil
}

// Discard gives the whole pages of b, which is a slice of this memory, back to the host. They read
// as zeros until they are written again, for every process that has them mapped. Pages of Of and of
// the host's pool of huge pages stay as they are. It fails on memory that is locked.
func (m *Memory) Discard(b []byte) error {
	b = wholePages(b)
	if m.advice == 0 || len(b) == 0 {
		return nil
	}
	if err := unix.Madvise(b, m.advice); err != nil {
		return fmt.Errorf("give %d KiB of guest memory back: %w", len(b)>>10, err)
	}
	return nil
}

// Close unmaps the memory of Map. No slice may be used after it.
func (m *Memory) Close() error {
	if m.unmap == nil {
		return nil
	}
	u := m.unmap
	m.unmap = nil
	return u()
}
