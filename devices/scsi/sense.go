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

// Sense is sense data (SPC-5 4.5) before it has a format. It is an error:
// a handler returns one to end its command with CHECK CONDITION.
type Sense struct {
	Key       SenseKey
	ASC, ASCQ uint8
	// Info is the INFORMATION field, valid when InfoValid is set.
	Info      uint64
	InfoValid bool
	// Specific is the SENSE KEY SPECIFIC field; its SKSV bit (80h of the first
	// byte) says whether it is valid.
	Specific [3]byte
	// Deferred says that the error is of a command that was answered before
	// (SPC-5 4.5.7).
	Deferred bool
}

// The sense data that this target returns.
var (
	BecomingReady             = Sense{Key: NotReady, ASC: 0x04, ASCQ: 0x02} // initializing command required
	SanitizeInProgress        = Sense{Key: NotReady, ASC: 0x04, ASCQ: 0x1b}
	WriteError                = Sense{Key: MediumError, ASC: 0x0c, ASCQ: 0x00}
	GuardCheckFailed          = Sense{Key: AbortedCommand, ASC: 0x10, ASCQ: 0x01} // logical block guard check failed
	ReferenceTagCheckFailed   = Sense{Key: AbortedCommand, ASC: 0x10, ASCQ: 0x03} // logical block reference tag check failed
	InvalidFieldInIU          = Sense{Key: IllegalRequest, ASC: 0x0e, ASCQ: 0x03}
	CopyAborted               = Sense{Key: CopyAbortedKey, ASC: 0x00, ASCQ: 0x00}
	CopyThirdParty            = Sense{Key: CopyAbortedKey, ASC: 0x0d, ASCQ: 0x01} // third party device failure
	CopyUnreachable           = Sense{Key: CopyAbortedKey, ASC: 0x0d, ASCQ: 0x02} // copy target device not reachable
	UnrecoveredReadError      = Sense{Key: MediumError, ASC: 0x11, ASCQ: 0x00}
	ParameterListLength       = Sense{Key: IllegalRequest, ASC: 0x1a, ASCQ: 0x00}
	MiscompareInVerify        = Sense{Key: Miscompare, ASC: 0x1d, ASCQ: 0x00}
	InvalidOpcode             = Sense{Key: IllegalRequest, ASC: 0x20, ASCQ: 0x00}
	LBAOutOfRange             = Sense{Key: IllegalRequest, ASC: 0x21, ASCQ: 0x00}
	InvalidFieldInCDB         = Sense{Key: IllegalRequest, ASC: 0x24, ASCQ: 0x00}
	LUNNotSupported           = Sense{Key: IllegalRequest, ASC: 0x25, ASCQ: 0x00}
	InvalidFieldInParam       = Sense{Key: IllegalRequest, ASC: 0x26, ASCQ: 0x00}
	InvalidRelease            = Sense{Key: IllegalRequest, ASC: 0x26, ASCQ: 0x04} // invalid release of persistent reservation
	UnsupportedCSCD           = Sense{Key: IllegalRequest, ASC: 0x26, ASCQ: 0x07}
	TooManyCSCDs              = Sense{Key: IllegalRequest, ASC: 0x26, ASCQ: 0x06}
	TooManySegments           = Sense{Key: IllegalRequest, ASC: 0x26, ASCQ: 0x08}
	UnsupportedSegment        = Sense{Key: IllegalRequest, ASC: 0x26, ASCQ: 0x09}
	CopyGranularity           = Sense{Key: CopyAbortedKey, ASC: 0x26, ASCQ: 0x0a} // unexpected inexact segment
	InlineDataExceeded        = Sense{Key: IllegalRequest, ASC: 0x26, ASCQ: 0x0b}
	WriteProtected            = Sense{Key: DataProtect, ASC: 0x27, ASCQ: 0x00}
	SoftwareProtected         = Sense{Key: DataProtect, ASC: 0x27, ASCQ: 0x02}
	SpaceAllocFailed          = Sense{Key: DataProtect, ASC: 0x27, ASCQ: 0x07}
	PowerOnOccurred           = Sense{Key: UnitAttention, ASC: 0x29, ASCQ: 0x01}
	DeviceReset               = Sense{Key: UnitAttention, ASC: 0x29, ASCQ: 0x03}
	NexusLoss                 = Sense{Key: UnitAttention, ASC: 0x29, ASCQ: 0x07}
	ModeParamsChanged         = Sense{Key: UnitAttention, ASC: 0x2a, ASCQ: 0x01}
	ReservationsPreempted     = Sense{Key: UnitAttention, ASC: 0x2a, ASCQ: 0x03}
	ReservationsReleased      = Sense{Key: UnitAttention, ASC: 0x2a, ASCQ: 0x04}
	RegistrationsPreempted    = Sense{Key: UnitAttention, ASC: 0x2a, ASCQ: 0x05}
	CapacityChanged           = Sense{Key: UnitAttention, ASC: 0x2a, ASCQ: 0x09}
	CommandsCleared           = Sense{Key: UnitAttention, ASC: 0x2f, ASCQ: 0x00}
	SanitizeFailed            = Sense{Key: MediumError, ASC: 0x31, ASCQ: 0x03}
	SavingNotSupported        = Sense{Key: IllegalRequest, ASC: 0x39, ASCQ: 0x00}
	LUNsChanged               = Sense{Key: UnitAttention, ASC: 0x3f, ASCQ: 0x0e}
	TargetFailure             = Sense{Key: HardwareError, ASC: 0x44, ASCQ: 0x00}
	InsufficientRegistrations = Sense{Key: IllegalRequest, ASC: 0x55, ASCQ: 0x04} // insufficient registration resources
)

func (s Sense) Error() string {
	return fmt.Sprintf("sense key %xh, additional sense %02xh/%02xh", uint8(s.Key), s.ASC, s.ASCQ)
}

// Is makes errors.Is compare key and additional sense code alone.
func (s Sense) Is(err error) bool {
	o, ok := err.(Sense)
	return ok && s.Key == o.Key && s.ASC == o.ASC && s.ASCQ == o.ASCQ
}

// ofReset says whether s is a unit attention condition that tells of a reset or
// of the loss of an I_T nexus.
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

// A mediumError is a failure of the backend, with what was asked of it.
type mediumError struct {
	op  string // "read", "write", "flush", …
	off int64
	err error
}

func (e *mediumError) Error() string {
	return fmt.Sprintf("%s at byte %d: %v", e.op, e.off, e.err)
}

func (e *mediumError) Unwrap() error { return e.err }

// senseOf turns any error into sense data. It is the only place that does, and
// what it does not know is a failure too.
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
