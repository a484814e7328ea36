// Package boot loads a kernel, its initrds and its command line into guest memory and returns the
// state in which the first vCPU starts. It does not depend on KVM.
//
// An ELF kernel is entered directly. If it has a PVH note, it is entered by PVH (32-bit protected
// mode, hvm_start_info), unless an initrd must lie above 4 GiB. Else it is entered at its ELF entry
// point by Linux's 64-bit boot protocol (long mode, zero page). The compressed vmlinux of a bzImage
// is decompressed on the host and entered in the same way: the decompressor in the image would do
// the same work far more slowly in the guest. If the host cannot decompress it, the bzImage is
// entered by the 64-bit boot protocol of Documentation/arch/x86/boot.rst.
//
// Libraries decompress: klauspost/compress zstd, pierrec/lz4 the blocks of lz4, the standard
// library gzip and bzip2, mikelolasagasti/xz xz, and ulikunitz/xz LZMA. This package adds only the
// lz4 legacy frame.
package boot

import (
	"fmt"
	"strings"

	"gvm/guestmem"
	"gvm/text"
)

// Mode selects how a bzImage is booted.
type Mode int

const (
	Auto    Mode = iota // decompress on the host, fall back to BzImage with a note
	ELF                 // decompress on the host, or fail; an ELF file is taken as it is
	BzImage             // run the decompressor of the bzImage in the guest
)

var modeNames = [...]string{Auto: "auto", ELF: "elf", BzImage: "bzimage"}

func (m Mode) String() string { return modeNames[m] }

// ParseMode reads a Mode as the --boot flag spells it.
func ParseMode(s string) (Mode, error) {
	for m, name := range modeNames {
		if s == name {
			return Mode(m), nil
		}
	}
	return 0, fmt.Errorf("boot mode %q: want auto, elf or bzimage%s", s, text.Suggest(s, modeNames[:]))
}

// Protocol is the state in which a kernel expects its first CPU.
type Protocol int

const (
	// PVH32 is the x86/HVM direct boot ABI: 32-bit protected mode, flat
	// segments, paging off, EBX = address of hvm_start_info.
	PVH32 Protocol = iota + 1
	// Linux64 is Linux's 64-bit boot protocol: long mode, identity page
	// tables, CS = 0x10, DS = ES = SS = 0x18, RSI = address of the zero page.
	Linux64
)

func (p Protocol) String() string {
	switch p {
	case PVH32:
		return "PVH"
	case Linux64:
		return "64-bit entry"
	}
	return "any"
}

// Config describes the kernel and files to load.
type Config struct {
	Kernel  *Image  // from Open or NewImage
	Initrds []*File // concatenated in this order
	CmdLine string
	Mode    Mode
	// Protocol forces the entry of an ELF kernel. Zero selects PVH if the kernel has the note and
	// the initrds fit below 4 GiB, else the 64-bit entry.
	Protocol Protocol
	RSDP     uint64 // guest physical address of the ACPI RSDP; 0: none
	// E820 is the guest's memory map; nil takes E820(mem). Files are loaded only into its entries
	// of type E820RAM.
	E820 []E820Entry
	// Cache is a directory of decompressed kernels, as CacheDir returns; "" disables the cache.
	Cache string
	// Dirty says that mem may hold something other than zeros.
	Dirty bool
	// Note takes one-line remarks about each fallback; nil drops them.
	Note func(string)
	// Reading takes the name of each file before its contents are read; nil: no call.
	Reading func(name string)
}

// Entry is the state in which the first vCPU starts.
type Entry struct {
	Protocol  Protocol
	RIP       uint64
	StartInfo uint64 // PVH32: hvm_start_info, for EBX
	ZeroPage  uint64 // Linux64: boot_params, for RSI
	CR3       uint64 // Linux64: identity page tables
	GDT       uint64 // Linux64: address of the GDT
	GDTLimit  uint16 // Linux64
	Payload   string // compression of the bzImage that the host decompressed, else ""
}

// maxELFCmdLine is COMMAND_LINE_SIZE less the NUL: an ELF kernel has no header with its limit, and
// Linux cuts a longer line.
const maxELFCmdLine = 2047

// loader is the state of one Load.
type loader struct {
	mem  *guestmem.Memory
	cfg  Config
	e820 []E820Entry
	free layout
}

// Load writes the kernel, the initrds, the command line and the protocol's tables into mem. An
// *ImageError reports user input that cannot be booted.
func Load(mem *guestmem.Memory, cfg Config) (Entry, error) {
	ld := &loader{mem: mem, cfg: cfg, e820: cfg.E820}
	if ld.e820 == nil {
		ld.e820 = E820(mem)
	}
	if len(ld.e820) > maxE820 {
		return Entry{}, fmt.Errorf("the memory map has %d entries, the boot protocols carry %d", len(ld.e820), maxE820)
	}
	if strings.ContainsAny(cfg.CmdLine, "\x00\n") {
		return Entry{}, &ImageError{"the kernel command line", "holds a NUL or a newline", "give one line of text"}
	}
	ld.free = newLayout(mem, ld.e820)
	ld.reading(cfg.Kernel.Name)
	if cfg.Kernel.elf != nil {
		if cfg.Mode == BzImage {
			return Entry{}, &ImageError{cfg.Kernel.Name, "is an ELF kernel, and the boot mode bzimage takes a bzImage",
				"use the boot mode auto or elf"}
		}
		if err := ld.placeELF(cfg.Kernel.elf); err != nil {
			return Entry{}, err
		}
		return ld.startELF(cfg.Kernel.elf, nil)
	}
	return ld.bzImage()
}

func (ld *loader) note(format string, args ...any) {
	if ld.cfg.Note != nil {
		ld.cfg.Note(fmt.Sprintf(format, args...))
	}
}

func (ld *loader) reading(name string) {
	if ld.cfg.Reading != nil {
		ld.cfg.Reading(name)
	}
}

// imageError makes an *ImageError about the kernel.
func (ld *loader) imageError(mend, format string, args ...any) error {
	return &ImageError{ld.cfg.Kernel.Name, fmt.Sprintf(format, args...), mend}
}

// roomMend says how to make [start, end) free RAM: more memory, unless part of the range is never
// RAM.
func roomMend(start, end uint64, otherwise string) string {
	if start >= highRAM && end <= guestmem.HoleStart || start >= guestmem.HoleEnd {
		return "give the guest more memory"
	}
	return otherwise
}

// place takes size bytes for a table, as low as they fit.
func (ld *loader) place(what string, size, align uint64) (uint64, error) {
	addr, ok := ld.free.low(size, align, 0, 1<<32)
	if !ok {
		return 0, ld.imageError("give the guest more memory", "leaves no room for the %s (%d bytes) in the guest's memory",
			what, size)
	}
	return addr, nil
}

// cmdLine writes the NUL-terminated command line and returns its address.
func (ld *loader) cmdLine(limit uint64) (uint64, error) {
	if n := uint64(len(ld.cfg.CmdLine)); n > limit {
		return 0, &ImageError{"the kernel command line", fmt.Sprintf("is %d bytes long, and the kernel takes %d", n, limit),
			"shorten it"}
	}
	b := append([]byte(ld.cfg.CmdLine), 0)
	addr, err := ld.place("command line", uint64(len(b)), 16)
	if err != nil {
		return 0, err
	}
	return addr, ld.mem.Write(addr, b)
}
