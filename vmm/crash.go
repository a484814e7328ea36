package vmm

import (
	"fmt"
	"strings"

	"github.com/bobuhiro11/gokvm/kvm"

	"gvm/kvmapi"
	"gvm/vmm/vmcore"
)

// crash describes an exit after which the guest cannot continue. It runs on the vCPU's thread.
func (m *machine) crash(index int, c *kvmapi.VCPU, e kvmapi.Exit) Outcome {
	out := Outcome{
		Ending:      GuestCrashed,
		Err:         fmt.Errorf("vCPU %d: %s", index, e.String()),
		tripleFault: e.Reason == kvmapi.ExitShutdown,
	}
	var b strings.Builder
	r, err := c.Regs()
	s, err2 := c.Sregs()
	if err != nil || err2 != nil {
		out.Report = fmt.Sprintf("no registers: %v, %v", err, err2)
		return out
	}
	text, lost := registers(e.Reason, r, s)
	if b.WriteString(text); lost {
		b.WriteString(m.vcpuReport(index, c))
		out.Report = b.String()
		return out
	}
	fmt.Fprintf(&b, "code at rip: %s\n", m.code(c, s.CS.Base+r.RIP))
	if in := e.EmulationBytes(); len(in) > 0 {
		fmt.Fprintf(&b, "instruction: % x\n", in)
	}
	if e.Reason == kvmapi.ExitInternalError && len(e.Info) > 0 {
		fmt.Fprintf(&b, "KVM's data: %x\n", e.Info)
	}
	if e.Reason == kvmapi.ExitInternalError {
		if mips, err := Speed(m.sys); err == nil && mips < EmulatedBelow {
			fmt.Fprintf(&b, "this host's KVM has no hardware virtualization: it emulates guest kernel code (%.1f MIPS) "+
				"and lacks this instruction; run this guest on a host with VT-x or AMD-V\n", mips)
		}
	}
	b.WriteString(m.vcpuReport(index, c))
	out.Report = b.String()
	return out
}

// registers describes a CPU at an exit, or says that its registers are lost.
func registers(reason uint32, r kvm.Regs, s kvm.Sregs) (text string, lost bool) {
	if reason == kvmapi.ExitShutdown && afterINIT(r, s) {
		return lostRegisters(r), true
	}
	return fmt.Sprintf("rip %016x  rflags %016x  cs %04x  cs_base %x  cpl %d  efer %x\n",
		r.RIP, r.RFLAGS, s.CS.Selector, s.CS.Base, s.SS.DPL, s.EFER) +
		generalRegisters(r) +
		fmt.Sprintf("cr0 %016x  cr2 %016x  cr3 %016x  cr4 %016x\n", s.CR0, s.CR2, s.CR3, s.CR4) +
		fmt.Sprintf("gdt_base %016x+%x  idt_base %016x+%x  tr %04x  apic_base %x\n",
			s.GDT.Base, s.GDT.Limit, s.IDT.Base, s.IDT.Limit, s.TR.Selector, s.ApicBase), false
}

// generalRegisters formats all registers but RIP.
func generalRegisters(r kvm.Regs) string {
	return fmt.Sprintf("rax %016x  rbx %016x  rcx %016x  rdx %016x\n"+
		"rsi %016x  rdi %016x  rbp %016x  rsp %016x\n"+
		"r8  %016x  r9  %016x  r10 %016x  r11 %016x\n"+
		"r12 %016x  r13 %016x  r14 %016x  r15 %016x\n",
		r.RAX, r.RBX, r.RCX, r.RDX,
		r.RSI, r.RDI, r.RBP, r.RSP,
		r.R8, r.R9, r.R10, r.R11,
		r.R12, r.R13, r.R14, r.R15)
}

// afterINIT reports whether the registers are those of a CPU after INIT that has run no guest code
// since (AMD64 APM volume 2, 14.1.3). On AMD a shutdown destroys the guest's state, and KVM resets
// the CPU before it reports the exit (shutdown_interception in arch/x86/kvm/svm/svm.c).
func afterINIT(r kvm.Regs, s kvm.Sregs) bool {
	return r.RIP == 0xfff0 && s.CS.Selector == 0xf000 && s.CS.Base == 0xffff_0000 && s.CR0&1 == 0 && s.EFER == 0
}

// registersLost reports whether KVM has reset a CPU after a triple fault. One that the guest has
// not started has the same registers, but waits for its start.
func registersLost(mpState uint32, r kvm.Regs, s kvm.Sregs) bool {
	return mpState == kvm.MPStateRunnable && afterINIT(r, s)
}

// generalKept reports whether KVM has kept the general registers of a CPU after INIT, as kernels
// before 5.19 do.
func generalKept(r kvm.Regs) bool {
	r.RIP, r.RFLAGS, r.RDX = 0, 0, 0 // RDX is the processor's signature
	return r != (kvm.Regs{})
}

// lostRegisters is the report for a CPU after INIT.
func lostRegisters(r kvm.Regs) string {
	text := "the guest's " + vmcore.LostRegisters + "\n"
	if generalKept(r) {
		text = "the guest's general registers are all that is left: on AMD, KVM resets a CPU that had a triple fault\n" +
			generalRegisters(r)
	}
	return text
}

// code returns 16 bytes at a linear address as the guest sees it, in hex.
func (m *machine) code(c *kvmapi.VCPU, linear uint64) string {
	var b strings.Builder
	for i := range uint64(16) {
		gpa, ok, err := c.Translate(linear + i)
		var p [1]byte
		if err != nil || !ok || m.mem.Read(gpa, p[:]) != nil {
			return b.String() + " (not in RAM)"
		}
		fmt.Fprintf(&b, "%02x ", p[0])
	}
	return strings.TrimSpace(b.String())
}
