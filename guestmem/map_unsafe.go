package guestmem

import (
	"context"
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// mapGuarded maps size bytes of fd, or anonymous memory, on a 2 MiB boundary in the middle of an
// inaccessible reservation. A write past a region, by this process or by the kernel on its behalf
// (vhost), faults instead of hitting unrelated memory.
func mapGuarded(fd int, size uint64, flags int) (b []byte, unmap func() error, err error) {
	total := uintptr(size) + 3*hugePage
	start, err := unix.MmapPtr(-1, 0, nil, total, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, nil, fmt.Errorf("mmap of %d MiB: %w", total>>20, err)
	}
	unmap = func() error {
		if err := unix.MunmapPtr(start, total); err != nil {
			return fmt.Errorf("munmap of %d MiB: %w", total>>20, err)
		}
		return nil
	}
	// At least one guard page before, and 2 MiB after.
	base := unsafe.Add(start, hugePage+-uintptr(start)%hugePage)
	const prot = unix.PROT_READ | unix.PROT_WRITE
	if _, err := unix.MmapPtr(fd, 0, base, uintptr(size), prot, flags|unix.MAP_FIXED); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("mmap of %d MiB: %w", size>>20, err), unmap())
	}
	return unsafe.Slice((*byte)(base), size), unmap, nil
}

// residentStep is how many bytes one mincore(2) looks at: the page tables of so many are read in
// some hundred microseconds.
const residentStep = 128 << 20

// Resident returns how many bytes of the region the host has in memory, as this process sees it
// (mincore(2)), and ok, unless ctx ends first.
func (r Region) Resident(ctx context.Context) (n uint64, ok bool) {
	const page = 4096
	var pages [residentStep / page]byte
	for off := 0; off < len(r.Bytes); off += residentStep {
		part := r.Bytes[off:min(off+residentStep, len(r.Bytes))]
		if _, _, e := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&part[0])), uintptr(len(part)),
			uintptr(unsafe.Pointer(&pages[0]))); e != 0 || ctx.Err() != nil {
			return 0, false
		}
		for _, p := range pages[:(len(part)+page-1)/page] {
			n += uint64(p&1) * page
		}
	}
	return n, true
}
