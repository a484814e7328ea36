package vmm

import (
	"strings"
	"testing"

	"github.com/bobuhiro11/gokvm/kvm"

	"gvm/kvmapi"
)

// TestAfterINIT uses the registers that KVM reports after a triple fault.
func TestAfterINIT(t *testing.T) {
	reset := kvm.Sregs{CR0: 0x6000_0010}
	reset.CS.Selector, reset.CS.Base = 0xf000, 0xffff_0000
	realMode := reset
	realMode.CS.Selector, realMode.CS.Base = 0, 0
	long := kvm.Sregs{CR0: 0x8000_0031, EFER: 0x500}
	long.CS.Selector = 8
	init := kvm.Regs{RIP: 0xfff0, RFLAGS: 2, RDX: 0x600}
	old := kvm.Regs{RIP: 0xfff0, RFLAGS: 2, RAX: 0x1234, RDX: 3, RSP: 0x8000}
	for _, tt := range []struct {
		name string
		regs kvm.Regs
		s    kvm.Sregs
		want bool
	}{
		{"AMD", init, reset, true},
		{"AMD, Linux 5.10", old, reset, true},
		{"Intel", kvm.Regs{RIP: 0x10059f}, long, false},
		{"the same offset in long mode", init, long, false},
		{"real mode", kvm.Regs{RIP: 0x7c00}, realMode, false},
		{"the same offset in real mode", init, realMode, false},
	} {
		if text, lost := registers(kvmapi.ExitShutdown, tt.regs, tt.s); lost != tt.want ||
			strings.HasPrefix(text, "rip ") == lost {
			t.Errorf("%s: lost is %v: %s", tt.name, lost, text)
		}
		if text, lost := registers(kvmapi.ExitInternalError, tt.regs, tt.s); lost || !strings.HasPrefix(text, "rip ") {
			t.Errorf("%s, no triple fault: lost is %v: %s", tt.name, lost, text)
		}
	}
	if got := lostRegisters(init); strings.Contains(got, "rax") || strings.Count(got, "\n") != 1 {
		t.Errorf("all lost: %q", got)
	}
	if got := lostRegisters(old); !strings.Contains(got, "rax 0000000000001234") ||
		!strings.Contains(got, "rsp 0000000000008000") || strings.Contains(got, "rip 0") {
		t.Errorf("general registers left: %q", got)
	}
}
