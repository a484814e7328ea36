package boot

import "encoding/binary"

// Layouts of xen/interface/hvm/start_info.h, version 1.
const (
	startInfoMagic = 0x336ec578
	startInfoSize  = 56
	modlistSize    = 32 // hvm_modlist_entry: paddr, size, cmdline_paddr, reserved
	memmapSize     = 24 // hvm_memmap_table_entry: addr, size, type, reserved
)

// pvh writes the structures that a kernel entered by PVH reads: hvm_start_info, followed by the
// module list and the memory map.
func (ld *loader) pvh(rip uint64, h *setupHeader, limit initrdLimit) (Entry, error) {
	maxCmdLine := uint64(maxELFCmdLine)
	if h != nil {
		maxCmdLine = uint64(h.cmdlineSize())
	}
	cmdline, err := ld.cmdLine(maxCmdLine)
	if err != nil {
		return Entry{}, err
	}
	initrd, initrdSize, err := ld.initrd(limit)
	if err != nil {
		return Entry{}, err
	}
	size := startInfoSize + modlistSize + memmapSize*len(ld.e820)
	info, err := ld.place("PVH start info", uint64(size), 8)
	if err != nil {
		return Entry{}, err
	}
	b := make([]byte, size)
	le := binary.LittleEndian
	le.PutUint32(b, startInfoMagic)
	le.PutUint32(b[4:], 1) // version
	if initrdSize > 0 {
		le.PutUint32(b[12:], 1) // nr_modules
		le.PutUint64(b[16:], info+startInfoSize)
		le.PutUint64(b[startInfoSize:], initrd)
		le.PutUint64(b[startInfoSize+8:], initrdSize)
	}
	le.PutUint64(b[24:], cmdline)
	le.PutUint64(b[32:], ld.cfg.RSDP)
	le.PutUint64(b[40:], info+startInfoSize+modlistSize)
	le.PutUint32(b[48:], uint32(len(ld.e820)))
	for i, e := range ld.e820 {
		m := b[startInfoSize+modlistSize+memmapSize*i:]
		le.PutUint64(m, e.Addr)
		le.PutUint64(m[8:], e.Size)
		le.PutUint32(m[16:], e.Type)
	}
	return Entry{Protocol: PVH32, RIP: rip, StartInfo: info}, ld.mem.Write(info, b)
}
