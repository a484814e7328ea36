// Package gdbstub serves debuggers: it speaks the stub's side of GDB's Remote Serial Protocol
// (appendix E of "Debugging with GDB") for a Target, over any stream. It knows no processor and no
// virtual machine. A client is untrusted: its packets are checked, and bounded in size.
package gdbstub

import "errors"

// Target is a machine with several CPUs, which a debugger sees as threads 1 to Threads. It is
// stopped or running as a whole. Serve alone calls it, from one goroutine.
type Target interface {
	// Attach stops the target for a client, and returns when it has stopped.
	Attach() (Stop, error)
	// Detach removes all points and lets all threads run, if the target has not ended. It is called
	// once after Attach.
	Detach()
	// Kill ends the target, now or soon.
	Kill()
	// Ended returns a channel that is closed when the target has ended.
	Ended() <-chan struct{}

	// Description is the target description (appendix G), which names and numbers the registers.
	Description() string
	// RegisterSizes are the sizes in bytes of the registers, by number.
	RegisterSizes() []int
	Threads() int
	// Thread returns the name of a thread, and its state.
	Thread(thread int) (name, state string)

	// Registers returns all registers of a stopped thread, by number, without padding.
	Registers(thread int) ([]byte, error)
	SetRegisters(thread int, regs []byte) error
	// ReadMemory reads memory as a stopped thread sees it, and returns the number of bytes that it
	// could read.
	ReadMemory(thread int, addr uint64, p []byte) (int, error)
	WriteMemory(thread int, addr uint64, p []byte) error

	// Moved returns the address of the text of the program that a stopped thread runs, if it has moved
	// from that in its file: a kernel with KASLR.
	Moved(thread int) (text uint64, ok bool)

	// Insert and Remove change the points of the stopped target, for all threads. The thread
	// is the one whose memory is meant.
	Insert(thread int, p Point) error
	Remove(thread int, p Point) error
	// Resume lets threads go on: actions has one for each, thread 1 first.
	Resume(actions []Action) error
	// Interrupt stops a running target.
	Interrupt()
	// Stops delivers one Stop after each Resume, when all threads have stopped.
	Stops() <-chan Stop
}

// ErrUnsupported is the error of an Insert or Remove of a kind that the target does not have.
var ErrUnsupported = errors.New("not supported")

// Point is a breakpoint or a watchpoint.
type Point struct {
	Kind PointKind
	Addr uint64
	Len  uint64 // bytes of a watchpoint; of a breakpoint, its kind
}

// PointKind is the number of a Z packet.
type PointKind int

const (
	SoftwareBreakpoint PointKind = iota
	HardwareBreakpoint
	WriteWatchpoint
	ReadWatchpoint
	AccessWatchpoint
)

// Action is a thread's part in a Resume.
type Action struct {
	Kind       ActionKind
	Start, End uint64 // of StepRange: the thread steps until it has left [Start, End)
}

// ActionKind is a kind of Action.
type ActionKind int

const (
	Stay ActionKind = iota // stopped
	Continue
	Step // one instruction
	StepRange
)

// Signals of a Stop, by GDB's numbers.
const (
	SIGINT  = 2
	SIGTRAP = 5
)

// Stop tells why a target stopped.
type Stop struct {
	Signal int
	Thread int    // the thread that stopped it
	Point  *Point // the point that stopped it; nil: none
}
