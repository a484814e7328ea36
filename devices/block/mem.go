package block

import (
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"gvm/devices/iovec"
)

// Mem is storage in memory. It is as durable as memory is.
type Mem struct {
	mu   sync.RWMutex
	data []byte
}

// NewMem returns size bytes of zeroes. The host gives memory as it is written.
func NewMem(size int64) *Mem { return &Mem{data: make([]byte, size)} }

// Size returns the size in bytes.
func (m *Mem) Size() int64 { return int64(len(m.data)) }

// Flush does nothing.
func (m *Mem) Flush() error { return nil }

// ReadAt implements io.ReaderAt.
func (m *Mem) ReadAt(p []byte, off int64) (int, error) { return m.ReadVec([][]byte{p}, off) }

// WriteAt implements io.WriterAt.
func (m *Mem) WriteAt(p []byte, off int64) (int, error) { return m.WriteVec([][]byte{p}, off) }

// ReadVec fills iov from off on; at the end of the storage it stops with
// io.ErrUnexpectedEOF.
func (m *Mem) ReadVec(iov [][]byte, off int64) (int, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	n := 0
	for _, p := range iov {
		at, err := m.from(off + int64(n))
		if err != nil {
			return n, err
		}
		k := copy(p, at)
		if n += k; k < len(p) {
			return n, io.ErrUnexpectedEOF
		}
	}
	return n, nil
}

// WriteVec writes iov at off; at the end of the storage it stops with
// io.ErrShortWrite.
func (m *Mem) WriteVec(iov [][]byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := 0
	for _, p := range iov {
		at, err := m.from(off + int64(n))
		if err != nil {
			return n, err
		}
		k := copy(at, p)
		if n += k; k < len(p) {
			return n, io.ErrShortWrite
		}
	}
	return n, nil
}

// ReadVecNow implements Prompt.
func (m *Mem) ReadVecNow(iov [][]byte, off int64) bool {
	_, err := m.ReadVec(iov, off)
	return err == nil
}

// WriteVecNow implements Prompt.
func (m *Mem) WriteVecNow(iov [][]byte, off int64) bool {
	_, err := m.WriteVec(iov, off)
	return err == nil
}

// from returns the storage from off on.
func (m *Mem) from(off int64) ([]byte, error) {
	if off < 0 || off > int64(len(m.data)) {
		return nil, fmt.Errorf("memory disk: offset %d past the end at %d", off, len(m.data))
	}
	return m.data[off:], nil
}

// WriteVecDurable is WriteVec.
func (m *Mem) WriteVecDurable(iov [][]byte, off int64) (int, error) { return m.WriteVec(iov, off) }

// DiscardGranularity returns 4096.
func (m *Mem) DiscardGranularity() int64 { return 4096 }

// Discard writes zeroes.
func (m *Mem) Discard(off, n int64) error { return m.Zero(off, n) }

// Zero writes zeroes.
func (m *Mem) Zero(off, n int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	at, err := m.from(off)
	if err == nil && n > int64(len(at)) {
		err = fmt.Errorf("memory disk: %d bytes at %d past the end at %d", n, off, len(m.data))
	}
	if err == nil {
		clear(at[:n])
	}
	return err
}

// OpenMemory returns a File of size bytes in memory that has no name, with all
// that a file can: it takes memory as it is written, gives back discarded parts,
// and can change its size. It is gone when it is closed.
func OpenMemory(size int64) (*File, error) {
	fd, err := unix.MemfdCreate("gvm-disk", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memory disk: memfd_create: %w", err)
	}
	f := os.NewFile(uintptr(fd), "memory disk")
	if err := f.Truncate(size); err != nil {
		f.Close()
		return nil, fmt.Errorf("memory disk: %w", err)
	}
	return unnamed(f, size), nil
}

// OpenTemporary is OpenMemory with storage in the directory for temporary files ($TMPDIR) instead
// of memory. files opens it; nil: System.
func OpenTemporary(size int64, files Files) (*File, error) {
	return openTemporary("temporary disk", size, files)
}

// unnamed returns a File for a file without a name.
func unnamed(f *os.File, size int64) *File {
	b := &File{f: f, fd: int(f.Fd()), path: f.Name(), blockSize: 512, unnamed: true}
	b.inMemory = isInMemory(b.fd)
	b.size.Store(size)
	b.granularity = b.discardGranularity()
	return b
}

// Null is storage that keeps nothing, for benchmarks: it reads as zeroes and
// takes every write. Its value is its size in bytes.
type Null int64

// Size returns the size in bytes.
func (n Null) Size() int64 { return int64(n) }

// Flush does nothing.
func (n Null) Flush() error { return nil }

// ReadAt fills p with zeroes.
func (n Null) ReadAt(p []byte, _ int64) (int, error) {
	clear(p)
	return len(p), nil
}

// WriteAt drops p.
func (n Null) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }

// ReadVec fills iov with zeroes.
func (n Null) ReadVec(iov [][]byte, _ int64) (int, error) {
	for _, p := range iov {
		clear(p)
	}
	return iovec.Len(iov), nil
}

// WriteVec drops iov.
func (n Null) WriteVec(iov [][]byte, _ int64) (int, error) {
	return iovec.Len(iov), nil
}

// ReadVecNow implements Prompt.
func (n Null) ReadVecNow(iov [][]byte, off int64) bool {
	_, _ = n.ReadVec(iov, off)
	return true
}

// WriteVecNow implements Prompt.
func (n Null) WriteVecNow([][]byte, int64) bool { return true }

// WriteVecDurable drops iov.
func (n Null) WriteVecDurable(iov [][]byte, off int64) (int, error) { return n.WriteVec(iov, off) }
