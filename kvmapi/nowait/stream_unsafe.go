package nowait

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// Read is read(2) of a descriptor in non-blocking mode, without a notice to Go's scheduler: after a
// call of more than some 20 µs, which copies 64 KiB on a slow host, the scheduler had given the
// goroutine's processor to another thread, and woken that for it.
func Read(fd int, b []byte) (int, error) {
	return result(unix.RawSyscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))),
		uintptr(len(b))))
}

// Write is write(2), as Read is.
func Write(fd int, b []byte) (int, error) {
	return result(unix.RawSyscall(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))),
		uintptr(len(b))))
}

// Vectors is memory for the kernel's form of buffers, which each call uses again.
type Vectors []unix.Iovec

// Writev is writev(2), as Read is.
func (v *Vectors) Writev(fd int, buffers [][]byte) (int, error) {
	defer v.fill(buffers)()
	return result(unix.RawSyscall(unix.SYS_WRITEV, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(*v))),
		uintptr(len(*v))))
}

// fill makes v the buffers, until the function that it returns is called.
func (v *Vectors) fill(buffers [][]byte) (forget func()) {
	*v = (*v)[:0]
	for _, b := range buffers {
		i := unix.Iovec{Base: unsafe.SliceData(b)}
		i.SetLen(len(b))
		*v = append(*v, i)
	}
	return func() { clear(*v) }
}

func result(n, _ uintptr, errno unix.Errno) (int, error) {
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}
