package archive

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"gvm/kvmapi/nowait"
)

// Unpack makes the file or directory of an archive at dest, or in the directory dest by the name
// base; an empty base needs a file.
func Unpack(r io.Reader, dest, base string) error {
	u := newUnpacker(r)
	h, err := u.first()
	if err != nil {
		return err
	}
	dir, name, err := place(dest, base, h.kind == isDir)
	if err != nil {
		return nowait.CreateError(dest, err)
	}
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	path := filepath.Join(dir, name)
	if err != nil {
		return nowait.CreateError(path, err)
	}
	defer unix.Close(fd)
	if err := u.entry(h, fd, name, path, 0); err != nil {
		return err
	}
	return u.end()
}

// UnpackStream writes the contents of an archive's file to w.
func UnpackStream(r io.Reader, w io.Writer) error {
	u := newUnpacker(r)
	h, err := u.first()
	if err == nil && h.kind != isFile {
		err = broken("it has a directory")
	}
	if err == nil {
		err = u.contents(w)
	}
	if err == nil {
		err = u.end()
	}
	return err
}

// place returns the directory and the name of a copy.
func place(dest, base string, isDir bool) (dir, name string, err error) {
	switch fi, err := os.Stat(dest); {
	case err == nil && fi.IsDir() && base == "":
		return "", "", Error("is a directory: name the file in it")
	case err == nil && fi.IsDir():
		return dest, base, nil
	case err == nil && isDir:
		return "", "", Error("is not a directory; remove it first, or name another")
	case err == nil && !fi.Mode().IsRegular():
		return "", "", errKind + "; name another"
	case err == nil: // a link to a file stays
		if dest, err = filepath.EvalSymlinks(dest); err != nil {
			return "", "", err
		}
	case !errors.Is(err, fs.ErrNotExist):
		return "", "", err
	case strings.HasSuffix(dest, "/") && !isDir:
		return "", "", Error("there is no such directory; make it first, or name another")
	}
	dest = filepath.Clean(dest)
	return filepath.Dir(dest), filepath.Base(dest), nil
}

// broken is an error of an archive that Pack does not make.
func broken(format string, args ...any) error {
	return fmt.Errorf("the archive is broken: "+format, args...)
}

// header is a record.
type header struct {
	kind byte
	mode uint32
	time unix.Timespec
	name string
}

type unpacker struct {
	in  *bufio.Reader
	buf []byte
}

func newUnpacker(r io.Reader) *unpacker {
	return &unpacker{bufio.NewReaderSize(r, 64<<10), make([]byte, partSize)}
}

// read fills b.
func (u *unpacker) read(b []byte) error {
	_, err := io.ReadFull(u.in, b)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return streamError(err)
}

// first returns the first record.
func (u *unpacker) first() (header, error) {
	h, err := u.next()
	if err == nil && (h.name != "" || h.kind != isFile && h.kind != isDir) {
		err = broken("it begins with %q", h.name)
	}
	return h, err
}

// end reads the end of the archive.
func (u *unpacker) end() error {
	h, err := u.next()
	if err == nil && h.kind != end {
		err = broken("it goes on with %q", h.name)
	}
	return err
}

// next returns the next record.
func (u *unpacker) next() (header, error) {
	b := u.buf[:headSize]
	if err := u.read(b); err != nil {
		return header{}, err
	}
	h := header{kind: b[0], mode: uint32(binary.LittleEndian.Uint16(b[1:]) & 0o777)}
	h.time.Sec, h.time.Nsec = int64(binary.LittleEndian.Uint64(b[3:])), int64(binary.LittleEndian.Uint32(b[11:]))
	size := binary.LittleEndian.Uint16(b[15:])
	if size > maxName {
		return h, broken("a name has %d bytes", size)
	}
	name := u.buf[:size]
	if err := u.read(name); err != nil {
		return h, err
	}
	h.name = string(name)
	return h, nil
}

// contents writes the contents of a file to w.
func (u *unpacker) contents(w io.Writer) error {
	for {
		if err := u.read(u.buf[:4]); err != nil {
			return err
		}
		n := binary.LittleEndian.Uint32(u.buf)
		if n == 0 {
			return nil
		}
		if n > partSize {
			return broken("a part has %d bytes", n)
		}
		if err := u.read(u.buf[:n]); err != nil {
			return err
		}
		if _, err := w.Write(u.buf[:n]); err != nil {
			return err
		}
	}
}

// entry makes the file, link or directory of a record in a directory by a name. No other name is
// used, and no link is followed, so that nothing leaves the copy.
func (u *unpacker) entry(h header, dir int, name, path string, depth int) (err error) {
	switch h.kind {
	case isFile:
		err = replace(dir, name, func(temp string) error { return u.file(h, dir, temp, path) })
	case isLink:
		var target strings.Builder
		if err := u.contents(limited{&target}); err != nil {
			return err
		}
		err = replace(dir, name, func(temp string) error {
			err := unix.Symlinkat(target.String(), dir, temp)
			if err == nil {
				err = setTime(dir, temp, h.time)
			}
			return err
		})
	case isDir:
		return u.dir(h, dir, name, path, depth)
	default:
		err = broken("a record of kind %q", h.kind)
	}
	if err != nil && !errors.As(err, new(*StreamError)) {
		err = nowait.CreateError(path, err)
	}
	return err
}

// limited bounds a link's target.
type limited struct{ *strings.Builder }

func (l limited) Write(p []byte) (int, error) {
	if l.Len()+len(p) > maxTarget {
		return 0, broken("the target of a link is long")
	}
	return l.Builder.Write(p)
}

// dir makes a directory, or fills one that is there.
func (u *unpacker) dir(h header, parent int, name, path string, depth int) error {
	err := unix.Mkdirat(parent, name, 0o700)
	isNew := err == nil
	if err != nil && err != unix.EEXIST {
		return nowait.CreateError(path, err)
	}
	if depth == maxDepth {
		return fault(path, errDeep)
	}
	flags := unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	if !isNew { // it may not be readable
		flags |= unix.O_PATH
	}
	dir, err := unix.Openat(parent, name, flags, 0)
	if err != nil {
		return nowait.CreateError(path, err)
	}
	defer unix.Close(dir)
	err = u.entries(dir, path, depth+1)
	if isNew { // also one that is not complete
		e := unix.Fchmod(dir, h.mode)
		if e == nil {
			e = setTime(parent, name, h.time)
		}
		if e != nil && err == nil {
			err = fault(path, e)
		}
	}
	return err
}

// entries unpacks all in a directory.
func (u *unpacker) entries(dir int, path string, depth int) error {
	for {
		h, err := u.next()
		if err != nil || h.kind == endDir {
			return err
		}
		if h.name == "" || h.name == "." || h.name == ".." || strings.ContainsAny(h.name, "/\x00") {
			return broken("the name %q", h.name)
		}
		if err := u.entry(h, dir, h.name, strings.TrimSuffix(path, "/")+"/"+h.name, depth); err != nil {
			return err
		}
	}
}

// replace gives its name to the object that create makes, in place of a file or a link.
func replace(dir int, name string, create func(temp string) error) error {
	var st unix.Stat_t
	err := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if kind := st.Mode & unix.S_IFMT; err == nil && kind != unix.S_IFREG && kind != unix.S_IFLNK {
		return Error("is there already, and is no file; remove it first, or name another")
	} else if err == nil && kind == unix.S_IFREG && isLocked(dir, name) {
		return Error("a program has it locked, as a machine its disks; end that first, or name another")
	}
	temp := fmt.Sprintf(".gvm-cp-%016x", rand.Uint64())
	if err = create(temp); err == nil {
		err = unix.Renameat(dir, temp, dir, name)
	}
	if err != nil {
		_ = unix.Unlinkat(dir, temp, 0) // it may not be there
	}
	return err
}

// isLocked reports whether a program has a lock on a file (fcntl(2)).
func isLocked(dir int, name string) bool {
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	l := unix.Flock_t{Type: unix.F_WRLCK}
	return unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &l) == nil && l.Type != unix.F_UNLCK
}

// file makes a file.
func (u *unpacker) file(h header, dir int, name, path string) error {
	fd, err := unix.Openat(dir, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), path)
	if err = u.contents(f); err == nil {
		err = unix.Fchmod(fd, h.mode)
	}
	if e := f.Close(); err == nil { // the last writes of some network file systems
		err = e
	}
	if err == nil {
		err = setTime(dir, name, h.time)
	}
	return err
}

func setTime(dir int, name string, t unix.Timespec) error {
	return unix.UtimesNanoAt(dir, name, []unix.Timespec{{Nsec: unix.UTIME_OMIT}, t}, unix.AT_SYMLINK_NOFOLLOW)
}
