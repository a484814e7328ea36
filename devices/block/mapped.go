package block

import (
	"golang.org/x/sys/unix"
)

// Mapped asks the file system for holes (SEEK_DATA, SEEK_HOLE). All of a block
// device is mapped: the kernel does not say what its device has.
func (b *File) Mapped(off, n int64) (mapped bool, length int64, err error) {
	if b.block {
		return true, n, nil
	}
	data, err := unix.Seek(b.fd, off, unix.SEEK_DATA)
	switch {
	case err == unix.ENXIO: // a hole up to the end
		return false, n, nil
	case err != nil:
		return false, 0, b.wrap("SEEK_DATA", err)
	case data > off:
		return false, min(data-off, n), nil
	}
	hole, err := unix.Seek(b.fd, off, unix.SEEK_HOLE)
	if err != nil {
		return false, 0, b.wrap("SEEK_HOLE", err)
	}
	return true, min(hole-off, n), nil
}

// Mapped asks the wrapped backend; one that does not know has all of it mapped.
func (f *Faulty) Mapped(off, n int64) (mapped bool, length int64, err error) {
	if x := f.strike(OpRead, off, 1); x != nil {
		return false, 0, x.Err
	}
	if m, ok := f.b.(Mapper); ok {
		return m.Mapped(off, n)
	}
	return true, n, nil
}
