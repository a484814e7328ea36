package guestmem

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Extents calls each with the parts of a region that may have bytes other than zero, in ascending
// order, until it returns an error or ctx ends. It does not touch the others, which so take no
// memory.
func (r Region) Extents(ctx context.Context, each func(from, to int) error) error {
	if r.FD >= 0 {
		return r.fileExtents(each)
	}
	return r.pageExtents(ctx, each)
}

// fileExtents is Extents of memory that a memfd backs.
func (r Region) fileExtents(each func(from, to int) error) error {
	for at, end := r.Off, r.Off+int64(len(r.Bytes)); at < end; {
		data, err := unix.Seek(r.FD, at, unix.SEEK_DATA)
		if err == unix.ENXIO {
			return nil
		}
		hole := end
		if err == nil {
			hole, err = unix.Seek(r.FD, data, unix.SEEK_HOLE)
		}
		if err == unix.EINVAL { // hugetlbfs
			data, hole, err = at, end, nil
		}
		if err != nil {
			return fmt.Errorf("find data of guest memory at %#x: %w", r.Base+uint64(at-r.Off), err)
		}
		if data >= end {
			return nil
		}
		at = min(hole, end)
		if err := each(int(data-r.Off), int(at-r.Off)); err != nil {
			return err
		}
	}
	return nil
}

// pagemap is open after OpenPagemap.
var pagemap atomic.Pointer[os.File]

// OpenPagemap opens the file that Extents of private memory reads, for a process that will not be
// able to open it. It stays open until the end of the process.
func OpenPagemap() error {
	f, err := os.Open("/proc/self/pagemap")
	if err == nil && !pagemap.CompareAndSwap(nil, f) {
		err = f.Close()
	}
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// pageExtents is Extents of private memory, by /proc/PID/pagemap, which has 8 bytes for each page.
func (r Region) pageExtents(ctx context.Context, each func(from, to int) error) error {
	const there = 3 << 62 // present or swapped: Documentation/admin-guide/mm/pagemap.rst
	f := pagemap.Load()
	if f == nil {
		var err error
		f, err = os.Open("/proc/self/pagemap")
		if errors.Is(err, os.ErrNotExist) {
			return each(0, len(r.Bytes)) // without CONFIG_PROC_PAGE_MONITOR
		}
		if err != nil {
			return fmt.Errorf("find the pages of guest memory: %w", err)
		}
		defer f.Close()
	}
	var entries [64 << 10]byte
	from, size := -1, len(r.Bytes) // from: where the current extent began; -1: none
	for at := 0; at < size; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n := min(len(entries), (size-at+pageSize-1)/pageSize*8)
		if _, err := f.ReadAt(entries[:n], int64(r.page()+uintptr(at/pageSize))*8); err != nil {
			return fmt.Errorf("find the pages of guest memory: %w", err)
		}
		for i := 0; i < n; i, at = i+8, at+pageSize {
			switch used := binary.LittleEndian.Uint64(entries[i:])&there != 0; {
			case used && from < 0:
				from = at
			case !used && from >= 0:
				if err := each(from, at); err != nil {
					return err
				}
				from = -1
			}
		}
	}
	if from >= 0 {
		return each(from, size)
	}
	return nil
}
