package vmcore

import (
	"bytes"
	"cmp"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"

	"gvm/elffile"
	"gvm/guestmem"
	"gvm/vmm/x86"
)

const (
	// stackSize is THREAD_SIZE of Linux without KASAN, to whose multiple its stacks are aligned.
	stackSize = 16 << 10
	// maxCalls bounds the return addresses of a stack.
	maxCalls = 100
	// maxSymbols bounds a table of symbols, maxSymbol the name of one, and maxNames all of them.
	maxSymbols, maxSymbol, maxNames = 4 << 20, 256, 128 << 20
)

// ErrOtherKernel means that the guest's memory has not the kernel of the symbols.
var ErrOtherKernel = errors.New("the guest's memory has no such kernel")

// Symbols are the functions of a Linux kernel.
type Symbols struct {
	functions []function // by address
	banner    uint64     // address of linux_banner
	text      []byte     // of linux_banner
}

// function is a symbol of code.
type function struct {
	name        string
	value, size uint64
	section     uint16
	kind        elf.SymType
}

// ReadSymbols reads the symbols of a vmlinux.
func ReadSymbols(r io.ReaderAt) (*Symbols, error) {
	f, err := elffile.Open(r)
	if err != nil {
		return nil, err
	}
	section := f.SectionOf(elf.SHT_SYMTAB)
	if section == nil || f.Class != elf.ELFCLASS64 {
		return nil, elf.ErrNoSymbols
	}
	table, err := f.Data(section, maxSymbols*elf.Sym64Size)
	if err != nil {
		return nil, fmt.Errorf("the symbols: %w", err)
	}
	words, err := f.Table(section.Link, maxNames)
	if err != nil {
		return nil, fmt.Errorf("the names of symbols: %w", err)
	}
	names := string(words) // which the functions share
	s := &Symbols{}
	for ; len(table) >= elf.Sym64Size; table = table[elf.Sym64Size:] {
		le := binary.LittleEndian // elf.Sym64
		info, number, value, size := table[4], le.Uint16(table[6:]), le.Uint64(table[8:]), le.Uint64(table[16:])
		at := uint64(le.Uint32(table))
		name, ok := elffile.Word(words, at, maxSymbol-1)
		if !ok || number == 0 || int(number) >= len(f.Sections) {
			continue
		}
		section, kind := &f.Sections[number], elf.ST_TYPE(info)
		switch {
		case string(name) == "linux_banner" && value >= section.Addr && size < maxSymbol:
			if off := value - section.Addr; off > section.Size || size > section.Size-off ||
				elf.SectionFlag(section.Flags)&elf.SHF_COMPRESSED != 0 {
				return nil, elf.ErrNoSymbols // the file is damaged
			}
			s.banner, s.text = value, make([]byte, size)
			if err := f.ReadFull(s.text, section.Off+value-section.Addr); err != nil {
				return nil, err
			}
		case elf.SectionFlag(section.Flags)&elf.SHF_EXECINSTR != 0 && (kind == elf.STT_FUNC || kind == elf.STT_NOTYPE):
			s.functions = append(s.functions, function{names[at:][:len(name)], value, size, number, kind})
		}
	}
	if len(s.text) == 0 || len(s.functions) == 0 {
		return nil, elf.ErrNoSymbols
	}
	slices.SortStableFunc(s.functions, func(a, b function) int { return cmp.Compare(a.value, b.value) })
	return s, nil
}

// name returns the function with an address, and the place in it, as Linux writes them; "": none.
func (s *Symbols) name(addr uint64) string {
	i, found := slices.BinarySearchFunc(s.functions, addr, func(y function, addr uint64) int {
		return cmp.Compare(y.value, addr)
	})
	if !found {
		i--
	}
	if i < 0 {
		return ""
	}
	y := s.functions[i]
	for i > 0 && s.functions[i-1].value == y.value && y.kind != elf.STT_FUNC {
		i--
		y = s.functions[i]
	}
	size := y.size
	if size == 0 && i+1 < len(s.functions) && s.functions[i+1].section == y.section { // of assembly
		size = s.functions[i+1].value - y.value
	}
	if addr-y.value >= size {
		return ""
	}
	return fmt.Sprintf("%s+%#x/%#x", y.name, addr-y.value, size)
}

// cr0PG enables paging (Intel SDM 3, 2.5).
const cr0PG = 1 << 31

// Stacks writes the function of each CPU, and those of the return addresses on its stack, from the
// stack pointer upwards. They are marked with ?, as Linux marks those that it is not sure of: some
// may be left over from earlier calls. The memory may be that of a hostile guest.
func Stacks(w io.Writer, mem *guestmem.Memory, cpus []CPU, symbols *Symbols) error {
	space, offset, err := symbols.find(mem, cpus)
	if err != nil {
		return err
	}
	var b bytes.Buffer
	for i := range cpus {
		r, s := &cpus[i].Regs, cpus[i].Sregs
		if cpus[i].Lost {
			fmt.Fprintf(&b, "vCPU %d: its %s\n", i, LostRegisters)
			continue
		}
		fmt.Fprintf(&b, "vCPU %d: rip %#x", i, r.RIP)
		if name := symbols.name(r.RIP - offset); name != "" {
			b.WriteString(" " + name)
		}
		if s.SS.DPL != 0 {
			b.WriteString(", in user space")
		}
		b.WriteString("\n")
		if s.CR0&cr0PG == 0 { // not started, or in early code: it has no stack of the kernel
			continue
		}
		s.CR3 = space
		calls := 0
		for at := (r.RSP + 7) &^ 7; s.SS.DPL == 0 && calls < maxCalls && at < r.RSP|(stackSize-1); at += 8 {
			var word [8]byte
			gpa, ok := x86.Translate(mem.Read, &s, at) // a word lies in one page
			if !ok || mem.Read(gpa, word[:]) != nil {
				break
			}
			if name := symbols.name(binary.LittleEndian.Uint64(word[:]) - offset); name != "" {
				calls++
				b.WriteString("  ? " + name + "\n")
			}
		}
	}
	_, err = w.Write(b.Bytes())
	return err
}

// find returns a page table that has the kernel of the symbols, and the offset of its addresses.
func (s *Symbols) find(mem *guestmem.Memory, cpus []CPU) (cr3, offset uint64, err error) {
	got := make([]byte, len(s.text))
	for _, c := range cpus {
		sregs := c.Sregs
		for _, sregs.CR3 = range []uint64{c.Sregs.CR3, c.Sregs.CR3 &^ x86.UserPageTable} {
			for offset := uint64(0); offset < x86.KernelSize; offset += x86.KernelAlign {
				gpa, ok := x86.Translate(mem.Read, &sregs, s.banner+offset)
				if ok && mem.Read(gpa, got) == nil && bytes.Equal(got, s.text) {
					return sregs.CR3, offset, nil
				}
			}
		}
	}
	return 0, 0, ErrOtherKernel
}
