package nowait

import (
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
	return open(os.Stat, os.OpenFile, path, flag, perm, want)
}

// OpenIn is Open for reading, for a path below root, which it does not leave.
func OpenIn(root *os.Root, path string, want Kinds) (*os.File, error) {
	return open(root.Stat, root.OpenFile, path, os.O_RDONLY, 0, want)
}

func open(
	stat func(string) (fs.FileInfo, error), openFile func(string, int, fs.FileMode) (*os.File, error),
	path string, flag int, perm fs.FileMode, want Kinds,
) (*os.File, error) {
	if fi, err := stat(path); err == nil && KindOf(fi.Mode())&want == 0 {
		return nil, &KindError{path, KindOf(fi.Mode()), want}
	}
	f, err := openFile(path, flag|unix.O_NONBLOCK|unix.O_NOCTTY, perm)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err == nil && KindOf(fi.Mode())&want == 0 {
		err = &KindError{path, KindOf(fi.Mode()), want}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
