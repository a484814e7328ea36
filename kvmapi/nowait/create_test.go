package nowait_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"gvm/kvmapi/nowait"
)

// TestNamedErrors opens and makes files in every way that can fail. An error is the kernel's, and
// names the path and a remedy.
func TestNamedErrors(t *testing.T) {
	t.Chdir(t.TempDir())
	long := strings.Repeat("x", 256)
	if err := errors.Join(os.WriteFile("file", nil, 0o600), os.Mkdir("dir", 0o700), os.Symlink("loop", "loop"),
		os.Symlink("none", "dangling"), unix.Mkfifo("fifo", 0o600)); err != nil {
		t.Fatal(err)
	}
	open := func(path string) error {
		_, err := nowait.Open(path, os.O_RDONLY, 0, nowait.Regular)
		return nowait.OpenError(path, err)
	}
	openDir := func(path string) error {
		_, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK, 0)
		return nowait.OpenError(path, err)
	}
	create := func(path string) error {
		_, _, err := nowait.Make(path, os.O_WRONLY, 0o600, nowait.Regular)
		return nowait.CreateError(path, err)
	}
	fails := func(err error) func(string) error {
		return func(path string) error {
			return nowait.OpenError(path, &fs.PathError{Op: "open", Path: path, Err: err})
		}
	}
	for _, tt := range []struct {
		name string
		do   func(string) error
		path string
		is   error // nil: a *nowait.KindError
		want string
	}{
		{"open nothing", open, "none", fs.ErrNotExist, "none: no such file or directory; check the path"},
		{"open in no directory", open, "none/x", fs.ErrNotExist,
			"none/x: no such file or directory; there is no directory none: check the path"},
		{"open no path", open, "", fs.ErrNotExist, "the path is empty; name a file"},
		{"open below a file", open, "file/x", unix.ENOTDIR,
			"file/x: not a directory; file is a file, or lies below one: check the path"},
		{"open a file as a directory", openDir, "file", unix.ENOTDIR, "file: not a directory; name a directory"},
		{"open a loop", open, "loop", unix.ELOOP,
			"loop: too many levels of symbolic links; remove a link of them, or name another file"},
		{"open a link to nothing", open, "dangling", fs.ErrNotExist,
			"dangling: is a symbolic link to none, which does not exist; remove the link, or name that file"},
		{"open a directory", open, "dir", nil, "dir: is a directory; want a regular file"},
		{"open a pipe", open, "fifo", nil, "fifo: is a pipe; want a regular file"},
		{"open a device", open, "/dev/null", nil, "/dev/null: is a character device; want a regular file"},
		{"open a long name", open, long, unix.ENAMETOOLONG, long + ": file name too long; give a shorter one"},
		{"open without permission", fails(unix.EACCES), "file", fs.ErrPermission,
			"file: permission denied; change its permissions or those of its directory, or name another"},
		{"open for writing on a read-only file system", fails(unix.EROFS), "file", unix.EROFS,
			"file: read-only file system; name one on another file system"},
		{"make without room", fails(unix.ENOSPC), "file", unix.ENOSPC,
			"file: no space left on device; make room, or name one on another file system"},
		{"make beyond a quota", fails(unix.EDQUOT), "file", unix.EDQUOT,
			"file: disk quota exceeded; make room, or name one on another file system"},
		{"make a large file", fails(unix.EFBIG), "file", unix.EFBIG,
			"file: file too large; give a smaller size, or name one on another file system"},
		{"make in the place of a program", fails(unix.ETXTBSY), "file", unix.ETXTBSY,
			"file: text file busy; it is a program that runs: name another file"},
		{"make in no directory", create, "none/x", fs.ErrNotExist,
			"none/x: no such file or directory; there is no directory none: make it first, or name another"},
		{"make no path", create, "", fs.ErrNotExist, "the path is empty; name a file"},
		{"make below a file", create, "file/x", unix.ENOTDIR,
			"file/x: not a directory; file is a file, or lies below one: check the path"},
		{"make a directory", create, "dir", nil, "dir: is a directory; want a regular file"},
		{"make a link to nothing", create, "dangling", fs.ErrNotExist,
			"dangling: is a symbolic link to none, which does not exist; remove the link, or name that file"},
		{"make a long name", create, filepath.Join("dir", long), unix.ENAMETOOLONG,
			"dir/" + long + ": file name too long; give a shorter one"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := tt.do(tt.path)
			kind := (*nowait.KindError)(nil)
			if err == nil || err.Error() != tt.want {
				t.Errorf("%v, want %s", err, tt.want)
			} else if tt.is == nil && !errors.As(err, &kind) || tt.is != nil && !errors.Is(err, tt.is) {
				t.Errorf("%v is no %v", err, tt.is)
			}
		})
	}
}
