package boot

import "encoding/binary"

// Offsets of zero page fields outside the setup header (Documentation/arch/x86/zero-page.rst).
const (
	zpRSDP        = 0x070 // u64
	zpExtRamdisk  = 0x0c0 // u32, high half of ramdisk_image
	zpExtRDSize   = 0x0c4 // u32
	zpExtCmdLine  = 0x0c8 // u32
	zpE820Entries = 0x1e8 // u8
	zpE820Table   = 0x2d0 // 20 bytes each: addr, size, type
	zeroPageSize  = 4096
)

// gdt is the GDT that boot.rst requires at the 64-bit entry: __BOOT_CS (0x10), 4 GiB flat
// execute/read in long mode, and __BOOT_DS (0x18), 4 GiB flat read/write.
var gdt = [4]uint64{2: 0x00af9b000000ffff, 3: 0x00cf93000000ffff}

const (
	ptePresent = 1 << 0
	pteWrite   = 1 << 1
	pteHuge    = 1 << 7 // in a page directory: 2 MiB page
)

// linux64 writes the structures that a kernel entered in long mode reads. h is the setup header of
// the kernel's bzImage; nil uses values that Linux 3.8 and later accept.
func (ld *loader) linux64(rip uint64, h *setupHeader) (Entry, error) {
	zp := make([]byte, zeroPageSize)
	le := binary.LittleEndian
	maxCmdLine, limit := uint64(maxELFCmdLine), initrdLimit{end: 1 << 32, above4G: true}
	if h != nil {
		copy(zp[hdrStart:], h.b[hdrStart:])
		maxCmdLine = uint64(h.cmdlineSize())
		if !h.loadableAbove4G() {
			limit = initrdLimit{end: uint64(h.u32(hdrInitrdMax)) + 1, mend: "a kernel with CONFIG_RELOCATABLE=y"}
		}
	} else {
		le.PutUint16(zp[hdrBootFlag:], bootFlag)
		copy(zp[hdrMagic:], "HdrS")
		le.PutUint16(zp[hdrVersion:], minVersion)
		le.PutUint32(zp[hdrCmdLineSize:], maxELFCmdLine)
	}
	cmdline, err := ld.cmdLine(maxCmdLine)
	if err != nil {
		return Entry{}, err
	}
	initrd, initrdSize, err := ld.initrd(limit)
	if err != nil {
		return Entry{}, err
	}
	zp[hdrTypeOfLoader] = undefLoader
	zp[hdrLoadFlags] = zp[hdrLoadFlags]&^(kaslrFlag|canUseHeap) | loadedHigh
	le.PutUint32(zp[hdrRamdisk:], uint32(initrd))
	le.PutUint32(zp[zpExtRamdisk:], uint32(initrd>>32))
	le.PutUint32(zp[hdrRamdiskSize:], uint32(initrdSize))
	le.PutUint32(zp[zpExtRDSize:], uint32(initrdSize>>32))
	le.PutUint32(zp[hdrCmdLinePtr:], uint32(cmdline))
	le.PutUint32(zp[zpExtCmdLine:], uint32(cmdline>>32))
	le.PutUint64(zp[zpRSDP:], ld.cfg.RSDP)
	zp[zpE820Entries] = uint8(len(ld.e820))
	for i, e := range ld.e820 {
		row := zp[zpE820Table+20*i:]
		le.PutUint64(row, e.Addr)
		le.PutUint64(row[8:], e.Size)
		le.PutUint32(row[16:], e.Type)
	}
	e := Entry{Protocol: Linux64, RIP: rip}
	if e.ZeroPage, err = ld.place("zero page", zeroPageSize, pageSize); err != nil {
		return Entry{}, err
	}
	if err := ld.mem.Write(e.ZeroPage, zp); err != nil {
		return Entry{}, err
	}
	table := make([]byte, 8*len(gdt))
	for i, d := range gdt {
		le.PutUint64(table[8*i:], d)
	}
	e.GDTLimit = uint16(len(table) - 1)
	if e.GDT, err = ld.place("GDT", uint64(len(table)), 8); err != nil {
		return Entry{}, err
	}
	if err := ld.mem.Write(e.GDT, table); err != nil {
		return Entry{}, err
	}
	e.CR3, err = ld.pageTables(initrd + initrdSize)
	return e, err
}

// pageTables maps the first 4 GiB, and memory above them up to end, to itself by 2 MiB pages, and
// returns the address of the PML4.
func (ld *loader) pageTables(end uint64) (uint64, error) {
	const gib = 1 << 30
	dirs := max(4, (end+gib-1)/gib)
	size := (2 + dirs) * pageSize
	pml4, err := ld.place("page tables", size, pageSize)
	if err != nil {
		return 0, err
	}
	b := make([]byte, size)
	le := binary.LittleEndian
	le.PutUint64(b, (pml4+pageSize)|ptePresent|pteWrite)
	for i := range dirs {
		le.PutUint64(b[pageSize+8*i:], (pml4+(2+i)*pageSize)|ptePresent|pteWrite)
	}
	for i := range dirs * 512 {
		le.PutUint64(b[2*pageSize+8*i:], i<<21|ptePresent|pteWrite|pteHuge)
	}
	return pml4, ld.mem.Write(pml4, b)
}
