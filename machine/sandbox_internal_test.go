package machine

import (
	"strings"
	"testing"

	"gvm/broker"
	"gvm/kvmapi/tracefs"
	"gvm/machine/disk"
	"gvm/sandbox"
)

// TestPolicyOfVhost: with a disk that the kernel serves and a broker, gvm has no rights in
// configfs.
func TestPolicyOfVhost(t *testing.T) {
	s := Spec{Sandbox: &Sandbox{}, Disks: []disk.Spec{{Path: "/a.img", Backend: disk.Vhost}}, Files: &broker.Client{}}
	if p := s.policy(); len(p.Paths) != 0 || p.Uses != sandbox.Vhost {
		t.Errorf("%+v", p)
	}
}

// TestPolicyOfCache: gvm has no right to the cache of kernels, which has other machines' too.
func TestPolicyOfCache(t *testing.T) {
	s := Spec{Sandbox: &Sandbox{}, KernelCache: "/cache", Files: &broker.Client{}}
	if p := s.policy(); len(p.Paths) != 0 {
		t.Errorf("%+v", p)
	}
}

// TestPolicyOfTrace: of the kernel's trace instances gvm changes its own alone.
func TestPolicyOfTrace(t *testing.T) {
	s := Spec{Sandbox: &Sandbox{}, Disks: []disk.Spec{{Path: "/a.img", Backend: disk.Vhost}}, Files: &broker.Client{},
		Trace: "/a.trace"}
	for _, p := range s.policy().Paths {
		if strings.HasPrefix(p.Name, tracefs.DefaultRoot) && p.Rights != sandbox.RemoveDir {
			t.Errorf("%+v", p)
		}
	}
}
