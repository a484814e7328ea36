package machine

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"gvm/control"
	"gvm/devices/scsi/lio"
	"gvm/guestmem"
	"gvm/inspect"
	"gvm/kvmapi/tracefs"
	"gvm/machine/disk"
	"gvm/panics"
	"gvm/sandbox"
)

// Sandbox is a sandbox that the whole program enters before the guest's first instruction: it is
// for a program that has one machine, and opens nothing else later.
type Sandbox struct {
	// Policy has the paths and uses of the caller. Start adds those of the machine.
	Policy sandbox.Policy
	// Entering is called before, when the machine is built; its error ends the machine. nil: no call.
	Entering func() error
	// Entered is called in the sandbox; nil: no call.
	Entered func(sandbox.Report)
}

// changes are the rights to a directory in which files are made, changed and removed.
const changes = sandbox.Read | sandbox.Write | sandbox.Make | sandbox.Remove

// policy returns the rights that the machine needs from its first instruction to its end.
func (s *Spec) policy() sandbox.Policy {
	p := s.Sandbox.Policy
	allow := func(name string, rights sandbox.Right) {
		p.Paths = append(p.Paths, sandbox.Path{Name: name, Rights: rights})
	}
	for _, d := range s.Disks {
		if d.Backend != disk.Process || d.Path == "" {
			p.Uses |= sandbox.Vhost
			// The broker makes the objects of added disks, of which one could be any block device, and takes
			// down the target.
			if s.Files == nil {
				allow(lio.DefaultRoot, changes&^sandbox.Make|sandbox.RemoveDir)
			}
			if s.Trace != "" {
				// The end stops and removes this process's instances, which there are by now. The right to
				// remove one is a right to remove others that are not in use.
				instances := filepath.Join(tracefs.DefaultRoot, "instances")
				allow(instances, sandbox.RemoveDir)
				for _, name := range lio.Traces() {
					allow(filepath.Join(instances, name), sandbox.Read|sandbox.Write)
				}
			}
		}
		if dir := besideDir(d); dir != "" && s.Files == nil {
			allow(dir, changes)
		}
	}
	for _, share := range s.Shares {
		p.Uses |= sandbox.Shares
		rights := changes | sandbox.RemoveDir
		if share.ReadOnly {
			rights = sandbox.Read
		}
		allow(share.Dir, rights)
	}
	if s.VhostVsock != nil {
		p.Uses |= sandbox.Vhost
	}
	for _, n := range s.Nets {
		if n.Tap != "" {
			p.Uses |= sandbox.Tap
			if n.Vhost != VhostOff {
				p.Uses |= sandbox.Vhost
			}
		}
	}
	return p
}

// besideDir returns the directory in which a disk's reservations and protection information are, ""
// if there are none.
func besideDir(d disk.Spec) string {
	if d.Backend == disk.Vhost || d.Storage != disk.Image || d.ReadOnly || d.Overlay != "" {
		return ""
	}
	if fi, err := os.Stat(d.Path); err != nil || !fi.Mode().IsRegular() {
		return ""
	}
	return filepath.Dir(disk.Absolute(d.Path))
}

// prepareSandbox returns the function that enters the sandbox, and begins with that beside what is
// left of the start: it does not wait, and everything is open. nil: there is no sandbox.
func (m *Machine) prepareSandbox(s *Spec) (seal func() error) {
	if s.Sandbox == nil || s.Sandbox.Policy.Mode == sandbox.Off {
		return nil
	}
	policy := s.policy()
	prepared := make(chan *sandbox.Prepared, 1)
	panics.Go(func() { prepared <- sandbox.Prepare(policy) })
	return func() error { return m.seal(s, <-prepared) }
}

// seal enters the sandbox.
func (m *Machine) seal(s *Spec, p *sandbox.Prepared) error {
	if err := guestmem.OpenPagemap(); err != nil {
		return err
	}
	if s.Kernel != nil {
		if path := s.Kernel.Cached(); path != "" { // a reset loads the kernel again
			p.Allow(sandbox.Path{Name: path, Rights: sandbox.Read})
		}
	}
	if s.Sandbox.Entering != nil {
		if err := s.Sandbox.Entering(); err != nil {
			return err
		}
	}
	r, err := p.Enter()
	if err != nil {
		return err
	}
	m.sealed.Store(&r)
	if s.Sandbox.Entered != nil {
		s.Sandbox.Entered(r)
	}
	return nil
}

// inspectSandbox shows the sandbox and the jail.
func (m *Machine) inspectSandbox(mode sandbox.Mode, jail []inspect.Node) inspect.Node {
	n := inspect.Group("sandbox")
	r := m.sealed.Load()
	if r == nil {
		mode, r = sandbox.Off, &sandbox.Report{}
	}
	for _, text := range [][2]string{{"mode", mode.String()}, {"capabilities", strings.Join(r.Capabilities, " ")},
		{"missing", strings.Join(r.Missing, "; ")}} {
		n.Nodes = append(n.Nodes, inspect.Text(text[0], text[1]))
	}
	n.Nodes = append(n.Nodes, inspect.Int("landlock", r.Landlock), inspect.Int("system_calls", r.Calls))
	if jail != nil {
		n.Nodes = append(n.Nodes, inspect.Group("jail", jail...))
	}
	return n
}

// canOpen refuses a disk that the sandbox keeps this process from opening.
func (m *Machine) canOpen(d disk.Spec) error {
	switch {
	case m.sealed.Load() == nil:
	case !m.brokered && (d.Storage == disk.Image || d.Storage == disk.Temporary):
		return control.Errorf(http.StatusConflict,
			"--disk %s: the sandbox is closed: start the machine with --sandbox=off to add disks", d.Name())
	}
	return nil
}
