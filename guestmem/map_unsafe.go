package guestmem

import (
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
