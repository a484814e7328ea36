// Prints the size, offset and ioctl number of everything in linux/kvm.h that
// package kvmapi lays out itself or takes from gokvm, one "name value" a line.
//   gcc -o /tmp/abi abi.c && /tmp/abi > abi.golden
#include <linux/kvm.h>
#include <stddef.h>
#include <stdio.h>

#define SIZE(t) printf("sizeof %s %zu\n", #t, sizeof(struct t))
#define OFF(t, f) printf("offset %s.%s %zu\n", #t, #f, offsetof(struct t, f))
#define NR(n) printf("value %s %lu\n", #n, (unsigned long)(n))

int main(void)
{
	SIZE(kvm_userspace_memory_region);
	SIZE(kvm_enable_cap);
	OFF(kvm_enable_cap, args);
	SIZE(kvm_pit_config);
	SIZE(kvm_irq_level);
	SIZE(kvm_irqchip);
	OFF(kvm_irqchip, chip);
	OFF(kvm_ioapic_state, redirtbl);
	SIZE(kvm_msi);
	OFF(kvm_msi, data);
	SIZE(kvm_irqfd);
	OFF(kvm_irqfd, gsi);
	OFF(kvm_irqfd, flags);
	SIZE(kvm_ioeventfd);
	OFF(kvm_ioeventfd, addr);
	OFF(kvm_ioeventfd, len);
	OFF(kvm_ioeventfd, fd);
	OFF(kvm_ioeventfd, flags);
	SIZE(kvm_irq_routing);
	SIZE(kvm_irq_routing_entry);
	OFF(kvm_irq_routing_entry, type);
	OFF(kvm_irq_routing_entry, u);
	SIZE(kvm_cpuid2);
	SIZE(kvm_cpuid_entry2);
	OFF(kvm_cpuid_entry2, eax);
	SIZE(kvm_regs);
	OFF(kvm_regs, rsp);
	OFF(kvm_regs, r8);
	OFF(kvm_regs, rip);
	SIZE(kvm_segment);
	SIZE(kvm_dtable);
	SIZE(kvm_sregs);
	OFF(kvm_sregs, gdt);
	OFF(kvm_sregs, cr0);
	OFF(kvm_sregs, cr8);
	OFF(kvm_sregs, efer);
	OFF(kvm_sregs, apic_base);
	SIZE(kvm_fpu);
	OFF(kvm_fpu, fcw);
	OFF(kvm_fpu, last_opcode);
	OFF(kvm_fpu, xmm);
	OFF(kvm_fpu, mxcsr);
	SIZE(kvm_msrs);
	SIZE(kvm_msr_entry);
	OFF(kvm_msr_entry, data);
	SIZE(kvm_lapic_state);
	SIZE(kvm_mp_state);
	SIZE(kvm_stats_header);
	SIZE(kvm_stats_desc);
	OFF(kvm_stats_desc, size);
	OFF(kvm_stats_desc, offset);
	SIZE(kvm_translation);
	OFF(kvm_translation, valid);
	SIZE(kvm_guest_debug);
	OFF(kvm_guest_debug, arch);
	OFF(kvm_run, immediate_exit);
	OFF(kvm_run, exit_reason);
	OFF(kvm_run, io.direction);
	OFF(kvm_run, io.size);
	OFF(kvm_run, io.port);
	OFF(kvm_run, io.count);
	OFF(kvm_run, io.data_offset);
	OFF(kvm_run, mmio.phys_addr);
	OFF(kvm_run, mmio.data);
	OFF(kvm_run, mmio.len);
	OFF(kvm_run, mmio.is_write);
	OFF(kvm_run, internal.suberror);
	OFF(kvm_run, internal.ndata);
	OFF(kvm_run, internal.data);
	OFF(kvm_run, fail_entry.hardware_entry_failure_reason);
	OFF(kvm_run, system_event.type);
	NR(KVM_GET_API_VERSION);
	NR(KVM_CREATE_VM);
	NR(KVM_CHECK_EXTENSION);
	NR(KVM_GET_VCPU_MMAP_SIZE);
	NR(KVM_GET_SUPPORTED_CPUID);
	NR(KVM_CREATE_VCPU);
	NR(KVM_SET_USER_MEMORY_REGION);
	NR(KVM_SET_TSS_ADDR);
	NR(KVM_SET_IDENTITY_MAP_ADDR);
	NR(KVM_CREATE_IRQCHIP);
	NR(KVM_IRQ_LINE);
	NR(KVM_GET_IRQCHIP);
	NR(KVM_SIGNAL_MSI);
	NR(KVM_SET_GSI_ROUTING);
	NR(KVM_IRQFD);
	NR(KVM_CREATE_PIT2);
	NR(KVM_SET_BOOT_CPU_ID);
	NR(KVM_IOEVENTFD);
	NR(KVM_RUN);
	NR(KVM_GET_REGS);
	NR(KVM_SET_REGS);
	NR(KVM_GET_SREGS);
	NR(KVM_SET_SREGS);
	NR(KVM_TRANSLATE);
	NR(KVM_SET_MSRS);
	NR(KVM_SET_FPU);
	NR(KVM_GET_LAPIC);
	NR(KVM_SET_LAPIC);
	NR(KVM_SET_CPUID2);
	NR(KVM_GET_MP_STATE);
	NR(KVM_SET_MP_STATE);
	NR(KVM_NMI);
	NR(KVM_SET_GUEST_DEBUG);
	NR(KVM_GET_TSC_KHZ);
	NR(KVM_KVMCLOCK_CTRL);
	NR(KVM_GET_STATS_FD);
	NR(KVM_ENABLE_CAP);
	NR(KVM_CAP_MAX_VCPUS);
	NR(KVM_CAP_MAX_VCPU_ID);
	NR(KVM_CAP_IMMEDIATE_EXIT);
	NR(KVM_CAP_X2APIC_API);
	NR(KVM_CAP_TSC_DEADLINE_TIMER);
	NR(KVM_CAP_IOEVENTFD_ANY_LENGTH);
	NR(KVM_EXIT_IO);
	NR(KVM_EXIT_DEBUG);
	NR(KVM_EXIT_HLT);
	NR(KVM_EXIT_MMIO);
	NR(KVM_EXIT_SHUTDOWN);
	NR(KVM_EXIT_FAIL_ENTRY);
	NR(KVM_EXIT_INTERNAL_ERROR);
	NR(KVM_EXIT_SYSTEM_EVENT);
	NR(KVM_IOEVENTFD_FLAG_DATAMATCH);
	NR(KVM_IOEVENTFD_FLAG_PIO);
	NR(KVM_IOEVENTFD_FLAG_DEASSIGN);
	NR(KVM_IRQFD_FLAG_DEASSIGN);
	NR(KVM_IRQ_ROUTING_IRQCHIP);
	NR(KVM_IRQ_ROUTING_MSI);
	NR(KVM_GUESTDBG_ENABLE);
	NR(KVM_GUESTDBG_SINGLESTEP);
	NR(KVM_GUESTDBG_USE_SW_BP);
	NR(KVM_GUESTDBG_USE_HW_BP);
	NR(KVM_PIT_SPEAKER_DUMMY);
	return 0;
}
