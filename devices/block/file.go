// Package block is the storage of disks of any command set. A Backend can be read,
// written and flushed, and may have more abilities, such as Vectored and Discarder. The package has
// raw files and block devices (File), memory (OpenMemory, and Mem without a file), nothing (Null),
// data written over a base that stays as it is (Overlay), a wrapper that fails on purpose (Faulty),
// and a disk that loses its cache at a power cut (Volatile).
package block

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"gvm/devices/internal/durable"
	"gvm/kvmapi/nowait"
)

// Options say how Open takes an image.
type Options struct {
	ReadOnly bool
	// Size, in bytes, of the image afterwards; 0 takes it as it is. A file
	// that does not exist is created, sparse; a smaller one grows, and the new
	// part reads as zeroes. Nothing ever shrinks: a larger file is an error, as
	// is a block device of another size.
	Size int64
	// BlockSize is the logical block size that Size and the image must be a
	// multiple of: 512 (the default) or 4096.
	BlockSize int
	// Direct opens with O_DIRECT, past the host's page cache. Data from buffers
	// that are not aligned goes through one that is.
	Direct bool
	// Note is told of what does not keep a read-only image from being read. nil drops it.
	Note func(string)
	// NoLock takes the image without a lock where the file system has no locks. It takes a lock, and
	// minds those of others, where that has them. A loop device on a file that it cannot find is
	// taken.
	NoLock bool
	// Cut, which may be nil, is called before the image grows to Size: what lies beside it and is
	// about bytes behind size is of an earlier image.
	Cut func(b *File, size int64) error
	// Lend leaves a block device unclaimed, because the kernel's SCSI target claims it. That
	// it can be claimed is checked.
	Lend bool
	// Lent says that the kernel's SCSI target has the device already, and has claimed it.
	Lent bool
	// Raw takes the image as raw bytes without looking for another format.
	Raw bool
	// Overlay takes the file of an overlay, which is Raw. One that exists has Size already, or is
	// empty.
	Overlay bool
	// Uses are those of another process that the image is for: what excludes one of them is in use.
	Uses []Use
	// Files opens the image, and later the files beside it; nil: System.
	Files Files
}

// Kinds of failure of Open, for errors.Is. Each error names the path and what
// can be done. Those of the system, such as fs.ErrNotExist and
// fs.ErrPermission, come through as they are.
var (
	ErrLocked  = errors.New("in use") // see also *LockedError
	ErrFormat  = errors.New("not a raw image")
	ErrSize    = errors.New("unsuitable size")
	ErrNotDisk = errors.New("neither a regular file nor a block device")
	ErrNoLocks = errors.New("no locks")
)

// openError is one line for the user that is also one of the kinds above.
type openError struct {
	kind error
	text string
}

func (e *openError) Error() string { return e.text }
func (e *openError) Unwrap() error { return e.kind }

// badImage returns an error that says why path is no image.
func badImage(kind error, path, format string, a ...any) error {
	return &openError{kind, path + ": " + fmt.Sprintf(format, a...)}
}

// File is a raw image: a regular file or a block device. It is locked from Open
// to Close. All methods but Close may be called at the same time.
type File struct {
	f           *os.File
	fd          int
	path        string
	size        atomic.Int64
	blockSize   int64
	readOnly    bool
	noLock      bool
	note        func(string) // nil: dropped
	identity    string
	files       Files
	below       []io.Closer // the devices below a block device, locked or claimed
	uses        []*use      // of the file or device and of those below it
	others      []Use       // Options.Uses
	block       bool
	made        bool // Open made the file
	imported    bool // another process opened it
	unnamed     bool // it has no path
	inMemory    bool // its file system is
	direct      bool
	mayWait     atomic.Bool  // the file system does not tell which reads wait
	found       int64        // the size before Open made it larger
	changed     int64        // deviceTime of one that is imported
	boot        string       // the host's boot, of Options.Overlay
	granularity int64        // of Discard, 0 without
	lost        atomic.Value // the error of the flush that lost data, an error
}

// Open opens, checks and locks the raw image at path. It changes nothing but
// what Options.Size asks for, and a file that it created is removed again when
// it fails.
func Open(path string, o Options) (*File, error) { return filesOr(o.Files).Image(path, o) }

func openImage(path string, o Options) (*File, error) {
	if o.BlockSize == 0 {
		o.BlockSize = 512
	}
	if o.Size < 0 || o.Size%int64(o.BlockSize) != 0 {
		return nil, badImage(ErrSize, path, "size %d is not a multiple of the block size %d; %d is",
			o.Size, o.BlockSize, roundUp(o.Size, int64(o.BlockSize)))
	}
	if o.Overlay {
		o.Raw = true
		if err := checkTop(path, o.Size); err != nil {
			return nil, err
		}
	}
	for tries := 0; ; tries++ {
		b, err := openLocked(path, o)
		if !errors.Is(err, errReplaced) || tries == 10 {
			return b, err
		}
	}
}

// errReplaced is a file that came or went between two looks at it.
var errReplaced = errors.New("another process makes or removes the file; try again")

// openLocked is one attempt of Open.
func openLocked(path string, o Options) (_ *File, err error) {
	f, made, err := openFile(path, o)
	if err != nil {
		return nil, err
	}
	b := &File{
		f: f, fd: int(f.Fd()), path: path, identity: realName(path), made: made, blockSize: int64(o.BlockSize),
		readOnly: o.ReadOnly, direct: o.Direct, noLock: o.NoLock, note: o.Note, files: o.Files, others: o.Uses,
	}
	defer func() {
		if err != nil {
			// Before the lock goes. Without it the file is another's, which found it before the lock.
			if made && !errors.Is(err, ErrLocked) {
				err = errors.Join(err, nowait.Remove(f, path))
			}
			b.Close()
		}
	}()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	b.block = fi.Mode()&fs.ModeDevice != 0
	if err := b.use(thingOf(fi), path, accessOf(o.ReadOnly), whole); err != nil {
		return nil, err
	}
	if err := b.lock(o); err != nil {
		return nil, err
	}
	if !nowait.Leads(path, f) {
		return nil, fmt.Errorf("%s: %w", path, errReplaced)
	}
	if err := b.claim(o); err != nil {
		return nil, err
	}
	// Of files of others the kernel keeps the time of the last access all the same.
	if flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0); err == nil {
		_, _ = unix.FcntlInt(f.Fd(), unix.F_SETFL, flags&^unix.O_NONBLOCK|unix.O_NOATIME)
	}
	b.inMemory = !b.block && isInMemory(b.fd)
	size, err := b.currentSize()
	if err != nil {
		return nil, err
	}
	b.size.Store(size)
	// Before it grows: a file of another format stays as it is.
	if !o.Raw && (!o.Direct || size%b.blockSize == 0) {
		if err := b.checkFormat(); err != nil {
			return nil, err
		}
	}
	if err := b.fit(o); err != nil {
		return nil, err
	}
	if o.Direct {
		if err := b.checkDirect(o.BlockSize); err != nil {
			return nil, err
		}
	}
	if !o.ReadOnly {
		b.granularity = b.discardGranularity()
	}
	if o.Overlay {
		boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
		if err != nil {
			return nil, err
		}
		b.boot = string(boot)
	}
	if b.found == 0 { // it is new, or a crash came between its making and this
		if err := durable.File(f, b.Identity()); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
	}
	return b, nil
}

// openFile opens path if it is something that can be a disk, and claims a block device
// that is to be written.
func openFile(path string, o Options) (f *os.File, made bool, err error) {
	flags := os.O_RDWR
	if o.ReadOnly {
		flags = os.O_RDONLY
	}
	if o.Direct {
		flags |= unix.O_DIRECT
	}
	const disk = nowait.Regular | nowait.BlockDevice
	fi, err := os.Stat(path)
	switch {
	case path == "":
		return nil, false, nowait.OpenError(path, err)
	case errors.Is(err, fs.ErrNotExist) && o.Size > 0 && !o.ReadOnly:
		if err := CheckName(path); err != nil {
			return nil, false, err
		}
		f, err = nowait.Open(path, flags|os.O_CREATE|os.O_EXCL, 0o644, nowait.Regular)
		switch {
		case errors.Is(err, fs.ErrExist) && !isLink(path):
			return nil, false, fmt.Errorf("%s: %w", path, errReplaced)
		case err != nil:
			return nil, false, nowait.CreateError(path, err)
		}
		made = true
	case errors.Is(err, fs.ErrNotExist) && isLink(path):
		return nil, false, nowait.CreateError(path, err)
	case errors.Is(err, fs.ErrNotExist) && !o.ReadOnly && !isDeviceName(path):
		return nil, false, fmt.Errorf("%s: %w; check the path, or give a size to create it", path, fs.ErrNotExist)
	case err != nil:
	case !o.ReadOnly && !o.Lent && nowait.KindOf(fi.Mode()) == nowait.BlockDevice:
		t := thingOf(fi)
		f, err = openDevice(path, flags, o.Lend)
		switch {
		case !errors.Is(err, unix.EBUSY):
		case o.Lend && t.lioUser("iblock") != "": // of a dead gvm, perhaps: package lio knows
			f, err = nowait.Open(path, flags, 0, nowait.BlockDevice)
		default:
			return nil, false, deviceLocked(path, t.rdev)
		}
	default:
		f, err = nowait.Open(path, flags, 0, disk)
	}
	if err != nil {
		if kind := (*nowait.KindError)(nil); errors.As(err, &kind) {
			return nil, false, badImage(ErrNotDisk, path, "is %v, not a disk image; want %v", kind.Is, disk)
		}
		var pe *fs.PathError
		if errors.As(err, &pe) {
			err = pe.Err
		}
		switch {
		case o.Direct && errors.Is(err, unix.EINVAL):
			return nil, false, fmt.Errorf("%s: the file system has no direct I/O: %w", path, err)
		case !o.ReadOnly && (errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EROFS)):
			return nil, false, fmt.Errorf("%s: cannot be opened for writing (readonly may work): %w", path, err)
		}
		return nil, false, nowait.OpenError(path, err)
	}
	return f, made, nil
}

// isLink reports whether path is a symbolic link.
func isLink(path string) bool {
	_, err := os.Readlink(path)
	return err == nil
}

// openDevice opens a block device for writing, and claims it (O_EXCL): unix.EBUSY says that
// something else does. One that is lent is only tried to be claimed.
func openDevice(path string, flags int, lend bool) (*os.File, error) {
	f, err := nowait.Open(path, flags|unix.O_EXCL, 0, nowait.BlockDevice)
	if err != nil {
		return nil, err
	}
	// Linux lets a read-only device be opened for writing, and fails the writes.
	if ro, err := unix.IoctlGetInt(int(f.Fd()), unix.BLKROGET); err == nil && ro&0x7fffffff != 0 {
		f.Close()
		return nil, unix.EROFS
	}
	if !lend {
		return f, nil
	}
	f.Close()
	return nowait.Open(path, flags, 0, nowait.BlockDevice)
}

// currentSize asks the system. A block device has BLKGETSIZE64's size at its
// end, which lseek returns too.
func (b *File) currentSize() (int64, error) {
	return b.f.Seek(0, io.SeekEnd)
}

// fit makes the image as large as o says and checks its size then.
func (b *File) fit(o Options) error {
	size, err := b.currentSize()
	if err != nil {
		return err
	}
	b.found = size
	switch {
	case o.Size == 0 || o.Size == size:
	case b.block:
		return badImage(ErrSize, b.path, "is a block device of %d bytes, size says %d", size, o.Size)
	case size > o.Size:
		return badImage(ErrSize, b.path, "has %d bytes, size says %d: an image is never made smaller", size, o.Size)
	case o.ReadOnly:
		return badImage(ErrSize, b.path, "has %d bytes, size says %d: it cannot grow readonly", size, o.Size)
	default:
		if size == 0 {
			if err := CheckName(b.path); err != nil {
				return err
			}
		}
		if o.Cut != nil {
			if err := o.Cut(b, size); err != nil {
				return err
			}
		}
		if err := b.f.Truncate(o.Size); err != nil {
			return nowait.CreateError(b.path, err)
		}
		size = o.Size
	}
	if err := b.checkSize(size); err != nil {
		return err
	}
	b.size.Store(size)
	return nil
}

// checkSize returns an error if no image can have size.
func (b *File) checkSize(size int64) error {
	if size == 0 {
		return badImage(ErrSize, b.path, "is empty (give a size to make it a disk)")
	}
	if rest := size % b.blockSize; rest != 0 {
		whole := size - rest
		if whole <= math.MaxInt64-b.blockSize {
			whole += b.blockSize // loses no data
		}
		return badImage(ErrSize, b.path, "has %d bytes, not a multiple of the block size %d (truncate -s %d makes it one)",
			size, b.blockSize, whole)
	}
	return nil
}

// checkDirect makes sure that O_DIRECT can move single blocks.
func (b *File) checkDirect(blockSize int) error {
	need := 0
	if b.block {
		n, err := unix.IoctlGetInt(b.fd, unix.BLKSSZGET)
		if err != nil {
			return fmt.Errorf("%s: BLKSSZGET: %w", b.path, err)
		}
		need = n & 0x7fffffff // the kernel stores an int, of 32 bits
	} else {
		var st unix.Statx_t
		if err := unix.Statx(b.fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &st); err == nil &&
			st.Mask&unix.STATX_DIOALIGN != 0 {
			need = int(st.Dio_offset_align)
		}
	}
	if need > blockSize {
		return badImage(ErrSize, b.path, "direct I/O needs blocks of %d bytes here, the disk has %d", need, blockSize)
	}
	return nil
}

// Close releases the lock and the file. It does not flush.
func (b *File) Close() error {
	b.endUses() // first: a closed file's inode number may be another's
	err := b.f.Close()
	for _, f := range b.below {
		err = errors.Join(err, f.Close())
	}
	return err
}

// Path returns the path that Open was given.
func (b *File) Path() string { return b.path }

// Stat describes the file that is open.
func (b *File) Stat() (fs.FileInfo, error) { return b.f.Stat() }

// Size returns the size of the image in bytes.
func (b *File) Size() int64 { return b.size.Load() }

// Identity names the image by its absolute path, so that a disk without a
// serial number has the same one in every run.
func (b *File) Identity() string {
	if b.identity == "" {
		return realName(b.path)
	}
	return b.identity
}

// realName returns the absolute path without links, or path if there is none.
func realName(path string) string {
	name, err := filepath.EvalSymlinks(path)
	if err == nil {
		name, err = filepath.Abs(name)
	}
	if err != nil {
		return path
	}
	return name
}

// BlockSize returns the logical block size that Open was given.
func (b *File) BlockSize() int { return int(b.blockSize) }

// ReadOnly reports whether the image is only read.
func (b *File) ReadOnly() bool { return b.readOnly }

// FoundSize returns the size that the image had before Open made it larger.
func (b *File) FoundSize() int64 { return b.found }

// Beside returns the path of a file that keeps more of the disk than its bytes: that of the image,
// with suffix. what is in the file. The path is "" for memory, which has no name, and a block
// device has no such place, which is ErrNotDisk.
func (b *File) Beside(suffix, what string) (string, error) {
	switch {
	case b.block:
		return "", badImage(ErrNotDisk, b.path, "a block device has no place for %s beside it", what)
	case b.unnamed:
		return "", nil
	}
	return b.Identity() + suffix, nil
}
