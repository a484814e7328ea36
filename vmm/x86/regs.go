package x86

import (
	"encoding/binary"

	"github.com/bobuhiro11/gokvm/kvm"

	"gvm/kvmapi"
)

// Bits of CR0, CR4, EFER and RFLAGS (Intel SDM 3, 2.5 and 2.2.1).
const (
	cr0PE = 1 << 0
	cr0ET = 1 << 4
	cr0PG = 1 << 31

	cr4PSE  = 1 << 4
	cr4PAE  = 1 << 5
	cr4LA57 = 1 << 12

	eferLME = 1 << 8
	eferLMA = 1 << 10

	rflagsReserved = 1 << 1
)

// Segment types (Intel SDM 3, 3.4.5.1).
const (
	segCode = 0xb // execute/read, accessed
	segData = 0x3 // read/write, accessed
	segTSS  = 0xb // 32-bit or 64-bit TSS, busy
)

func flat(selector uint16, typ uint8) kvm.Segment {
	return kvm.Segment{Limit: 0xffff_ffff, Selector: selector, Typ: typ, Present: 1, S: 1, G: 1, DB: 1}
}

// StartPVH32 sets a vCPU to the state in which PVH enters a kernel: 32-bit
// protected mode without paging, flat segments, RBX pointing to
// hvm_start_info (Xen, docs/misc/pvh.pandoc).
func StartPVH32(s kvm.Sregs, rip, startInfo uint64) (kvm.Regs, kvm.Sregs) {
	s.CS = flat(0x8, segCode)
	data := flat(0x10, segData)
	s.DS, s.ES, s.FS, s.GS, s.SS = data, data, data, data, data
	s.TR = kvm.Segment{Limit: 0x67, Selector: 0x18, Typ: segTSS, Present: 1}
	s.CR0, s.CR4, s.EFER = cr0PE|cr0ET, 0, 0
	return kvm.Regs{RFLAGS: rflagsReserved, RIP: rip, RBX: startInfo}, s
}

// StartLong64 sets a vCPU to the state in which the 64-bit boot protocol enters
// a kernel: long mode with the identity page tables at cr3, the GDT of the
// boot protocol (__BOOT_CS 0x10, __BOOT_DS 0x18) at gdt, RSI pointing to
// struct boot_params (Documentation/arch/x86/boot.rst, 64-bit boot protocol).
func StartLong64(s kvm.Sregs, rip, bootParams, cr3, gdt uint64, gdtLimit uint16) (kvm.Regs, kvm.Sregs) {
	s.CS = flat(0x10, segCode)
	s.CS.DB, s.CS.L = 0, 1
	data := flat(0x18, segData)
	s.DS, s.ES, s.FS, s.GS, s.SS = data, data, data, data, data
	s.TR = kvm.Segment{Limit: 0x67, Selector: 0x20, Typ: segTSS, Present: 1}
	s.GDT = kvm.Descriptor{Base: gdt, Limit: gdtLimit}
	s.IDT = kvm.Descriptor{}
	s.CR0, s.CR3, s.CR4, s.EFER = cr0PE|cr0ET|cr0PG, cr3, cr4PAE, eferLME|eferLMA
	return kvm.Regs{RFLAGS: rflagsReserved, RIP: rip, RSI: bootParams}, s
}

// X2APICMode is the bit of IA32_APIC_BASE that puts an enabled local APIC into x2APIC mode (Intel
// SDM 3, 11.12.1).
const X2APICMode = 1 << 10

// MSRs returns the MSRs that firmware would have set before a kernel runs:
// fast strings on, and write-back as the default memory type, which a guest
// without any variable-range MTRR needs for its RAM to be cached.
func MSRs() []kvmapi.MSR {
	return []kvmapi.MSR{
		{Index: uint32(kvm.MSRIA32MISCENABLE), Data: 1},
		{Index: uint32(kvm.MSRMTRRdefType), Data: 1<<11 | 6},
	}
}

// InitialFPU is the x87 and SSE state after reset and FINIT (Intel SDM 1,
// 8.1.5 and 10.2.3).
func InitialFPU() kvmapi.FPU { return kvmapi.FPU{FCW: 0x37f, MXCSR: 0x1f80} }

// Offsets of the local vector table's pins in the local APIC, and the delivery
// modes (Intel SDM 3, 11.5.1).
const (
	apicLVT0 = 0x350
	apicLVT1 = 0x360

	deliverNMI    = 4 << 8
	deliverExtINT = 7 << 8
)

// WireLAPIC connects LINT0 to the 8259 and LINT1 to NMI, as firmware leaves
// them (MultiProcessor Specification 1.4, 3.6.2.2 virtual wire mode).
func WireLAPIC(l kvm.LAPICState) kvm.LAPICState {
	binary.LittleEndian.PutUint32(l.Regs[apicLVT0:], deliverExtINT)
	binary.LittleEndian.PutUint32(l.Regs[apicLVT1:], deliverNMI)
	return l
}
