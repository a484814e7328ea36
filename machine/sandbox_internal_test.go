package machine

import (
	"testing"

	"gvm/devices/scsi/lio"
	"gvm/machine/disk"
	"gvm/sandbox"
)

// TestPolicyOfVhost: with a disk that the kernel serves, gvm can take down the kernel's target and make
// nothing there: a backstore could be any block device of the host.
func TestPolicyOfVhost(t *testing.T) {
	s := Spec{Sandbox: &Sandbox{}, Disks: []disk.Spec{{Path: "/a.img", Backend: disk.Vhost}}}
	const want = sandbox.Read | sandbox.Write | sandbox.Remove | sandbox.RemoveDir
	p := s.policy()
	if len(p.Paths) != 1 || p.Paths[0] != (sandbox.Path{Name: lio.DefaultRoot, Rights: want}) {
		t.Errorf("%+v", p.Paths)
	}
}
