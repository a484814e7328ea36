package kvmapi

import (
	"encoding/binary"
	"fmt"

	"github.com/bobuhiro11/gokvm/kvm"
)

// Reasons for which Run returns (linux/kvm.h), and one of this package.
const (
	ExitIO            = uint32(kvm.EXITIO)
	ExitDebug         = uint32(kvm.EXITDEBUG)
	ExitHLT           = uint32(kvm.EXITHLT)
	ExitMMIO          = uint32(kvm.EXITMMIO)
	ExitShutdown      = uint32(kvm.EXITSHUTDOWN)
	ExitFailEntry     = uint32(kvm.EXITFAILENTRY)
	ExitInternalError = uint32(kvm.EXITINTERNALERROR)
	ExitSystemEvent   = uint32(24)
	// ExitInterrupted is KVM_RUN's EINTR: Kick was called, or another signal came.
	ExitInterrupted = ^uint32(0)
)

// Suberrors of ExitInternalError.
const (
	InternalErrorEmulation            = 1
	InternalErrorSimulEx              = 2
	InternalErrorDeliveryEv           = 3
	InternalErrorUnexpectedExitReason = 4
)

// Exit describes why the guest stopped. The valid fields depend on Reason.
type Exit struct {
	Reason uint32

	// ExitIO and ExitMMIO. Data is inside struct kvm_run; the answer to a read is stored there. An
	// ExitIO has Count items of Size bytes, all for the same port (REP INS and OUTS); an ExitMMIO
	// has one of Size bytes.
	Addr  uint64
	Write bool
	Size  int
	Count int
	Data  []byte

	// ExitInternalError: the suberror and its data. ExitFailEntry: the hardware's
	// reason in Info[0]. ExitSystemEvent: the type.
	Suberror uint32
	Info     []uint64

	// ExitDebug: the vector (1 is #DB, 3 is #BP), the linear address of the instruction, and DR6.
	Exception uint32
	PC, DR6   uint64
}

// Item returns the i-th item of an ExitIO's data.
func (e *Exit) Item(i int) []byte { return e.Data[i*e.Size : (i+1)*e.Size] }

// Offsets in struct kvm_run's exit union.
const (
	runUnion     = 32
	ioDirection  = runUnion + 0
	ioSize       = runUnion + 1
	ioPort       = runUnion + 2
	ioCount      = runUnion + 4
	ioDataOffset = runUnion + 8
	mmioAddr     = runUnion + 0
	mmioData     = runUnion + 8
	mmioLen      = runUnion + 16
	mmioIsWrite  = runUnion + 20
	suberror     = runUnion + 0
	ndata        = runUnion + 4
	errorData    = runUnion + 8
	hwReason     = runUnion + 0
	debugVector  = runUnion + 0
	debugPC      = runUnion + 8
	debugDR6     = runUnion + 16
)

// exit reads struct kvm_run after KVM_RUN returned.
func (c *VCPU) exit() Exit {
	p, le := c.page, binary.LittleEndian
	e := Exit{Reason: c.run.ExitReason}
	switch e.Reason {
	case ExitIO:
		c.exits.IO++
		e.Write = p[ioDirection] == kvm.EXITIOOUT
		e.Size = int(p[ioSize])
		e.Addr = uint64(le.Uint16(p[ioPort:]))
		e.Count = int(le.Uint32(p[ioCount:]))
		off := le.Uint64(p[ioDataOffset:])
		e.Data = p[off : off+uint64(e.Size*e.Count)]
	case ExitMMIO:
		c.exits.MMIO++
		e.Addr = le.Uint64(p[mmioAddr:])
		e.Write = p[mmioIsWrite] != 0
		e.Size = int(min(le.Uint32(p[mmioLen:]), 8))
		e.Count = 1
		e.Data = p[mmioData : mmioData+e.Size]
	case ExitDebug:
		e.Exception = le.Uint32(p[debugVector:])
		e.PC, e.DR6 = le.Uint64(p[debugPC:]), le.Uint64(p[debugDR6:])
	case ExitInternalError:
		e.Suberror = le.Uint32(p[suberror:])
		for i := range int(min(le.Uint32(p[ndata:]), 16)) {
			e.Info = append(e.Info, le.Uint64(p[errorData+8*i:]))
		}
	case ExitFailEntry:
		e.Info = []uint64{le.Uint64(p[hwReason:])}
	case ExitSystemEvent:
		e.Suberror = le.Uint32(p[suberror:])
	}
	return e
}

// EmulationBytes returns the instruction that KVM could not emulate, if this KVM reports it
// (KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES): Info[0] has the flags, Info[1] the length
// and then the bytes.
func (e *Exit) EmulationBytes() []byte {
	if e.Reason != ExitInternalError || e.Suberror != InternalErrorEmulation || len(e.Info) < 3 || e.Info[0]&1 == 0 {
		return nil
	}
	var b [16]byte
	binary.LittleEndian.PutUint64(b[:8], e.Info[1])
	binary.LittleEndian.PutUint64(b[8:], e.Info[2])
	n := min(int(b[0]), 15)
	return b[1 : 1+n]
}

// String names the exit for a crash report.
func (e *Exit) String() string {
	switch e.Reason {
	case ExitInterrupted:
		return "interrupted"
	case ExitInternalError:
		s := fmt.Sprintf("KVM_EXIT_INTERNAL_ERROR, suberror %d", e.Suberror)
		if e.Suberror == InternalErrorEmulation {
			s += " (instruction emulation failed)"
		}
		return s
	case ExitFailEntry:
		return fmt.Sprintf("KVM_EXIT_FAIL_ENTRY, hardware reason %#x", e.Info[0])
	case ExitShutdown:
		return "KVM_EXIT_SHUTDOWN (triple fault)"
	case ExitSystemEvent:
		return fmt.Sprintf("KVM_EXIT_SYSTEM_EVENT, type %d", e.Suberror)
	}
	return fmt.Sprintf("KVM exit %d (%v)", e.Reason, kvm.ExitType(e.Reason))
}
