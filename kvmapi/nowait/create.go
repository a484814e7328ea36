package nowait

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// createError is an error with its own text.
type createError struct {
	text string
	err  error
}

func (e *createError) Error() string { return e.text }
func (e *createError) Unwrap() error { return e.err }

// Make is Open for a file that it makes if it does not exist. It reports whether it made the file.
func Make(path string, flag int, perm fs.FileMode, want Kinds) (f *os.File, made bool, err error) {
	f, err = Open(path, flag|os.O_CREATE|os.O_EXCL, perm, want)
	if !errors.Is(err, fs.ErrExist) {
		return f, err == nil, err
	}
	f, err = Open(path, flag, perm, want)
	return f, false, err
}

// CreateTemp makes a file for this user alone in a directory, by a name that no other file has.
func CreateTemp(dir, prefix, suffix string) (*os.File, error) {
	for {
		path := filepath.Join(dir, prefix+strconv.FormatUint(rand.Uint64(), 36)+suffix)
		f, err := Open(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600, Regular)
		if !errors.Is(err, fs.ErrExist) {
			return f, err
		}
	}
}

// Unnamed opens a new file without a name, to write, for Name: nothing is left of it if the process
// ends first. It is nil if the file system of path has none, or /proc is missing, which Name needs.
func Unnamed(path string, perm uint32) *os.File {
	if NoProc() {
		return nil
	}
	fd, err := unix.Open(filepath.Dir(path), unix.O_TMPFILE|unix.O_WRONLY|unix.O_CLOEXEC, perm)
	if err != nil {
		return nil
	}
	return os.NewFile(uintptr(fd), path)
}

// Name gives a file of Unnamed its path, where no file may be: else the error is unix.EEXIST.
func Name(f *os.File) error {
	return unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", f.Fd()), unix.AT_FDCWD, f.Name(),
		unix.AT_SYMLINK_FOLLOW)
}

// Remove removes the file at path, which the caller made and has open as f, unless path now names
// another file.
func Remove(f *os.File, path string) error {
	mine, err := f.Stat()
	if err != nil {
		return err
	}
	if there, err := os.Lstat(path); err != nil || !os.SameFile(mine, there) {
		return nil
	}
	return os.Remove(path)
}

// Leads reports whether path leads to the open file f.
func Leads(path string, f *os.File) bool {
	a, err := os.Stat(path)
	b, err2 := f.Stat()
	return err == nil && err2 == nil && os.SameFile(a, b)
}

// CreateError turns err, from an attempt to make the file at path, into an error that names the
// path, the reason and the remedy.
func CreateError(path string, err error) error {
	mend := "name another file"
	if NoProc() { // gvm makes sockets by a descriptor of the directory
		mend = ProcMend
	}
	return explain(path, err, "make it first, or name another", mend)
}

// ProcMend is the remedy of NoProc.
const ProcMend = "mount /proc: mount -t proc proc /proc"

// NoProc reports whether the proc file system, by which gvm starts itself and reaches open files,
// is not there.
func NoProc() bool {
	_, err := os.Lstat("/proc/self")
	return err != nil
}

// OpenError is CreateError for an attempt to open a file that exists.
func OpenError(path string, err error) error {
	return explain(path, err, "check the path", "check the path")
}

// explain makes the error of a path. noDir and noFile are the remedies if the directory or the file
// is missing.
func explain(path string, err error, noDir, noFile string) error {
	if kind := (*KindError)(nil); errors.As(err, &kind) {
		return err // says the types that would do
	}
	if pe := (*fs.PathError)(nil); errors.As(err, &pe) {
		err = pe.Err
	}
	text := fmt.Sprintf("%s: %v", path, err)
	target, linkErr := os.Readlink(path)
	_, fileErr := os.Stat(path)
	dir := filepath.Dir(path)
	_, dirErr := os.Stat(dir)
	switch {
	case path == "":
		text = "the path is empty; name a file"
	case linkErr == nil && errors.Is(fileErr, fs.ErrNotExist):
		text = fmt.Sprintf("%s: is a symbolic link to %s, which does not exist; remove the link, or name that file",
			path, target)
	case errors.Is(err, fs.ErrNotExist) && errors.Is(dirErr, fs.ErrNotExist):
		text += fmt.Sprintf("; there is no directory %s: %s", dir, noDir)
	case errors.Is(err, fs.ErrNotExist):
		text += "; " + noFile
	case errors.Is(err, unix.ENOTDIR) && fileErr == nil:
		text += "; name a directory"
	case errors.Is(err, unix.ENOTDIR):
		text += "; " + dir + " is a file, or lies below one: check the path"
	case errors.Is(err, unix.ELOOP):
		text += "; remove a link of them, or name another file"
	case errors.Is(err, unix.ENAMETOOLONG):
		text += "; give a shorter one"
	case errors.Is(err, fs.ErrPermission):
		text += "; change its permissions or those of its directory, or name another"
	case errors.Is(err, unix.EROFS):
		text += "; name one on another file system"
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		text += "; make room, or name one on another file system"
	case LimitMend(err) != "":
		text += LimitMend(err)
	case errors.Is(err, unix.EFBIG):
		text += "; give a smaller size, or name one on another file system"
	case errors.Is(err, unix.ETXTBSY):
		text += "; it is a program that runs: name another file"
	case errors.Is(err, fs.ErrExist):
		text += "; name another file, or remove that one first"
	}
	return &createError{text, err}
}

// LimitMend returns the remedy of a file that is too large if this process may not make larger
// ones, for behind the text of err: "" for another error, or if the text has it.
func LimitMend(err error) string {
	const mend = "; raise RLIMIT_FSIZE (ulimit -f)"
	var r unix.Rlimit
	if !errors.Is(err, unix.EFBIG) || unix.Prlimit(0, unix.RLIMIT_FSIZE, nil, &r) != nil ||
		r.Cur == unix.RLIM_INFINITY || strings.Contains(err.Error(), mend) {
		return ""
	}
	return mend
}

// TempError is the error of making a temporary file or directory, as kind says. It names the
// directory of those, which a user may not think of.
func TempError(kind string, err error) error {
	if errno := unix.Errno(0); errors.As(err, &errno) {
		err = errno
	}
	mend := "; set TMPDIR to a directory that exists and has room"
	switch {
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE): // another one does not help
		mend = ""
	case LimitMend(err) != "":
		mend = LimitMend(err)
	case errors.Is(err, unix.EFBIG):
		mend = "; give a smaller size, or set TMPDIR to a directory on another file system"
	}
	return fmt.Errorf("temporary %s in %s: %w%s", kind, os.TempDir(), err, mend)
}
