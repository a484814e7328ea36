package scsi

import "fmt"

// Operation codes that are compared outside the table.
const (
	opTestUnitReady      = 0x00
	opRequestSense       = 0x03
	opInquiry            = 0x12
	opStartStopUnit      = 0x1b
	opRelease6           = 0x17
	opPreventAllow       = 0x1e
	opRelease10          = 0x57
	opReceiveCopyResults = 0x84
	opReportLUNs         = 0xa0
)

// Direction says which way a command moves data, as seen by the initiator.
type Direction uint8

// Directions.
const (
	NoData  Direction = iota
	DataIn            // target to initiator
	DataOut           // initiator to target
)

// opFlags say what a command needs before its handler may run.
type opFlags uint16

const (
	medium      opFlags = 1 << iota // accesses the medium: the unit must not be stopped
	writes                          // changes the medium: refused when write protected
	alone                           // no other medium access at the same time
	thinOnly                        // exists on units with provisioning management
	noAttention                     // exempt from unit attention (SAM-5 5.14)
	onWLUN                          // known to the REPORT LUNS well-known logical unit
	always                          // allowed whatever is reserved (see access)
	prompt                          // waits for nothing but the medium, and not for that when task.now says so
	never                           // refused to others under any reservation, although it changes no block
)

// opcode is a row of the dispatch table.
type opcode struct {
	name string
	// usage is the CDB USAGE DATA of SPC-5 6.35.3: the operation code, the
	// service action if there is one, and ones for the bits that are looked
	// at. Its length is the length of the CDB.
	usage   string
	dir     Direction
	flags   opFlags
	run     func(*task) error
	actions []opcode // rows of the service actions, in ascending order
}

// length is the length of the CDB in bytes.
func (o *opcode) length() int { return len(o.usage) }

// action is the service action of a row in actions.
func (o *opcode) action() byte { return o.usage[1] & 0x1f }

// Parts of usage masks.
const (
	lba4   = "\xff\xff\xff\xff"
	lba8   = lba4 + lba4
	zeros4 = "\x00\x00\x00\x00"
)

// opcodes is the one list of what the target can do: dispatch, OpcodeName and
// REPORT SUPPORTED OPERATION CODES use it. It is filled by init because
// handlers read it.
var opcodes [256]opcode

func init() {
	opcodes = [256]opcode{
		0x00: {name: "TEST UNIT READY", usage: "\x00" + zeros4 + "\x00", flags: prompt | medium | onWLUN | always, run: testUnitReady},
		0x03: {name: "REQUEST SENSE", usage: "\x03\x01\x00\x00\xff\x00", dir: DataIn, flags: prompt | noAttention | onWLUN | always, run: requestSense},
		0x08: {name: "READ(6)", usage: "\x08\x1f\xff\xff\xff\x00", dir: DataIn, flags: prompt | medium, run: read},
		0x0a: {name: "WRITE(6)", usage: "\x0a\x1f\xff\xff\xff\x00", dir: DataOut, flags: prompt | medium | writes, run: write},
		0x12: {name: "INQUIRY", usage: "\x12\x03\xff\xff\xff\x00", dir: DataIn, flags: prompt | noAttention | onWLUN | always, run: inquiry},
		0x15: {name: "MODE SELECT(6)", usage: "\x15\x11\x00\x00\xff\x00", dir: DataOut, flags: alone, run: modeSelect},
		0x16: {name: "RESERVE(6)", usage: "\x16\x11\x00\x00\x00\x00", flags: always, run: reserveUnit},
		0x17: {name: "RELEASE(6)", usage: "\x17\x11\x00\x00\x00\x00", flags: always, run: reserveUnit},
		0x1a: {name: "MODE SENSE(6)", usage: "\x1a\x08\xff\xff\xff\x00", dir: DataIn, flags: prompt, run: modeSense},
		0x1b: {name: "START STOP UNIT", usage: "\x1b\x01\x00\x0f\xf7\x00", run: startStopUnit},
		0x1e: {name: "PREVENT ALLOW MEDIUM REMOVAL", usage: "\x1e\x00\x00\x00\x03\x00", run: preventAllow},
		0x25: {name: "READ CAPACITY(10)", usage: "\x25" + zeros4 + zeros4 + "\x00", dir: DataIn, flags: prompt | medium | always, run: readCapacity10},
		0x28: {name: "READ(10)", usage: "\x28\xf8" + lba4 + "\x00\xff\xff\x00", dir: DataIn, flags: prompt | medium, run: read},
		0x2a: {name: "WRITE(10)", usage: "\x2a\xf8" + lba4 + "\x00\xff\xff\x00", dir: DataOut, flags: prompt | medium | writes, run: write},
		0x2e: {name: "WRITE AND VERIFY(10)", usage: "\x2e\xf6" + lba4 + "\x00\xff\xff\x00", dir: DataOut, flags: medium | writes, run: writeAndVerify},
		0x2f: {name: "VERIFY(10)", usage: "\x2f\xf6" + lba4 + "\x00\xff\xff\x00", dir: DataOut, flags: medium, run: verify},
		0x34: {name: "PRE-FETCH(10)", usage: "\x34\x02" + lba4 + "\x00\xff\xff\x00", flags: medium, run: prefetch},
		0x35: {name: "SYNCHRONIZE CACHE(10)", usage: "\x35\x02" + lba4 + "\x00\xff\xff\x00", flags: medium | never, run: synchronizeCache},
		0x37: {name: "READ DEFECT DATA(10)", usage: "\x37\x00\x1f" + zeros4 + "\xff\xff\x00", dir: DataIn, flags: medium, run: readDefectData},
		0x41: {name: "WRITE SAME(10)", usage: "\x41\xfe" + lba4 + "\x00\xff\xff\x00", dir: DataOut, flags: medium | writes, run: writeSame},
		0x42: {name: "UNMAP", usage: "\x42\x01" + zeros4 + "\x00\xff\xff\x00", dir: DataOut, flags: medium | writes | thinOnly, run: unmap},
		0x48: {name: "SANITIZE", actions: []opcode{
			{name: "SANITIZE, OVERWRITE", usage: "\x48\xa1" + zeros4 + "\x00\xff\xff\x00", dir: DataOut, flags: writes, run: sanitize},
			{name: "SANITIZE, BLOCK ERASE", usage: "\x48\xa2" + zeros4 + "\x00\xff\xff\x00", flags: writes | thinOnly, run: sanitize},
			{name: "SANITIZE, EXIT FAILURE MODE", usage: "\x48\x1f" + zeros4 + "\x00\xff\xff\x00", flags: writes, run: sanitize},
		}},
		0x4d: {name: "LOG SENSE", usage: "\x4d\x01\xff\xff\x00\xff\xff\xff\xff\x00", dir: DataIn, flags: prompt | always, run: logSense},
		0x55: {name: "MODE SELECT(10)", usage: "\x55\x11" + zeros4 + "\x00\xff\xff\x00", dir: DataOut, flags: alone, run: modeSelect},
		0x56: {name: "RESERVE(10)", usage: "\x56\x11" + zeros4 + zeros4, flags: always, run: reserveUnit},
		0x57: {name: "RELEASE(10)", usage: "\x57\x11" + zeros4 + zeros4, flags: always, run: reserveUnit},
		0x5a: {name: "MODE SENSE(10)", usage: "\x5a\x18\xff\xff\x00\x00\x00\xff\xff\x00", dir: DataIn, flags: prompt, run: modeSense},
		0x5e: {name: "PERSISTENT RESERVE IN", actions: []opcode{
			{name: "PERSISTENT RESERVE IN, READ KEYS", usage: "\x5e\x00\x00" + zeros4 + "\xff\xff\x00", dir: DataIn, flags: always, run: readKeys},
			{name: "PERSISTENT RESERVE IN, READ RESERVATION", usage: "\x5e\x01\x00" + zeros4 + "\xff\xff\x00", dir: DataIn, flags: always, run: readReservation},
			{name: "PERSISTENT RESERVE IN, REPORT CAPABILITIES", usage: "\x5e\x02\x00" + zeros4 + "\xff\xff\x00", dir: DataIn, flags: always, run: reportCapabilities},
			{name: "PERSISTENT RESERVE IN, READ FULL STATUS", usage: "\x5e\x03\x00" + zeros4 + "\xff\xff\x00", dir: DataIn, flags: always, run: readFullStatus},
		}},
		0x5f: {name: "PERSISTENT RESERVE OUT", actions: []opcode{
			{name: "PERSISTENT RESERVE OUT, REGISTER", usage: "\x5f\x00\x00\x00\x00" + lba4 + "\x00", dir: DataOut, flags: always, run: persistentReserveOut},
			{name: "PERSISTENT RESERVE OUT, RESERVE", usage: "\x5f\x01\xff\x00\x00" + lba4 + "\x00", dir: DataOut, flags: always, run: persistentReserveOut},
			{name: "PERSISTENT RESERVE OUT, RELEASE", usage: "\x5f\x02\xff\x00\x00" + lba4 + "\x00", dir: DataOut, flags: always, run: persistentReserveOut},
			{name: "PERSISTENT RESERVE OUT, CLEAR", usage: "\x5f\x03\x00\x00\x00" + lba4 + "\x00", dir: DataOut, flags: always, run: persistentReserveOut},
			{name: "PERSISTENT RESERVE OUT, PREEMPT", usage: "\x5f\x04\xff\x00\x00" + lba4 + "\x00", dir: DataOut, flags: always, run: persistentReserveOut},
			{name: "PERSISTENT RESERVE OUT, PREEMPT AND ABORT", usage: "\x5f\x05\xff\x00\x00" + lba4 + "\x00", dir: DataOut, flags: always, run: persistentReserveOut},
			{name: "PERSISTENT RESERVE OUT, REGISTER AND IGNORE EXISTING KEY", usage: "\x5f\x06\x00\x00\x00" + lba4 + "\x00", dir: DataOut, flags: always, run: persistentReserveOut},
			{name: "PERSISTENT RESERVE OUT, REGISTER AND MOVE", usage: "\x5f\x07\x00\x00\x00" + lba4 + "\x00", dir: DataOut, flags: always, run: registerAndMove},
		}},
		0x83: {name: "EXTENDED COPY", actions: []opcode{
			{name: "EXTENDED COPY(LID1)", usage: "\x83\x00" + zeros4 + zeros4 + lba4 + "\x00\x00", dir: DataOut, flags: writes, run: extendedCopy},
		}},
		0x84: {name: "RECEIVE COPY RESULTS", actions: []opcode{
			{name: "RECEIVE COPY STATUS(LID1)", usage: "\x84\x00\xff\x00\x00\x00" + zeros4 + lba4 + "\x00\x00", dir: DataIn, flags: always, run: copyStatus},
			{name: "RECEIVE COPY DATA(LID1)", usage: "\x84\x01\xff\x00\x00\x00" + zeros4 + lba4 + "\x00\x00", dir: DataIn, flags: always, run: copyData},
			{name: "RECEIVE COPY OPERATING PARAMETERS", usage: "\x84\x03\x00\x00\x00\x00" + zeros4 + lba4 + "\x00\x00", dir: DataIn, flags: always, run: copyParameters},
			{name: "RECEIVE COPY FAILURE DETAILS(LID1)", usage: "\x84\x04\xff\x00\x00\x00" + zeros4 + lba4 + "\x00\x00", dir: DataIn, flags: always, run: copyFailure},
		}},
		0x88: {name: "READ(16)", usage: "\x88\xf8" + lba8 + lba4 + "\x00\x00", dir: DataIn, flags: prompt | medium, run: read},
		0x89: {name: "COMPARE AND WRITE", usage: "\x89\xf8" + lba8 + "\x00\x00\x00\xff\x00\x00", dir: DataOut, flags: medium | writes | alone, run: compareAndWrite},
		0x8a: {name: "WRITE(16)", usage: "\x8a\xf8" + lba8 + lba4 + "\x00\x00", dir: DataOut, flags: prompt | medium | writes, run: write},
		0x8b: {name: "ORWRITE(16)", usage: "\x8b\xf8" + lba8 + lba4 + "\x00\x00", dir: DataOut, flags: medium | writes | alone, run: orWrite},
		0x8e: {name: "WRITE AND VERIFY(16)", usage: "\x8e\xf6" + lba8 + lba4 + "\x00\x00", dir: DataOut, flags: medium | writes, run: writeAndVerify},
		0x8f: {name: "VERIFY(16)", usage: "\x8f\xf6" + lba8 + lba4 + "\x00\x00", dir: DataOut, flags: medium, run: verify},
		0x90: {name: "PRE-FETCH(16)", usage: "\x90\x02" + lba8 + lba4 + "\x00\x00", flags: medium, run: prefetch},
		0x91: {name: "SYNCHRONIZE CACHE(16)", usage: "\x91\x02" + lba8 + lba4 + "\x00\x00", flags: medium | never, run: synchronizeCache},
		0x93: {name: "WRITE SAME(16)", usage: "\x93\xff" + lba8 + lba4 + "\x00\x00", dir: DataOut, flags: medium | writes, run: writeSame},
		0x9e: {name: "SERVICE ACTION IN(16)", actions: []opcode{
			{name: "READ CAPACITY(16)", usage: "\x9e\x10" + zeros4 + zeros4 + lba4 + "\x00\x00", dir: DataIn, flags: prompt | medium | always, run: readCapacity16},
			{name: "GET LBA STATUS(16)", usage: "\x9e\x12" + lba8 + lba4 + "\xff\x00", dir: DataIn, flags: medium, run: getLBAStatus},
		}},
		0xa0: {name: "REPORT LUNS", usage: "\xa0\x00\xff\x00\x00\x00" + lba4 + "\x00\x00", dir: DataIn, flags: prompt | noAttention | onWLUN | always, run: reportLUNs},
		0xa3: {name: "MAINTENANCE IN", actions: []opcode{
			{name: "REPORT SUPPORTED OPERATION CODES", usage: "\xa3\x0c\x87\xff\xff\xff" + lba4 + "\x00\x00", dir: DataIn, run: reportSupportedOpcodes},
			{name: "REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS", usage: "\xa3\x0d\x80\x00\x00\x00" + lba4 + "\x00\x00", dir: DataIn, run: reportSupportedTMFs},
		}},
		0xa8: {name: "READ(12)", usage: "\xa8\xf8" + lba4 + lba4 + "\x00\x00", dir: DataIn, flags: prompt | medium, run: read},
		0xaa: {name: "WRITE(12)", usage: "\xaa\xf8" + lba4 + lba4 + "\x00\x00", dir: DataOut, flags: prompt | medium | writes, run: write},
		0xae: {name: "WRITE AND VERIFY(12)", usage: "\xae\xf6" + lba4 + lba4 + "\x00\x00", dir: DataOut, flags: medium | writes, run: writeAndVerify},
		0xaf: {name: "VERIFY(12)", usage: "\xaf\xf6" + lba4 + lba4 + "\x00\x00", dir: DataOut, flags: medium, run: verify},
		0xb7: {name: "READ DEFECT DATA(12)", usage: "\xb7\x1f" + zeros4 + lba4 + "\x00\x00", dir: DataIn, flags: medium, run: readDefectData},
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

// exists says whether u has the command.
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
	return row.length(), row.dir, true
}
