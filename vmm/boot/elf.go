package boot

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"io"
	"slices"
	"sort"
)

// elfKernel is an ELF file whose headers are checked against its size.
type elfKernel struct {
	r     io.ReaderAt
	loads []elf.Prog64 // PT_LOAD with a memory size, ascending by physical address
	entry uint64       // physical address of the ELF entry point
	pvh   uint64       // physical address of the PVH entry point; 0: none
}

const (
	maxPhnum    = 256
	maxNoteSize = 1 << 20
	phys32Entry = 18 // XEN_ELFNOTE_PHYS32_ENTRY, xen/interface/elfnote.h
)

const (
	wantKernel = "give an x86-64 bzImage or vmlinux"
	wantWhole  = "copy or build it again"
)

// parseELF checks an ELF file of size bytes and finds its entry points. Its
// errors are *ImageError about name.
func parseELF(name string, r io.ReaderAt, size int64) (*elfKernel, error) {
	truncated := &ImageError{name, "is a truncated ELF file", wantWhole}
	var raw [64]byte
	n, err := r.ReadAt(raw[:], 0)
	if n < elf.EI_NIDENT {
		return nil, truncated
	}
	// e_type and e_machine have the same offsets in 32-bit and 64-bit files.
	machine := elf.Machine(binary.LittleEndian.Uint16(raw[18:]))
	if elf.Data(raw[elf.EI_DATA]) != elf.ELFDATA2LSB {
		return nil, &ImageError{name, "is a big-endian ELF file", wantKernel}
	}
	if elf.Class(raw[elf.EI_CLASS]) == elf.ELFCLASS32 && (machine == elf.EM_386 || machine == elf.EM_X86_64) {
		return nil, &ImageError{name, "is a 32-bit ELF file", wantKernel}
	}
	if n >= 20 && machine != elf.EM_X86_64 {
		return nil, &ImageError{name, fmt.Sprintf("is an ELF file for %v", machine), wantKernel}
	}
	if n < len(raw) {
		if err != nil && err != io.EOF {
			return nil, &ImageError{name, fmt.Sprintf("cannot be read: %v", err), "check the file"}
		}
		return nil, truncated
	}
	var h elf.Header64
	if err := binary.Read(bytes.NewReader(raw[:]), binary.LittleEndian, &h); err != nil {
		return nil, truncated
	}
	switch elf.Type(h.Type) {
	case elf.ET_EXEC:
	case elf.ET_REL:
		return nil, &ImageError{name, "is a relocatable object (a kernel module or .o file), not a kernel", wantKernel}
	case elf.ET_DYN:
		return nil, &ImageError{name, "is a shared object or a position-independent program, not a kernel", wantKernel}
	default:
		return nil, &ImageError{name, fmt.Sprintf("is an ELF file of type %v, not a kernel", elf.Type(h.Type)), wantKernel}
	}
	if h.Phnum == 0 {
		return nil, &ImageError{name, "is an ELF file without program headers", wantKernel}
	}
	if h.Phentsize != 56 || h.Phnum > maxPhnum {
		return nil, &ImageError{name, fmt.Sprintf("has %d ELF program headers of %d bytes", h.Phnum, h.Phentsize), wantWhole}
	}
	progs := make([]elf.Prog64, h.Phnum)
	table, ok := section(r, size, h.Phoff, uint64(h.Phnum)*56)
	if !ok || binary.Read(table, binary.LittleEndian, progs) != nil {
		return nil, truncated
	}
	k := &elfKernel{r: r}
	program := false
	for _, p := range progs {
		switch elf.ProgType(p.Type) {
		case elf.PT_INTERP, elf.PT_DYNAMIC, elf.PT_TLS:
			program = true
		case elf.PT_LOAD:
			if p.Filesz > p.Memsz || p.Paddr+p.Memsz < p.Paddr {
				return nil, &ImageError{name, fmt.Sprintf("has a bad ELF segment: %d bytes of file for [%#x, +%#x)",
					p.Filesz, p.Paddr, p.Memsz), wantWhole}
			}
			if _, ok := section(r, size, p.Off, p.Filesz); !ok {
				return nil, truncated
			}
			if p.Memsz > 0 {
				k.loads = append(k.loads, p)
			}
		case elf.PT_NOTE:
			notes, ok := section(r, size, p.Off, p.Filesz)
			if !ok {
				return nil, truncated
			}
			if p.Filesz > maxNoteSize {
				continue
			}
			b := make([]byte, p.Filesz)
			if _, err := io.ReadFull(notes, b); err != nil {
				return nil, truncated
			}
			if entry, ok := pvhNote(b, p.Align); ok {
				k.pvh = entry
			}
		}
	}
	if k.pvh == 0 && program {
		return nil, &ImageError{name, "is a program, not a kernel", wantKernel}
	}
	if err := k.check(name, h.Entry); err != nil {
		return nil, err
	}
	return k, nil
}

// check verifies that segments do not overlap and that the entry points are in them.
func (k *elfKernel) check(name string, entry uint64) error {
	if len(k.loads) == 0 {
		return &ImageError{name, "is an ELF file with nothing to load", wantKernel}
	}
	sort.SliceStable(k.loads, func(i, j int) bool { return k.loads[i].Paddr < k.loads[j].Paddr })
	for i, p := range k.loads[1:] {
		if q := k.loads[i]; q.Paddr+q.Memsz > p.Paddr {
			return &ImageError{name, fmt.Sprintf("has ELF segments that overlap at %#x", p.Paddr), wantWhole}
		}
	}
	if k.pvh != 0 && !k.loaded(k.pvh) {
		return &ImageError{name, fmt.Sprintf("has its PVH entry point %#x outside its segments", k.pvh), wantWhole}
	}
	k.entry = entry
	if !k.loaded(entry) {
		// Linux gives a physical address; other kernels give the virtual one.
		i := slices.IndexFunc(k.loads, func(p elf.Prog64) bool { return entry-p.Vaddr < p.Filesz })
		switch {
		case i >= 0:
			k.entry = entry - k.loads[i].Vaddr + k.loads[i].Paddr
		case k.pvh != 0:
			k.entry = 0
		default:
			return &ImageError{name, fmt.Sprintf("has its entry point %#x outside its segments", entry), wantWhole}
		}
	}
	return nil
}

// loaded reports whether the physical address is in the file's part of a segment.
func (k *elfKernel) loaded(addr uint64) bool {
	return slices.ContainsFunc(k.loads, func(p elf.Prog64) bool { return addr >= p.Paddr && addr-p.Paddr < p.Filesz })
}

// section returns [off, off+n) of a file of size bytes, if the file has all of it.
func section(r io.ReaderAt, size int64, off, n uint64) (io.Reader, bool) {
	if off > uint64(size) || n > uint64(size)-off {
		return nil, false
	}
	return io.NewSectionReader(r, int64(off), int64(n)), true
}

// pvhNote looks for XEN_ELFNOTE_PHYS32_ENTRY in the notes of a PT_NOTE segment.
func pvhNote(b []byte, align uint64) (uint64, bool) {
	if align != 8 {
		align = 4 // gABI says 8 for 64-bit files; in practice it is 4 except for GNU properties
	}
	up := func(n uint32) uint64 { return (uint64(n) + align - 1) &^ (align - 1) }
	for len(b) >= 12 {
		namesz, descsz := binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:])
		kind := binary.LittleEndian.Uint32(b[8:])
		desc := (12 + uint64(namesz) + align - 1) &^ (align - 1)
		if uint64(len(b)) < desc+uint64(descsz) {
			return 0, false
		}
		if kind == phys32Entry && bytes.Equal(b[12:12+namesz], []byte("Xen\x00")) {
			switch descsz {
			case 4:
				return uint64(binary.LittleEndian.Uint32(b[desc:])), true
			case 8:
				if v := binary.LittleEndian.Uint64(b[desc:]); v < 1<<32 {
					return v, true
				}
			}
		}
		b = b[min(desc+up(descsz), uint64(len(b))):]
	}
	return 0, false
}

// placeELF takes the memory of the kernel's segments, and writes nothing.
func (ld *loader) placeELF(k *elfKernel) error {
	for _, p := range k.loads {
		if !ld.free.take(p.Paddr, p.Memsz) {
			return ld.imageError(roomMend(p.Paddr, p.Paddr+p.Memsz,
				"build it for addresses where guests have RAM, such as 1 MiB to 3 GiB"),
				"needs memory at [%#x, %#x) for a segment, which is not all free RAM in a guest "+
					"of %d MiB", p.Paddr, p.Paddr+p.Memsz, ld.mem.Size()>>20)
		}
	}
	return nil
}

// startELF loads a kernel placed by placeELF. h is the setup header of its bzImage, or nil.
func (ld *loader) startELF(k *elfKernel, h *setupHeader) (Entry, error) {
	proto := ld.cfg.Protocol
	switch {
	case proto == 0 && k.pvh != 0 && (k.entry == 0 || pvhInitrd.fits(ld)):
		proto = PVH32
	case proto == 0:
		proto = Linux64
	case proto == PVH32 && k.pvh == 0:
		return Entry{}, ld.imageError("build it with CONFIG_PVH=y, or use the 64-bit entry", "has no PVH note")
	case proto == Linux64 && k.entry == 0:
		return Entry{}, ld.imageError("use PVH", "has no 64-bit entry point in its segments")
	}
	for _, p := range k.loads {
		b, err := ld.mem.Slice(p.Paddr, p.Memsz)
		if err != nil {
			return Entry{}, err
		}
		f := File{Name: ld.cfg.Kernel.Name, ReaderAt: k.r, Size: int64(p.Off + p.Filesz)}
		if err := f.ReadFull(b[:p.Filesz], int64(p.Off)); err != nil {
			return Entry{}, err
		}
		if ld.cfg.Dirty {
			clear(b[p.Filesz:])
		}
	}
	if proto == PVH32 {
		limit := pvhInitrd
		if k.entry != 0 {
			limit.mend = "use the 64-bit entry"
		}
		return ld.pvh(k.pvh, h, limit)
	}
	return ld.linux64(k.entry, h)
}
