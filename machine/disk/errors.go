package disk

import (
	"errors"
	"io/fs"

	"golang.org/x/sys/unix"

	"gvm/devices/block"
)

// configError is an error in a value that the user gave.
type configError struct{ error }

func (e configError) Unwrap() error { return e.error }

// ImageError is a failure of a disk's image, or of a file beside it.
type ImageError struct{ Err error }

func (e ImageError) Error() string { return e.Err.Error() }

// Unwrap returns the failure.
func (e ImageError) Unwrap() error { return e.Err }

// KernelError reports that the kernel does not serve a disk with backend=vhost.
type KernelError struct{ Err error }

func (e KernelError) Error() string { return e.Err.Error() }

// Unwrap returns the reason.
func (e KernelError) Unwrap() error { return e.Err }

// IsConfig reports whether the user can correct err, as with a file that is missing or in use. Any
// other error is a failure of the host.
func IsConfig(err error) bool {
	var config configError
	var image ImageError
	switch {
	case errors.As(err, &config):
		return true
	case errors.As(err, &image):
		for _, kind := range []error{block.ErrLocked, block.ErrFormat, block.ErrSize,
			block.ErrNotDisk, block.ErrBase, block.ErrNoLocks, fs.ErrNotExist, fs.ErrExist, fs.ErrPermission,
			unix.EROFS, unix.ENOTDIR, unix.ELOOP, unix.ENAMETOOLONG, unix.ETXTBSY, unix.EFBIG} {
			if errors.Is(err, kind) {
				return true
			}
		}
	}
	return false
}
