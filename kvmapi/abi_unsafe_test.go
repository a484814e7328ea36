package kvmapi

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"github.com/bobuhiro11/gokvm/kvm"
)

// golden reads testdata/abi.golden, a C compiler's output for linux/kvm.h.
func golden(t *testing.T) map[string]uint64 {
	t.Helper()
	b, err := os.ReadFile("testdata/abi.golden")
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]uint64{}
	for line := range strings.Lines(string(b)) {
		var kind, name string
		var v uint64
		if _, err := fmt.Sscanf(line, "%s %s %d", &kind, &name, &v); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		m[kind+" "+name] = v
	}
	return m
}

func TestABIMatchesKernelHeaders(t *testing.T) {
	var (
		ec  enableCap
		ifd irqfd
		ied ioeventfd
		rt  routing
		re  RoutingEntry
		ce  kvm.CPUIDEntry2
		re2 kvm.Regs
		sr  kvm.Sregs
		fpu FPU
		msr MSR
		tr  kvm.Translation
		gd  GuestDebug
	)
	have := map[string]uint64{
		"sizeof kvm_userspace_memory_region": uint64(unsafe.Sizeof(kvm.UserspaceMemoryRegion{})),
		"sizeof kvm_enable_cap":              uint64(unsafe.Sizeof(ec)),
		"offset kvm_enable_cap.args":         uint64(unsafe.Offsetof(ec.Args)),
		"sizeof kvm_pit_config":              uint64(unsafe.Sizeof(pitConfig{})),
		"sizeof kvm_irq_level":               uint64(unsafe.Sizeof(irqLevel{})),
		"sizeof kvm_irqchip":                 uint64(unsafe.Sizeof(irqchip{})),
		"offset kvm_irqchip.chip":            uint64(unsafe.Offsetof(irqchip{}.Base)),
		"offset kvm_ioapic_state.redirtbl": uint64(unsafe.Offsetof(irqchip{}.RedirectionTable) -
			unsafe.Offsetof(irqchip{}.Base)),
		"offset kvm_pic_state.elcr":         uint64(unsafe.Offsetof(pic{}.ELCR) - unsafe.Offsetof(irqchip{}.Base)),
		"sizeof kvm_msi":                    uint64(unsafe.Sizeof(msi{})),
		"offset kvm_msi.data":               uint64(unsafe.Offsetof(msi{}.Data)),
		"sizeof kvm_irqfd":                  uint64(unsafe.Sizeof(ifd)),
		"offset kvm_irqfd.gsi":              uint64(unsafe.Offsetof(ifd.GSI)),
		"offset kvm_irqfd.flags":            uint64(unsafe.Offsetof(ifd.Flags)),
		"sizeof kvm_ioeventfd":              uint64(unsafe.Sizeof(ied)),
		"offset kvm_ioeventfd.addr":         uint64(unsafe.Offsetof(ied.Addr)),
		"offset kvm_ioeventfd.len":          uint64(unsafe.Offsetof(ied.Len)),
		"offset kvm_ioeventfd.fd":           uint64(unsafe.Offsetof(ied.FD)),
		"offset kvm_ioeventfd.flags":        uint64(unsafe.Offsetof(ied.Flags)),
		"sizeof kvm_irq_routing":            uint64(unsafe.Offsetof(rt.Entries)),
		"sizeof kvm_irq_routing_entry":      uint64(unsafe.Sizeof(re)),
		"offset kvm_irq_routing_entry.type": uint64(unsafe.Offsetof(re.Type)),
		"offset kvm_irq_routing_entry.u":    uint64(unsafe.Offsetof(re.U)),
		"sizeof kvm_cpuid2":                 uint64(unsafe.Offsetof(cpuid2{}.Entries)),
		"sizeof kvm_cpuid_entry2":           uint64(unsafe.Sizeof(ce)),
		"offset kvm_cpuid_entry2.eax":       uint64(unsafe.Offsetof(ce.Eax)),
		"sizeof kvm_regs":                   uint64(unsafe.Sizeof(re2)),
		"offset kvm_regs.rsp":               uint64(unsafe.Offsetof(re2.RSP)),
		"offset kvm_regs.r8":                uint64(unsafe.Offsetof(re2.R8)),
		"offset kvm_regs.rip":               uint64(unsafe.Offsetof(re2.RIP)),
		"sizeof kvm_segment":                uint64(unsafe.Sizeof(kvm.Segment{})),
		"sizeof kvm_dtable":                 uint64(unsafe.Sizeof(kvm.Descriptor{})),
		"sizeof kvm_sregs":                  uint64(unsafe.Sizeof(sr)),
		"offset kvm_sregs.gdt":              uint64(unsafe.Offsetof(sr.GDT)),
		"offset kvm_sregs.cr0":              uint64(unsafe.Offsetof(sr.CR0)),
		"offset kvm_sregs.cr8":              uint64(unsafe.Offsetof(sr.CR8)),
		"offset kvm_sregs.efer":             uint64(unsafe.Offsetof(sr.EFER)),
		"offset kvm_sregs.apic_base":        uint64(unsafe.Offsetof(sr.ApicBase)),
		"sizeof kvm_fpu":                    uint64(unsafe.Sizeof(fpu)),
		"offset kvm_fpu.fcw":                uint64(unsafe.Offsetof(fpu.FCW)),
		"offset kvm_fpu.last_opcode":        uint64(unsafe.Offsetof(fpu.LastOpcode)),
		"offset kvm_fpu.xmm":                uint64(unsafe.Offsetof(fpu.XMM)),
		"offset kvm_fpu.mxcsr":              uint64(unsafe.Offsetof(fpu.MXCSR)),
		"sizeof kvm_msrs":                   uint64(unsafe.Offsetof(msrs{}.Entries)),
		"sizeof kvm_msr_entry":              uint64(unsafe.Sizeof(msr)),
		"offset kvm_msr_entry.data":         uint64(unsafe.Offsetof(msr.Data)),
		"sizeof kvm_lapic_state":            uint64(unsafe.Sizeof(kvm.LAPICState{})),
		"sizeof kvm_mp_state":               uint64(unsafe.Sizeof(kvm.MPState{})),
		"sizeof kvm_translation":            uint64(unsafe.Sizeof(tr)),
		"offset kvm_translation.valid":      uint64(unsafe.Offsetof(tr.Valid)),
		"sizeof kvm_guest_debug":            uint64(unsafe.Sizeof(gd)),
		"offset kvm_guest_debug.arch":       uint64(unsafe.Offsetof(gd.DebugReg)),

		"offset kvm_run.immediate_exit":                           uint64(unsafe.Offsetof(kvm.RunData{}.ImmediateExit)),
		"offset kvm_run.exit_reason":                              uint64(unsafe.Offsetof(kvm.RunData{}.ExitReason)),
		"offset kvm_run.io.direction":                             ioDirection,
		"offset kvm_run.io.size":                                  ioSize,
		"offset kvm_run.io.port":                                  ioPort,
		"offset kvm_run.io.count":                                 ioCount,
		"offset kvm_run.io.data_offset":                           ioDataOffset,
		"offset kvm_run.mmio.phys_addr":                           mmioAddr,
		"offset kvm_run.mmio.data":                                mmioData,
		"offset kvm_run.mmio.len":                                 mmioLen,
		"offset kvm_run.mmio.is_write":                            mmioIsWrite,
		"offset kvm_run.internal.suberror":                        suberror,
		"offset kvm_run.internal.ndata":                           ndata,
		"offset kvm_run.internal.data":                            errorData,
		"offset kvm_run.fail_entry.hardware_entry_failure_reason": hwReason,
		"offset kvm_run.system_event.type":                        suberror,
		"offset kvm_run.debug.arch.exception":                     debugVector,
		"offset kvm_run.debug.arch.pc":                            debugPC,
		"offset kvm_run.debug.arch.dr6":                           debugDR6,
		"sizeof kvm_debugregs":                                    uint64(unsafe.Sizeof(kvm.DebugRegs{})),
		"offset kvm_debugregs.dr6":                                uint64(unsafe.Offsetof(kvm.DebugRegs{}.DR6)),

		"value KVM_GET_API_VERSION":        uint64(kvm.IIO(nrGetAPIVersion)),
		"value KVM_CREATE_VM":              uint64(kvm.IIO(nrCreateVM)),
		"value KVM_CHECK_EXTENSION":        uint64(kvm.IIO(nrCheckExtension)),
		"value KVM_GET_VCPU_MMAP_SIZE":     uint64(kvm.IIO(nrGetVCPUMmapSize)),
		"value KVM_GET_SUPPORTED_CPUID":    uint64(kvm.IIOWR(nrGetSupportedCPUID, 8)),
		"value KVM_CREATE_VCPU":            uint64(kvm.IIO(nrCreateVCPU)),
		"value KVM_SET_USER_MEMORY_REGION": uint64(iow[kvm.UserspaceMemoryRegion](nrSetUserMemoryRegion)),
		"value KVM_SET_TSS_ADDR":           uint64(kvm.IIO(nrSetTSSAddr)),
		"value KVM_SET_IDENTITY_MAP_ADDR":  uint64(iow[uint64](nrSetIdentityMapAddr)),
		"value KVM_CREATE_IRQCHIP":         uint64(kvm.IIO(nrCreateIRQChip)),
		"value KVM_IRQ_LINE":               uint64(iow[irqLevel](nrIRQLine)),
		"value KVM_GET_IRQCHIP":            uint64(iowr[irqchip](nrGetIRQChip)),
		"value KVM_SET_IRQCHIP":            uint64(ior[pic](nrSetIRQChip)),
		"value KVM_SIGNAL_MSI":             uint64(iow[msi](nrSignalMSI)),
		"value KVM_SET_GSI_ROUTING":        uint64(kvm.IIOW(nrSetGSIRouting, 8)),
		"value KVM_IRQFD":                  uint64(iow[irqfd](nrIRQFD)),
		"value KVM_CREATE_PIT2":            uint64(iow[pitConfig](nrCreatePIT2)),
		"value KVM_SET_BOOT_CPU_ID":        uint64(kvm.IIO(nrSetBootCPUID)),
		"value KVM_IOEVENTFD":              uint64(iow[ioeventfd](nrIOEventFD)),
		"value KVM_RUN":                    uint64(kvm.IIO(nrRun)),
		"value KVM_GET_REGS":               uint64(ior[kvm.Regs](nrGetRegs)),
		"value KVM_SET_REGS":               uint64(iow[kvm.Regs](nrSetRegs)),
		"value KVM_GET_SREGS":              uint64(ior[kvm.Sregs](nrGetSregs)),
		"value KVM_SET_SREGS":              uint64(iow[kvm.Sregs](nrSetSregs)),
		"value KVM_TRANSLATE":              uint64(iowr[kvm.Translation](nrTranslate)),
		"value KVM_GET_MSRS":               uint64(kvm.IIOWR(nrGetMSRs, 8)),
		"value KVM_GET_FPU":                uint64(ior[FPU](nrGetFPU)),
		"value KVM_GET_DEBUGREGS":          uint64(ior[kvm.DebugRegs](nrGetDebugRegs)),
		"value KVM_SET_DEBUGREGS":          uint64(iow[kvm.DebugRegs](nrSetDebugRegs)),
		"value KVM_SET_MSRS":               uint64(kvm.IIOW(nrSetMSRs, 8)),
		"value KVM_SET_FPU":                uint64(iow[FPU](nrSetFPU)),
		"value KVM_GET_LAPIC":              uint64(ior[kvm.LAPICState](nrGetLAPIC)),
		"value KVM_SET_LAPIC":              uint64(iow[kvm.LAPICState](nrSetLAPIC)),
		"value KVM_SET_CPUID2":             uint64(kvm.IIOW(nrSetCPUID2, 8)),
		"value KVM_GET_MP_STATE":           uint64(ior[kvm.MPState](nrGetMPState)),
		"value KVM_NMI":                    uint64(kvm.IIO(nrNMI)),
		"value KVM_SET_MP_STATE":           uint64(iow[kvm.MPState](nrSetMPState)),
		"value KVM_SET_GUEST_DEBUG":        uint64(iow[GuestDebug](nrSetGuestDebug)),
		"value KVM_GET_TSC_KHZ":            uint64(kvm.IIO(nrGetTSCKHz)),
		"value KVM_GET_STATS_FD":           uint64(kvm.IIO(nrGetStatsFD)),
		"sizeof kvm_stats_header":          uint64(unsafe.Sizeof(statHeader{})),
		"sizeof kvm_stats_desc":            uint64(unsafe.Sizeof(statDescriptor{})),
		"offset kvm_stats_desc.size":       uint64(unsafe.Offsetof(statDescriptor{}.Size)),
		"offset kvm_stats_desc.offset":     uint64(unsafe.Offsetof(statDescriptor{}.Offset)),
		"value KVM_KVMCLOCK_CTRL":          uint64(kvm.IIO(nrKVMClockCtrl)),
		"value KVM_ENABLE_CAP":             uint64(iow[enableCap](nrEnableCap)),

		"value KVM_CAP_MAX_VCPUS":            CapMaxVCPUs,
		"value KVM_CAP_MAX_VCPU_ID":          CapMaxVCPUID,
		"value KVM_CAP_IMMEDIATE_EXIT":       CapImmediateExit,
		"value KVM_CAP_X2APIC_API":           CapX2APICAPI,
		"value KVM_CAP_TSC_DEADLINE_TIMER":   uint64(CapTSCDeadline),
		"value KVM_CAP_IOEVENTFD_ANY_LENGTH": CapIOEventFDAnyLen,
		"value KVM_EXIT_IO":                  uint64(ExitIO),
		"value KVM_EXIT_DEBUG":               uint64(ExitDebug),
		"value KVM_EXIT_HLT":                 uint64(ExitHLT),
		"value KVM_EXIT_MMIO":                uint64(ExitMMIO),
		"value KVM_EXIT_SHUTDOWN":            uint64(ExitShutdown),
		"value KVM_EXIT_FAIL_ENTRY":          uint64(ExitFailEntry),
		"value KVM_EXIT_INTERNAL_ERROR":      uint64(ExitInternalError),
		"value KVM_EXIT_SYSTEM_EVENT":        uint64(ExitSystemEvent),
		"value KVM_IOEVENTFD_FLAG_DATAMATCH": ioeventfdDatamatch,
		"value KVM_IOEVENTFD_FLAG_PIO":       ioeventfdPIO,
		"value KVM_IOEVENTFD_FLAG_DEASSIGN":  ioeventfdDeassign,
		"value KVM_IRQFD_FLAG_DEASSIGN":      irqfdDeassign,
		"value KVM_IRQ_ROUTING_IRQCHIP":      RoutingIRQChip,
		"value KVM_IRQCHIP_PIC_MASTER":       ChipPIC0,
		"value KVM_IRQCHIP_PIC_SLAVE":        ChipPIC1,
		"value KVM_IRQ_ROUTING_MSI":          RoutingMSI,
		"value KVM_GUESTDBG_ENABLE":          GuestDebugEnable,
		"value KVM_GUESTDBG_SINGLESTEP":      GuestDebugSingleStep,
		"value KVM_GUESTDBG_USE_SW_BP":       GuestDebugUseSWBP,
		"value KVM_GUESTDBG_USE_HW_BP":       GuestDebugUseHWBP,
		"value KVM_GUESTDBG_INJECT_DB":       GuestDebugInjectDB,
		"value KVM_GUESTDBG_INJECT_BP":       GuestDebugInjectBP,
		"value KVM_GUESTDBG_BLOCKIRQ":        GuestDebugBlockIRQ,
		"value KVM_CAP_SET_GUEST_DEBUG":      CapSetGuestDebug,
		"value KVM_CAP_SET_GUEST_DEBUG2":     CapSetGuestDebug2,
		"value KVM_PIT_SPEAKER_DUMMY":        pitSpeakerDummy,
	}
	want := golden(t)
	for name, w := range want {
		if h, ok := have[name]; !ok {
			t.Errorf("%s is in abi.golden and not compared", name)
		} else if h != w {
			t.Errorf("%s = %d, the kernel header has %d", name, h, w)
		}
	}
	for name := range have {
		if _, ok := want[name]; !ok {
			t.Errorf("%s is not in abi.golden: add it to abi.c", name)
		}
	}
}

// TestGoldenIsCurrent compiles abi.c against this machine's headers. Headers older than those of
// the golden file may lack a name; a value that differs is an error.
func TestGoldenIsCurrent(t *testing.T) {
	gcc, err := exec.LookPath("gcc")
	if err != nil {
		t.Skip("no gcc here (Debian: apt-get install gcc linux-libc-dev); the golden file is compared all the same")
	}
	bin := filepath.Join(t.TempDir(), "abi")
	if out, err := exec.Command(gcc, "-o", bin, "testdata/abi.c").CombinedOutput(); err != nil {
		t.Fatalf("compile testdata/abi.c: %v\n%s", err, out)
	}
	out, err := exec.Command(bin).Output()
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile("testdata/abi.golden")
	if err != nil {
		t.Fatal(err)
	}
	if string(out) != string(want) {
		t.Errorf("testdata/abi.golden differs from the output of testdata/abi.c; the difference:\n%s", out)
	}
}
