package scsi

import "io"

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

// Command is one SCSI command. The initiator's side fills it in and hands it
// to Target.Submit; Done is called exactly once, from any goroutine, inline or
// later. CDB is the target's own copy: nobody changes it while the command
// runs. The bytes that Out and In point to may change under the target's hands
// (they are guest memory): what is interpreted is copied first.
type Command struct {
	LUN  LUN
	CDB  []byte
	Attr TaskAttr
	Tag  uint64
	// Nexus tells initiators apart: the transport's number for the I_T nexus
	// that the command came through. A transport with one leaves it 0.
	Nexus NexusID
	Out   [][]byte // data-out buffer, in order, as scattered as the initiator gave it
	In    [][]byte // data-in buffer, likewise
	// The protection information of a unit with any, TupleSize bytes for each block,
	// never between the blocks. For a command that asks for it and has no such buffer the
	// unit does what a host bus adapter would: it makes it, or checks and drops it.
	ProtectionOut, ProtectionIn [][]byte
	Done                        func(Result)
}

// NexusID is the transport's number for an I_T nexus (SAM-5 4.8).
type NexusID uint32

// Abort says which kind of task management function ended a command.
type Abort uint8

// Ways that a command ends without a status of its own.
const (
	NotAborted     Abort = iota
	AbortedByTask        // ABORT TASK, ABORT TASK SET, CLEAR TASK SET
	AbortedByReset       // LOGICAL UNIT RESET, I_T NEXUS RESET, Detach
)

// Result is how a command ended.
type Result struct {
	Status   Status
	Sense    []byte // sense data, empty unless Status is CheckCondition
	Residual uint32 // bytes of the data buffers that were not transferred
	// ProtectionIn is how many bytes of the buffer of that name were written, from its beginning.
	ProtectionIn uint32
	// NoLUN says that the LUN of the command has no logical unit, for a
	// transport that answers that itself. Status and Sense are set all the
	// same, as SPC-5 6.6.1 and SAM-5 4.7 say for an incorrect logical unit.
	// It stays false for INQUIRY, REPORT LUNS and REQUEST SENSE to LUN 0 of a
	// target that has units elsewhere, which SPC-5 wants answered.
	NoLUN bool
	// Overrun says that the buffers were too small: the command had more data
	// to transfer than In or Out can hold. Data-in is cut short; a command with
	// too little data-out ends with CHECK CONDITION and writes nothing.
	Overrun bool
	// Abort says that a task management function ended the command. There is
	// no status for the initiator then; Status is TaskAborted for transports
	// without an answer of their own.
	Abort Abort
}

// Backend is storage as a logical unit needs it. ReadAt and WriteAt follow
// io.ReaderAt and io.WriterAt, may be called at the same time from several
// goroutines, and offsets and lengths are multiples of the logical block size
// inside Size. Flush returns once everything written before it was called is
// on stable storage. A Backend may have more abilities: see Vectored, Discarder,
// Zeroer and Syncer.
type Backend interface {
	io.ReaderAt
	io.WriterAt
	Size() int64 // bytes
	Flush() error
}
