package x86

import (
	"testing"

	"github.com/bobuhiro11/gokvm/kvm"
)

// TestMovedKernel: the lowest address of a kernel's mapping, also for a CPU that has the user's
// page table of page-table isolation, in user space and on its way into the kernel.
func TestMovedKernel(t *testing.T) {
	const user, entry = 0x1abc, KernelMap + 0x1240_0000
	tables := tables(t, 8, map[uint64]uint64{
		// The kernel's page table: user space, and the kernel from 0x12200000 on.
		0x2000: 0x4003, 0x2ff8: 0x7003, 0x7ff0: 0x8003, 0x8000 + 0x91*8: 0x20_0083, 0x8000 + 0x92*8: 0x40_0083,
		// The user's: the same user space, and the way in.
		0x3000: 0x4003, 0x3ff8: 0x9003, 0x9ff0: 0xa003, 0xa000 + 0x92*8: 0x40_0083,
		0x4000: 0x5003, 0x5000: 0x6003, 0x6008: 0xb003,
		// A kernel at its link address, and a mapping from the beginning.
		0xcff8: 0xd003, 0xdff0: 0xe003, 0xe000 + 8*8: 0x20_0083,
		0x1000: 0x4003, 0x1ff8: 0x7003, 0xfff8: 0x4003,
	})
	for _, c := range []struct {
		name     string
		cr3, rip uint64
		want     uint64
	}{
		{"in the kernel", 0x2000, entry + 8, KernelMap + 0x1220_0000},
		{"in user space", 0x2000, user, KernelMap + 0x1220_0000},
		{"in user space, isolated", 0x3000, user, KernelMap + 0x1220_0000},
		{"on the way in", 0x3000, entry + 8, KernelMap + 0x1220_0000},
		{"no isolation, behind another page table", 0x1000, user, KernelMap + 0x1220_0000},
		{"not moved", 0xc000, KernelMap + 0x100_0008, 0},
		{"nothing mapped", 0xf000, user, 0},
	} {
		s := kvm.Sregs{CR0: cr0PG | cr0PE, CR3: c.cr3, CR4: cr4PAE, EFER: eferLME | eferLMA}
		if text, ok := MovedKernel(tables.Read, s, c.rip); ok != (c.want != 0) || ok && text != c.want {
			t.Errorf("%s: %#x, %v; want %#x", c.name, text, ok, c.want)
		}
	}
	if text, ok := MovedKernel(tables.Read, kvm.Sregs{CR0: cr0PE}, 0x1000); ok {
		t.Errorf("without paging: %#x", text)
	}
}
