package vmm

import (
	"gvm/devices/pci"
	"gvm/guestmem"
)

// The machine's physical addresses. RAM occupies 0 to guestmem.HoleStart, and the rest of it starts
// at 4 GiB; devices are in between.
const (
	// ACPI tables lie where a kernel searches for the RSDP if it was given no address (ACPI 6.5,
	// 5.2.5.1).
	acpiBase = 0xe_0000
	acpiSize = 0x2_0000

	mmio32Base = guestmem.HoleStart
	mmio32Size = ecamBase - mmio32Base
	ecamBase   = 0xe000_0000
	ecamSize   = pci.ECAMSize // one bus

	ioapicBase = 0xfec0_0000
	lapicBase  = 0xfee0_0000

	// Pages that KVM needs on Intel, above the local APIC.
	identityMapAddr = 0xfeff_c000
	tssAddr         = 0xfeff_d000

	sciGSI = 9

	mmio64Align = 1 << 30
	mmio64Size  = 16 << 30
)

// intxIRQs are the ISA interrupts of PCI's INTx# lines, assigned to the slots in turn from slot 1
// on: those that a PC leaves to PCI. They are pins of both the IOAPIC and the PICs, so that a
// kernel with one of them unused (noapic, pci=nomsi) has a disk.
var intxIRQs = [...]uint8{10, 11, 5}

// levelIRQs has a bit for each ISA interrupt that is level-triggered: INTx#, which functions share
// (PCI 3.0, 2.2.6), and the SCI (ACPI 6.5, 5.2.9). The PICs need it of firmware: ACPI tells it to
// the kernels that use ACPI, and others take the lines as firmware left them.
func levelIRQs() uint16 {
	levels := uint16(1) << sciGSI
	for _, irq := range intxIRQs {
		levels |= 1 << irq
	}
	return levels
}

// mmio64 returns the window for 64-bit BARs: the first whole GiB past RAM. physBits is the width of
// the guest's physical addresses. If RAM leaves no room below that limit there is no window, and
// the BARs go below 4 GiB.
func mmio64(mem *guestmem.Memory, physBits uint) pci.Window {
	base := max(ramEnd(mem), guestmem.HoleEnd)
	base = (base + mmio64Align - 1) &^ (mmio64Align - 1)
	if base+mmio64Size > 1<<physBits {
		return pci.Window{}
	}
	return pci.Window{Base: base, Size: mmio64Size}
}

// ramEnd returns the guest physical address one past RAM.
func ramEnd(mem *guestmem.Memory) uint64 {
	rs := mem.Regions()
	return rs[len(rs)-1].End()
}

// checkRAM rejects RAM beyond the physical addresses of physBits bits.
func checkRAM(mem *guestmem.Memory, physBits uint) error {
	if ramEnd(mem) > 1<<physBits {
		return configErrorf("%d MiB of memory: a guest's processors here have addresses of %d bits", mem.Size()>>20, physBits)
	}
	return nil
}
