package block

import (
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"gvm/devices/internal/durable"
	"gvm/kvmapi/nowait"
)

// Files are the operations on files by path that a disk needs. A process that may open no files has
// another one do them.
type Files interface {
	// Image opens, checks and locks a raw image, as Open does.
	Image(path string, o Options) (*File, error)
	// Temporary opens a file without a name in the directory for temporary files ($TMPDIR).
	Temporary() (*os.File, error)
	// Open opens a file beside an image, as os.OpenFile does, but follows no link. A file that is not
	// regular is a *nowait.KindError.
	Open(path string, flag int, perm fs.FileMode) (*os.File, error)
	// Sync makes a new file durable, with its name.
	Sync(f *os.File, path string) error
	// Replace gives a file new contents, and Remove removes one. After a crash either nothing or all
	// of that has happened.
	Replace(path string, data []byte) error
	Remove(path string) error
	// Discard removes the file at path, unless that is another than f by now.
	Discard(f *os.File, path string) error
}

// System are the Files of this process.
type System struct{}

// Image implements Files.
func (System) Image(path string, o Options) (*File, error) { return openImage(path, o) }

// Temporary implements Files.
func (System) Temporary() (*os.File, error) {
	fd, err := unix.Open(os.TempDir(), unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, nowait.TempError("file", err)
	}
	return os.NewFile(uintptr(fd), "temporary file"), nil
}

// Open implements Files.
func (System) Open(path string, flag int, perm fs.FileMode) (*os.File, error) {
	return nowait.Open(path, flag|unix.O_NOFOLLOW, perm, nowait.Regular)
}

// Sync implements Files.
func (System) Sync(f *os.File, path string) error { return durable.File(f, path) }

// Replace implements Files.
func (System) Replace(path string, data []byte) error { return durable.Replace(path, data) }

// Remove implements Files.
func (System) Remove(path string) error { return durable.Remove(path) }

// Discard implements Files.
func (System) Discard(f *os.File, path string) error { return nowait.Remove(f, path) }

// filesOr returns f, or those of this process for nil.
func filesOr(f Files) Files {
	if f == nil {
		return System{}
	}
	return f
}

// Files returns the operations for the files beside the image.
func (b *File) Files() Files { return filesOr(b.files) }
