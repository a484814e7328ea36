package scsi

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"syscall"
)

// SenseKey is a sense key (SPC-5 4.5.6).
type SenseKey uint8

// Sense keys.
const (
	NoSense        SenseKey = 0x0
	NotReady       SenseKey = 0x2
	MediumError    SenseKey = 0x3
	HardwareError  SenseKey = 0x4
	IllegalRequest SenseKey = 0x5
	UnitAttention  SenseKey = 0x6
	DataProtect    SenseKey = 0x7
	CopyAbortedKey SenseKey = 0xa
	AbortedCommand SenseKey = 0xb
	Miscompare     SenseKey = 0xe
)

// keyNames are the names of sense keys, including those that only other targets return.
var keyNames = [16]string{
	NoSense: "NO SENSE", 0x1: "RECOVERED ERROR", NotReady: "NOT READY", MediumError: "MEDIUM ERROR",
	HardwareError: "HARDWARE ERROR", IllegalRequest: "ILLEGAL REQUEST", UnitAttention: "UNIT ATTENTION",
	DataProtect: "DATA PROTECT", 0x8: "BLANK CHECK", CopyAbortedKey: "COPY ABORTED",
	AbortedCommand: "ABORTED COMMAND", 0xd: "VOLUME OVERFLOW", Miscompare: "MISCOMPARE", 0xf: "COMPLETED",
}

// Name returns the name of the sense key as the standards print it.
func (k SenseKey) Name() string {
	if int(k) < len(keyNames) && keyNames[k] != "" {
		return keyNames[k]
	}
	return fmt.Sprintf("sense key %xh", uint8(k))
}

// Sense is sense data (SPC-5 4.5) before it has a format. It is an error:
// a handler returns one to end its command with CHECK CONDITION.
type Sense struct {
	Key       SenseKey
	ASC, ASCQ uint8
	// Info is the INFORMATION field, valid when InfoValid is set.
	Info      uint64
	InfoValid bool
	// Specific is the SENSE KEY SPECIFIC field; its SKSV bit (80h of the first byte) tells whether
	// it is valid.
	Specific [3]byte
	// Deferred reports that the error belongs to a command that was answered before (SPC-5 4.5.7).
	Deferred bool
}

// namedSense is a sense key and an additional sense code with its name (SPC-5, table F.2).
type namedSense struct {
	key       SenseKey
	asc, ascq uint8
	name      string
}

// returned is the sense data that this target returns; sense adds to it.
var returned = make([]namedSense, 0, 64)

// foreign is sense data of other targets, for reading their traces.
var foreign = []namedSense{
	{NotReady, 0x08, 0x00, "communication failure"},
	{UnitAttention, 0x29, 0x00, "power on, reset, or bus device reset occurred"},
	{IllegalRequest, 0x55, 0x03, "insufficient resources"},
}

// sense makes sense data that this target returns, with a name for its additional sense code. No
// other code of this package makes any (TestSenseNames).
func sense(key SenseKey, asc, ascq uint8, name string) Sense {
	returned = append(returned, namedSense{key, asc, ascq, name})
	return Sense{Key: key, ASC: asc, ASCQ: ascq}
}

// additional returns the name of an additional sense code.
func additional(asc, ascq uint8) string {
	for _, list := range [][]namedSense{returned, foreign} {
		for _, n := range list {
			if n.asc == asc && n.ascq == ascq {
				return n.name
			}
		}
	}
	return fmt.Sprintf("additional sense %02xh/%02xh", asc, ascq)
}

// The sense data that this target returns.
var (
	BecomingReady             = sense(NotReady, 0x04, 0x02, "initializing command required")
	SanitizeInProgress        = sense(NotReady, 0x04, 0x1b, "sanitize in progress")
	WriteError                = sense(MediumError, 0x0c, 0x00, "write error")
	GuardCheckFailed          = sense(AbortedCommand, 0x10, 0x01, "guard check failed")
	ReferenceTagCheckFailed   = sense(AbortedCommand, 0x10, 0x03, "reference tag check failed")
	InvalidFieldInIU          = sense(IllegalRequest, 0x0e, 0x03, "invalid field in command information unit")
	CopyAborted               = sense(CopyAbortedKey, 0x00, 0x00, "no additional sense")
	CopyThirdParty            = sense(CopyAbortedKey, 0x0d, 0x01, "third party device failure")
	CopyUnreachable           = sense(CopyAbortedKey, 0x0d, 0x02, "copy target device not reachable")
	UnrecoveredReadError      = sense(MediumError, 0x11, 0x00, "unrecovered read error")
	ParameterListLength       = sense(IllegalRequest, 0x1a, 0x00, "parameter list length error")
	MiscompareInVerify        = sense(Miscompare, 0x1d, 0x00, "miscompare during verify")
	InvalidOpcode             = sense(IllegalRequest, 0x20, 0x00, "invalid command operation code")
	LBAOutOfRange             = sense(IllegalRequest, 0x21, 0x00, "logical block address out of range")
	InvalidFieldInCDB         = sense(IllegalRequest, 0x24, 0x00, "invalid field in CDB")
	LUNNotSupported           = sense(IllegalRequest, 0x25, 0x00, "logical unit not supported")
	InvalidFieldInParam       = sense(IllegalRequest, 0x26, 0x00, "invalid field in parameter list")
	InvalidRelease            = sense(IllegalRequest, 0x26, 0x04, "invalid release of persistent reservation")
	UnsupportedCSCD           = sense(IllegalRequest, 0x26, 0x07, "unsupported CSCD descriptor type code")
	TooManyCSCDs              = sense(IllegalRequest, 0x26, 0x06, "too many CSCD descriptors")
	TooManySegments           = sense(IllegalRequest, 0x26, 0x08, "too many segment descriptors")
	UnsupportedSegment        = sense(IllegalRequest, 0x26, 0x09, "unsupported segment descriptor type code")
	CopyGranularity           = sense(CopyAbortedKey, 0x26, 0x0a, "unexpected inexact segment")
	InlineDataExceeded        = sense(IllegalRequest, 0x26, 0x0b, "inline data length exceeded")
	WriteProtected            = sense(DataProtect, 0x27, 0x00, "write protected")
	SoftwareProtected         = sense(DataProtect, 0x27, 0x02, "logical unit software write protected")
	SpaceAllocFailed          = sense(DataProtect, 0x27, 0x07, "space allocation failed")
	PowerOnOccurred           = sense(UnitAttention, 0x29, 0x01, "power on occurred")
	DeviceReset               = sense(UnitAttention, 0x29, 0x03, "bus device reset function occurred")
	NexusLoss                 = sense(UnitAttention, 0x29, 0x07, "I_T nexus loss occurred")
	ModeParamsChanged         = sense(UnitAttention, 0x2a, 0x01, "mode parameters changed")
	ReservationsPreempted     = sense(UnitAttention, 0x2a, 0x03, "reservations preempted")
	ReservationsReleased      = sense(UnitAttention, 0x2a, 0x04, "reservations released")
	RegistrationsPreempted    = sense(UnitAttention, 0x2a, 0x05, "registrations preempted")
	CapacityChanged           = sense(UnitAttention, 0x2a, 0x09, "capacity data has changed")
	CommandsCleared           = sense(UnitAttention, 0x2f, 0x00, "commands cleared by another initiator")
	SanitizeFailed            = sense(MediumError, 0x31, 0x03, "sanitize command failed")
	SavingNotSupported        = sense(IllegalRequest, 0x39, 0x00, "saving parameters not supported")
	LUNsChanged               = sense(UnitAttention, 0x3f, 0x0e, "reported LUNs data has changed")
	TargetFailure             = sense(HardwareError, 0x44, 0x00, "internal target failure")
	InsufficientRegistrations = sense(IllegalRequest, 0x55, 0x04, "insufficient registration resources")
)

// Error describes the sense data: "ILLEGAL REQUEST, invalid field in CDB (byte 2, bit 7)".
func (s Sense) Error() string {
	text := s.Key.Name() + ", " + additional(s.ASC, s.ASCQ)
	if s.Deferred {
		text = "deferred error: " + text
	}
	if s.Specific[0]&0x80 != 0 && s.Key == IllegalRequest { // field pointer, SPC-5 4.5.2.4.2
		text += fmt.Sprintf(" (byte %d", binary.BigEndian.Uint16(s.Specific[1:]))
		if s.Specific[0]&0x08 != 0 {
			text += fmt.Sprintf(", bit %d", s.Specific[0]&7)
		}
		text += ")"
	}
	if s.InfoValid {
		text += fmt.Sprintf(" (information %d)", s.Info)
	}
	return text
}

// Is makes errors.Is compare key and additional sense code alone.
func (s Sense) Is(err error) bool {
	o, ok := err.(Sense)
	return ok && s.Key == o.Key && s.ASC == o.ASC && s.ASCQ == o.ASCQ
}

// ofReset reports whether s is the unit attention condition of a reset or of the loss of an I_T
// nexus.
func (s Sense) ofReset() bool { return s.Key == UnitAttention && s.ASC == 0x29 }

// invalidCDB is INVALID FIELD IN CDB with a field pointer to bit (7 to 0) of
// byte at in the CDB (SPC-5 4.5.2.4.2).
func invalidCDB(at, bit int) Sense {
	s := InvalidFieldInCDB
	s.Specific = [3]byte{0x80 | 0x40 | 0x08 | byte(bit), byte(at >> 8), byte(at)}
	return s
}

// invalidParam is INVALID FIELD IN PARAMETER LIST with a pointer to byte at.
func invalidParam(at int) Sense {
	s := InvalidFieldInParam
	s.Specific = [3]byte{0x80, byte(at >> 8), byte(at)}
	return s
}

// Fixed returns s as fixed format sense data, 18 bytes (SPC-5 4.5.3). An
// INFORMATION field that does not fit 32 bits is left out, with VALID clear.
func (s Sense) Fixed() []byte {
	b := make([]byte, 18)
	b[0] = 0x70
	if s.Deferred {
		b[0] = 0x71
	}
	b[2] = byte(s.Key)
	if s.InfoValid && s.Info <= math.MaxUint32 {
		b[0] |= 0x80
		binary.BigEndian.PutUint32(b[3:], uint32(s.Info))
	}
	b[7] = 18 - 8
	b[12], b[13] = s.ASC, s.ASCQ
	copy(b[15:], s.Specific[:])
	return b
}

// Descriptor returns s as descriptor format sense data (SPC-5 4.5.2).
func (s Sense) Descriptor() []byte {
	b := []byte{0x72, byte(s.Key), s.ASC, s.ASCQ, 0, 0, 0, 0}
	if s.InfoValid {
		b = append(b, 0x00, 0x0a, 0x80, 0x00)
		b = binary.BigEndian.AppendUint64(b, s.Info)
	}
	if s.Specific[0]&0x80 != 0 {
		b = append(b, 0x02, 0x06, 0, 0, s.Specific[0], s.Specific[1], s.Specific[2], 0)
	}
	if s.Deferred {
		b[0] = 0x73
	}
	b[7] = byte(len(b) - 8)
	return b
}

// encode picks the format: descriptor when D_SENSE of the control mode page is
// set (SPC-5 7.5.10).
func (s Sense) encode(descriptor bool) []byte {
	if descriptor {
		return s.Descriptor()
	}
	return s.Fixed()
}

// mediumError is a failure of the backend, with the failed operation.
type mediumError struct {
	op  string // "read", "write", "flush", …
	off int64
	err error
}

func (e *mediumError) Error() string {
	return fmt.Sprintf("%s at byte %d: %v", e.op, e.off, e.err)
}

func (e *mediumError) Unwrap() error { return e.err }

// senseOf turns any error into sense data. It is the only place that does; an unknown error is a
// failure too.
func senseOf(err error) Sense {
	var s Sense
	if errors.As(err, &s) {
		return s
	}
	var m *mediumError
	switch {
	case !errors.As(err, &m):
		return TargetFailure
	case m.op == "read":
		return UnrecoveredReadError
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return SpaceAllocFailed // SBC-4 4.7.3.6: thin provisioning ran out of space
	case errors.Is(err, syscall.EROFS):
		return WriteProtected
	}
	return WriteError
}
