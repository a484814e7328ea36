package scsi

import (
	"encoding/binary"
	"fmt"
)

// Operation codes that are compared outside the table.
const (
	opRequestSense = 0x03
	opInquiry      = 0x12
	opRelease6     = 0x17
	opRelease10    = 0x57
	opReportLUNs   = 0xa0
)

// Direction is the direction of a command's data, as seen by the initiator.
type Direction uint8

// Directions.
const (
	NoData  Direction = iota
	DataIn            // target to initiator
	DataOut           // initiator to target
)

// dataKind is the kind of data that a command transfers.
type dataKind uint8

const (
	noData    dataKind = iota
	listIn             // parameter data
	listOut            // a parameter list
	blocksIn           // the blocks of the extent
	blocksOut          // likewise
	compared           // blocks to compare with the medium; of COMPARE AND WRITE as many again to write
	oneBlock           // one block for all of the extent; bit 3 of byte 1 is UNMAP
)

// ofBlocks reports whether the command reads or writes the blocks of its extent.
func (d dataKind) ofBlocks() bool { return d >= blocksIn }

func (d dataKind) direction() Direction {
	switch d {
	case noData:
		return NoData
	case listIn, blocksIn:
		return DataIn
	}
	return DataOut
}

// field is the place of a number in a CDB: big-endian, right-aligned in its bytes from at on.
type field struct{ at, bits uint8 }

// of returns the number in cdb, 0 if there is none.
func (f field) of(cdb []byte) uint64 {
	be := binary.BigEndian
	switch f.bits {
	case 8:
		return uint64(cdb[f.at])
	case 16:
		return uint64(be.Uint16(cdb[f.at:]))
	case 21:
		return uint64(be.Uint32(cdb[f.at-1:])) & 0x1fffff
	case 32:
		return uint64(be.Uint32(cdb[f.at:]))
	case 64:
		return be.Uint64(cdb[f.at:])
	}
	return 0
}

// put writes the number into cdb, where it has zeroes. It reports whether the field has room.
func (f field) put(cdb []byte, n uint64) bool {
	if f.bits < 64 && n>>f.bits != 0 {
		return false
	}
	for i := int(f.at) + (int(f.bits)+7)/8 - 1; n > 0; i-- {
		cdb[i] |= byte(n)
		n >>= 8
	}
	return true
}

// mark sets the bits of the field in b.
func (f field) mark(b []byte) {
	last := int(f.at) + (int(f.bits)+7)/8 - 1
	for i := range int(f.bits) {
		b[last-i/8] |= 1 << (i % 8)
	}
}

// extent is the place of the LOGICAL BLOCK ADDRESS and of the number of blocks in a CDB.
type extent struct {
	lba, blocks field
	zero        uint64 // the meaning of 0 blocks
}

// of returns the address and the number of blocks in cdb.
func (e *extent) of(cdb []byte) (lba, n uint64) {
	lba, n = e.lba.of(cdb), e.blocks.of(cdb)
	if n == 0 {
		n = e.zero
	}
	return lba, n
}

// Extents that several commands share.
var (
	extent6  = extent{lba: field{1, 21}, blocks: field{4, 8}, zero: 256} // SBC-4 5.16
	extent10 = extent{lba: field{2, 32}, blocks: field{7, 16}}
	extent12 = extent{lba: field{2, 32}, blocks: field{6, 32}}
	extent16 = extent{lba: field{2, 64}, blocks: field{10, 32}}
)

// opFlags are the conditions under which a handler may run, and properties of the CDB.
type opFlags uint16

const (
	medium               opFlags = 1 << iota // accesses the medium: the unit must not be stopped
	writes                                   // changes the medium: refused when write protected
	exclusive                                // no other medium access at the same time
	thinOnly                                 // exists on units with provisioning management
	ignoresAttention                         // exempt from unit attention (SAM-5 5.14)
	onWLUN                                   // known to the REPORT LUNS well-known logical unit
	nonBlocking                              // waits for the medium alone; never waits if task.now is set
	ignoresReservation                       // allowed under any reservation (see access)
	alwaysConflicts                          // refused under any reservation of another nexus
	conflictsWithReserve                     // refused under RESERVE of another nexus (SPC-2 5.5.1)
	counts                                   // a limit counts it as a command, although it moves no blocks
	countsTwice                              // a limit counts its blocks as read and as written
	countsSegments                           // charges its segments itself, at the units of its list
	fuaBit                                   // bit 3 of byte 1 is FUA
)

// opcode is a row of the dispatch table: all properties of a command that its handler does not
// implement.
type opcode struct {
	name string
	// usage is usageData without the operation code and without the bits of the fields
	// below. The length of the CDB is one more.
	usage   string
	extent  extent
	list    field // ALLOCATION LENGTH or PARAMETER LIST LENGTH, in bytes
	data    dataKind
	flags   opFlags
	exempt  func(cdb []byte) bool   // reports whether this CDB ignores reservations; nil: as flags say
	detail  func(cdb []byte) string // returns other fields for a trace; nil: none
	run     func(*task) error
	actions []opcode // rows of the service actions, in ascending order
}

// usageData is the CDB USAGE DATA of SPC-5 6.35.3: the operation code, the service action if there
// is one, and ones for the bits that the target evaluates.
func (o *opcode) usageData(code byte) []byte {
	b := append([]byte{code}, o.usage...)
	for _, f := range []field{o.extent.lba, o.extent.blocks, o.list} {
		f.mark(b)
	}
	return b
}

// length is the length of the CDB in bytes.
func (o *opcode) length() int { return 1 + len(o.usage) }

// action is the service action of a row in actions.
func (o *opcode) action() byte { return o.usage[0] & 0x1f }

// Bytes of a CDB after the first two, or three.
const (
	zeros4 = "\x00\x00\x00\x00"
	rest6  = zeros4
	rest10 = zeros4 + zeros4
	rest12 = rest10 + "\x00\x00"
	rest16 = rest12 + zeros4
	less10 = zeros4 + "\x00\x00\x00"
	less16 = less10 + "\x00\x00" + zeros4
)

// opcodes is the one list of commands: dispatch, limits, reservations, traces, REPORT SUPPORTED
// OPERATION CODES and docs/commands.md read it. init fills it because handlers read it.
var opcodes [256]opcode

func init() {
	opcodes = [256]opcode{
		0x00: {name: "TEST UNIT READY", usage: "\x00" + rest6,
			flags: nonBlocking | medium | onWLUN | ignoresReservation | conflictsWithReserve, run: testUnitReady},
		0x03: {name: "REQUEST SENSE", usage: "\x01" + rest6, list: field{4, 8}, data: listIn,
			flags: nonBlocking | ignoresAttention | onWLUN | ignoresReservation, run: requestSense},
		0x08: {name: "READ(6)", usage: "\x00" + rest6, extent: extent6, data: blocksIn,
			flags: nonBlocking | medium, run: read},
		0x0a: {name: "WRITE(6)", usage: "\x00" + rest6, extent: extent6, data: blocksOut,
			flags: nonBlocking | medium | writes, run: write},
		0x12: {name: "INQUIRY", usage: "\x03\xff\x00\x00\x00", list: field{3, 16}, data: listIn,
			flags: nonBlocking | ignoresAttention | onWLUN | ignoresReservation, detail: vpdDetail, run: inquiry},
		0x15: {name: "MODE SELECT(6)", usage: "\x11" + rest6, list: field{4, 8}, data: listOut,
			flags: exclusive, run: modeSelect},
		0x16: {name: "RESERVE(6)", usage: "\x11" + rest6, flags: ignoresReservation, run: reserveUnit},
		0x17: {name: "RELEASE(6)", usage: "\x11" + rest6, flags: ignoresReservation, run: reserveUnit},
		0x1a: {name: "MODE SENSE(6)", usage: "\x08\xff\xff\x00\x00", list: field{4, 8}, data: listIn,
			flags: nonBlocking, detail: pageDetail, run: modeSense},
		0x1b: {name: "START STOP UNIT", usage: "\x01\x00\x0f\xf7\x00", exempt: starts, run: startStopUnit},
		0x1e: {name: "PREVENT ALLOW MEDIUM REMOVAL", usage: "\x00\x00\x00\x03\x00",
			exempt: allows, run: preventAllow},
		0x25: {name: "READ CAPACITY(10)", usage: "\x00" + rest10, data: listIn,
			flags: nonBlocking | medium | ignoresReservation, run: readCapacity10},
		0x28: {name: "READ(10)", usage: "\xf8" + rest10, extent: extent10, data: blocksIn,
			flags: nonBlocking | medium | fuaBit, run: read},
		0x2a: {name: "WRITE(10)", usage: "\xf8" + rest10, extent: extent10, data: blocksOut,
			flags: nonBlocking | medium | writes | fuaBit, run: write},
		0x2e: {name: "WRITE AND VERIFY(10)", usage: "\xf6" + rest10, extent: extent10, data: blocksOut,
			flags: medium | writes | countsTwice, run: writeAndVerify},
		0x2f: {name: "VERIFY(10)", usage: "\xf6" + rest10, extent: extent10, data: compared,
			flags: medium, run: verify},
		0x34: {name: "PRE-FETCH(10)", usage: "\x02" + rest10, extent: extent10, flags: medium, run: prefetch},
		0x35: {name: "SYNCHRONIZE CACHE(10)", usage: "\x02" + rest10, extent: extent10,
			flags: medium | alwaysConflicts | counts, run: synchronizeCache},
		0x37: {name: "READ DEFECT DATA(10)", usage: "\x00\x1f" + less10, list: field{7, 16}, data: listIn,
			flags: medium, run: readDefectData},
		0x41: {name: "WRITE SAME(10)", usage: "\xfe" + rest10, extent: extent10, data: oneBlock,
			flags: medium | writes, run: writeSame},
		0x42: {name: "UNMAP", usage: "\x01" + rest10, list: field{7, 16}, data: listOut,
			flags: medium | writes | thinOnly | counts, run: unmap},
		0x48: {name: "SANITIZE", actions: []opcode{
			{name: "SANITIZE, OVERWRITE", usage: "\xa1" + rest10, list: field{7, 16}, data: listOut,
				flags: writes, run: sanitize},
			{name: "SANITIZE, BLOCK ERASE", usage: "\xa2" + rest10, list: field{7, 16},
				flags: writes | thinOnly, run: sanitize},
			{name: "SANITIZE, EXIT FAILURE MODE", usage: "\x1f" + rest10, list: field{7, 16},
				flags: writes, run: sanitize},
		}},
		0x4d: {name: "LOG SENSE", usage: "\x01\xff\xff\x00\xff\xff\x00\x00\x00", list: field{7, 16}, data: listIn,
			flags: nonBlocking | ignoresReservation, run: logSense},
		0x55: {name: "MODE SELECT(10)", usage: "\x11" + rest10, list: field{7, 16}, data: listOut,
			flags: exclusive, run: modeSelect},
		0x56: {name: "RESERVE(10)", usage: "\x11" + rest10, flags: ignoresReservation, run: reserveUnit},
		0x57: {name: "RELEASE(10)", usage: "\x11" + rest10, flags: ignoresReservation, run: reserveUnit},
		0x5a: {name: "MODE SENSE(10)", usage: "\x18\xff\xff\x00\x00\x00\x00\x00\x00", list: field{7, 16},
			data: listIn, flags: nonBlocking, detail: pageDetail, run: modeSense},
		0x5e: {name: "PERSISTENT RESERVE IN", actions: []opcode{
			{name: "PERSISTENT RESERVE IN, READ KEYS", usage: "\x00" + rest10, list: field{7, 16}, data: listIn,
				flags: ignoresReservation, run: readKeys},
			{name: "PERSISTENT RESERVE IN, READ RESERVATION", usage: "\x01" + rest10, list: field{7, 16},
				data: listIn, flags: ignoresReservation, run: readReservation},
			{name: "PERSISTENT RESERVE IN, REPORT CAPABILITIES", usage: "\x02" + rest10, list: field{7, 16},
				data: listIn, flags: ignoresReservation, run: reportCapabilities},
			{name: "PERSISTENT RESERVE IN, READ FULL STATUS", usage: "\x03" + rest10, list: field{7, 16},
				data: listIn, flags: ignoresReservation, run: readFullStatus},
		}},
		0x5f: {name: "PERSISTENT RESERVE OUT", actions: []opcode{
			{name: "PERSISTENT RESERVE OUT, REGISTER", usage: "\x00" + rest10, list: field{5, 32}, data: listOut,
				flags: ignoresReservation, run: persistentReserveOut},
			{name: "PERSISTENT RESERVE OUT, RESERVE", usage: "\x01\xff" + less10, list: field{5, 32}, data: listOut,
				flags: ignoresReservation, detail: typeDetail, run: persistentReserveOut},
			{name: "PERSISTENT RESERVE OUT, RELEASE", usage: "\x02\xff" + less10, list: field{5, 32}, data: listOut,
				flags: ignoresReservation, detail: typeDetail, run: persistentReserveOut},
			{name: "PERSISTENT RESERVE OUT, CLEAR", usage: "\x03" + rest10, list: field{5, 32}, data: listOut,
				flags: ignoresReservation, run: persistentReserveOut},
			{name: "PERSISTENT RESERVE OUT, PREEMPT", usage: "\x04\xff" + less10, list: field{5, 32}, data: listOut,
				flags: ignoresReservation, detail: typeDetail, run: persistentReserveOut},
			{name: "PERSISTENT RESERVE OUT, PREEMPT AND ABORT", usage: "\x05\xff" + less10, list: field{5, 32},
				data: listOut, flags: ignoresReservation, detail: typeDetail, run: persistentReserveOut},
			{name: "PERSISTENT RESERVE OUT, REGISTER AND IGNORE EXISTING KEY", usage: "\x06" + rest10,
				list: field{5, 32}, data: listOut, flags: ignoresReservation, run: persistentReserveOut},
			{name: "PERSISTENT RESERVE OUT, REGISTER AND MOVE", usage: "\x07" + rest10, list: field{5, 32},
				data: listOut, flags: ignoresReservation, run: registerAndMove},
		}},
		0x83: {name: "EXTENDED COPY", actions: []opcode{
			{name: "EXTENDED COPY(LID1)", usage: "\x00" + rest16, list: field{10, 32}, data: listOut,
				flags: writes | countsSegments, run: extendedCopy},
		}},
		0x84: {name: "RECEIVE COPY RESULTS", actions: []opcode{
			{name: "RECEIVE COPY STATUS(LID1)", usage: "\x00\xff" + less16, list: field{10, 32}, data: listIn,
				flags: ignoresReservation | conflictsWithReserve, run: copyStatus},
			{name: "RECEIVE COPY DATA(LID1)", usage: "\x01\xff" + less16, list: field{10, 32}, data: listIn,
				flags: ignoresReservation | conflictsWithReserve, run: copyData},
			{name: "RECEIVE COPY OPERATING PARAMETERS", usage: "\x03" + rest16, list: field{10, 32}, data: listIn,
				flags: ignoresReservation | conflictsWithReserve, run: copyParameters},
			{name: "RECEIVE COPY FAILURE DETAILS(LID1)", usage: "\x04\xff" + less16, list: field{10, 32},
				data: listIn, flags: ignoresReservation | conflictsWithReserve, run: copyFailure},
		}},
		0x88: {name: "READ(16)", usage: "\xf8" + rest16, extent: extent16, data: blocksIn,
			flags: nonBlocking | medium | fuaBit, run: read},
		0x89: {name: "COMPARE AND WRITE", usage: "\xf8" + rest16,
			extent: extent{lba: field{2, 64}, blocks: field{13, 8}}, data: compared,
			flags: medium | writes | exclusive | countsTwice | fuaBit, run: compareAndWrite},
		0x8a: {name: "WRITE(16)", usage: "\xf8" + rest16, extent: extent16, data: blocksOut,
			flags: nonBlocking | medium | writes | fuaBit, run: write},
		0x8b: {name: "ORWRITE(16)", usage: "\xf8" + rest16, extent: extent16, data: blocksOut,
			flags: medium | writes | exclusive | countsTwice | fuaBit, run: orWrite},
		0x8e: {name: "WRITE AND VERIFY(16)", usage: "\xf6" + rest16, extent: extent16, data: blocksOut,
			flags: medium | writes | countsTwice, run: writeAndVerify},
		0x8f: {name: "VERIFY(16)", usage: "\xf6" + rest16, extent: extent16, data: compared,
			flags: medium, run: verify},
		0x90: {name: "PRE-FETCH(16)", usage: "\x02" + rest16, extent: extent16, flags: medium, run: prefetch},
		0x91: {name: "SYNCHRONIZE CACHE(16)", usage: "\x02" + rest16, extent: extent16,
			flags: medium | alwaysConflicts | counts, run: synchronizeCache},
		0x93: {name: "WRITE SAME(16)", usage: "\xff" + rest16, extent: extent16, data: oneBlock,
			flags: medium | writes, run: writeSame},
		0x9e: {name: "SERVICE ACTION IN(16)", actions: []opcode{
			{name: "READ CAPACITY(16)", usage: "\x10" + rest16, list: field{10, 32}, data: listIn,
				flags: nonBlocking | medium | ignoresReservation, run: readCapacity16},
			{name: "GET LBA STATUS(16)", usage: "\x12" + rest12 + "\x00\x00\xff\x00",
				extent: extent{lba: field{2, 64}}, list: field{10, 32}, data: listIn,
				flags: medium | counts, run: getLBAStatus},
		}},
		0xa0: {name: "REPORT LUNS", usage: "\x00\xff\x00\x00\x00" + zeros4 + "\x00\x00", list: field{6, 32},
			data: listIn, flags: nonBlocking | ignoresAttention | onWLUN | ignoresReservation, run: reportLUNs},
		0xa3: {name: "MAINTENANCE IN", actions: []opcode{
			{name: "REPORT SUPPORTED OPERATION CODES", usage: "\x0c\x87\xff\xff\xff" + zeros4 + "\x00\x00",
				list: field{6, 32}, data: listIn, run: reportSupportedOpcodes},
			{name: "REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS", usage: "\x0d\x80\x00\x00\x00" + zeros4 + "\x00\x00",
				list: field{6, 32}, data: listIn, run: reportSupportedTMFs},
		}},
		0xa8: {name: "READ(12)", usage: "\xf8" + rest12, extent: extent12, data: blocksIn,
			flags: nonBlocking | medium | fuaBit, run: read},
		0xaa: {name: "WRITE(12)", usage: "\xf8" + rest12, extent: extent12, data: blocksOut,
			flags: nonBlocking | medium | writes | fuaBit, run: write},
		0xae: {name: "WRITE AND VERIFY(12)", usage: "\xf6" + rest12, extent: extent12, data: blocksOut,
			flags: medium | writes | countsTwice, run: writeAndVerify},
		0xaf: {name: "VERIFY(12)", usage: "\xf6" + rest12, extent: extent12, data: compared,
			flags: medium, run: verify},
		0xb7: {name: "READ DEFECT DATA(12)", usage: "\x1f" + rest12, list: field{6, 32}, data: listIn,
			flags: medium, run: readDefectData},
	}
}

// lookupOpcode finds the row for cdb: INVALID COMMAND OPERATION CODE for an
// unknown operation code, INVALID FIELD IN CDB for an unknown service action.
func lookupOpcode(cdb []byte) (*opcode, error) {
	if len(cdb) == 0 {
		return nil, InvalidFieldInIU
	}
	row := &opcodes[cdb[0]]
	if row.name == "" {
		return nil, InvalidOpcode
	}
	if row.actions == nil {
		return row, nil
	}
	if len(cdb) < 2 {
		return nil, InvalidFieldInIU
	}
	if a := row.find(cdb[1] & 0x1f); a != nil {
		return a, nil
	}
	return nil, invalidCDB(1, 4)
}

// find returns the row of a service action.
func (o *opcode) find(action byte) *opcode {
	for i := range o.actions {
		if o.actions[i].action() == action {
			return &o.actions[i]
		}
	}
	return nil
}

// exists reports whether u has the command.
func (o *opcode) exists(u *Unit) bool {
	if u.wellKnown {
		return o.flags&onWLUN != 0
	}
	return o.flags&thinOnly == 0 || u.thin()
}

// OpcodeName returns the name of the command in cdb as the standards print it,
// or the operation code in hexadecimal if the target does not know it.
func OpcodeName(cdb []byte) string {
	if row, err := lookupOpcode(cdb); err == nil {
		return row.name
	}
	if len(cdb) == 0 {
		return "no CDB"
	}
	if name := opcodes[cdb[0]].name; name != "" && len(cdb) > 1 {
		return fmt.Sprintf("%s, service action %02xh", name, cdb[1]&0x1f)
	}
	return fmt.Sprintf("operation code %02xh", cdb[0])
}

// CommandInfo returns the length in bytes of the CDB and the direction of the
// data of the command in cdb, and false for a command that the target does not
// know.
func CommandInfo(cdb []byte) (length int, dir Direction, ok bool) {
	row, err := lookupOpcode(cdb)
	if err != nil {
		return 0, NoData, false
	}
	return row.length(), row.data.direction(), true
}

// Extent returns the first logical block and the number of blocks of a command
// that has both in its CDB (SBC-4 5), and false for any other.
func Extent(cdb []byte) (lba, n uint64, ok bool) {
	row, err := lookupOpcode(cdb)
	if err != nil || len(cdb) < row.length() || row.extent.blocks == (field{}) {
		return 0, 0, false
	}
	lba, n = row.extent.of(cdb)
	return lba, n, true
}

// Detail returns the fields of cdb that traces show: "8+16 FUA" for 16 blocks from block 8 on,
// "page 08h". A CDB that the target does not know is shown whole, in hexadecimal.
func Detail(cdb []byte) string {
	row, err := lookupOpcode(cdb)
	if err != nil {
		return fmt.Sprintf("% x", cdb)
	}
	if len(cdb) < row.length() {
		return ""
	}
	if row.detail != nil {
		return row.detail(cdb)
	}
	lba, n, ok := Extent(cdb)
	switch text := fmt.Sprintf("%d+%d", lba, n); {
	case !ok:
		return ""
	case row.fua(cdb):
		return text + " FUA"
	case row.unmap(cdb):
		return text + " UNMAP"
	default:
		return text
	}
}

// ParameterList reports whether the data-out of a command is a parameter list, or the block of
// WRITE SAME with UNMAP (SBC-4 5.49). It is true for a command that the target does not know.
func ParameterList(cdb []byte) bool {
	row, err := lookupOpcode(cdb)
	switch {
	case err != nil:
		return len(cdb) > 0
	case row.data.ofBlocks() && row.data != blocksIn:
		return row.unmap(cdb)
	}
	return true
}

// fua is FORCE UNIT ACCESS.
func (o *opcode) fua(cdb []byte) bool { return o.flags&fuaBit != 0 && cdb[1]&0x08 != 0 }

// unmap is UNMAP of WRITE SAME.
func (o *opcode) unmap(cdb []byte) bool {
	return o.data == oneBlock && len(cdb) > 1 && cdb[1]&0x08 != 0
}

// protect is RDPROTECT, WRPROTECT, VRPROTECT or ORPROTECT, which 6-byte commands do not have.
func (o *opcode) protect(cdb []byte) byte { return cdb[1] & o.usage[0] >> 5 }

// vpdDetail is the page that INQUIRY asks for.
func vpdDetail(cdb []byte) string {
	if cdb[1]&0x01 == 0 {
		return ""
	}
	return fmt.Sprintf("page %02xh", cdb[2])
}

// pageDetail is the page that MODE SENSE asks for.
func pageDetail(cdb []byte) string { return fmt.Sprintf("page %02xh", cdb[2]&0x3f) }

// typeDetail is the TYPE of PERSISTENT RESERVE OUT.
func typeDetail(cdb []byte) string { return reservationType(cdb[2] & 0x0f).name() }
