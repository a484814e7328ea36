// Package archive copies files and directories through a stream between a host and its guest. Both
// ends take the other one for hostile: no file leaves the destination, and a file that is not whole
// never has its name.
//
// An archive is a sequence of records: a kind of 1 byte, the permissions (2 bytes), the
// modification time in seconds (8) and nanoseconds (4), and a name with its length (2), all
// little-endian. The first record, without a name, is the file or the directory that is copied.
//
//	f  a file: its contents in parts, each behind its length of 4 bytes; a length of 0 ends them
//	l  a symbolic link: its target, as the contents of a file
//	d  a directory: the records of all in it, up to its end
//	u  the end of a directory
//	e  the end of the archive
package archive

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"gvm/kvmapi/nowait"
)

const (
	isFile, isLink, isDir, endDir, end = 'f', 'l', 'd', 'u', 'e'

	headSize = 17
	// partSize bounds a part of a file.
	partSize = 256 << 10
	// maxName and maxTarget are NAME_MAX and PATH_MAX of Linux.
	maxName, maxTarget = 255, 4096
	// maxDepth bounds the directories in each other, of which each has a descriptor.
	maxDepth = 500
)

// Error is an error that the user can mend, beside those of the system that Refused knows.
type Error string

func (e Error) Error() string { return string(e) }

const (
	errKind = Error("is no file, directory or symbolic link")
	errDeep = Error("has too many directories above it; copy one of them")
)

// StreamError is an error of the stream: the other end has the reason.
type StreamError struct{ error }

// Unwrap returns the stream's own error.
func (e *StreamError) Unwrap() error { return e.error }

// LeftOutError tells of the files that Pack has left out of the archive of a directory: devices,
// pipes and sockets, and those that cannot be read.
type LeftOutError struct {
	First error
	Count int
}

func (e *LeftOutError) Error() string { return fmt.Sprintf("%v; files left out: %d", e.First, e.Count) }

// Refused reports whether an error is one of the user's, who can mend it.
func Refused(err error) bool {
	is := func(e error) bool { return errors.Is(err, e) }
	return slices.ContainsFunc([]error{fs.ErrNotExist, fs.ErrPermission, fs.ErrExist, unix.ENOTDIR, unix.EISDIR,
		unix.ELOOP, unix.ENAMETOOLONG, unix.EROFS}, is) || errors.As(err, new(Error)) || errors.As(err, new(*LeftOutError))
}

// Base returns the name that a copy of the file at path has in a directory: "." for the contents of
// a directory.
func Base(p string) string {
	if p = path.Base(p); p == "/" || p == ".." {
		return "."
	}
	return p
}

// Pack writes an archive of the file at path, or of the directory if recursive is set. A symbolic
// link at path is followed.
func Pack(w io.Writer, path string, recursive bool) error {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return nowait.OpenError(path, err)
	}
	switch {
	case st.Mode&unix.S_IFMT == unix.S_IFDIR && !recursive:
		return fault(path, Error("is a directory, which --recursive copies"))
	case st.Mode&unix.S_IFMT != unix.S_IFDIR && st.Mode&unix.S_IFMT != unix.S_IFREG:
		return fault(path, errKind+"; name another")
	}
	p := newPacker(w)
	if begun, err := p.open(unix.AT_FDCWD, path, "", path, 0); begun && err != nil {
		return err
	} else if err != nil {
		return nowait.OpenError(path, err)
	}
	return p.end()
}

// PackStream writes an archive of a file with the contents of r.
func PackStream(w io.Writer, r io.Reader) error {
	p := newPacker(w)
	st := unix.Stat_t{Mode: 0o644, Mtim: unix.NsecToTimespec(time.Now().UnixNano())}
	const name = "standard input"
	if begun, err := p.file("", &st, r, name); begun && err != nil {
		return err
	} else if err != nil {
		return fault(name, err)
	}
	return p.end()
}

type packer struct {
	out   *bufio.Writer
	buf   []byte
	head  []byte
	depth int // of directories
	left  LeftOutError
}

func newPacker(w io.Writer) *packer {
	return &packer{out: bufio.NewWriterSize(w, 64<<10), buf: make([]byte, partSize)}
}

// end ends an archive.
func (p *packer) end() error {
	err := p.record(end, "", &unix.Stat_t{})
	if err == nil {
		err = streamError(p.out.Flush())
	}
	if err == nil && p.left.Count > 0 {
		err = &p.left
	}
	return err
}

func streamError(err error) error {
	if err != nil {
		err = &StreamError{err}
	}
	return err
}

// fault names the file of an error.
func fault(path string, err error) error {
	if e := (*fs.PathError)(nil); errors.As(err, &e) {
		err = e.Err
	}
	return fmt.Errorf("%s: %w", path, err)
}

func (p *packer) record(kind byte, name string, st *unix.Stat_t) error {
	b := append(p.head[:0], kind)
	b = binary.LittleEndian.AppendUint16(b, uint16(st.Mode&0o777))
	b = binary.LittleEndian.AppendUint64(b, uint64(st.Mtim.Sec))
	b = binary.LittleEndian.AppendUint32(b, uint32(st.Mtim.Nsec))
	b = binary.LittleEndian.AppendUint16(b, uint16(len(name)))
	p.head = append(b, name...)
	_, err := p.out.Write(p.head)
	return streamError(err)
}

// parts writes the last part of a file, and its end.
func (p *packer) parts(b []byte) error {
	if len(b) > 0 {
		if err := p.part(b); err != nil {
			return err
		}
	}
	return p.part(nil)
}

// part writes a part of a file.
func (p *packer) part(b []byte) error {
	_, err := p.out.Write(binary.LittleEndian.AppendUint32(nil, uint32(len(b))))
	if err == nil {
		_, err = p.out.Write(b)
	}
	return streamError(err)
}

// add packs a name of a directory. It leaves out a file that it cannot begin to read.
func (p *packer) add(dir int, name, path string) error {
	var st unix.Stat_t
	begun, err := false, unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	switch kind := st.Mode & unix.S_IFMT; {
	case err == unix.ENOENT: // removed meanwhile
		return nil
	case err != nil:
	case kind == unix.S_IFLNK:
		begun, err = p.link(dir, name, &st)
	case kind == unix.S_IFREG || kind == unix.S_IFDIR:
		begun, err = p.open(dir, name, name, path, unix.O_NOFOLLOW)
	default:
		err = errKind
	}
	if err == nil || begun {
		return err
	}
	if p.left.Count++; p.left.Count == 1 {
		p.left.First = fault(path, err)
	}
	return nil
}

func (p *packer) link(dir int, name string, st *unix.Stat_t) (begun bool, err error) {
	n, err := unix.Readlinkat(dir, name, p.buf[:maxTarget])
	if err != nil {
		return false, err
	}
	if err = p.record(isLink, name, st); err == nil {
		err = p.parts(p.buf[:n])
	}
	return true, err
}

// open packs a file or directory by a name. begun tells that the archive has a part of it; else the
// error lacks its path.
func (p *packer) open(dir int, file, name, path string, flags int) (begun bool, err error) {
	fd, err := unix.Openat(dir, file, flags|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0) // it may be a pipe by now
	if err != nil {
		return false, err
	}
	f, err := nowait.NewFile(fd, path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return false, err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		return p.file(name, &st, f, path)
	case unix.S_IFDIR:
		return p.dir(name, &st, f, path)
	}
	return false, errKind
}

// file packs a file up to its end: the size of one in /proc is not known before.
func (p *packer) file(name string, st *unix.Stat_t, r io.Reader, path string) (begun bool, err error) {
	for {
		n, err := io.ReadFull(r, p.buf)
		last := err == io.EOF || err == io.ErrUnexpectedEOF
		if err != nil && !last {
			if begun {
				err = fault(path, err)
			}
			return begun, err
		}
		if !begun {
			begun = true
			if err := p.record(isFile, name, st); err != nil {
				return true, err
			}
		}
		if last {
			return true, p.parts(p.buf[:n])
		}
		if err := p.part(p.buf[:n]); err != nil {
			return true, err
		}
	}
}

func (p *packer) dir(name string, st *unix.Stat_t, d *os.File, path string) (begun bool, err error) {
	names, err := d.Readdirnames(-1)
	if p.depth++; err == nil && p.depth > maxDepth {
		err = errDeep
	}
	defer func() { p.depth-- }()
	if err != nil {
		return false, err
	}
	slices.Sort(names)
	if err := p.record(isDir, name, st); err != nil {
		return true, err
	}
	for _, n := range names {
		if err := p.add(int(d.Fd()), n, strings.TrimSuffix(path, "/")+"/"+n); err != nil {
			return true, err
		}
	}
	return true, p.record(endDir, "", st)
}
