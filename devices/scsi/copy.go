package scsi

import (
	"encoding/binary"
	"errors"
	"math/bits"
	"slices"
	"strings"

	"gvm/devices/block"
)

// Limits of EXTENDED COPY, as RECEIVE COPY RESULTS reports them.
const (
	maxCSCDs       = 16
	maxSegments    = 64
	maxDescriptors = maxCSCDs*cscdLen + maxSegments*segmentLen // bytes of both lists
	maxHeldCopies  = 16                                        // results kept for an initiator
)

// Descriptors of EXTENDED COPY (SPC-4 6.4.5, 6.4.6): one kind of each is supported.
const (
	copyHeaderLen = 16

	cscdIdentification = 0xe4
	cscdLen            = 32

	segmentBlockToBlock = 0x02
	segmentLen          = 28
)

// copyPiece is the number of bytes that a block.Copier copies at once.
const copyPiece = 16 << 20

// copyResult is the outcome of an EXTENDED COPY, for RECEIVE COPY RESULTS.
type copyResult struct {
	list     byte
	failed   bool
	segments uint16 // processed
	bytes    uint64 // written
	sense    Sense  // of a failure
}

// segment is a block device to block device segment descriptor (SPC-4 6.4.6.4).
type segment struct {
	from, to       *Unit
	fromLBA, toLBA uint64
	bytes          int64
}

// extendedCopy is EXTENDED COPY(LID1) (SPC-4 6.4) among the units of the target.
func extendedCopy(tk *task) error {
	n := tk.listLength()
	switch {
	case n == 0:
		return nil // SPC-4 6.4.3: no copy, and no error
	case n < copyHeaderLen || n > copyHeaderLen+maxDescriptors:
		return ParameterListLength
	}
	b, err := tk.parameters(n)
	if err != nil {
		return err
	}
	cscds, segments, err := copyLists(b)
	if err != nil {
		return err
	}
	units := make([]*Unit, len(cscds)/cscdLen)
	for i := range units {
		if units[i], err = tk.t.cscd(cscds[i*cscdLen:], copyHeaderLen+i*cscdLen); err != nil {
			return err
		}
	}
	// A list with an error copies nothing, and no result of it is held.
	tk.u.set.dropCopy(tk.Nexus, b[0])
	copies := make([]segment, len(segments)/segmentLen)
	for i := range copies {
		at := i * segmentLen
		d, listAt := segments[at:at+segmentLen], copyHeaderLen+len(cscds)+at
		if copies[i], err = parseSegment(tk.Nexus, units, d, listAt); err != nil {
			return err
		}
	}
	r := copyResult{list: b[0]}
	for _, s := range copies {
		if err = tk.copySegment(s); err != nil {
			r.failed, r.sense = true, senseOf(err)
			break
		}
		r.segments++
		r.bytes += uint64(s.bytes)
	}
	// LIST ID USAGE: 00b holds the result, 10b only that of a failure.
	if usage := b[1] >> 3 & 3; usage == 0 || usage == 2 && r.failed {
		tk.u.set.holdCopy(tk.Nexus, r)
	}
	return err
}

// copyLists checks the header of the parameter list and the kinds and lengths of
// the descriptors, and returns their lists.
func copyLists(b []byte) (cscds, segments []byte, err error) {
	be := binary.BigEndian
	cscdBytes, segmentBytes := int(be.Uint16(b[2:])), uint64(be.Uint32(b[8:]))
	switch usage := b[1] >> 3 & 3; {
	case usage == 1 || usage == 3 && b[0] != 0:
		return nil, nil, invalidParam(1)
	case be.Uint32(b[12:]) != 0:
		return nil, nil, InlineDataExceeded
	case uint64(cscdBytes)+segmentBytes > maxDescriptors,
		uint64(len(b)) < copyHeaderLen+uint64(cscdBytes)+segmentBytes:
		return nil, nil, ParameterListLength
	}
	list := b[copyHeaderLen:]
	cscds, segments = list[:cscdBytes], list[cscdBytes:cscdBytes+int(segmentBytes)]
	if len(cscds) > 0 && cscds[0] != cscdIdentification {
		return nil, nil, UnsupportedCSCD
	}
	if len(segments) > 0 && segments[0] != segmentBlockToBlock {
		return nil, nil, UnsupportedSegment
	}
	switch {
	case cscdBytes%cscdLen != 0:
		return nil, nil, ParameterListLength
	case cscdBytes/cscdLen > maxCSCDs:
		return nil, nil, TooManyCSCDs
	case segmentBytes%segmentLen != 0:
		return nil, nil, ParameterListLength
	case segmentBytes/segmentLen > maxSegments:
		return nil, nil, TooManySegments
	}
	return cscds, segments, nil
}

// cscd returns the unit that an Identification CSCD descriptor (SPC-4 6.4.5.2) names by one of the
// designators of its Device Identification page. It returns nil if no unit has it: that is an error
// only if a segment uses it.
func (t *Target) cscd(d []byte, at int) (*Unit, error) {
	if d[0] != cscdIdentification {
		return nil, UnsupportedCSCD
	}
	n := int(d[7])
	if d[1]&0x1f != typeDisk || n > 20 || d[5]>>4&3 != 0 {
		return nil, invalidParam(at)
	}
	for _, u := range *t.units.Load() {
		for _, have := range u.designators() {
			if have[0]&0x0f == d[4]&0x0f && have[1]&0x0f == d[5]&0x0f && string(have[4:]) == string(d[8:8+n]) {
				if int64(d[29])<<16|int64(d[30])<<8|int64(d[31]) != u.blockSize {
					return nil, invalidParam(at + 29)
				}
				return u, nil
			}
		}
	}
	return nil, nil
}

// parseSegment reads and checks a segment descriptor, which lies at byte at of the
// list.
func parseSegment(by NexusID, units []*Unit, d []byte, at int) (segment, error) {
	be := binary.BigEndian
	if d[0] != segmentBlockToBlock {
		return segment{}, UnsupportedSegment
	}
	if be.Uint16(d[2:]) != segmentLen-4 {
		return segment{}, invalidParam(at + 2)
	}
	from, to := int(be.Uint16(d[4:])), int(be.Uint16(d[6:]))
	if from >= len(units) || to >= len(units) || units[from] == nil || units[to] == nil {
		return segment{}, CopyUnreachable
	}
	s := segment{from: units[from], to: units[to], fromLBA: be.Uint64(d[12:]), toLBA: be.Uint64(d[20:])}
	counted := s.from
	if d[1]&0x02 != 0 { // DC: the number counts blocks of the destination
		counted = s.to
	}
	s.bytes = int64(be.Uint16(d[10:])) * counted.blockSize
	if s.bytes%s.from.blockSize != 0 || s.bytes%s.to.blockSize != 0 {
		return segment{}, CopyGranularity
	}
	return s, s.check(by)
}

// check returns an error unless both units can take part in a copy for an initiator.
func (s segment) check(by NexusID) error {
	for _, u := range []*Unit{s.from, s.to} {
		if u.set.isClosed() || u.notReady() != nil {
			return CopyUnreachable
		}
	}
	if s.from.set.refusesCopy(by, readAccess) || s.to.set.refusesCopy(by, writeAccess) {
		return CopyThirdParty
	}
	if s.to.writeProtected() != nil ||
		s.from.inRange(s.fromLBA, uint64(s.bytes/s.from.blockSize)) != nil ||
		s.to.inRange(s.toLBA, uint64(s.bytes/s.to.blockSize)) != nil {
		return CopyAborted
	}
	return nil
}

// copySegment does one segment. It shares the medium of both units with other commands; every copy
// locks the two in the same order.
func (tk *task) copySegment(s segment) error {
	both, places, begun := []*Unit{s.from, s.to}, [2]block.Place{}, false
	for i, u := range []*Unit{s.from, s.to} {
		if u.limit == nil || s.bytes == 0 {
			continue
		}
		defer func() {
			if !begun {
				u.limit.GiveBack(&places[i])
			}
		}()
		for !u.limit.Take(&places[i], uint64(s.bytes)) {
			if tk.await(&places[i]); tk.state.Load() != running {
				return TargetFailure // aborted
			}
		}
	}
	slices.SortFunc(both, func(a, b *Unit) int { return strings.Compare(a.serial, b.serial) })
	for _, u := range slices.Compact(both) {
		if !tk.lockMedium(u, false) {
			return TargetFailure // aborted
		}
		defer u.medium.unlock(false)
	}
	if err := s.check(tk.Nexus); err != nil { // again, now that nothing can change
		return err
	}
	begun = tk.state.Load() == running
	err := s.move(tk)
	var m *mediumError
	if errors.As(err, &m) {
		return CopyAborted
	}
	return err
}

// move copies the data: by the backend's own means, or piece by piece.
func (s segment) move(tk *task) error {
	fromOff, toOff := int64(s.fromLBA)*s.from.blockSize, int64(s.toLBA)*s.to.blockSize
	done := int64(0)
	if c, ok := s.to.b.(block.Copier); ok && s.bytes > 0 && s.from.cfg.Protection == nil && s.to.cfg.Protection == nil {
		var err error
		for err == nil && done < s.bytes {
			if tk.stopped() {
				err = errStopped
				break
			}
			n := min(s.bytes-done, copyPiece)
			err = s.to.attempt("write", toOff+done, func() error {
				return c.CopyFrom(s.from.b, fromOff+done, toOff+done, n)
			})
			if err == nil {
				done += n
			}
		}
		switch {
		case err == nil:
			return s.to.settle()
		case !errors.Is(err, errors.ErrUnsupported):
			s.to.written.Add(1)
			return err
		}
	}
	buf := getScratch()
	defer putScratch(buf)
	for done < s.bytes {
		if tk.stopped() {
			return errStopped
		}
		part := [][]byte{(*buf)[:min(s.bytes-done, int64(len(*buf)))]}
		if err := s.from.read(part, uint64((fromOff+done)/s.from.blockSize)); err != nil {
			return err
		}
		if err := s.to.write(part, uint64((toOff+done)/s.to.blockSize), false); err != nil {
			return err
		}
		done += int64(len(part[0]))
	}
	return nil
}

// blockExponent is the logarithm of the block size.
func (u *Unit) blockExponent() byte { return byte(bits.TrailingZeros64(uint64(u.blockSize))) }

// dropCopy forgets the result with a list identifier that is reused.
func (s *taskSet) dropCopy(id NexusID, list byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.nexus(id)
	n.copies = slices.DeleteFunc(n.copies, func(c copyResult) bool { return c.list == list })
}

// holdCopy keeps r for the initiator, and drops the oldest result if there are too many.
func (s *taskSet) holdCopy(id NexusID, r copyResult) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.nexus(id)
	if len(n.copies) == maxHeldCopies {
		n.copies = n.copies[1:]
	}
	n.copies = append(n.copies, r)
}

// heldCopy returns the result with a list identifier.
func (s *taskSet) heldCopy(id NexusID, list byte) (copyResult, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	copies := s.nexus(id).copies
	i := slices.IndexFunc(copies, func(c copyResult) bool { return c.list == list })
	if i < 0 {
		return copyResult{}, false
	}
	return copies[i], true
}

// copyStatus is RECEIVE COPY STATUS(LID1) (SPC-4 6.24).
func copyStatus(tk *task) error {
	r, ok := tk.u.set.heldCopy(tk.Nexus, tk.CDB[2])
	if !ok {
		return invalidCDB(2, 7)
	}
	b := make([]byte, 12)
	binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	b[4] = 0x01 // completed without errors; copies are never found under way
	if r.failed {
		b[4] = 0x02
	}
	binary.BigEndian.PutUint16(b[5:], r.segments)
	b[7] = 0x00 // TRANSFER COUNT UNITS: bytes
	binary.BigEndian.PutUint32(b[8:], clamp32(r.bytes))
	return tk.reply(b)
}

// copyData is RECEIVE COPY DATA(LID1) (SPC-4 6.21): no kind of segment here
// holds data for the initiator.
func copyData(tk *task) error {
	if _, ok := tk.u.set.heldCopy(tk.Nexus, tk.CDB[2]); !ok {
		return invalidCDB(2, 7)
	}
	return tk.reply(make([]byte, 4))
}

// copyFailure is RECEIVE COPY FAILURE DETAILS(LID1) (SPC-4 6.22).
func copyFailure(tk *task) error {
	r, ok := tk.u.set.heldCopy(tk.Nexus, tk.CDB[2])
	if !ok || !r.failed {
		return invalidCDB(2, 7)
	}
	sense := r.sense.encode(tk.u.dSense.Load())
	b := append(make([]byte, 60), sense...)
	be := binary.BigEndian
	be.PutUint32(b, uint32(len(b)-4))
	b[56] = byte(CheckCondition)
	be.PutUint16(b[58:], uint16(len(sense)))
	return tk.reply(b)
}

// copyParameters is RECEIVE COPY OPERATING PARAMETERS (SPC-4 6.23).
func copyParameters(tk *task) error {
	b := make([]byte, 46)
	be := binary.BigEndian
	be.PutUint32(b, uint32(len(b)-4))
	b[4] = 0x01 // SNLID: a LIST ID USAGE of 11b is known
	be.PutUint16(b[8:], maxCSCDs)
	be.PutUint16(b[10:], maxSegments)
	be.PutUint32(b[12:], maxDescriptors)
	be.PutUint32(b[16:], 0xffff*uint32(tk.u.blockSize)) // MAXIMUM SEGMENT LENGTH
	be.PutUint16(b[34:], 1)                             // TOTAL CONCURRENT COPIES
	b[36] = 1                                           // MAXIMUM CONCURRENT COPIES
	b[37] = tk.u.blockExponent()                        // DATA SEGMENT GRANULARITY
	b[43] = 2
	b[44], b[45] = segmentBlockToBlock, cscdIdentification
	return tk.reply(b)
}

// thirdPartyCopy is the Third-party Copy page (SPC-4 7.8.17): which commands and
// descriptors supported, and the limits of EXTENDED COPY.
func thirdPartyCopy(u *Unit) []byte {
	var b []byte
	be := binary.BigEndian
	add := func(kind uint16, body ...byte) {
		for len(body)%4 != 0 {
			body = append(body, 0)
		}
		b = be.AppendUint16(b, kind)
		b = be.AppendUint16(b, uint16(len(body)))
		b = append(b, body...)
	}
	commands := []byte{0}
	for _, code := range []byte{0x83, 0x84} {
		row := &opcodes[code]
		commands = append(commands, code, byte(len(row.actions)))
		for i := range row.actions {
			commands = append(commands, row.actions[i].action())
		}
	}
	commands[0] = byte(len(commands) - 1)
	add(0x0001, commands...) // Supported Commands

	limits := make([]byte, 28)
	be.PutUint16(limits[4:], maxCSCDs)
	be.PutUint16(limits[6:], maxSegments)
	be.PutUint32(limits[8:], maxDescriptors)
	add(0x0004, limits...)                                  // Parameter Data
	add(0x0008, 2, segmentBlockToBlock, cscdIdentification) // Supported Descriptors
	add(0x000c, 0, 0)                                       // Supported CSCD Descriptor IDs: no reserved ones
	general := make([]byte, 32)
	be.PutUint32(general, 1)     // TOTAL CONCURRENT COPIES
	be.PutUint32(general[4:], 1) // MAXIMUM IDENTIFIED CONCURRENT COPIES
	be.PutUint32(general[8:], 0xffff*uint32(u.blockSize))
	general[12] = u.blockExponent()
	add(0x8001, general...)
	return b
}
