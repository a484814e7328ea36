package scsi

import (
	"bytes"
	"encoding/binary"

	"gvm/devices/block"
	"gvm/devices/iovec"
)

// TupleSize is the size of the protection information of a logical block (SBC-4 4.21.3): LOGICAL
// BLOCK GUARD, the CRC of the data, LOGICAL BLOCK APPLICATION TAG and LOGICAL BLOCK REFERENCE TAG,
// the low bits of its address.
const TupleSize = 8

// Protection keeps the protection information of a unit beside its Backend.
// Tuples that were never written read as all FFh, the escape from checks (SBC-4
// 4.21.3). Its methods may be called at the same time for different blocks.
type Protection interface {
	// ReadTuples and WriteTuples move len(p)/TupleSize tuples from block on.
	ReadTuples(p []byte, block uint64) error
	WriteTuples(p []byte, block uint64) error
	// ClearTuples makes n tuples read as if never written.
	ClearTuples(block, n uint64) error
	// Flush is like Backend.Flush.
	Flush() error
}

// protectionCheck is the set of checked fields.
type protectionCheck uint8

const (
	checkGuard protectionCheck = 1 << iota
	checkReference
	checkAll = checkGuard | checkReference
)

// protectChecks are the checks for each value of RDPROTECT, WRPROTECT or VRPROTECT (SBC-4 tables of
// 5.17, 5.42 and 5.35). The application tag belongs to the initiator and is not checked (VPD 86h,
// APP_CHK).
var protectChecks = [...]protectionCheck{0: checkAll, 1: checkAll, 2: checkReference, 3: 0, 4: checkGuard, 5: checkAll}

// escape is a tuple that is not checked.
var escape = [TupleSize]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// guardTable is the table of the CRC of LOGICAL BLOCK GUARD, polynomial 8BB7h (SBC-4 4.21.4).
var guardTable = func() (t [256]uint16) {
	for i := range t {
		c := uint16(i) << 8
		for range 8 {
			if c&0x8000 != 0 {
				c = c<<1 ^ 0x8bb7
			} else {
				c <<= 1
			}
		}
		t[i] = c
	}
	return t
}()

// guard continues a CRC with p.
func guard(c uint16, p []byte) uint16 {
	for _, b := range p {
		c = c<<8 ^ guardTable[byte(c>>8)^b]
	}
	return c
}

// makeTuples fills t for the blocks of data from lba on. The application tag is 0.
func makeTuples(t, data []byte, lba uint64) {
	size := len(data) / (len(t) / TupleSize)
	for ; len(t) > 0; t, data, lba = t[TupleSize:], data[size:], lba+1 {
		binary.BigEndian.PutUint16(t, guard(0, data[:size]))
		binary.BigEndian.PutUint16(t[2:], 0)
		binary.BigEndian.PutUint32(t[4:], uint32(lba))
	}
}

// verifyTuples checks t against data, the blocks from lba on.
func (k protectionCheck) verifyTuples(t, data []byte, lba uint64) error {
	if len(t) == 0 {
		return nil
	}
	size := len(data) / (len(t) / TupleSize)
	for ; len(t) > 0; t, data, lba = t[TupleSize:], data[size:], lba+1 {
		if t[2] == 0xff && t[3] == 0xff {
			continue // the application tag that stops checks of type 1
		}
		failed := func(s Sense) error {
			s.Info, s.InfoValid = lba, true
			return s
		}
		if k&checkGuard != 0 && binary.BigEndian.Uint16(t) != guard(0, data[:size]) {
			return failed(GuardCheckFailed)
		}
		if k&checkReference != 0 && binary.BigEndian.Uint32(t[4:]) != uint32(lba) {
			return failed(ReferenceTagCheckFailed)
		}
	}
	return nil
}

// readChecked reads n blocks from lba on, checks them, and copies them to iov and their protection
// information to tuples, unless those are nil. It checks its own copy of the data, not the buffers:
// the initiator may write to them meanwhile, or use one for several commands. It works for w, or in
// one piece if w is nil.
func (u *Unit) readChecked(w worker, iov [][]byte, lba uint64, n int, tuples [][]byte, k protectionCheck) error {
	buf := getScratch()
	defer putScratch(buf)
	bs := int(u.blockSize)
	per := len(*buf) / bs
	t := make([]byte, min(n, per)*TupleSize)
	for done := 0; done < n; done += per {
		if w != nil && w.stopped() {
			return errStopped
		}
		blocks := min(n-done, per)
		data, pi := (*buf)[:blocks*bs], t[:blocks*TupleSize]
		at := lba + uint64(done)
		if err := u.loadProtected(data, pi, at); err != nil {
			return err
		}
		if err := k.verifyTuples(pi, data, at); err != nil {
			return err
		}
		if iov != nil {
			iovec.Scatter(iovec.Cut(nil, iov, done*bs, len(data)), data)
		}
		if tuples != nil {
			iovec.Scatter(iovec.Cut(nil, tuples, done*TupleSize, len(pi)), pi)
		}
	}
	return nil
}

// loadProtected reads blocks from lba on and their tuples, neither newer than the other.
func (u *Unit) loadProtected(data, tuples []byte, lba uint64) error {
	u.tuples.RLock()
	defer u.tuples.RUnlock()
	off := int64(lba) * u.blockSize
	return u.try("read", off, func() (int, error) {
		if n, err := block.ReadVec(u.b, [][]byte{data}, off); err != nil {
			return n, err
		}
		return 0, u.cfg.Protection.ReadTuples(tuples, lba)
	})
}

// writeChecked is write with protection information, which it checks, or makes if tuples is nil. It
// stores its checked copy of the data, even if the initiator changes its buffers meanwhile. It
// stops at the first wrong block. It works for w, or in one piece if w is nil.
func (u *Unit) writeChecked(
	w worker, iov [][]byte, lba uint64, tuples [][]byte, k protectionCheck, durable bool,
) error {
	buf := getScratch()
	defer putScratch(buf)
	bs, total := int(u.blockSize), iovec.Len(iov)
	for done := 0; done < total; {
		if w != nil && w.stopped() {
			return errStopped
		}
		part := (*buf)[:min(total-done, len(*buf))]
		iovec.Gather(part, iovec.Cut(nil, iov, done, len(part)))
		at, t := lba+uint64(done/bs), make([]byte, len(part)/bs*TupleSize)
		if tuples == nil {
			makeTuples(t, part, at)
		} else {
			iovec.Gather(t, iovec.Cut(nil, tuples, done/bs*TupleSize, len(t)))
			if err := k.verifyTuples(t, part, at); err != nil {
				return err
			}
		}
		err := u.storeProtected(part, t, at)
		u.written.Add(1)
		if err != nil {
			return err
		}
		done += len(part)
	}
	if durable && u.cfg.Cache != Unsafe {
		return u.flush()
	}
	return nil
}

// storeProtected writes blocks and their tuples. If this process ends in the middle, the blocks are
// unchecked, not wrong.
func (u *Unit) storeProtected(data, tuples []byte, lba uint64) error {
	u.tuples.Lock()
	defer u.tuples.Unlock()
	off := int64(lba) * u.blockSize
	return u.try("write", off, func() (int, error) {
		if err := u.cfg.Protection.WriteTuples(bytes.Repeat(escape[:], len(tuples)/TupleSize), lba); err != nil {
			return 0, err
		}
		if n, err := block.WriteVec(u.b, [][]byte{data}, off); err != nil {
			return n, err
		}
		return 0, u.cfg.Protection.WriteTuples(tuples, lba)
	})
}

// protected returns the protection information buffer of n blocks, nil if there is none to
// transfer: the unit then generates it and drops it, as a host bus adapter does.
func (tk *task) protected(buffers [][]byte, n int) ([][]byte, error) {
	if tk.op.protect(tk.CDB) == 0 || len(buffers) == 0 {
		return nil, nil
	}
	if iovec.Len(buffers) < n*TupleSize {
		tk.overrun = true
		return nil, InvalidFieldInIU
	}
	return buffers, nil
}
