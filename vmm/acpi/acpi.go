// Package acpi makes the ACPI tables (ACPI 6.4) that describe the machine to its guest, as bytes
// for guest memory.
package acpi

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"

	"gvm/devices/acpipm"
	"gvm/devices/pvpanic"
	"gvm/devices/rtc"
	"gvm/devices/serial"
)

// Range is Size addresses from Base on.
type Range struct{ Base, Size uint64 }

func (r Range) end() uint64 { return r.Base + r.Size }

// Config is the machine that the tables describe. A zero field takes the default stated with it;
// APICIDs and MMIO64 have none.
type Config struct {
	// Area is the guest physical memory for the tables: 0xe0000, 128 KiB. A guest that was given no
	// address searches it for the RSDP, and it has room for some 2,000 CPUs.
	Area Range

	APICIDs []uint32 // the CPUs' local APIC IDs, ascending, the boot CPU first

	ECAM   uint64 // PCI configuration space: 0xe0000000
	Buses  int    // its buses, 1 MiB of ECAM each: 256
	IO     Range  // the host bridge's windows: ports 0x1000-0xffff,
	MMIO32 Range  // 0xc0000000-0xdfffffff below 4 GiB,
	MMIO64 Range  // and none above unless given

	IOAPIC uint32 // the I/O APIC's address: 0xfec00000; its ID and first GSI are 0
	SCI    uint8  // the system control interrupt, level-triggered: GSI 9
	// INTx are the ISA interrupts of the PCI slots' INTA#, in turn from slot 1 on, level-triggered;
	// none: INTx# is not wired.
	INTx []uint8

	PM        uint16 // ports of package acpipm: 0x600
	ResetPort uint16 // 0xcf9
	COM1      uint16 // 0x3f8
	COM1IRQ   uint8  // 4
	COM2      bool   // there is a second UART, at port 0x2f8 with interrupt 3
	PVPanic   uint16 // 0x505

	// GenerationID identifies the execution of the machine, for the guest's device VM_Gen_Counter;
	// nil: there is none.
	GenerationID *[16]byte
	generationID uint64 // its address
}

func def[T comparable](field *T, v T) {
	var zero T
	if *field == zero {
		*field = v
	}
}

func (c *Config) setDefaults() {
	def(&c.Area, Range{0xe0000, 0x20000})
	def(&c.ECAM, 0xe0000000)
	def(&c.Buses, 256)
	def(&c.IO, Range{0x1000, 0xf000})
	def(&c.MMIO32, Range{0xc0000000, 0x20000000})
	def(&c.IOAPIC, 0xfec00000)
	def(&c.SCI, 9)
	def(&c.PM, acpipm.Port)
	def(&c.ResetPort, acpipm.ResetPort)
	def(&c.COM1, serial.COM1)
	def(&c.COM1IRQ, serial.COM1IRQ)
	def(&c.PVPanic, pvpanic.Port)
}

func (c *Config) check() error {
	if len(c.APICIDs) == 0 {
		return fmt.Errorf("acpi: no CPUs")
	}
	if len(c.APICIDs) > 0x1000 {
		return fmt.Errorf("acpi: %d CPUs are more than the %d that have a name", len(c.APICIDs), 0x1000)
	}
	for i, id := range c.APICIDs {
		if i > 0 && id <= c.APICIDs[i-1] || id == 0xffffffff {
			return fmt.Errorf("acpi: APIC ID %#x of CPU %d does not ascend", id, i)
		}
	}
	if c.Buses < 1 || c.Buses > 256 {
		return fmt.Errorf("acpi: %d PCI buses: want 1 to 256", c.Buses)
	}
	if c.SCI > 15 || c.COM1IRQ > 15 {
		return fmt.Errorf("acpi: SCI %d or COM1 interrupt %d is no ISA interrupt", c.SCI, c.COM1IRQ)
	}
	for _, irq := range c.INTx {
		if irq > 15 || irq == 0 || irq == c.SCI || irq == c.COM1IRQ || c.COM2 && irq == serial.COM2IRQ {
			return fmt.Errorf("acpi: PCI cannot have interrupt %d", irq)
		}
	}
	for _, r := range []struct {
		name  string
		r     Range
		limit uint64
		align uint64
	}{
		{"table area", c.Area, 1 << 52, 64},
		{"ECAM", Range{c.ECAM, uint64(c.Buses) << 20}, 1 << 52, 1 << 20},
		{"I/O window", c.IO, 1 << 16, 1},
		{"32-bit MMIO window", c.MMIO32, 1 << 32, 1 << 12},
		{"64-bit MMIO window", c.MMIO64, 1 << 52, 1 << 12},
		{"PM ports", Range{uint64(c.PM), acpipm.Size}, 1 << 16, 4},
		{"COM1 ports", Range{uint64(c.COM1), serial.Size}, 1 << 16, 8},
	} {
		if r.r.Base > r.limit || r.r.Size > r.limit-r.r.Base || r.r.Base%r.align != 0 {
			return fmt.Errorf("acpi: %s %#x+%#x wraps, passes %#x or is not aligned to %#x",
				r.name, r.r.Base, r.r.Size, r.limit, r.align)
		}
	}
	return nil
}

// Build returns the tables and the address of the RSDP. The caller writes the tables to the start
// of cfg.Area, which is also the RSDP's address. It fails if the configuration cannot be described
// or the area is too small.
func Build(cfg Config) (tables []byte, rsdp uint64, err error) {
	cfg.setDefaults()
	if err := cfg.check(); err != nil {
		return nil, 0, err
	}
	b := make([]byte, rsdpSize)
	place := func(t []byte) uint64 {
		const align = 64 // required by the FACS
		b = append(b, make([]byte, -len(b)&(align-1))...)
		b = append(b, t...)
		return cfg.Area.Base + uint64(len(b)-len(t))
	}
	facs := place(facsTable())
	if id := cfg.GenerationID; id != nil {
		cfg.generationID = place(id[:])
	}
	dsdt := place(table("DSDT", 2, cfg.dsdt()))
	xsdt := place(table("XSDT", 1, marshal([]uint64{
		place(cfg.fadt(facs, dsdt)),
		place(cfg.madt()),
		place(cfg.mcfg()),
	})))
	copy(b, rsdpTable(xsdt))
	if uint64(len(b)) > cfg.Area.Size {
		return nil, 0, fmt.Errorf("acpi: tables for %d CPUs take %d bytes, the area at %#x has %d",
			len(cfg.APICIDs), len(b), cfg.Area.Base, cfg.Area.Size)
	}
	return b, cfg.Area.Base, nil
}

const (
	oemID      = "GVM   "
	oemTableID = "GVM     "
	creatorID  = "GVM "
	headerSize = 36
	rsdpSize   = 36
)

// table prepends the header (5.2.6) to a table's body.
func table(signature string, revision byte, body []byte) []byte {
	b := append([]byte(signature), 0, 0, 0, 0, revision, 0)
	b = append(b, oemID+oemTableID...)
	b = le.AppendUint32(b, 1)
	b = append(b, creatorID...)
	b = le.AppendUint32(b, 1)
	b = append(b, body...)
	le.PutUint32(b[4:], uint32(len(b)))
	b[9] = checksum(b)
	return b
}

// checksum returns the byte that makes b sum to 0, where the checksum is still 0.
func checksum(b []byte) byte {
	var sum byte
	for _, v := range b {
		sum -= v
	}
	return sum
}

// marshal returns the bytes of fixed-size structures, without padding.
func marshal(vs ...any) []byte {
	var b bytes.Buffer
	for _, v := range vs {
		if err := binary.Write(&b, le, v); err != nil {
			panic(err) // a type of this package without a fixed size
		}
	}
	return b.Bytes()
}

// rsdpTable is revision 2 (5.2.5.3), with an XSDT and no RSDT.
func rsdpTable(xsdt uint64) []byte {
	b := append([]byte("RSD PTR \x00"+oemID), 2, 0, 0, 0, 0)
	b = le.AppendUint32(b, rsdpSize)
	b = le.AppendUint64(b, xsdt)
	b = append(b, 0, 0, 0, 0)
	b[8] = checksum(b[:20])
	b[32] = checksum(b)
	return b
}

// facsTable is 5.2.10. The FACS has no checksum.
func facsTable() []byte {
	b := make([]byte, 64)
	copy(b, "FACS")
	b[4] = byte(len(b))
	b[32] = 2 // version
	return b
}

// gas is a Generic Address Structure (5.2.3.2).
type gas struct {
	Space, Bits, Offset, Access byte
	Address                     uint64
}

// port is a register in I/O space, accessed by units of bytes.
func port(addr uint16, size, access byte) gas {
	return gas{Space: 1, Bits: 8 * size, Access: map[byte]byte{1: 1, 2: 2, 4: 3}[access], Address: uint64(addr)}
}

// fadt is 5.2.9, without the header.
type fadt struct {
	FirmwareCtrl, DSDT                                 uint32
	_, PreferredPMProfile                              byte
	SCIInt                                             uint16
	SMICmd                                             uint32
	ACPIEnable, ACPIDisable, S4BIOSReq, PStateCnt      byte
	PM1aEvtBlk, PM1bEvtBlk, PM1aCntBlk, PM1bCntBlk     uint32
	PM2CntBlk, PMTmrBlk, GPE0Blk, GPE1Blk              uint32
	PM1EvtLen, PM1CntLen, PM2CntLen, PMTmrLen          byte
	GPE0BlkLen, GPE1BlkLen, GPE1Base, CSTCnt           byte
	PLvl2Lat, PLvl3Lat, FlushSize, FlushStride         uint16
	DutyOffset, DutyWidth, DayAlrm, MonAlrm, Century   byte
	IAPCBootArch                                       uint16
	_                                                  byte
	Flags                                              uint32
	ResetReg                                           gas
	ResetValue                                         byte
	ARMBootArch                                        uint16
	MinorVersion                                       byte
	XFirmwareCtrl, XDSDT                               uint64
	XPM1aEvtBlk, XPM1bEvtBlk, XPM1aCntBlk, XPM1bCntBlk gas
	XPM2CntBlk, XPMTmrBlk, XGPE0Blk, XGPE1Blk          gas
	SleepControlReg, SleepStatusReg                    gas
	HypervisorVendor                                   uint64
}

const (
	// IAPC_BOOT_ARCH (table 5.11). The 8042 bit is clear: see package i8042.
	legacyDevices = 1 << 0
	vgaNotPresent = 1 << 2

	// Flags (table 5.10). The power button and the clock's alarm are fixed hardware,
	// their bits clear; there is no sleep button.
	wbinvd      = 1 << 0
	procC1      = 1 << 2
	slpButton   = 1 << 5
	tmrValExt   = 1 << 8
	resetRegSup = 1 << 10
)

func (c *Config) fadt(facs, dsdt uint64) []byte {
	f := fadt{
		SCIInt:     uint16(c.SCI),
		PM1aEvtBlk: uint32(c.PM + acpipm.OffEvent),
		PM1aCntBlk: uint32(c.PM + acpipm.OffControl),
		PMTmrBlk:   uint32(c.PM + acpipm.OffTimer),
		PM1EvtLen:  4, PM1CntLen: 2, PMTmrLen: 4,
		PLvl2Lat: 0xfff, PLvl3Lat: 0xfff, // more than 100 and 1000: no C2, no C3
		Century:      rtc.Century,
		IAPCBootArch: legacyDevices | vgaNotPresent,
		Flags:        wbinvd | procC1 | slpButton | tmrValExt | resetRegSup,
		ResetReg:     port(c.ResetPort, 1, 1),
		ResetValue:   acpipm.ResetValue,
		MinorVersion: 4,
		XPM1aEvtBlk:  port(c.PM+acpipm.OffEvent, 4, 2),
		XPM1aCntBlk:  port(c.PM+acpipm.OffControl, 2, 2),
		XPMTmrBlk:    port(c.PM+acpipm.OffTimer, 4, 4),
	}
	// Above 4 GiB only the 64-bit fields hold the addresses; below it both do.
	f.XFirmwareCtrl, f.XDSDT = facs, dsdt
	if c.Area.end() <= 1<<32 {
		f.FirmwareCtrl, f.DSDT = uint32(facs), uint32(dsdt)
	}
	return table("FACP", 6, marshal(f))
}

// madt is 5.2.12.
func (c *Config) madt() []byte {
	const (
		localAPIC  = 0xfee00000
		pcatCompat = 1 // there are two 8259s
		enabled    = 1
		isa        = 0
		levelHigh  = 3<<2 | 1 // trigger mode level, polarity active high
		levelLow   = 3<<2 | 3 // and active low, as PCI's are
		lint1      = 1
	)
	b := marshal(uint32(localAPIC), uint32(pcatCompat))
	x2 := false
	for uid, id := range c.APICIDs {
		if id < 255 {
			b = append(b, marshal(struct {
				Type, Length, UID, ID byte
				Flags                 uint32
			}{0, 8, byte(uid), byte(id), enabled})...)
			continue
		}
		x2 = true
		b = append(b, marshal(struct {
			Type, Length   byte
			_              uint16
			ID, Flags, UID uint32
		}{9, 16, 0, id, enabled, uint32(uid)})...)
	}
	b = append(b, marshal(struct {
		Type, Length, ID, _ byte
		Address, GSIBase    uint32
	}{1, 12, 0, 0, c.IOAPIC, 0})...)

	override := func(irq byte, gsi uint32, flags uint16) {
		b = append(b, marshal(struct {
			Type, Length, Bus, Source byte
			GSI                       uint32
			Flags                     uint16
		}{2, 10, isa, irq, gsi, flags})...)
	}
	override(0, 2, 0)
	override(c.SCI, uint32(c.SCI), levelHigh)
	for i, irq := range c.INTx {
		if !slices.Contains(c.INTx[:i], irq) {
			override(irq, uint32(irq), levelLow)
		}
	}

	b = append(b, marshal(struct { // NMI of every local APIC
		Type, Length, UID byte
		Flags             uint16
		LINT              byte
	}{4, 6, 0xff, 0, lint1})...)
	if x2 {
		b = append(b, marshal(struct {
			Type, Length byte
			Flags        uint16
			UID          uint32
			LINT         byte
			_            [3]byte
		}{10, 12, 0, 0xffffffff, lint1, [3]byte{}})...)
	}
	return table("APIC", 5, b)
}

// mcfg is PCI Firmware 3.3, 4.1.2: one segment.
func (c *Config) mcfg() []byte {
	return table("MCFG", 1, marshal(uint64(0), struct {
		Base       uint64
		Segment    uint16
		Start, End byte
		_          uint32
	}{c.ECAM, 0, 0, byte(c.Buses - 1), 0}))
}
