package vmm

import (
	"regexp"
	"strings"
	"testing"

	"github.com/bobuhiro11/gokvm/kvm"

	"gvm/guestmem"
	"gvm/kvmapi"
)

// TestReportNames: the report of a crash has the names of the machine's state for registers.
func TestReportNames(t *testing.T) {
	cfg := Config{Memory: guestmem.Config{Size: 64 << 20}, Kernel: embeddedKernel(t)}
	m, err := newMachine(t.Context(), system(t), cfg)
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for _, n := range inspectCPU(m.cpus[0], 0) {
		names[n.Name] = true
	}
	text, _ := registers(kvmapi.ExitInternalError, kvm.Regs{}, kvm.Sregs{})
	said := regexp.MustCompile(`(\w+) +[0-9a-f]+`).FindAllStringSubmatch(text, -1)
	for _, s := range said {
		if !names[s[1]] {
			t.Errorf("%s is no name of a register in the state", s[1])
		}
	}
	if len(said) < 25 {
		t.Errorf("%d registers in %q", len(said), text)
	}
	if err := m.close(); err != nil {
		t.Error(err)
	}
}

// TestLostRegisters: after a triple fault on AMD the state of a machine does not show the registers
// of a reset as the guest's. A CPU that was never started has them.
func TestLostRegisters(t *testing.T) {
	reset := kvm.Sregs{CR0: 0x6000_0010}
	reset.CS.Selector, reset.CS.Base = 0xf000, 0xffff_0000
	long := kvm.Sregs{CR0: 0x8000_0031, EFER: 0x500}
	for _, tt := range []struct {
		name     string
		mp       uint32
		r        kvm.Regs
		s        kvm.Sregs
		has, not string // names of values
	}{
		{"AMD", kvm.MPStateRunnable, kvm.Regs{RIP: 0xfff0, RFLAGS: 2, RDX: 0x600}, reset, "error", "rip rax cr0"},
		{"AMD, Linux 5.10", kvm.MPStateRunnable, kvm.Regs{RIP: 0xfff0, RFLAGS: 2, RAX: 1}, reset, "error rax rsp", "rip cr0"},
		{"never started", kvm.MPStateUninitialized, kvm.Regs{RIP: 0xfff0, RFLAGS: 2}, reset, "rip rax cr0", "error"},
		{"Intel", kvm.MPStateRunnable, kvm.Regs{RIP: 0x10059f}, long, "rip rax cr0", "error"},
	} {
		names := map[string]bool{}
		for _, n := range inspectRegisters(tt.mp, tt.r, tt.s) {
			names[n.Name] = true
		}
		for _, name := range strings.Fields(tt.has) {
			if !names[name] {
				t.Errorf("%s: the state lacks %s", tt.name, name)
			}
		}
		for _, name := range strings.Fields(tt.not) {
			if names[name] {
				t.Errorf("%s: the state has %s", tt.name, name)
			}
		}
	}
}

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
