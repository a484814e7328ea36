// Package nowait has file operations that do not wait. Preadv does not even tell Go's
// scheduler, which readies itself for a long absence at every other system call: a tenth of
// what a small read of the page cache takes.
package nowait

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// What may be done without the scheduler knowing: it cannot stop the thread meanwhile.
const (
	maxBuffers = 8
	maxBytes   = 64 << 10
)

// Preadv is preadv2(2) with RWF_NOWAIT: it reads at off into iov what needs no wait for
// storage, and returns how many bytes that were. The errors are the system call's,
// unix.EAGAIN if nothing can be read at once, and unix.EOPNOTSUPP if the file system cannot
// tell.
func Preadv(fd int, iov [][]byte, off int64) (int, error) {
	if off < 0 {
		return 0, unix.EINVAL // to the kernel, -1 is where the file's position is
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
	// The offset is in two halves, of which a 64-bit kernel takes the lower one whole.
	got, _, errno := unix.RawSyscall6(unix.SYS_PREADV2, uintptr(fd), uintptr(unsafe.Pointer(&v)), uintptr(n), uintptr(off), 0, unix.RWF_NOWAIT)
	if errno != 0 {
		return 0, errno
	}
	return int(got), nil
}
