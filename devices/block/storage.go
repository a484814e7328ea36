package block

import (
	"errors"
	"io"

	"gvm/devices/iovec"
)

// Backend is the storage of a disk. ReadAt and WriteAt follow io.ReaderAt and io.WriterAt, may be
// called at the same time from several goroutines, and offsets and lengths are multiples of the
// logical block size inside Size. Flush returns once all data written before the call is on stable
// storage. A Backend may implement more: see Vectored, Prompt, Syncer, Discarder, Mapper, Zeroer,
// Copier and Identified.
type Backend interface {
	io.ReaderAt
	io.WriterAt
	Size() int64 // bytes
	Flush() error
}

// Vectored is a Backend that reads into and writes from scattered buffers with
// one operation. The total length is a multiple of the logical block size; the
// length of one buffer need not be. Fewer bytes than asked come with an error.
type Vectored interface {
	ReadVec(iov [][]byte, off int64) (int, error)
	WriteVec(iov [][]byte, off int64) (int, error)
}

// Prompt is a Backend that knows which transfers need not wait for storage, because they read from
// memory or write to it. Its methods do such a transfer completely, as ReadVec and WriteVec do, or
// return false. The caller then repeats it from the beginning with ReadVec or WriteVec, which
// return any error.
type Prompt interface {
	ReadVecNow(iov [][]byte, off int64) bool
	WriteVecNow(iov [][]byte, off int64) bool
}

// Syncer is a Backend with writes that are on stable storage when they return,
// without a flush of everything else.
type Syncer interface {
	WriteVecDurable(iov [][]byte, off int64) (int, error)
}

// Discarder is a Backend that can give back the storage of a range.
type Discarder interface {
	// DiscardGranularity returns the size, in bytes, of the smallest range that gives back storage,
	// or 0 if Discard does not work.
	DiscardGranularity() int64
	// Discard gives back as much of the range as it can. The whole range reads as zeroes
	// afterwards.
	Discard(off, n int64) error
}

// Mapper is a Backend that knows which blocks have storage of their own.
type Mapper interface {
	// Mapped reports whether the bytes at off have storage, and how many bytes from off on, at
	// least one and at most n, share that state.
	Mapped(off, n int64) (mapped bool, length int64, err error)
}

// Zeroer is a Backend that writes zeroes faster than WriteAt. After errors.ErrUnsupported the
// caller writes them itself.
type Zeroer interface {
	Zero(off, n int64) error
}

// Copier is a Backend that copies from another one without moving the data through this process.
// After errors.ErrUnsupported, with nothing copied, the caller reads and writes the rest.
type Copier interface {
	CopyFrom(src Backend, srcOff, off, n int64) error
}

// Identified is a Backend with a name that stays the same as long as it holds the same data, for
// disks without a serial number.
type Identified interface {
	Identity() string
}

// ReadVec reads from b at off until iov is full, with one operation if b is
// Vectored. The error is nil only when every byte was read.
func ReadVec(b Backend, iov [][]byte, off int64) (int, error) {
	v, ok := b.(Vectored)
	if !ok {
		return each(iov, off, b.ReadAt, true)
	}
	n, err := v.ReadVec(iov, off)
	if err == nil && n < iovec.Len(iov) {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// WriteVec writes all of iov to b at off, with one operation if b is Vectored.
// The error is nil only when every byte was written.
func WriteVec(b Backend, iov [][]byte, off int64) (int, error) {
	v, ok := b.(Vectored)
	if !ok {
		return each(iov, off, b.WriteAt, false)
	}
	n, err := v.WriteVec(iov, off)
	if err == nil && n < iovec.Len(iov) {
		err = io.ErrShortWrite
	}
	return n, err
}

// WriteVecDurable is WriteVec that returns when the data is on stable storage:
// by b's own means if it is a Syncer, else by a flush.
func WriteVecDurable(b Backend, iov [][]byte, off int64) (int, error) {
	s, ok := b.(Syncer)
	if !ok {
		n, err := WriteVec(b, iov, off)
		if err == nil {
			err = b.Flush()
		}
		return n, err
	}
	n, err := s.WriteVecDurable(iov, off)
	if err == nil && n < iovec.Len(iov) {
		err = io.ErrShortWrite
	}
	return n, err
}

// DiscardGranularity returns b's granularity, 0 if it cannot discard.
func DiscardGranularity(b Backend) int64 {
	if d, ok := b.(Discarder); ok {
		return d.DiscardGranularity()
	}
	return 0
}

// pieceSize divides the length of every buffer that may go alone to a Backend that is not Vectored:
// no logical block is larger.
const pieceSize = 4096

// each hands the buffers of iov to do one after another. If one of them ends inside a logical
// block, all go through one new buffer, because offsets of a Backend are multiples of the block
// size.
func each(iov [][]byte, off int64, do func([]byte, int64) (int, error), read bool) (int, error) {
	if len(iov) > 1 {
		for _, p := range iov {
			if len(p)%pieceSize == 0 {
				continue
			}
			buf := make([]byte, iovec.Len(iov))
			if !read {
				iovec.Gather(buf, iov)
			}
			n, err := complete(do, buf, off)
			if read {
				iovec.Scatter(iov, buf[:n])
			}
			return n, err
		}
	}
	done := 0
	for _, p := range iov {
		n, err := complete(do, p, off+int64(done))
		done += n
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

// complete calls do once. io.ReaderAt may return io.EOF with a full buffer, which is no error here.
// A short transfer without an error is one.
func complete(do func([]byte, int64) (int, error), p []byte, off int64) (int, error) {
	n, err := do(p, off)
	switch {
	case n == len(p) && errors.Is(err, io.EOF):
		err = nil
	case n < len(p) && (err == nil || err == io.EOF):
		err = io.ErrUnexpectedEOF
	}
	return n, err
}
