package trace

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"

	"gvm/devices/scsi"
)

// Op returns the name of the request: of the command, as the standards print it, or of the task
// management function.
func (r *Record) Op() string {
	switch r.Kind {
	case Command:
		return scsi.OpcodeName(r.CDB)
	case TaskManagement:
		if int64(r.Function) >= int64(len(functions)) {
			return opUnknown
		}
		return functions[r.Function]
	case Reset:
		return opReset
	case PowerOn:
		return opPowerOn
	}
	return opLost
}

// Names of records that are no command.
const (
	opUnknown = "unknown function"
	opReset   = "device reset"
	opPowerOn = "power on"
	opLost    = "lost"
)

// Ops returns the names that Op has for records.
func Ops() []string {
	var names []string
	for code := range 1 << 8 {
		for action := range 1 << 5 {
			names = append(names, scsi.OpcodeName([]byte{byte(code), byte(action)}))
		}
	}
	return slices.Concat(slices.Compact(names), functions, []string{opUnknown, opReset, opPowerOn, opLost})
}

func name(names []string, n int, unknown string) string {
	if n >= 0 && n < len(names) && names[n] != "" {
		return names[n]
	}
	return fmt.Sprintf(unknown, n)
}

// Names by code: virtio 1.3, 5.6.6.2 and 5.6.6.1.
var (
	functions = []string{"ABORT TASK", "ABORT TASK SET", "CLEAR ACA", "CLEAR TASK SET", "I_T NEXUS RESET",
		"LOGICAL UNIT RESET", "QUERY TASK", "QUERY TASK SET"}
	responses = []string{"OK", "OVERRUN", "ABORTED", "BAD TARGET", "RESET", "BUSY", "TRANSPORT FAILURE",
		"TARGET FAILURE", "NEXUS FAILURE", "FAILURE",
		"FUNCTION SUCCEEDED", "FUNCTION REJECTED", "INCORRECT LUN"}
)

// Response codes of success.
const (
	responseOK        = 0
	functionSucceeded = 10
)

// ParseSense reads sense data of either format (SPC-5 4.5.2, 4.5.3), as far as
// a Sense has room. ok is false for data that is too short or of another kind.
func ParseSense(b []byte) (s scsi.Sense, ok bool) {
	if len(b) < 4 {
		return s, false
	}
	s.Deferred = b[0]&1 != 0
	switch b[0] & 0x7f {
	case 0x70, 0x71:
		s.Key = scsi.SenseKey(b[2] & 0xf)
		if len(b) >= 7 {
			s.InfoValid = b[0]&0x80 != 0
			s.Info = uint64(binary.BigEndian.Uint32(b[3:]))
		}
		if len(b) >= 14 {
			s.ASC, s.ASCQ = b[12], b[13]
		}
		if len(b) >= 18 {
			s.Specific = [3]byte(b[15:18])
		}
		return s, true
	case 0x72, 0x73:
		s.Key, s.ASC, s.ASCQ = scsi.SenseKey(b[1]&0xf), b[2], b[3]
		for d := b[min(8, len(b)):]; len(d) >= 2 && len(d) >= 2+int(d[1]); d = d[2+int(d[1]):] {
			switch {
			case d[0] == 0 && d[1] == 10:
				s.InfoValid = d[2]&0x80 != 0
				s.Info = binary.BigEndian.Uint64(d[4:])
			case d[0] == 2 && d[1] == 6:
				s.Specific = [3]byte(d[4:7])
			}
		}
		return s, true
	}
	return s, false
}

// senseText describes sense data: "ILLEGAL REQUEST, invalid field in CDB (byte 2, bit 7)".
func senseText(b []byte) string {
	s, ok := ParseSense(b)
	if !ok {
		return fmt.Sprintf("sense data % x", b)
	}
	return s.Error()
}

// Failed reports whether the request failed. A unit attention counts as a failure here, although
// initiators expect it.
func (r *Record) Failed() bool {
	switch r.Kind {
	case Command:
		return r.Response != responseOK || r.Status != scsi.Good && r.Status != scsi.ConditionMet
	case TaskManagement:
		return r.Response != responseOK && r.Response != functionSucceeded
	}
	return r.Kind == Lost
}

// Outcome describes the result of the request.
func (r *Record) Outcome() string {
	switch r.Kind {
	case TaskManagement:
		return name(responses, int(r.Response), "response %d")
	case Command:
	case Lost:
		return fmt.Sprintf("%d requests are missing here", r.Count)
	default:
		return ""
	}
	var words []string
	if r.Response != responseOK {
		words = append(words, name(responses, int(r.Response), "response %d"))
	}
	if status := r.Status.Name(); status == "" {
		words = append(words, fmt.Sprintf("status %02xh", uint8(r.Status)))
	} else if r.Status != scsi.Good || len(words) == 0 {
		words = append(words, status)
	}
	if len(r.Sense) > 0 {
		words = append(words, senseText(r.Sense))
	}
	if r.Residual > 0 {
		words = append(words, fmt.Sprintf("residual %d", r.Residual))
	}
	return strings.Join(words, ": ")
}

// Unit names the logical unit of the request: the number of a LUN of target 0, "wlun" for the
// REPORT LUNS well-known logical unit, "none" for an invalid address.
func (r *Record) Unit() string {
	if n, ok := r.UnitNumber(); ok {
		return fmt.Sprint(n)
	}
	b := r.LUN
	lun := binary.BigEndian.Uint64(b[:])
	switch {
	case r.Kind > TaskManagement:
		return ""
	case scsi.LUN(lun) == scsi.ReportLUNsWLUN, b[0] == 1 && b[1] == 0 && scsi.LUN(lun<<16) == scsi.ReportLUNsWLUN:
		return "wlun"
	}
	return "none"
}

// UnitNumber returns the number of the LUN, and false when the request is not
// for a single level LUN of target 0 (virtio 1.3, 5.6.6.1).
func (r *Record) UnitNumber() (int, bool) {
	b := r.LUN
	if b[0] != 1 || b[1] != 0 || r.Kind > TaskManagement {
		return 0, false
	}
	return scsi.DecodeLUN(scsi.LUN(binary.BigEndian.Uint64(b[:]) << 16))
}

// UnitLUN returns the lun field of a request for logical unit n of target 0, as Linux writes it.
func UnitLUN(n int) [8]byte { return [8]byte{1, 0, 0x40 | byte(n>>8), byte(n)} }

// Detail returns the other fields of the request: blocks, pages, the tag of a task management
// function.
func (r *Record) Detail() string {
	if r.Kind == TaskManagement {
		switch {
		case r.Function == 0, r.Function == 6: // ABORT TASK, QUERY TASK
			return fmt.Sprintf("tag %x", r.Tag)
		case int64(r.Function) >= int64(len(functions)):
			return fmt.Sprint(r.Function)
		}
	}
	if r.Kind != Command {
		return ""
	}
	return scsi.Detail(r.CDB)
}
