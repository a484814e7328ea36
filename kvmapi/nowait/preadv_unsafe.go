// Package nowait has file operations that do not wait. Preadv, Read, Write and Writev do not notify
// Go's scheduler, which prepares for a long absence at every other system call; that would add a
// tenth to the time of a small read from the page cache.
package nowait

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// Bounds of a call without the scheduler, which cannot stop the thread meanwhile.
const (
	maxBuffers = 8
	maxBytes   = 64 << 10
)

// Preadv is preadv2(2) with RWF_NOWAIT: it reads at off into iov as much as it can without waiting
// for storage, and returns the number of bytes. The errors are the system call's: unix.EAGAIN if
// nothing can be read at once, and unix.EOPNOTSUPP if the file system does not support it.
func Preadv(fd int, iov [][]byte, off int64) (int, error) {
	if off < 0 {
		return 0, unix.EINVAL // the kernel takes -1 as the file's position
	}
	var v [maxBuffers]unix.Iovec
	n, total := 0, 0
	for _, b := range iov {
		if len(b) == 0 {
			continue
		}
		if total += len(b); n == maxBuffers || total > maxBytes {
			return unix.Preadv2(fd, iov, off, unix.RWF_NOWAIT)
		}
		v[n].Base = &b[0]
		v[n].SetLen(len(b))
		n++
	}
	// The offset has two halves; a 64-bit kernel takes all of it from the lower one.
	got, _, errno := unix.RawSyscall6(unix.SYS_PREADV2, uintptr(fd), uintptr(unsafe.Pointer(&v)), uintptr(n),
		uintptr(off), 0, unix.RWF_NOWAIT)
	if errno != 0 {
		return 0, errno
	}
	return int(got), nil
}
