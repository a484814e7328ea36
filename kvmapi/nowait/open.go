package nowait

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Kinds is a set of types of files.
type Kinds uint8

const (
	Regular Kinds = 1 << iota
	BlockDevice
	CharDevice // including terminals
	Pipe       // named or not
	Socket
	Directory
)

var kindNames = []string{"a regular file", "a block device", "a character device", "a pipe", "a socket", "a directory"}

// String lists the names of the types: "a regular file or a pipe".
func (k Kinds) String() string {
	var names []string
	for i, name := range kindNames {
		if k&(1<<i) != 0 {
			names = append(names, name)
		}
	}
	if n := len(names); n > 1 {
		names = []string{strings.Join(names[:n-1], ", "), names[n-1]}
	}
	return strings.Join(names, " or ")
}

// KindOf returns the type of a file.
func KindOf(m fs.FileMode) Kinds {
	switch {
	case m.IsRegular():
		return Regular
	case m.IsDir():
		return Directory
	case m&fs.ModeCharDevice != 0:
		return CharDevice
	case m&fs.ModeDevice != 0:
		return BlockDevice
	case m&fs.ModeNamedPipe != 0:
		return Pipe
	}
	return Socket
}

// kindOf is KindOf for a mode of stat(2).
func kindOf(mode uint32) Kinds {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return Regular
	case unix.S_IFDIR:
		return Directory
	case unix.S_IFCHR:
		return CharDevice
	case unix.S_IFBLK:
		return BlockDevice
	case unix.S_IFIFO:
		return Pipe
	}
	return Socket
}

// KindError reports a file of a type that Open was not asked for.
type KindError struct {
	Path      string
	Is, Wants Kinds
}

func (e *KindError) Error() string { return fmt.Sprintf("%s: is %v; want %v", e.Path, e.Is, e.Wants) }

// Open is os.OpenFile for a path from a user, a client or a file. It opens only files of the types
// in want, does not wait for the other end of a FIFO, a terminal's line or a lease, and takes no
// terminal as the controlling one. It checks the type before the open, because opening a device may
// have effects, and again after it. A pipe stays non-blocking: reads wait in the runtime's poller,
// where Close ends them. Another type is a *KindError.
func Open(path string, flag int, perm fs.FileMode, want Kinds) (*os.File, error) {
	fi, err := os.Stat(path)
	return open(fi, err, path, want, func() (int, error) {
		return unix.Open(path, flag|nonBlock, uint32(perm.Perm()))
	})
}

// OpenIn is Open for reading, for a path below root, which it does not leave.
func OpenIn(root *os.Root, path string, want Kinds) (*os.File, error) {
	dir, err := root.OpenFile(".", os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	fi, err := root.Stat(path)
	return open(fi, err, path, want, func() (int, error) {
		fd, err := openat2(int(dir.Fd()), path, &unix.OpenHow{Flags: nonBlock, Resolve: unix.RESOLVE_BENEATH})
		switch err {
		case unix.EXDEV:
			err = errEscapes
		case unix.ENOSYS, unix.EPERM: // before Linux 5.6, and in containers that do not know the call
			f, err := root.OpenFile(path, nonBlock, 0)
			if err != nil {
				return -1, err
			}
			defer f.Close()
			return unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		}
		return fd, err
	})
}

var errEscapes = errors.New("path escapes from parent") // the text of package os

var openat2 = unix.Openat2 // tests change it

const nonBlock = unix.O_NONBLOCK | unix.O_NOCTTY | unix.O_CLOEXEC

func open(fi fs.FileInfo, statErr error, path string, want Kinds, openFile func() (int, error)) (*os.File, error) {
	if statErr == nil && KindOf(fi.Mode())&want == 0 {
		return nil, &KindError{path, KindOf(fi.Mode()), want}
	}
	fd, err := openFile()
	for err == unix.EINTR {
		fd, err = openFile()
	}
	if err != nil {
		if pe := (*fs.PathError)(nil); errors.As(err, &pe) {
			err = pe.Err
		}
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	f, is, err := newFile(fd, path)
	if err == nil && is&want == 0 {
		f.Close()
		err = &KindError{path, is, want}
	}
	if err != nil {
		return nil, err
	}
	return f, nil
}

// NewFile is os.NewFile for a descriptor that was opened without waiting (O_NONBLOCK), as Open
// opens: only the file of a pipe, a socket or a terminal stays non-blocking, and in the runtime's
// poller. The runtime adds a file to the poller by a system call of which its scheduler does not
// know, and in which the kernel asks the server of a FUSE file system: all goroutines stop at the
// next garbage collection until that answers. On an error the descriptor is closed.
func NewFile(fd int, path string) (*os.File, error) {
	f, _, err := newFile(fd, path)
	return f, err
}

func newFile(fd int, path string) (_ *os.File, is Kinds, err error) {
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil {
		is = kindOf(st.Mode)
		waits := is&(Pipe|Socket) != 0
		if is == CharDevice {
			_, notTerminal := unix.IoctlGetTermios(fd, unix.TCGETS)
			waits = notTerminal == nil
		}
		if !waits {
			err = unix.SetNonblock(fd, false)
		}
	}
	if err != nil {
		unix.Close(fd)
		return nil, 0, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), is, nil
}
