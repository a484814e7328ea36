// Package control lets other processes of the same user look at a running
// machine and change it: HTTP with JSON bodies over a unix socket of the
// machine's own. A Server answers for a Machine; a Client asks.
//
// docs/control.md has the protocol.
package control

import (
	"context"
	"fmt"
	"net/http"
	"time"
)

// Info is what a machine says of itself.
type Info struct {
	Name   string `json:"name"`
	PID    int    `json:"pid"`
	GVM    string `json:"gvm"`    // version
	Kernel Text   `json:"kernel"` // path of the kernel, "" for the embedded guest
	CPUs   int    `json:"cpus"`
	Memory uint64 `json:"memory"` // bytes
	State  State  `json:"state"`
}

// State is what a machine does.
type State string

// States of a machine.
const (
	Running State = "running"
	Paused  State = "paused"
)

// Disk is a logical unit that the guest has.
type Disk struct {
	LUN       int    `json:"lun"`
	Path      Text   `json:"path,omitempty"`    // absolute; "" for memory and for targets of the kernel's
	Storage   string `json:"storage,omitempty"` // of a disk without a path: mem or null
	WWN       string `json:"wwn,omitempty"`     // of a target of the kernel's
	Serial    Text   `json:"serial,omitempty"`
	Size      int64  `json:"size"` // bytes
	BlockSize int    `json:"block_size"`
	ReadOnly  bool   `json:"readonly"`
	Cache     string `json:"cache"`
	Backend   string `json:"backend"`
	Change    string `json:"change,omitempty"` // under way: Adding, Removing or Resizing
}

// Changes of a disk that are under way.
const (
	Adding   = "adding"
	Removing = "removing"
	Resizing = "resizing"
)

// AddDisk is the body of POST /v1/disks.
type AddDisk struct {
	// Disk is the disk as gvm run --disk takes it.
	Disk Text `json:"disk"`
	// Dir is what a relative path in Disk starts from. Without it such a path
	// is refused: the machine has a working directory of its own.
	Dir Text `json:"dir,omitempty"`
}

// ResizeDisk is the body of POST /v1/disks/ID/resize.
type ResizeDisk struct {
	Size   int64 `json:"size,omitempty"`   // in bytes; 0 takes the size that the image has by now
	Shrink bool  `json:"shrink,omitempty"` // it may become smaller
}

// Change is the answer to a change of the disks.
type Change struct {
	Disk  Disk  `json:"disk"`  // as it is, or was
	Guest Guest `json:"guest"` // whether the guest knows
}

// Guest is what the guest's driver has heard of a change.
type Guest string

// What the guest has heard.
const (
	Told      Guest = "told"      // the driver has the event
	Missed    Guest = "missed"    // it had no buffer for it; the next event says that some were lost
	Deaf      Guest = "deaf"      // it has not negotiated such events
	Absent    Guest = "absent"    // no driver is active; one that starts looks by itself
	Unchanged Guest = "unchanged" // there was nothing to tell
)

// MaxGrace is the longest grace time of a Stop.
const MaxGrace = 24 * time.Hour

// Stop is the body of POST /v1/machine/stop.
type Stop struct {
	// GraceMS is how many milliseconds the guest has to power itself off, after its power
	// button has been pressed; 0 stops the machine at once.
	GraceMS int64 `json:"grace_ms,omitempty"`
}

// Stopped is the answer to a Stop.
type Stopped struct {
	Asked bool `json:"asked"` // the guest has its grace time; else the machine ends now
}

// Machine is what a Server needs of a machine. Its methods are called from
// several goroutines. An error that is an *Error goes to the client with its
// status, any other as a failure of the host. When the context ends, because the client has gone or the
// server closes, a method returns, whatever it waits for.
type Machine interface {
	Info() Info
	// Pause stops the CPUs, and Resume lets them go on.
	Pause(context.Context) error
	Resume() error
	// Stop has the machine end. It does not wait for that.
	Stop(Stop) (Stopped, error)
	Disks() []Disk
	AddDisk(context.Context, AddDisk) (Change, error)
	// RemoveDisk and ResizeDisk take a LUN, a serial number or an absolute path.
	RemoveDisk(ctx context.Context, id string) (Change, error)
	ResizeDisk(ctx context.Context, id string, r ResizeDisk) (Change, error)
}

// Error is a request that was refused or failed.
type Error struct {
	Status int // of HTTP
	Text   string
}

func (e *Error) Error() string { return e.Text }

// Errorf returns an *Error.
func Errorf(status int, format string, a ...any) error {
	return &Error{status, fmt.Sprintf(format, a...)}
}

// ErrEnded refuses what comes after the end of the machine.
var ErrEnded = Errorf(http.StatusServiceUnavailable, "the machine has ended")
