package scsi_test

import (
	"errors"
	"sync"
	"testing"

	"gvm/devices/block"
)

var errBackend = errors.New("the backend fails")

// watched is storage that looks at how it is used.
type watched struct {
	*block.Mem
	t       *testing.T
	block   int
	mu      sync.Mutex
	changes int
	dirty   bool          // something was written and not flushed
	failing bool          // everything fails
	gate    chan struct{} // reads wait for it, nil: they do not
}

func (w *watched) use(n int, off int64, changes bool) error {
	if off < 0 || n < 0 || off%int64(w.block) != 0 || n%w.block != 0 || off+int64(n) > w.Size() {
		w.t.Errorf("backend used at %d for %d bytes, its size is %d", off, n, w.Size())
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if changes {
		w.changes++
		w.dirty = true
	}
	if w.failing {
		return errBackend
	}
	return nil
}

func (w *watched) ReadVec(iov [][]byte, off int64) (int, error) {
	w.mu.Lock()
	gate := w.gate
	w.mu.Unlock()
	if gate != nil {
		<-gate
	}
	if err := w.use(total(iov), off, false); err != nil {
		return 0, err
	}
	return w.Mem.ReadVec(iov, off)
}

func (w *watched) WriteVec(iov [][]byte, off int64) (int, error) {
	if err := w.use(total(iov), off, true); err != nil {
		return 0, err
	}
	return w.Mem.WriteVec(iov, off)
}

func (w *watched) ReadVecNow(iov [][]byte, off int64) bool {
	if w.gate != nil || w.failing {
		return false
	}
	_, err := w.ReadVec(iov, off)
	return err == nil
}

func (w *watched) WriteVecNow(iov [][]byte, off int64) bool {
	if w.failing {
		return false
	}
	_, err := w.WriteVec(iov, off)
	return err == nil
}

func (w *watched) WriteVecDurable(iov [][]byte, off int64) (int, error) {
	was := w.dirty
	n, err := w.WriteVec(iov, off)
	w.dirty = was
	return n, err
}

func (w *watched) Flush() error {
	if err := w.use(0, 0, false); err != nil {
		return err
	}
	w.dirty = false
	return nil
}

func (w *watched) Discard(off, n int64) error {
	if err := w.use(int(n), off, true); err != nil {
		return err
	}
	return w.Mem.Discard(off, n)
}

func (w *watched) Zero(off, n int64) error { return w.Discard(off, n) }

// resize makes the storage another.
func (w *watched) resize(n int64) error {
	m := block.NewMem(n)
	old := make([]byte, min(n, w.Size()))
	_, _ = w.Mem.ReadAt(old, 0)
	_, _ = m.WriteAt(old, 0)
	w.Mem = m
	return nil
}

func (w *watched) all() []byte {
	b := make([]byte, w.Size())
	_, _ = w.Mem.ReadAt(b, 0)
	return b
}
