package scsi

import "time"

// LUN is the eight-byte logical unit number of SAM-5 4.7 as a big-endian
// number: 0 for LUN 0, 0x0005000000000000 for LUN 5 in peripheral device
// addressing, 0x4101000000000000 for LUN 257 in flat space addressing.
type LUN uint64

// TaskAttr is a task attribute (SAM-5 8.6).
type TaskAttr uint8

// Task attributes, with the codes that virtio-scsi uses (virtio 1.3, 5.6.6.1).
const (
	Simple TaskAttr = iota
	Ordered
	HeadOfQueue
	ACA
)

// Command is one SCSI command. The initiator's side fills it in and hands it to Target.Submit; Done
// is called exactly once, from any goroutine, inline or later. CDB is the target's own copy and
// does not change while the command runs. The bytes of Out and In are guest memory and may change
// at any time: the target copies parameter data before it reads it.
type Command struct {
	LUN  LUN
	CDB  []byte
	Attr TaskAttr
	Tag  uint64
	// Nexus identifies the initiator: the transport's number for the I_T nexus that the command
	// came through. A transport with a single nexus leaves it 0.
	Nexus NexusID
	Out   [][]byte // data-out buffer, in order, scattered as the initiator sent it
	In    [][]byte // data-in buffer, likewise
	// The protection information of a unit that has it, TupleSize bytes for each block, never
	// between the blocks. If a command asks for it and has no such buffer, the unit acts as a host
	// bus adapter: it generates the information, or checks and drops it.
	ProtectionOut, ProtectionIn [][]byte
	// Taken is when the transport took the command from its initiator, by inspect.Clock; 0: unknown.
	Taken time.Duration
	Done  func(Result)
}

// NexusID is the transport's number for an I_T nexus (SAM-5 4.8).
type NexusID uint32

// Abort is the kind of task management function that ended a command.
type Abort uint8

// Ways that a command ends without a status of its own.
const (
	NotAborted     Abort = iota
	AbortedByTask        // ABORT TASK, ABORT TASK SET, CLEAR TASK SET
	AbortedByReset       // LOGICAL UNIT RESET, I_T NEXUS RESET, Detach
)

// Result is the outcome of a command.
type Result struct {
	Status   Status
	Sense    []byte // sense data, empty unless Status is CheckCondition
	Residual uint32 // bytes of the data buffers that were not transferred
	// ProtectionIn counts the bytes written to the buffer of that name, from its beginning.
	ProtectionIn uint32
	// NoLUN reports that the LUN of the command has no logical unit, for a transport that answers
	// that itself. Status and Sense are set all the same, as SPC-5 6.6.1 and SAM-5 4.7 say for an
	// incorrect logical unit. It stays false for INQUIRY, REPORT LUNS and REQUEST SENSE to LUN 0 of
	// a target that has units elsewhere, because SPC-5 requires an answer to them.
	NoLUN bool
	// Overrun reports that the buffers were too small: the command had more data to transfer than
	// In or Out can hold. Data-in is cut short; a command with too little data-out ends with CHECK
	// CONDITION and writes nothing.
	Overrun bool
	// Abort reports that a task management function ended the command. The initiator gets no status
	// then; Status is TaskAborted for transports without an answer of their own.
	Abort Abort
}
