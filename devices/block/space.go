package block

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// DiscardGranularity returns the size of the smallest range that gives back
// storage, 0 when this image has no discard that leaves zeroes.
func (b *File) DiscardGranularity() int64 { return b.granularity }

// Discard gives the range back to the file system or the device. It reads as
// zeroes afterwards: on a block device the kernel turns a punched hole into
// WRITE ZEROES with leave to unmap, which keeps that promise where a plain
// BLKDISCARD would not.
func (b *File) Discard(off, n int64) error {
	return b.allocate(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

// Zero writes zeroes; the storage stays allocated. A file system without the
// operation returns an error that is errors.ErrUnsupported; on a block device
// it is BLKZEROOUT.
func (b *File) Zero(off, n int64) error {
	return b.allocate(unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

func (b *File) allocate(mode uint32, off, n int64) error {
	if size := b.Size(); off < 0 || n <= 0 || off > size || n > size-off {
		return fmt.Errorf("fallocate %s: %d bytes at %d: past the end at %d", b.path, n, off, size)
	}
	for {
		err := unix.Fallocate(b.fd, mode, off, n)
		if err == unix.EINTR {
			continue
		}
		return b.wrap("fallocate", err)
	}
}

// discardGranularity finds out whether Discard works without touching data.
func (b *File) discardGranularity() int64 {
	if b.block {
		return b.deviceGranularity()
	}
	var st unix.Stat_t
	if err := unix.Fstat(b.fd, &st); err != nil {
		return 0
	}
	// A hole past the end changes nothing and tells whether holes work.
	err := unix.Fallocate(b.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, b.Size(), int64(st.Blksize))
	if errors.Is(err, errors.ErrUnsupported) {
		return 0
	}
	return int64(st.Blksize)
}

// deviceGranularity reads the queue limits: the device must know both discard
// and WRITE ZEROES.
func (b *File) deviceGranularity() int64 {
	var st unix.Stat_t
	if err := unix.Fstat(b.fd, &st); err != nil {
		return 0
	}
	dir := fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	if _, err := os.Stat(filepath.Join(dir, "partition")); err == nil {
		real, err := filepath.EvalSymlinks(dir)
		if err != nil {
			return 0
		}
		dir = filepath.Dir(real)
	}
	limit := func(name string) int64 {
		s, err := os.ReadFile(filepath.Join(dir, "queue", name))
		if err != nil {
			return 0
		}
		n, err := strconv.ParseInt(strings.TrimSpace(string(s)), 10, 64)
		if err != nil {
			return 0
		}
		return n
	}
	if limit("discard_max_bytes") == 0 || limit("write_zeroes_max_bytes") == 0 {
		return 0
	}
	return limit("discard_granularity")
}
