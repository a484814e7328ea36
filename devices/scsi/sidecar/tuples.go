// Package sidecar keeps the state of a SCSI disk besides its data in files beside its image:
// persistent reservations in IMAGE.pr, protection information in IMAGE.pi.
package sidecar

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/kvmapi/nowait"
)

// The file of a Tuples: a header of tuplesHeader bytes, which has tuplesMagic and the
// block size in 4 bytes, big-endian; then the tuples of all blocks, each bit
// inverted, so that a hole reads as tuples that are not checked.
const (
	tuplesMagic  = "GVM-PI\x00\x01"
	tuplesHeader = 4096
)

// ErrTuples is the error of a file that does not hold tuples.
var ErrTuples = errors.New("not the protection information of this disk")

// Tuples keeps the protection information of a disk in a file beside its image. It is
// a scsi.Protection. The file is made with the first tuple.
type Tuples struct {
	path      string // "": it has no name
	files     block.Files
	blockSize int
	readOnly  bool

	mu sync.Mutex // held while f is made
	f  *os.File   // nil: there is none
}

var _ scsi.Protection = (*Tuples)(nil)

// OpenTuples returns the protection information of the image: in IMAGE.pi, next to the image
// that symbolic links lead to, or in memory for memory. The lock on the image covers
// it. It is an error for a block device, which has no such place, and when the
// file is there and is of another block size.
func OpenTuples(b *block.File) (*Tuples, error) {
	path, err := b.Beside(".pi", "protection information")
	if err != nil {
		return nil, err
	}
	t := &Tuples{path: path, files: b.Files(), blockSize: b.BlockSize(), readOnly: b.ReadOnly()}
	if path == "" {
		fd, err := unix.MemfdCreate("gvm-pi", unix.MFD_CLOEXEC)
		if err != nil {
			return nil, fmt.Errorf("protection information in memory: memfd_create: %w", err)
		}
		t.f = os.NewFile(uintptr(fd), "protection information")
		return t, nil
	}
	flags := os.O_RDWR
	if t.readOnly {
		flags = os.O_RDONLY
	}
	f, err := t.files.Open(t.path, flags, 0)
	kind := (*nowait.KindError)(nil)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return t, nil
	case errors.As(err, &kind):
		return nil, fmt.Errorf("%s: %w", t.path, ErrTuples)
	case err != nil:
		return nil, err
	}
	err = block.Lock(f, t.path, t.readOnly)
	blank := false
	if err == nil {
		blank, err = t.check(f)
	}
	switch {
	case !blank || err != nil:
	case t.readOnly:
		return t, f.Close() // there is none
	default:
		err = t.begin(f)
	}
	if err == nil && !t.readOnly {
		err = t.cut(f, uint64(b.FoundSize()/int64(t.blockSize)))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", t.path, err), f.Close())
	}
	t.f = f
	return t, nil
}

func (t *Tuples) header() []byte {
	return binary.BigEndian.AppendUint32([]byte(tuplesMagic), uint32(t.blockSize))
}

// check checks the header. A blank file is one whose maker crashed before it had written that.
func (t *Tuples) check(f *os.File) (blank bool, err error) {
	fi, err := f.Stat()
	if err != nil {
		return false, err
	}
	want := t.header()
	got := make([]byte, len(want))
	if _, err := f.ReadAt(got, 0); err != nil && err != io.EOF {
		return false, err
	}
	switch {
	case bytes.Equal(got, want):
		return false, nil
	case bytes.Equal(got[:len(tuplesMagic)], want[:len(tuplesMagic)]):
		return false, fmt.Errorf("%w: it is for blocks of %d bytes; give block_size=%[2]d, or remove it to begin without any",
			ErrTuples, binary.BigEndian.Uint32(got[len(tuplesMagic):]))
	case fi.Size() <= int64(len(got)) && bytes.Count(got, []byte{0}) == len(got):
		return true, nil
	}
	return false, fmt.Errorf("%w; move it away, and gvm begins without any", ErrTuples)
}

// cut drops the tuples of blocks that an image which got smaller has no more.
func (t *Tuples) cut(f *os.File, blocks uint64) error {
	fi, err := f.Stat()
	if err != nil || fi.Size() <= tupleOffset(blocks) {
		return err
	}
	return f.Truncate(tupleOffset(blocks))
}

// Cut drops from IMAGE.pi, if that is there, all behind size bytes of the image, for good. It
// is for block.File.Resize.
func Cut(b *block.File, size int64) error {
	path, err := b.Beside(".pi", "protection information")
	if err != nil || path == "" {
		return nil
	}
	f, err := b.Files().Open(path, os.O_RDWR, 0)
	kind := (*nowait.KindError)(nil)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ELOOP), errors.As(err, &kind):
		return nil
	case err != nil:
		return err
	}
	defer f.Close()
	head := make([]byte, len(tuplesMagic)+4)
	if _, err := f.ReadAt(head, 0); err != nil && err != io.EOF {
		return err
	}
	blockSize := int64(binary.BigEndian.Uint32(head[len(tuplesMagic):]))
	if !bytes.HasPrefix(head, []byte(tuplesMagic)) || blockSize == 0 {
		return nil
	}
	t := Tuples{blockSize: int(blockSize)}
	if err := t.cut(f, uint64(size/blockSize)); err != nil {
		return err
	}
	return unix.Fdatasync(int(f.Fd()))
}

// file returns the file, and makes it if there is none and make is set.
func (t *Tuples) file(create bool) (*os.File, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.f != nil || !create {
		return t.f, nil
	}
	f, err := t.files.Open(t.path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	if err := block.Lock(f, t.path, false); err != nil { // the file is another's, which found it before the lock
		return nil, errors.Join(err, f.Close())
	}
	if err := t.begin(f); err != nil {
		return nil, errors.Join(err, t.files.Discard(f, t.path), f.Close())
	}
	t.f = f
	return f, nil
}

// begin writes the header, which is durable before there is any tuple.
func (t *Tuples) begin(f *os.File) error {
	if _, err := f.WriteAt(t.header(), 0); err != nil {
		return err
	}
	return t.files.Sync(f, t.path)
}

// tupleOffset is where a block's tuple is.
func tupleOffset(block uint64) int64 { return tuplesHeader + int64(block)*scsi.TupleSize }

// invert is how tuples lie in the file.
func invert(dst, src []byte) {
	for i, b := range src {
		dst[i] = ^b
	}
}

// ReadTuples implements scsi.Protection.
func (t *Tuples) ReadTuples(p []byte, block uint64) error {
	f, err := t.file(false)
	if err != nil {
		return err
	}
	clear(p)
	if f != nil {
		if n, err := f.ReadAt(p, tupleOffset(block)); err == io.EOF {
			clear(p[n:])
		} else if err != nil {
			return err
		}
	}
	invert(p, p)
	return nil
}

// WriteTuples implements scsi.Protection.
func (t *Tuples) WriteTuples(p []byte, block uint64) error {
	f, err := t.file(true)
	if err != nil {
		return err
	}
	q := make([]byte, len(p))
	invert(q, p)
	_, err = f.WriteAt(q, tupleOffset(block))
	return err
}

// ClearTuples implements scsi.Protection. What reaches to the end of the file is cut off, which
// takes the same time for any length: zeroes take long where a file system punches no holes.
func (t *Tuples) ClearTuples(block, n uint64) error {
	f, err := t.file(false)
	if f == nil || err != nil {
		return err
	}
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if fi.Size() <= tupleOffset(block+n) {
		return t.cut(f, block)
	}
	err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, tupleOffset(block),
		int64(n)*scsi.TupleSize)
	if !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	for zeroes := make([]byte, 64<<10); n > 0; {
		k := min(n, uint64(len(zeroes)/scsi.TupleSize))
		if _, err := f.WriteAt(zeroes[:k*scsi.TupleSize], tupleOffset(block)); err != nil {
			return err
		}
		block, n = block+k, n-k
	}
	return nil
}

// Flush implements scsi.Protection.
func (t *Tuples) Flush() error {
	f, err := t.file(false)
	if f == nil || err != nil || t.path == "" {
		return err
	}
	return unix.Fdatasync(int(f.Fd()))
}

// Close closes the file.
func (t *Tuples) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.f == nil {
		return nil
	}
	return t.f.Close()
}
