package acpi

import (
	"fmt"

	"gvm/devices/acpipm"
	"gvm/devices/rtc"
	"gvm/devices/serial"
)

// dsdt is the DSDT's byte code. All devices are children of \_SB: there is no ISA bridge for the
// legacy ones.
func (c *Config) dsdt() aml {
	sb := []aml{c.hostBridge(), c.motherboard(), uart(1, c.COM1, c.COM1IRQ), rtcDevice(), c.pvpanic()}
	if c.COM2 {
		sb = append(sb, uart(2, serial.COM2, serial.COM2IRQ))
	}
	if c.GenerationID != nil {
		sb = append(sb, c.generation())
	}
	for i := range c.APICIDs {
		sb = append(sb, device(fmt.Sprintf("C%03X", i), name("_HID", str("ACPI0007")), name("_UID", integer(uint64(i)))))
	}
	s5 := integer(acpipm.SleepTypeS5)
	return join(
		name("_S5", packageOf(s5, s5, integer(0), integer(0))),
		scope("_SB", sb...),
	)
}

// hostBridge is the PCI Express root.
func (c *Config) hostBridge() aml {
	crs := []aml{
		window(busRange, 2, 0, uint64(c.Buses)),
		io(0xcf8, 8),
	}
	if w := c.IO; w.Size > 0 {
		crs = append(crs, window(ioRange, 2, w.Base, w.Size))
	}
	if w := c.MMIO32; w.Size > 0 {
		crs = append(crs, window(memoryRange, 4, w.Base, w.Size))
	}
	if w := c.MMIO64; w.Size > 0 {
		crs = append(crs, window(memoryRange, 8, w.Base, w.Size))
	}
	// _PRT (6.2.13): the device in each slot has only INTA#, wired to a GSI without a link device.
	var prt []aml
	for slot := 1; slot < 32 && len(c.INTx) > 0; slot++ { // none: an empty table
		irq := c.INTx[(slot-1)%len(c.INTx)]
		prt = append(prt, packageOf(integer(uint64(slot)<<16|0xffff), integer(0), integer(0), integer(uint64(irq))))
	}
	return device("PCI0",
		name("_HID", eisaID("PNP0A08")),
		name("_CID", eisaID("PNP0A03")),
		name("_SEG", integer(0)),
		name("_BBN", integer(0)),
		name("_UID", integer(0)),
		name("_CRS", resources(crs...)),
		name("_PRT", packageOf(prt...)),
		osc(),
	)
}

// Bits of _OSC for PCI host bridges (PCI Firmware 3.3, 4.5.1).
const (
	oscUnknownUUID     = 1 << 2
	oscUnknownRevision = 1 << 3
	oscMasked          = 1 << 4

	oscPME  = 1 << 2
	oscAER  = 1 << 3
	oscPCIe = 1 << 4
	oscLTR  = 1 << 5

	// oscGranted lists the features that the guest may control. Hot-plug is not among them: there
	// are no slots, and granting it would disable hot-plug by ACPI.
	oscGranted = oscPME | oscAER | oscPCIe | oscLTR
)

func osc() aml {
	cdw1, cdw3 := seg("CDW1"), seg("CDW3")
	set := func(bit uint64) aml { return or(cdw1, integer(bit), cdw1) }
	return method("_OSC", 4,
		createDWordField(arg(3), 0, "CDW1"),
		ifElse(equal(arg(0), toUUID("33DB4D5B-1FF7-401C-9657-7441C03DD766")),
			join(
				createDWordField(arg(3), 8, "CDW3"),
				and(cdw3, integer(oscGranted), local0),
				when(not(equal(arg(1), integer(1))), set(oscUnknownRevision)),
				when(not(equal(local0, cdw3)), set(oscMasked)),
				store(local0, cdw3),
			),
			set(oscUnknownUUID),
		),
		returns(arg(3)),
	)
}

// motherboard reserves the resources of no other device. Linux trusts MCFG only if the range is
// reserved here or by the firmware's memory map.
func (c *Config) motherboard() aml {
	crs := []aml{io(c.PM, acpipm.Size)}
	if end := c.ECAM + uint64(c.Buses)<<20; end <= 1<<32 {
		crs = append(crs, memory32Fixed(uint32(c.ECAM), uint32(end-c.ECAM)))
	} else {
		crs = append(crs, window(memoryRange, 8, c.ECAM, end-c.ECAM))
	}
	return device("MBRD",
		name("_HID", eisaID("PNP0C02")),
		name("_UID", integer(0)),
		name("_CRS", resources(crs...)),
	)
}

// uart is COM1 or COM2.
func uart(n int, port uint16, irq uint8) aml {
	return device(fmt.Sprintf("COM%d", n),
		name("_HID", eisaID("PNP0501")),
		name("_UID", integer(uint64(n))),
		name("_CRS", resources(io(port, serial.Size), irqNoFlags(irq))),
	)
}

func rtcDevice() aml {
	return device("RTC",
		name("_HID", eisaID("PNP0B00")),
		name("_CRS", resources(io(rtc.Port, rtc.Size), irqNoFlags(rtc.IRQ))),
	)
}

func (c *Config) pvpanic() aml {
	return device("PEVT",
		name("_HID", str("QEMU0001")),
		name("_CRS", resources(io(c.PVPanic, 1))),
	)
}

// generation is the device of Microsoft's "Virtual Machine Generation ID", whose ADDR has the
// address of the ID in two halves. It sends no notification, as the ID does not change while the
// guest runs.
func (c *Config) generation() aml {
	return device("VGEN",
		name("_HID", str("GVMG0001")),
		name("_CID", str("VM_Gen_Counter")),
		name("_DDN", str("VM_Gen_Counter")),
		name("ADDR", packageOf(integer(c.generationID&0xffffffff), integer(c.generationID>>32))),
	)
}
