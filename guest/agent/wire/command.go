package wire

import (
	"encoding/json"
	"fmt"
	"io"

	"gvm/text"
)

// CommandFile is the path of the command file in the guest's initramfs.
const CommandFile = "/gvm/command.json"

// maxCommand bounds the size of a command file. Linux bounds arguments and environment by 6 MiB,
// and a byte takes up to 6 in JSON.
const maxCommand = 64 << 20

// Command is the command file: a command, and how to run it. Names may hold any bytes.
type Command struct {
	Args []text.Name `json:"args"`          // the first is a path, or a name to find in PATH of Env
	Env  []text.Name `json:"env,omitempty"` // NAME=value
	Dir  text.Name   `json:"dir,omitempty"` // working directory; empty: /

	UID     uint32   `json:"uid"`
	GID     uint32   `json:"gid"`
	Groups  []uint32 `json:"groups,omitempty"`
	Rlimits []Rlimit `json:"rlimits,omitempty"`

	Terminal *Terminal   `json:"terminal,omitempty"` // nil: stdin, stdout and stderr are pipes
	Modules  []text.Name `json:"modules,omitempty"`  // paths of uncompressed modules, in the order to load
	Later    []text.Name `json:"later,omitempty"`    // modules to load if the agent does not reach the host by vsock
	Mounts   []Mount     `json:"mounts,omitempty"`   // after the modules, in this order
	Hostname string      `json:"hostname,omitempty"`

	Disks []DiskVariable `json:"disks,omitempty"` // set before the command starts, unless Env has them

	Copy *Copy `json:"copy,omitempty"` // in place of a program
}

// Copy copies files, in an archive of package archive: into the guest from stdin, or out of it to
// stdout. Its end has the status CopyRefused or CopyFailed and a reason on stderr, or 0.
type Copy struct {
	Path      text.Name `json:"path"`
	Base      text.Name `json:"base,omitempty"` // of the source, for one into the guest
	Into      bool      `json:"into,omitempty"`
	Recursive bool      `json:"recursive,omitempty"`
}

// Statuses of a Copy.
const (
	CopyRefused = 2 // the user can mend it
	CopyFailed  = 3
)

// DiskVariable is a variable of the command's environment that names disks: their device nodes,
// separated by spaces.
type DiskVariable struct {
	Name    string   `json:"name"`
	Serials []string `json:"serials"` // unit serial numbers
}

// Mount is a directory of the host that a virtio-fs device gives the guest.
type Mount struct {
	Tag      string    `json:"tag"`
	Dir      text.Name `json:"dir"` // in the guest
	ReadOnly bool      `json:"read_only,omitempty"`
	Root     bool      `json:"root,omitempty"` // the guest's root is an overlay in memory above it
}

// Rlimit is a resource limit of setrlimit(2); math.MaxUint64 is RLIM_INFINITY.
type Rlimit struct {
	Resource int    `json:"resource"`
	Soft     uint64 `json:"soft"`
	Hard     uint64 `json:"hard"`
}

// Terminal is the first size of the command's terminal.
type Terminal struct {
	Rows    uint16 `json:"rows"`
	Columns uint16 `json:"columns"`
}

// Encode returns the contents of the command file.
func (c *Command) Encode() ([]byte, error) { return json.Marshal(c) }

// ReadCommand reads a command file.
func ReadCommand(r io.Reader) (*Command, error) {
	d := json.NewDecoder(io.LimitReader(r, maxCommand))
	d.DisallowUnknownFields()
	c := &Command{}
	if err := d.Decode(c); err != nil {
		return nil, fmt.Errorf("read the command file: %w", err)
	}
	if len(c.Args) == 0 {
		return nil, fmt.Errorf("read the command file: it has no command")
	}
	return c, nil
}
