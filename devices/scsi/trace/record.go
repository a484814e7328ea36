// Package trace records the requests of an initiator to SCSI targets and their answers, one record
// for each request, in one format for every backend. It writes and reads trace files, and counts
// and compares their records.
//
// docs/trace.md has the layout of a file.
package trace

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math"
	"time"

	"gvm/devices/scsi"
)

// Kind is the kind of a record.
type Kind uint8

// Kinds of records. A reader skips those that it does not know.
const (
	Command        Kind = iota + 1 // a request of a request queue
	TaskManagement                 // a task management function of the control queue
	Reset                          // the driver reset the device: to the target the loss of the I_T nexus
	PowerOn                        // the machine was power-cycled, and the target with it
	Lost                           // Count records are missing here: the file's disk was too slow
)

// Missing is the set of fields of a record that the backend does not know: the kernel's tracepoints
// have fewer than gvm's own ring.
type Missing uint8

// Fields that may be missing.
const (
	NoQueue Missing = 1 << iota
	NoResponse
	NoResidual
	NoTag
)

// Record is one request and its answer. The slices of a record that a Reader
// filled in are valid until the next call of Next.
type Record struct {
	Kind    Kind
	Missing Missing
	Device  uint8         // index in Header.Devices
	Queue   uint16        // request queue, from 0
	Time    time.Duration // of the request, since Header.Start
	Latency time.Duration // from the request to its answer
	// LUN is the lun field of the request (virtio 1.3, 5.6.6.1).
	LUN      [8]byte
	Tag      uint64        // the initiator's number for the request
	Attr     scsi.TaskAttr // as the initiator wrote it
	Function uint32        // of TaskManagement: the subtype (virtio 1.3, 5.6.6.2)
	// CDB lacks zeros at its end, but not inside the length that SPC-5 4.2.5.1 gives its operation
	// code.
	CDB      []byte
	Out, In  uint32 // bytes of data-out and data-in that the initiator offered
	Response uint8  // virtio 1.3, 5.6.6.1 and 5.6.6.2
	Status   scsi.Status
	Residual uint32
	Sense    []byte
	// Payload is the data-out, nil if it was not recorded.
	Payload []byte
	Count   uint64 // of Lost
}

const (
	// MaxRecord is the largest size of a record in bytes.
	MaxRecord = 4 << 20

	fixedLen    = 64 // bytes before CDB, sense data and payload
	lostLen     = fixedLen
	crcFrom     = 8
	flagPayload = 1 << 0
	maxSense    = 252 // SPC-5 4.4.1
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// trim returns cdb without unused zeros at its end. A CDB comes in a field of cdb_size bytes, most
// of which it does not use.
func trim(cdb []byte) []byte {
	if len(cdb) == 0 {
		return cdb
	}
	short := 6 // group 0, and groups without a fixed length
	switch cdb[0] >> 5 {
	case 1, 2:
		short = 10
	case 4:
		short = 16
	case 5:
		short = 12
	}
	n := len(cdb)
	for n >= short+8 && binary.LittleEndian.Uint64(cdb[n-8:]) == 0 {
		n -= 8
	}
	for n > short && cdb[n-1] == 0 {
		n--
	}
	return cdb[:n]
}

// size returns the largest number of bytes that append adds.
func (r *Record) size() int { return fixedLen + len(r.CDB) + len(r.Sense) + len(r.Payload) }

// append adds the encoded record to b. CDB and Sense have no more than 65535 and 255 bytes.
func (r *Record) append(b []byte) []byte {
	cdb := trim(r.CDB)
	start := len(b)
	b = append(b, make([]byte, fixedLen)...)
	b = append(b, cdb...)
	b = append(b, r.Sense...)
	b = append(b, r.Payload...)
	f := b[start:]
	var flags byte
	if r.Payload != nil {
		flags = flagPayload
	}
	out, tag := r.Out, r.Tag
	switch r.Kind {
	case TaskManagement:
		out = r.Function
	case Lost:
		tag = r.Count
	}
	le := binary.LittleEndian
	le.PutUint32(f, uint32(len(f)))
	f[8], f[9] = byte(r.Kind), flags
	le.PutUint16(f[10:], r.Queue)
	le.PutUint64(f[12:], uint64(r.Time))
	le.PutUint64(f[20:], uint64(r.Latency))
	copy(f[28:36], r.LUN[:])
	le.PutUint64(f[36:], tag)
	le.PutUint32(f[44:], out)
	le.PutUint32(f[48:], r.In)
	le.PutUint32(f[52:], r.Residual)
	f[56], f[57], f[58], f[59] = byte(r.Attr), byte(r.Status), r.Response, byte(r.Missing)
	le.PutUint16(f[60:], uint16(len(cdb)))
	f[62], f[63] = byte(len(r.Sense)), r.Device
	le.PutUint32(f[4:], crc32.Checksum(f[crcFrom:], castagnoli))
	return b
}

// parse fills r in from f, a whole record whose length field has been checked. It returns the fault
// of f, "" for none.
func (r *Record) parse(f []byte) string {
	le := binary.LittleEndian
	if sum := crc32.Checksum(f[crcFrom:], castagnoli); sum != le.Uint32(f[4:]) {
		return fmt.Sprintf("a record's checksum is %08x and should be %08x", le.Uint32(f[4:]), sum)
	}
	at, latency := le.Uint64(f[12:]), le.Uint64(f[20:])
	if at > math.MaxInt64 || latency > math.MaxInt64-at {
		return "a record's time is out of range"
	}
	cdbEnd := fixedLen + int(le.Uint16(f[60:]))
	senseEnd := cdbEnd + int(f[62])
	if senseEnd > len(f) || f[62] > maxSense {
		return fmt.Sprintf("a record of %d bytes says that it holds more", len(f))
	}
	*r = Record{
		Kind:     Kind(f[8]),
		Missing:  Missing(f[59]),
		Device:   f[63],
		Queue:    le.Uint16(f[10:]),
		Time:     time.Duration(at),
		Latency:  time.Duration(latency),
		LUN:      [8]byte(f[28:36]),
		Tag:      le.Uint64(f[36:]),
		Attr:     scsi.TaskAttr(f[56]),
		CDB:      f[fixedLen:cdbEnd],
		Out:      le.Uint32(f[44:]),
		In:       le.Uint32(f[48:]),
		Response: f[58],
		Status:   scsi.Status(f[57]),
		Residual: le.Uint32(f[52:]),
		Sense:    f[cdbEnd:senseEnd],
	}
	if f[9]&flagPayload != 0 {
		r.Payload = f[senseEnd:]
	}
	switch r.Kind {
	case TaskManagement:
		r.Function, r.Out = r.Out, 0
	case Lost:
		r.Count, r.Tag = r.Tag, 0
	}
	return ""
}
