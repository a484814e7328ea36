package guestmem

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Layout of guest physical memory: RAM starts at 0 and leaves a hole below 4 GiB for devices; RAM
// beyond the hole's start continues at 4 GiB.
const (
	HoleStart = 0xc000_0000   // 3 GiB
	HoleEnd   = 0x1_0000_0000 // 4 GiB

	MinSize = 16 << 20 // the minimum for a Linux kernel
	MaxSize = 8 << 40  // a memory slot of KVM has 1<<31 - 1 pages (KVM_MEM_MAX_NR_PAGES)

	hugePage = 2 << 20
)

// Config selects how Map allocates memory on the host.
type Config struct {
	Size uint64 // bytes, a multiple of 4096, MinSize to MaxSize
	// Hugepages takes 2 MiB pages from the host's pool (vm.nr_hugepages).
	Hugepages bool
	// Shared backs each region by a memfd, so that others can map it (Region.FD).
	Shared bool
}

// Map makes a guest's RAM. The host commits a page when it is first touched (MAP_NORESERVE), so
// that a large guest that uses little memory costs little.
func Map(c Config) (*Memory, error) {
	align := uint64(pageSize)
	if c.Hugepages {
		align = hugePage
	}
	if c.Size < MinSize || c.Size%align != 0 || c.Size > MaxSize {
		return nil, fmt.Errorf("guest memory: %d bytes: want %d MiB to %d TiB, in multiples of %d KiB",
			c.Size, MinSize>>20, MaxSize>>40, align>>10)
	}
	m := &Memory{}
	switch {
	case c.Hugepages: // one that the pool gives to another meanwhile would be a SIGBUS
	case c.Shared:
		m.advice = unix.MADV_REMOVE // punches a hole in the memfd, for all that map it
	default:
		m.advice = unix.MADV_DONTNEED
	}
	var unmaps []func() error
	m.unmap = func() error {
		var errs []error
		for i, r := range m.regions {
			errs = append(errs, unmaps[i]())
			if r.FD >= 0 {
				errs = append(errs, unix.Close(r.FD))
			}
		}
		m.regions = nil
		return errors.Join(errs...)
	}
	add := func(base, size uint64) error {
		r, unmap, err := mapRegion(c, base, size)
		if err == nil {
			m.regions = append(m.regions, r)
			unmaps = append(unmaps, unmap)
		}
		return err
	}
	err := add(0, min(c.Size, HoleStart))
	if err == nil && c.Size > HoleStart {
		err = add(HoleEnd, c.Size-HoleStart)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("guest memory: %w", err), m.Close())
	}
	return m, nil
}

func mapRegion(c Config, base, size uint64) (r Region, unmap func() error, err error) {
	r = Region{Base: base, FD: -1}
	flags := unix.MAP_NORESERVE
	var mfd int
	if c.Hugepages {
		// Reserve now: a page missing from the pool later would be a SIGBUS.
		flags = unix.MAP_HUGETLB | 21<<unix.MAP_HUGE_SHIFT
		mfd = unix.MFD_HUGETLB | 21<<unix.MAP_HUGE_SHIFT
	}
	if c.Shared {
		fd, err := unix.MemfdCreate("gvm-ram", unix.MFD_CLOEXEC|mfd)
		if err != nil {
			return r, nil, fmt.Errorf("memfd_create: %w", err)
		}
		r.FD = fd
		if err := unix.Ftruncate(fd, int64(size)); err != nil {
			unix.Close(fd)
			return r, nil, fmt.Errorf("ftruncate of memfd to %d bytes: %w", size, err)
		}
		flags |= unix.MAP_SHARED
		flags &^= unix.MAP_HUGETLB | 21<<unix.MAP_HUGE_SHIFT
	} else {
		flags |= unix.MAP_PRIVATE | unix.MAP_ANONYMOUS
	}
	if r.Bytes, unmap, err = mapGuarded(r.FD, size, flags); err != nil {
		if r.FD >= 0 {
			unix.Close(r.FD)
		}
		if c.Hugepages && errors.Is(err, unix.ENOMEM) {
			return r, nil, fmt.Errorf("2 MiB pages: %w; add pages: sysctl vm.nr_hugepages=%d", err, (size+hugePage-1)/hugePage)
		}
		return r, nil, err
	}
	if !c.Hugepages {
		// Fewer faults and TLB misses if transparent huge pages are set to madvise; EINVAL if the
		// kernel has none.
		_ = unix.Madvise(r.Bytes, unix.MADV_HUGEPAGE)
		_ = unix.Madvise(r.Bytes, unix.MADV_DONTDUMP)
	}
	return r, unmap, nil
}
