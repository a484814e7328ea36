package vmm

import (
	"gvm/devices/pci"
	"gvm/guestmem"
)

// The machine's physical addresses. RAM has 0 to guestmem.HoleStart, and what
// is left from 4 GiB; everything between is devices'.
const (
	// ACPI tables go where a kernel that is not told looks for the RSDP
	// (ACPI 6.5, 5.2.5.1).
	acpiBase = 0xe_0000
	acpiSize = 0x2_0000

	mmio32Base = guestmem.HoleStart
	mmio32Size = ecamBase - mmio32Base
	ecamBase   = 0xe000_0000
	ecamSize   = pci.ECAMSize // one bus

	ioapicBase = 0xfec0_0000
	lapicBase  = 0xfee0_0000

	// Pages that Intel's KVM wants for itself, above the local APIC.
	identityMapAddr = 0xfeff_c000
	tssAddr         = 0xfeff_d000

	sciGSI = 9

	mmio64Align = 1 << 30
	mmio64Size  = 16 << 30
)

// intxIRQs are the ISA interrupts that PCI's INTx# lines have, the slots in turn from
// slot 1 on: those that a PC leaves to PCI. They are pins of the IOAPIC and of the PICs, so
// that a kernel without either (noapic, pci=nomsi) has a disk.
var intxIRQs = [...]uint8{10, 11, 5}

// mmio64 returns the window for 64-bit BARs: the first whole GiB past RAM.
// physBits is the width of the guest's physical addresses; a guest whose RAM
// leaves no room below that has no such window, and its BARs go below 4 GiB.
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

// checkRAM refuses RAM that processors with physical addresses of physBits do not reach.
func checkRAM(mem *guestmem.Memory, physBits uint) error {
	if ramEnd(mem) > 1<<physBits {
		return configErrorf("%d MiB of memory: a guest's processors here have addresses of %d bits", mem.Size()>>20, physBits)
	}
	return nil
}
