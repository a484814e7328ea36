package block

import (
	"errors"
	"sync"
	"time"

	"gvm/devices/iovec"
)

// Op is a kind of backend operation, or a set of them.
type Op uint8

// Operations. A durable write is OpWrite.
const (
	OpRead Op = 1 << iota
	OpWrite
	OpFlush
	OpDiscard
	OpZero
	AnyOp = OpRead | OpWrite | OpFlush | OpDiscard | OpZero
)

// Fault is a failure to inject, and its time. Operations that it matches are
// counted; it strikes at the Nth of them, or at all of them if Nth is 0.
type Fault struct {
	Op  Op  // operations that match
	Nth int // 1 is the first match
	// Off and Len choose operations that touch this range of bytes; Len 0 is
	// everywhere. A flush touches every range.
	Off, Len int64

	Delay time.Duration   // wait before anything else
	Hang  <-chan struct{} // then wait until it is closed
	Short int             // then transfer this many bytes
	Err   error           // and return this; nil lets the operation go on in full
}

// Faulty is a Backend that fails as its faults say and else passes everything
// on.
type Faulty struct {
	b      Backend
	mu     sync.Mutex
	faults []Fault
	seen   []int
}

// NewFaulty wraps b.
func NewFaulty(b Backend, faults ...Fault) *Faulty {
	return &Faulty{b: b, faults: faults, seen: make([]int, len(faults))}
}

// strike returns the fault that hits an operation on n bytes at off, after its
// delay, or nil.
func (f *Faulty) strike(op Op, off, n int64) *Fault {
	var hit *Fault
	f.mu.Lock()
	for i := range f.faults {
		x := &f.faults[i]
		if x.Op&op == 0 || op != OpFlush && x.Len > 0 && (off >= x.Off+x.Len || off+n <= x.Off) {
			continue
		}
		f.seen[i]++
		if hit == nil && (x.Nth == 0 || x.Nth == f.seen[i]) {
			hit = x
		}
	}
	f.mu.Unlock()
	if hit == nil {
		return nil
	}
	time.Sleep(hit.Delay)
	if hit.Hang != nil {
		<-hit.Hang
	}
	if hit.Err == nil {
		return nil
	}
	return hit
}

// move does a transfer of iov, or the part of it that a fault leaves.
func (f *Faulty) move(op Op, iov [][]byte, off int64, do func(Backend, [][]byte, int64) (int, error)) (int, error) {
	total := iovec.Len(iov)
	x := f.strike(op, off, int64(total))
	if x == nil {
		return do(f.b, iov, off)
	}
	n, err := do(f.b, iovec.Cut(nil, iov, 0, min(x.Short, total)), off)
	if err == nil {
		err = x.Err
	}
	return n, err
}

// Size returns the size of the wrapped backend.
func (f *Faulty) Size() int64 { return f.b.Size() }

// ReadAt implements io.ReaderAt.
func (f *Faulty) ReadAt(p []byte, off int64) (int, error) { return f.ReadVec([][]byte{p}, off) }

// WriteAt implements io.WriterAt.
func (f *Faulty) WriteAt(p []byte, off int64) (int, error) { return f.WriteVec([][]byte{p}, off) }

// ReadVec implements Vectored.
func (f *Faulty) ReadVec(iov [][]byte, off int64) (int, error) {
	return f.move(OpRead, iov, off, ReadVec)
}

// WriteVec implements Vectored.
func (f *Faulty) WriteVec(iov [][]byte, off int64) (int, error) {
	return f.move(OpWrite, iov, off, WriteVec)
}

// WriteVecDurable implements Syncer.
func (f *Faulty) WriteVecDurable(iov [][]byte, off int64) (int, error) {
	return f.move(OpWrite, iov, off, WriteVecDurable)
}

// Flush flushes the wrapped backend.
func (f *Faulty) Flush() error {
	if x := f.strike(OpFlush, 0, 0); x != nil {
		return x.Err
	}
	return f.b.Flush()
}

// DiscardGranularity returns that of the wrapped backend.
func (f *Faulty) DiscardGranularity() int64 {
	if d, ok := f.b.(Discarder); ok {
		return d.DiscardGranularity()
	}
	return 0
}

// Discard implements Discarder.
func (f *Faulty) Discard(off, n int64) error {
	if x := f.strike(OpDiscard, off, n); x != nil {
		return x.Err
	}
	if d, ok := f.b.(Discarder); ok {
		return d.Discard(off, n)
	}
	return errors.ErrUnsupported
}

// Zero implements Zeroer.
func (f *Faulty) Zero(off, n int64) error {
	if x := f.strike(OpZero, off, n); x != nil {
		return x.Err
	}
	if z, ok := f.b.(Zeroer); ok {
		return z.Zero(off, n)
	}
	return errors.ErrUnsupported
}
