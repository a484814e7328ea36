// Package bus finds the device behind an address: one Bus for port I/O, one
// for memory-mapped I/O.
package bus

import (
	"fmt"
	"sort"
	"sync"
)

// Handler is a range of registers. off counts from the range's base; p is 1 to 8 bytes,
// little-endian, and never crosses the range's end. Several vCPUs may call at the same time: a
// handler does its own locking.
type Handler interface {
	Read(off uint64, p []byte)
	Write(off uint64, p []byte)
}

type span struct {
	name       string
	base, size uint64
	h          Handler
}

// Bus maps address ranges that do not overlap to handlers. Lookups run on
// vCPU threads while the guest moves BARs on another, hence the lock.
type Bus struct {
	mu    sync.RWMutex
	spans []span // ascending by base
}

// Add maps [base, base+size) to h. It fails for a range that is empty, wraps, or overlaps a mapped
// one; the error names both ranges.
func (b *Bus) Add(name string, base, size uint64, h Handler) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if size == 0 || base+size-1 < base {
		return fmt.Errorf("bus: %s: bad range %#x+%#x", name, base, size)
	}
	i := sort.Search(len(b.spans), func(i int) bool { return b.spans[i].base+(b.spans[i].size-1) >= base })
	if i < len(b.spans) && b.spans[i].base <= base+(size-1) {
		return fmt.Errorf("bus: %s at %#x+%#x overlaps %s at %#x+%#x", name, base, size, b.spans[i].name, b.spans[i].base,
			b.spans[i].size)
	}
	b.spans = append(b.spans, span{})
	copy(b.spans[i+1:], b.spans[i:])
	b.spans[i] = span{name, base, size, h}
	return nil
}

// Remove unmaps the range that starts at base; it fails if there is none.
func (b *Bus) Remove(base uint64) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	for i := range b.spans {
		if b.spans[i].base == base {
			b.spans = append(b.spans[:i], b.spans[i+1:]...)
			return nil
		}
	}
	return fmt.Errorf("bus: nothing is mapped at %#x", base)
}

func (b *Bus) find(addr uint64, n int) (Handler, uint64) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	i := sort.Search(len(b.spans), func(i int) bool { return b.spans[i].base+(b.spans[i].size-1) >= addr })
	if i == len(b.spans) || b.spans[i].base > addr {
		return nil, 0
	}
	s := &b.spans[i]
	if off := addr - s.base; uint64(n) <= s.size-off {
		return s.h, off
	}
	return nil, 0
}

// Read fills p from the device at addr and returns true. Without a device it fills p with ones,
// like an undriven bus, and returns false.
func (b *Bus) Read(addr uint64, p []byte) bool {
	h, off := b.find(addr, len(p))
	if h == nil {
		for i := range p {
			p[i] = 0xff
		}
		return false
	}
	h.Read(off, p)
	return true
}

// Write gives p to the device at addr and returns true. Without a device it drops p and returns
// false.
func (b *Bus) Write(addr uint64, p []byte) bool {
	h, off := b.find(addr, len(p))
	if h == nil {
		return false
	}
	h.Write(off, p)
	return true
}
