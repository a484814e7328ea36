package x86

import "github.com/bobuhiro11/gokvm/kvm"

// Linux's mapping of its own image (Documentation/arch/x86/x86_64/mm.rst): __START_KERNEL_map, and
// KERNEL_IMAGE_SIZE with CONFIG_RANDOMIZE_BASE.
const (
	KernelMap  = 0xffffffff_80000000
	KernelSize = 1 << 30
)

const (
	// KernelAlign is the least step of a randomized address (CONFIG_PHYSICAL_ALIGN).
	KernelAlign = 2 << 20
	// UserPageTable is the bit of CR3 that tells a user's page table from the kernel's, with
	// page-table isolation (PTI_USER_PGTABLE_BIT).
	UserPageTable = 1 << 12
	// linkAddress is the address of the text in a vmlinux, with the default of CONFIG_PHYSICAL_START.
	linkAddress = KernelMap + 16<<20
)

// MovedKernel returns the address of the text of a Linux kernel that KASLR has moved, for a CPU at
// rip: the lowest one of its mapping, as __startup_64 leaves nothing mapped before it. ok is false
// for a kernel that is at its usual link address, or not there yet. read reads guest physical
// memory, which may say anything.
func MovedKernel(read func(gpa uint64, p []byte) error, s kvm.Sregs, rip uint64) (text uint64, ok bool) {
	// A user's page table of page-table isolation has a part of the kernel. The kernel's own is the
	// page before, and has all that the user's has.
	kernel := s
	kernel.CR3 &^= UserPageTable
	at, mapped := Translate(read, &s, rip)
	if same, ok := Translate(read, &kernel, rip); mapped && ok && same == at {
		s = kernel
	}
	for text = KernelMap; text < KernelMap+KernelSize; text += KernelAlign {
		if _, ok := Translate(read, &s, text); ok {
			return text, text != KernelMap && text != linkAddress
		}
	}
	return 0, false
}
