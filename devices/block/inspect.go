package block

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"gvm/devices/internal/durable"
	"gvm/kvmapi/nowait"
	"gvm/text"
)

// Info has the facts of an image that can be known without taking it.
type Info struct {
	Path   text.Name `json:"path"`
	Format string    `json:"format"` // "raw", "block device", "overlay", or a name such as "qcow2 image"
	Size   int64     `json:"size"`   // bytes; of an overlay, those of its base
	// Allocated is how many bytes of the file system the image takes, 0 for a block
	// device.
	Allocated int64     `json:"allocated"`
	Base      text.Name `json:"base,omitempty"`   // of an overlay: the path of its base when it was made
	Writer    int       `json:"writer,omitempty"` // PID of the process that has it for writing, -1 if it is not found
	Readers   bool      `json:"readers"`          // it is in use for reading
	Host      text.Name `json:"host,omitempty"`   // the host's use of it, such as a mount
}

// Inspect looks at an image, which may be in use.
func Inspect(path string) (i Info, err error) {
	f, _, err := openFile(path, Options{ReadOnly: true})
	if err != nil {
		return i, err
	}
	defer f.Close()
	b := &File{f: f, fd: int(f.Fd()), path: path}
	fi, err := f.Stat()
	if err != nil {
		return i, err
	}
	i = Info{Path: text.Name(b.Identity()), Format: "raw"}
	if i.Size, err = b.currentSize(); err != nil {
		return i, err
	}
	head := make([]byte, overlayHeader)
	n, err := f.ReadAt(head, 0)
	if err != nil && err != io.EOF {
		return i, err
	}
	name, known := formatOf(formats, head[:n])
	if !known {
		tail := make([]byte, 512)
		n, _ := f.ReadAt(tail, max(i.Size-512, 0))
		name, known = formatOf(trailers, tail[:n])
	}
	switch {
	case fi.Mode()&fs.ModeDevice != 0:
		i.Format = "block device"
	case bytes.HasPrefix(head[:n], []byte(overlayMagic)):
		have, err := decodeOverlay(head[:n])
		if err != nil {
			return i, badImage(ErrFormat, path, "%v", err)
		}
		i.Format, i.Size, i.Base = "overlay", have.Size, text.Name(have.Base)
	case known:
		i.Format = name.name
	}
	var st unix.Stat_t
	if err := unix.Fstat(b.fd, &st); err != nil {
		return i, fmt.Errorf("%s: %w", path, err)
	}
	if b.block = i.Format == "block device"; !b.block {
		i.Allocated = st.Blocks * 512
	}
	i.Host = text.Name(b.usedBy(&st, Options{ReadOnly: true}))
	l := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Len: whole.to}
	if err := setLock(uintptr(b.fd), unix.F_OFD_GETLK, &l); err != nil {
		l.Type = unix.F_UNLCK // a file system without locks
	}
	switch l.Type {
	case unix.F_RDLCK:
		i.Readers = true
	case unix.F_WRLCK:
		if i.Writer = lockHolder(b.fd, true, whole); i.Writer == 0 {
			i.Writer = -1
		}
	}
	return i, nil
}

// Create makes an image of size bytes that is not there yet: of holes, or with all
// its storage if allocate is set. When it fails there is none.
func Create(path string, size int64, allocate bool) error {
	if size <= 0 || size%512 != 0 {
		return badImage(ErrSize, path, "size %d is not a multiple of 512; %d is", size, roundUp(size, 512))
	}
	f, named, err := openNew(path, allocate)
	if err != nil {
		return err
	}
	if allocate {
		err = fallocate(int(f.Fd()), 0, 0, size)
	} else {
		err = f.Truncate(size)
	}
	if err == nil && !named {
		err = nowait.Name(f)
		named = err == nil
	}
	if err != nil {
		err = nowait.CreateError(path, err)
	} else {
		err = durable.File(f, path)
	}
	if err != nil && named {
		err = errors.Join(err, nowait.Remove(f, path))
	}
	return errors.Join(err, f.Close())
}

// absent reports whether no file has the path.
func absent(path string) bool {
	_, err := os.Lstat(path)
	return errors.Is(err, fs.ErrNotExist)
}

// fallocate is a variable for tests.
var fallocate = unix.Fallocate

// openNew opens the file of a new image. That of one which takes a while to allocate has no name
// yet, if the file system has such files: nothing is left of it if a signal ends gvm meanwhile.
func openNew(path string, allocate bool) (f *os.File, named bool, err error) {
	if allocate && path != "" && absent(path) {
		if f := nowait.Unnamed(path, 0o644); f != nil {
			return f, false, nil
		}
	}
	const any = ^nowait.Kinds(0) // of a file that is there already, which is an error
	f, err = nowait.Open(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644, any)
	if err != nil {
		return nil, false, nowait.CreateError(path, err)
	}
	if err := Lock(f, path, false); err != nil {
		return nil, false, errors.Join(err, f.Close()) // the file is another's, which found it before the lock
	}
	return f, true, nil
}
