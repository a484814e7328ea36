// Package control lets other processes of the same user inspect and change a running machine: HTTP
// with JSON bodies over the machine's own unix socket. A Server answers for a Machine; a Client
// sends requests.
//
// docs/control.md specifies the protocol.
package control

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"time"

	"gvm/inspect"
	"gvm/text"
)

// Info describes a machine.
type Info struct {
	Name   string    `json:"name"`
	PID    int       `json:"pid"`
	GVM    string    `json:"gvm"`    // version
	Kernel text.Name `json:"kernel"` // path of the kernel, "" for the embedded guest
	CPUs   int       `json:"cpus"`
	Memory uint64    `json:"memory"` // bytes
	State  State     `json:"state"`
}

// State is the state of a machine.
type State string

const (
	Running State = "running"
	Paused  State = "paused"
)

// Disk is a logical unit of the guest.
type Disk struct {
	LUN       int       `json:"lun"`
	Path      text.Name `json:"path,omitempty"`    // absolute; "" for memory and for kernel targets
	Storage   string    `json:"storage,omitempty"` // of a disk without a path: mem, null or temp
	WWN       string    `json:"wwn,omitempty"`     // of a kernel target
	Serial    text.Name `json:"serial,omitempty"`
	Size      int64     `json:"size"` // bytes
	BlockSize int       `json:"block_size"`
	ReadOnly  bool      `json:"readonly"`
	Cache     string    `json:"cache"`
	Backend   string    `json:"backend"`
	Change    string    `json:"change,omitempty"` // in progress: Adding, Removing or Resizing

	// Options has the options of --disk that are not at their defaults, as they were given. An option
	// without a value has its name as value.
	Options map[string]text.Name `json:"options,omitempty"`
}

// Changes of a disk in progress.
const (
	Adding   = "adding"
	Removing = "removing"
	Resizing = "resizing"
)

// AddDisk is the body of POST /v1/disks.
type AddDisk struct {
	// Disk is the disk in the syntax of gvm run --disk.
	Disk text.Name `json:"disk"`
	// Dir is the base of a relative path in Disk. Without it such a path is refused: the machine
	// has its own working directory.
	Dir text.Name `json:"dir,omitempty"`
}

// ResizeDisk is the body of POST /v1/disks/ID/resize.
type ResizeDisk struct {
	Size   int64 `json:"size,omitempty"`   // in bytes; 0 takes the image's present size
	Shrink bool  `json:"shrink,omitempty"` // the disk may become smaller
}

// Change is the answer to a change of the disks.
type Change struct {
	Disk  Disk  `json:"disk"`  // its state now, or before it was removed
	Guest Guest `json:"guest"` // whether the guest was told
}

// Guest says whether the guest's driver was told of a change.
type Guest string

const (
	Told      Guest = "told"      // the driver has the event
	Missed    Guest = "missed"    // it had no buffer for the event; the next event reports lost ones
	Deaf      Guest = "deaf"      // it has not negotiated such events
	Absent    Guest = "absent"    // no driver is active; one that starts scans the disks
	Unchanged Guest = "unchanged" // there was no change to report
)

// MaxGrace is the longest grace time of a Stop.
const MaxGrace = 24 * time.Hour

// Stop is the body of POST /v1/machine/stop.
type Stop struct {
	// GraceMS is how many milliseconds the guest has to power itself off after its power button has
	// been pressed; 0 stops the machine at once.
	GraceMS int64 `json:"grace_ms,omitempty"`
}

// Stopped is the answer to a Stop.
type Stopped struct {
	Asked bool `json:"asked"` // the guest has its grace time; else the machine ends now
	// Outlived says that the machine's process runs on after it, with other machines.
	Outlived bool `json:"outlived,omitempty"`
}

// TerminalSize is the body of POST /v1/hvc/size.
type TerminalSize struct {
	Columns uint16 `json:"columns"`
	Rows    uint16 `json:"rows"`
}

// ResizeBalloon is the body of POST /v1/balloon.
type ResizeBalloon struct {
	Size uint64 `json:"size"` // bytes
}

// Balloon is the guest's balloon: memory that it has given back to the host.
type Balloon struct {
	Size   uint64 `json:"size"`   // bytes that were asked for
	Actual uint64 `json:"actual"` // bytes that the guest has in it
	// Stats are the guest's statistics, by the names of virtio 1.3, 5.5.6.4.
	Stats inspect.Node `json:"stats"`
	Guest Guest        `json:"guest"` // Told, or Absent: no driver is active
}

// SysRq is the body of POST /v1/machine/sysrq.
type SysRq struct {
	Key string `json:"key"` // one character
}

// Machine is the machine behind a Server. Its methods are called from several goroutines. An *Error
// goes to the client with its status, any other error as a failure of the host. A method returns
// when its context ends, because the client has gone or the server closes.
type Machine interface {
	Info() Info
	// Pause stops the CPUs, and Resume resumes them.
	Pause(context.Context) error
	Resume() error
	// Stop starts the machine's end. It does not wait for it.
	Stop(Stop) (Stopped, error)
	// Reset starts the guest again. It does not wait for that.
	Reset() error
	// NMI raises a non-maskable interrupt on the CPUs.
	NMI(context.Context) error
	// Core pauses the machine and returns an ELF core of it, by PutCore and EndCore. The machine runs
	// on after it, or when it is closed.
	Core(context.Context) (io.ReadCloser, error)
	// Console returns a new end of the console, whose Read ends with the machine, and Break sends a
	// break on it.
	Console() io.ReadWriteCloser
	Break()
	// HVC returns a new end of the virtio console, as Console does, and ResizeHVC tells the guest the
	// size of its terminal.
	HVC() (io.ReadWriteCloser, error)
	ResizeHVC(TerminalSize) error
	// Agent connects to the guest's agent, for a session.
	Agent(context.Context) (io.ReadWriteCloser, error)
	// SysRq sends a break and a printable ASCII character to the console.
	SysRq(ctx context.Context, key byte) error
	Disks() []Disk
	AddDisk(context.Context, AddDisk) (Change, error)
	// RemoveDisk and ResizeDisk take a LUN, a serial number or an absolute path.
	RemoveDisk(ctx context.Context, id string) (Change, error)
	ResizeDisk(ctx context.Context, id string, r ResizeDisk) (Change, error)
	// Balloon describes the balloon, and ResizeBalloon asks the guest for another size.
	Balloon(context.Context) (Balloon, error)
	ResizeBalloon(ResizeBalloon) (Balloon, error)
	// Inspect returns the machine's state at a path, "" for all. An unknown path is an
	// *inspect.PathError.
	Inspect(ctx context.Context, path string) (inspect.Node, error)
}

// Error is the error of a request that was refused or failed.
type Error struct {
	Status int // HTTP status
	Text   string
}

func (e *Error) Error() string { return e.Text }

// Errorf returns an *Error.
func Errorf(status int, format string, a ...any) error {
	return &Error{status, fmt.Sprintf(format, a...)}
}

// ErrEnded refuses requests after the end of the machine.
var ErrEnded = Errorf(http.StatusServiceUnavailable, "the machine has ended")
