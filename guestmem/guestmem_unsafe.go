package guestmem

import (
	"sync/atomic"
	"unsafe"
)

const pageSize = 4096

// heapPages returns n bytes of Go heap that start on a page boundary, like mapped guest memory:
// ring words must be aligned for atomic access.
func heapPages(n int) []byte {
	b := make([]byte, n+pageSize)
	off := -int(uintptr(unsafe.Pointer(&b[0]))) & (pageSize - 1)
	return b[off : off+n : off+n]
}

// wholePages returns the part of b that starts and ends on page boundaries of this process. Regions
// are page aligned here and in the guest, so that these are pages of the guest.
func wholePages(b []byte) []byte {
	if len(b) == 0 {
		return nil
	}
	addr := uintptr(unsafe.Pointer(&b[0])) // only its place in a page is used
	start, end := int(-addr&(pageSize-1)), len(b)-int((addr+uintptr(len(b)))&(pageSize-1))
	if start >= end {
		return nil
	}
	return b[start:end]
}

// word returns the aligned 32-bit word that holds the 16-bit little-endian value at b[0], and the
// shift of the value in it. The slice must come from Memory (whose regions are page aligned and a
// multiple of 4 bytes) and b[0] must be 2-byte aligned, so that the word is inside the region.
func word(b []byte) (*uint32, uint) {
	p := uintptr(unsafe.Pointer(&b[0]))
	// The containing word starts at or before b[0], in the same region.
	return (*uint32)(unsafe.Add(unsafe.Pointer(&b[0]), -int(p&2))), uint(p&2) * 8
}

// LoadUint16 reads the 16-bit little-endian value at b[0] with acquire order: after it the caller
// sees all writes that the other side made before it stored the value. Go has no 16-bit atomics, so
// the containing aligned word is read. b must come from Slice and be 2-byte aligned.
func LoadUint16(b []byte) uint16 {
	w, shift := word(b[:2])
	return uint16(atomic.LoadUint32(w) >> shift)
}

// StoreUint16 writes the 16-bit little-endian value at b[0] with release order and a full fence (as
// in Go's atomics), and leaves the other half of the word alone. b must come from Slice and be
// 2-byte aligned.
func StoreUint16(b []byte, v uint16) {
	w, shift := word(b[:2])
	mask := uint32(0xffff) << shift
	for {
		old := atomic.LoadUint32(w)
		if atomic.CompareAndSwapUint32(w, old, old&^mask|uint32(v)<<shift) {
			return
		}
	}
}

// page returns the number of the region's first page in this process. Only the kernel takes it.
func (r Region) page() uintptr { return uintptr(unsafe.Pointer(&r.Bytes[0])) / pageSize }
