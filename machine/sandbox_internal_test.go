package machine

import (
	"testing"

	"gvm/broker"
	"gvm/machine/disk"
	"gvm/sandbox"
)

// TestPolicyOfVhost: with a disk that the kernel serves and a broker, gvm has no rights in configfs.
func TestPolicyOfVhost(t *testing.T) {
	s := Spec{Sandbox: &Sandbox{}, Disks: []disk.Spec{{Path: "/a.img", Backend: disk.Vhost}}, Files: &broker.Client{}}
	if p := s.policy(); len(p.Paths) != 0 || p.Uses != sandbox.Vhost {
		t.Errorf("%+v", p)
	}
}
