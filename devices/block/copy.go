package block

import (
	"errors"
	"fmt"
	"io"
	"slices"

	"golang.org/x/sys/unix"
)

// cannotCopy are errors of copy_file_range that mean that these two files, or
// ranges that overlap in one, are not for it.
var cannotCopy = []error{unix.EXDEV, unix.EINVAL, unix.EOPNOTSUPP, unix.ENOSYS, unix.EBADF, unix.EISDIR, unix.ETXTBSY}

// CopyFrom copies from another file by copy_file_range, which shares the storage
// where the file system can. Other backends, block devices and ranges that
// overlap are errors.ErrUnsupported.
func (b *File) CopyFrom(src Backend, srcOff, off, n int64) error {
	s, ok := src.(*File)
	if !ok || s.block || b.block {
		return errors.ErrUnsupported
	}
	if srcOff < 0 || off < 0 || n < 0 || srcOff > s.Size()-n || off > b.Size()-n {
		return fmt.Errorf("copy_file_range %s: %d bytes from %d to %d: past an end, at %d and %d",
			b.path, n, srcOff, off, s.Size(), b.Size())
	}
	for n > 0 {
		moved, err := unix.CopyFileRange(s.fd, &srcOff, b.fd, &off, int(min(n, maxBytes)), 0)
		switch {
		case err == unix.EINTR:
		case slices.Contains(cannotCopy, err):
			return errors.ErrUnsupported
		case err != nil:
			return b.wrap("copy_file_range", err)
		case moved == 0:
			return b.wrap("copy_file_range", io.ErrUnexpectedEOF)
		}
		n -= int64(max(moved, 0))
	}
	return nil
}
