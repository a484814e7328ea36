// Package scsitest tests SCSI targets: it has an initiator in one call (Do), CDB vectors with their
// expected answers (Vectors) and a backend that records the operations on it (Recorder).
package scsitest

import (
	"errors"
	"fmt"
	"sync"

	"gvm/devices/block"
	"gvm/devices/scsi"
)

// Answer is the result of a command as its initiator sees it.
type Answer struct {
	scsi.Result
	Data []byte // the part of the data-in buffer that was transferred
}

// Codes returns the sense key and the additional sense code and qualifier in
// the answer's sense data, of either format, all zero without any.
func (a Answer) Codes() (key scsi.SenseKey, asc, ascq byte) {
	s := a.Sense
	switch {
	case len(s) >= 14 && s[0]&0x7e == 0x70:
		return scsi.SenseKey(s[2] & 0x0f), s[12], s[13]
	case len(s) >= 8 && s[0]&0x7e == 0x72:
		return scsi.SenseKey(s[1] & 0x0f), s[2], s[3]
	}
	return 0, 0, 0
}

// String is the answer in one line, for comparisons in tests: "GOOD" or
// "CHECK 5/24/00".
func (a Answer) String() string {
	if a.Status != scsi.CheckCondition {
		if a.Status == scsi.Good {
			return "GOOD"
		}
		return fmt.Sprintf("STATUS %02x", uint8(a.Status))
	}
	key, asc, ascq := a.Codes()
	return fmt.Sprintf("CHECK %x/%02x/%02x", uint8(key), asc, ascq)
}

// Do sends a command with the data-out out and inLen bytes of data-in, and
// waits for the answer. It panics when Done is called more than once.
func Do(t *scsi.Target, lun scsi.LUN, cdb, out []byte, inLen int) Answer {
	c := &scsi.Command{LUN: lun, CDB: cdb}
	if out != nil {
		c.Out = [][]byte{out}
	}
	in := make([]byte, inLen)
	if inLen > 0 {
		c.In = [][]byte{in}
	}
	a := Run(t, c)
	if moved := len(out) + inLen - int(a.Residual); inLen > 0 && moved >= 0 && moved <= inLen {
		a.Data = in[:moved]
	}
	return a
}

// Run submits c and waits for the answer, which it returns without Data.
func Run(t *scsi.Target, c *scsi.Command) Answer {
	done := make(chan scsi.Result, 1)
	var once sync.Once
	c.Done = func(r scsi.Result) {
		first := false
		once.Do(func() { first = true })
		if !first {
			panic("scsitest: Done called twice")
		}
		done <- r
	}
	t.Submit(c)
	return Answer{Result: <-done}
}

// Ready clears the unit attention conditions of nexus 0 at lun by TEST UNIT
// READY, as initiators do.
func Ready(t *scsi.Target, lun scsi.LUN) error {
	for range 8 {
		a := Do(t, lun, make([]byte, 6), nil, 0)
		if a.Status == scsi.Good {
			return nil
		}
		if key, _, _ := a.Codes(); key != scsi.UnitAttention {
			return fmt.Errorf("TEST UNIT READY: %v", a)
		}
	}
	return fmt.Errorf("TEST UNIT READY: unit attention for ever")
}

// Recorder is a Backend that records every call that changes or reads the wrapped one, in the order
// in which they return.
type Recorder struct {
	block.Backend
	// OnCall, if set, is called at the start of every call.
	OnCall func(call string)

	mu  sync.Mutex
	log []string
}

// Note adds a line to the log.
func (r *Recorder) Note(format string, a ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.log = append(r.log, fmt.Sprintf(format, a...))
}

// Log returns the lines since the last Log: "read OFF+LEN", "write OFF+LEN", "durable OFF+LEN",
// "discard OFF+LEN", "zero OFF+LEN", "flush", and the entries of Note.
func (r *Recorder) Log() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.log
	r.log = nil
	return l
}

// call does an operation and notes it.
func (r *Recorder) call(name string, f func() error) error {
	if r.OnCall != nil {
		r.OnCall(name)
	}
	err := f()
	if err != nil {
		name += " failed"
	}
	r.Note("%s", name)
	return err
}

func (r *Recorder) move(name string, iov [][]byte, off int64,
	do func(block.Backend, [][]byte, int64) (int, error)) (n int, err error) {
	total := 0
	for _, p := range iov {
		total += len(p)
	}
	err = r.call(fmt.Sprintf("%s %d+%d", name, off, total), func() error {
		n, err = do(r.Backend, iov, off)
		return err
	})
	return n, err
}

// ReadVec implements block.Vectored.
func (r *Recorder) ReadVec(iov [][]byte, off int64) (int, error) {
	return r.move("read", iov, off, block.ReadVec)
}

// WriteVec implements block.Vectored.
func (r *Recorder) WriteVec(iov [][]byte, off int64) (int, error) {
	return r.move("write", iov, off, block.WriteVec)
}

// WriteVecDurable implements block.Syncer.
func (r *Recorder) WriteVecDurable(iov [][]byte, off int64) (int, error) {
	return r.move("durable", iov, off, block.WriteVecDurable)
}

// Flush flushes the wrapped backend.
func (r *Recorder) Flush() error { return r.call("flush", r.Backend.Flush) }

// DiscardGranularity returns that of the wrapped backend.
func (r *Recorder) DiscardGranularity() int64 {
	if d, ok := r.Backend.(block.Discarder); ok {
		return d.DiscardGranularity()
	}
	return 0
}

// Discard implements block.Discarder.
func (r *Recorder) Discard(off, n int64) error {
	return r.call(fmt.Sprintf("discard %d+%d", off, n), func() error {
		if d, ok := r.Backend.(block.Discarder); ok {
			return d.Discard(off, n)
		}
		return errors.ErrUnsupported
	})
}

// Zero implements block.Zeroer.
func (r *Recorder) Zero(off, n int64) error {
	return r.call(fmt.Sprintf("zero %d+%d", off, n), func() error {
		if z, ok := r.Backend.(block.Zeroer); ok {
			return z.Zero(off, n)
		}
		return errors.ErrUnsupported
	})
}
