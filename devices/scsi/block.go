package scsi

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math"

	"gvm/devices/block"
	"gvm/devices/iovec"
)

// readCapacity10 is READ CAPACITY(10) (SBC-4 5.20).
func readCapacity10(tk *task) error {
	b := make([]byte, 8)
	binary.BigEndian.PutUint32(b, clamp32(tk.u.Blocks()-1))
	binary.BigEndian.PutUint32(b[4:], uint32(tk.u.blockSize))
	return tk.reply(b)
}

// readCapacity16 is READ CAPACITY(16) (SBC-4 5.21).
func readCapacity16(tk *task) error {
	u, b := tk.u, make([]byte, 32)
	binary.BigEndian.PutUint64(b, u.Blocks()-1)
	binary.BigEndian.PutUint32(b[8:], uint32(u.blockSize))
	if u.cfg.Protection != nil {
		b[12] = 0x01 // PROT_EN; P_TYPE 000b is type 1
	}
	b[13] = u.physicalExponent()
	if u.thin() {
		b[14] = 0x80 | 0x40 // LBPME, LBPRZ
	}
	return tk.reply(b)
}

// transfer returns the extent of a command that moves data. It checks the extent against the medium
// and MAXIMUM TRANSFER LENGTH, and the protection field against the unit's Protection.
func (tk *task) transfer() (lba uint64, n int, err error) {
	if p := tk.op.protect(tk.CDB); p != 0 && (tk.u.cfg.Protection == nil || int(p) >= len(protectChecks)) {
		return 0, 0, invalidCDB(1, 7)
	}
	lba, blocks := tk.op.extent.of(tk.CDB)
	if err := tk.u.inRange(lba, blocks); err != nil {
		return 0, 0, err
	}
	if blocks > maxTransfer {
		return 0, 0, invalidCDB(int(tk.op.extent.blocks.at), 7)
	}
	return lba, int(blocks), nil
}

// read is READ(6), (10), (12) and (16) (SBC-4 5.16 to 5.19). DPO is a hint for a cache that the
// unit does not control.
func read(tk *task) error {
	lba, n, err := tk.transfer()
	if err != nil {
		return err
	}
	want := n * int(tk.u.blockSize)
	have, moved := want, min(tk.inLen, want)
	if tk.inLen < want {
		tk.overrun = true
		have = tk.inLen - tk.inLen%int(tk.u.blockSize)
	}
	tuples, err := tk.protected(tk.ProtectionIn, have/int(tk.u.blockSize))
	if err != nil {
		return err
	}
	if moved > 0 || tk.op.fua(tk.CDB) {
		if err := tk.charge(moved); err != nil {
			return err
		}
	}
	if tk.now && (tk.op.fua(tk.CDB) || tk.inLen < want) {
		return errWait
	}
	if tk.op.fua(tk.CDB) {
		// The data must come from the medium: cached writes go there first (SBC-4 5.17).
		if err := tk.u.flushDirty(); err != nil {
			return err
		}
	}
	if have > 0 {
		if err := tk.readIn(lba, have, tuples); err != nil {
			return err
		}
	}
	if rest := moved - have; rest > 0 {
		// The buffer ends inside a block.
		block := make([]byte, tk.u.blockSize)
		if err := tk.u.read([][]byte{block}, lba+uint64(have)/uint64(tk.u.blockSize)); err != nil {
			return err
		}
		iovec.Scatter(tk.clip(tk.In, tk.inLen, have, rest), block)
		have += rest
	}
	tk.inDone = have
	return nil
}

// readIn reads n bytes, whole blocks, into data-in, and their protection information into tuples
// unless tuples is nil.
func (tk *task) readIn(lba uint64, n int, tuples [][]byte) error {
	iov := tk.clip(tk.In, tk.inLen, 0, n)
	if tk.now {
		if !tk.u.readNow(iov, lba) {
			return errWait
		}
		return nil
	}
	if tk.u.cfg.Protection == nil {
		return tk.u.read(iov, lba)
	}
	err := tk.u.readChecked(tk, iov, lba, n/int(tk.u.blockSize), tuples, protectChecks[tk.op.protect(tk.CDB)])
	if err == nil && tuples != nil {
		tk.piDone = n / int(tk.u.blockSize) * TupleSize
	}
	return err
}

// write is WRITE(6), (10), (12) and (16) (SBC-4 5.40 to 5.43).
func write(tk *task) error {
	lba, n, err := tk.transfer()
	if err != nil || n == 0 {
		return err
	}
	return tk.writeOut(lba, n, tk.op.fua(tk.CDB))
}

// writeOut writes n blocks of data-out. Nothing counts as transferred when it fails.
func (tk *task) writeOut(lba uint64, n int, durable bool) error {
	iov, err := tk.dataOut(n * int(tk.u.blockSize))
	if err != nil {
		return err
	}
	tuples, err := tk.protected(tk.ProtectionOut, n)
	if err == nil {
		err = tk.charge(n * int(tk.u.blockSize))
	}
	switch {
	case err != nil:
	case tk.now:
		if !tk.u.writeNow(iov, lba, durable) {
			err = errWait
		}
	case tk.u.cfg.Protection == nil:
		err = tk.u.write(iov, lba, durable)
	default:
		err = tk.u.writeChecked(tk, iov, lba, tuples, protectChecks[tk.op.protect(tk.CDB)], durable || !tk.u.wce.Load())
	}
	if err != nil {
		tk.outDone = 0
	}
	return err
}

// orWrite is ORWRITE(16) (SBC-4 5.14). Dispatch admits no other command to the medium meanwhile.
func orWrite(tk *task) error {
	if tk.op.protect(tk.CDB) != 0 {
		return invalidCDB(1, 7) // ORPROTECT
	}
	lba, n, err := tk.transfer()
	if err != nil || n == 0 {
		return err
	}
	iov, err := tk.dataOut(n * int(tk.u.blockSize))
	if err != nil {
		return err
	}
	if err = tk.charge(n * int(tk.u.blockSize)); err == nil {
		err = tk.u.or(tk, iov, lba, n, tk.op.fua(tk.CDB))
	}
	if err != nil {
		tk.outDone = 0
	}
	return err
}

// or sets those bits of n blocks from lba on that are set in iov.
func (u *Unit) or(w worker, iov [][]byte, lba uint64, n int, durable bool) error {
	buf := getScratch()
	defer putScratch(buf)
	for done, total := 0, n*int(u.blockSize); done < total; {
		if w.stopped() {
			return errStopped
		}
		part := (*buf)[:min(total-done, len(*buf))]
		at := lba + uint64(done)/uint64(u.blockSize)
		if err := u.read([][]byte{part}, at); err != nil {
			return err
		}
		rest := part
		for _, p := range iovec.Cut(nil, iov, done, len(part)) {
			for i, b := range p {
				rest[i] |= b
			}
			rest = rest[len(p):]
		}
		if err := u.write([][]byte{part}, at, durable); err != nil {
			return err
		}
		done += len(part)
	}
	return nil
}

// byteCheck is the BYTCHK field of VERIFY and WRITE AND VERIFY (SBC-4 5.33).
func byteCheck(cdb []byte) byte { return cdb[1] >> 1 & 0x03 }

// verify is VERIFY(10), (12) and (16) (SBC-4 5.33 to 5.36).
func verify(tk *task) error {
	lba, n, err := tk.transfer()
	if err != nil {
		return err
	}
	size, check, protect := int(tk.u.blockSize), byteCheck(tk.CDB), tk.op.protect(tk.CDB)
	switch {
	case check == 2:
		return invalidCDB(1, 2)
	case check != 0 && protect != 0:
		return invalidCDB(1, 7) // VRPROTECT: protection information is not compared
	case n == 0:
		return nil
	}
	var want [][]byte
	switch check {
	case 1: // the medium must hold the data-out
		if want, err = tk.dataOut(n * size); err != nil {
			return err
		}
	case 3: // every block must hold the one block of data-out
		block, err := tk.parameters(size)
		if err != nil {
			return err
		}
		want = [][]byte{block}
	}
	if err := tk.charge(n * size); err != nil {
		return err
	}
	switch {
	case protect != 0: // the blocks must be readable, with these checks
		return tk.u.readChecked(tk, nil, lba, n, nil, protectChecks[protect])
	case check == 3:
		for i := range uint64(n) {
			if err := tk.u.compare(tk, want, lba+i, 1); err != nil {
				return err
			}
		}
		return nil
	}
	return tk.u.compare(tk, want, lba, n) // without data-out: the blocks must be readable
}

// writeAndVerify is WRITE AND VERIFY(10), (12) and (16) (SBC-4 5.45): the data
// goes to the medium, past the write cache, and is read back.
func writeAndVerify(tk *task) error {
	check := byteCheck(tk.CDB)
	if check > 1 {
		return invalidCDB(1, 2)
	}
	lba, n, err := tk.transfer()
	if err != nil || n == 0 {
		return err
	}
	if err := tk.writeOut(lba, n, true); err != nil {
		return err
	}
	var iov [][]byte
	if check == 1 {
		iov = tk.clip(tk.Out, tk.outLen, 0, tk.outDone)
	}
	return tk.u.compare(tk, iov, lba, n)
}

// compare reads n blocks from lba on and compares them with want unless it is nil. A difference is
// MISCOMPARE DURING VERIFY OPERATION with the offset of the first wrong byte as INFORMATION.
func (u *Unit) compare(w worker, want [][]byte, lba uint64, n int) error {
	buf := getScratch()
	defer putScratch(buf)
	total := n * int(u.blockSize)
	for done := 0; done < total; {
		if w.stopped() {
			return errStopped
		}
		part := (*buf)[:min(total-done, len(*buf))]
		if err := u.read([][]byte{part}, lba+uint64(done)/uint64(u.blockSize)); err != nil {
			return err
		}
		if want != nil {
			at := done
			for _, p := range iovec.Cut(nil, want, done, len(part)) {
				if i := mismatch(part[at-done:], p); i >= 0 {
					s := MiscompareInVerify
					s.Info, s.InfoValid = uint64(at+i), true
					return s
				}
				at += len(p)
			}
		}
		done += len(part)
	}
	return nil
}

// mismatch returns the first index where the start of a differs from b, or -1. b may change
// meanwhile; each byte is read once.
func mismatch(a, b []byte) int {
	if bytes.Equal(a[:len(b)], b) {
		return -1
	}
	for i := range b {
		if a[i] != b[i] {
			return i
		}
	}
	return 0
}

// compareAndWrite is COMPARE AND WRITE (SBC-4 5.3). Dispatch admits no other command to the medium
// meanwhile.
func compareAndWrite(tk *task) error {
	cdb, size := tk.CDB, int(tk.u.blockSize)
	if tk.op.protect(cdb) != 0 {
		return invalidCDB(1, 7)
	}
	lba, blocks := tk.op.extent.of(cdb)
	n := int(blocks)
	if err := tk.u.inRange(lba, blocks); err != nil {
		return err
	}
	if n == 0 {
		return nil
	}
	if tk.outLen != 2*n*size {
		tk.overrun = tk.outLen < 2*n*size
		return InvalidFieldInIU
	}
	if err := tk.charge(n * size); err != nil {
		return err
	}
	if err := tk.u.compare(tk, iovec.Cut(nil, tk.Out, 0, n*size), lba, n); err != nil {
		return err
	}
	if err := tk.u.write(iovec.Cut(nil, tk.Out, n*size, n*size), lba, tk.op.fua(cdb)); err != nil {
		return err
	}
	tk.outDone = tk.outLen
	return nil
}

// synchronizeCache is SYNCHRONIZE CACHE(10) and (16) (SBC-4 5.32). It flushes the whole cache, not
// only the blocks named.
func synchronizeCache(tk *task) error {
	if lba, n := tk.op.extent.of(tk.CDB); tk.u.inRange(lba, n) != nil {
		return LBAOutOfRange
	}
	if err := tk.charge(0); err != nil {
		return err
	}
	if tk.CDB[1]&0x02 != 0 { // IMMED
		tk.flushAfter = true
		return nil
	}
	return tk.u.flush()
}

// prefetch is PRE-FETCH(10) and (16) (SBC-4 5.11). It promises nothing about the host's cache: GOOD
// means that not all blocks were stored in it.
func prefetch(tk *task) error {
	lba, n := tk.op.extent.of(tk.CDB)
	return tk.u.inRange(lba, n)
}

// writeSame is WRITE SAME(10) and (16) (SBC-4 5.47, 5.48).
func writeSame(tk *task) error {
	cdb, u := tk.CDB, tk.u
	discard, noBlock := tk.op.unmap(cdb), cdb[1]&tk.op.usage[0]&0x01 != 0 // UNMAP, NDOB
	switch {
	case tk.op.protect(cdb) != 0:
		return invalidCDB(1, 7) // WRPROTECT
	case cdb[1]&0x10 != 0:
		return invalidCDB(1, 4) // ANCHOR
	case discard && !u.thin():
		return invalidCDB(1, 3) // UNMAP
	case cdb[1]&0x06 != 0:
		return invalidCDB(1, 2) // PBDATA and LBDATA, obsolete
	}
	lba, n := tk.op.extent.of(cdb)
	if err := u.inRange(lba, n); err != nil {
		return err
	}
	if n == 0 || n > maxWriteSame {
		return invalidCDB(int(tk.op.extent.blocks.at), 7) // WSNZ; MAXIMUM WRITE SAME LENGTH
	}
	var block []byte
	if !noBlock {
		if tk.outLen > int(u.blockSize) {
			return InvalidFieldInIU
		}
		var err error
		if block, err = tk.parameters(int(u.blockSize)); err != nil {
			return err
		}
	}
	zero, moved := allAre(block, 0), int(n)*int(u.blockSize) // without a block: zero
	if zero && discard {
		moved = 0
	}
	err := tk.charge(moved)
	if err != nil {
		return err
	}
	if zero {
		err = u.zero(tk, lba, n, discard)
	} else {
		err = u.repeat(tk, lba, n, block)
	}
	if err != nil {
		tk.outDone = 0
	}
	return err
}

// unmap is UNMAP (SBC-4 5.33). The whole list is checked before anything is
// unmapped.
func unmap(tk *task) error {
	u, be := tk.u, binary.BigEndian
	if tk.CDB[1]&0x01 != 0 {
		return invalidCDB(1, 0) // ANCHOR
	}
	n := tk.listLength()
	if n == 0 {
		return nil
	}
	if n < 8 {
		return ParameterListLength
	}
	b, err := tk.parameters(n)
	if err != nil {
		return err
	}
	list := b[8:]
	// An incomplete last descriptor is ignored.
	list = list[:min(len(list), int(be.Uint16(b[2:])))/16*16]
	if len(list)/16 > maxUnmapRanges {
		return invalidParam(2)
	}
	total := uint64(0)
	for i := 0; i < len(list); i += 16 {
		lba, blocks := be.Uint64(list[i:]), uint64(be.Uint32(list[i+8:]))
		if err := u.inRange(lba, blocks); err != nil {
			return err
		}
		if total += blocks; total > maxUnmapBlocks {
			return invalidParam(8 + i + 8)
		}
	}
	if total == 0 {
		return nil
	}
	if err := tk.charge(0); err != nil {
		return err
	}
	for i := 0; i < len(list); i += 16 {
		lba, blocks := be.Uint64(list[i:]), uint64(be.Uint32(list[i+8:]))
		if blocks == 0 {
			continue
		}
		err := u.discard(tk, lba, blocks)
		if errors.Is(err, errors.ErrUnsupported) {
			err = u.zero(tk, lba, blocks, false) // as LBPRZ promises
		}
		if err != nil {
			return err
		}
	}
	return u.settle()
}

// getLBAStatus is GET LBA STATUS(16) (SBC-4 5.6).
func getLBAStatus(tk *task) error {
	u, be := tk.u, binary.BigEndian
	lba, _ := tk.op.extent.of(tk.CDB)
	if lba >= u.Blocks() {
		return LBAOutOfRange
	}
	if tk.CDB[14] != 0 {
		return invalidCDB(14, 7) // REPORT TYPE: all of them
	}
	if err := tk.charge(0); err != nil {
		return err
	}
	b := make([]byte, 8)
	for end := u.Blocks(); lba < end && len(b) <= min(tk.listLength(), 4096)-16; {
		if tk.stopped() {
			return errStopped
		}
		mapped, n, err := u.mapped(lba, min(end-lba, math.MaxUint32))
		if err != nil {
			return err
		}
		d := [16]byte{}
		be.PutUint64(d[:], lba)
		be.PutUint32(d[8:], uint32(n))
		if !mapped {
			d[12] = 0x01 // deallocated
		}
		b = append(b, d[:]...)
		lba += n
	}
	be.PutUint32(b, uint32(len(b)-4))
	return tk.reply(b)
}

// mapped reports whether lba has storage, and how many of the n blocks from lba on share that
// state. A block with any storage is mapped.
func (u *Unit) mapped(lba, n uint64) (bool, uint64, error) {
	m, ok := u.b.(block.Mapper)
	if !ok || !u.thin() {
		return true, n, nil
	}
	off := int64(lba) * u.blockSize
	var mapped bool
	var size int64
	if err := u.try("read", off, func() (_ int, err error) {
		mapped, size, err = m.Mapped(off, int64(n)*u.blockSize)
		return 0, err
	}); err != nil {
		return false, 0, err
	}
	if !mapped && size < u.blockSize {
		return true, 1, nil
	}
	if mapped {
		size += u.blockSize - 1
	}
	return mapped, min(max(uint64(size/u.blockSize), 1), n), nil
}

// readDefectData is READ DEFECT DATA(10) and (12) (SBC-4 5.18, 5.19): both lists are empty in every
// format.
func readDefectData(tk *task) error {
	at, b := 2, make([]byte, 4)
	if tk.op.length() == 12 {
		at, b = 1, make([]byte, 8)
	}
	lists := tk.CDB[at]
	if lists&0x07 > 0x05 {
		return invalidCDB(at, 2) // DEFECT LIST FORMAT
	}
	b[1] = lists & 0x1f
	return tk.reply(b)
}
