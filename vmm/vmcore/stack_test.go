package vmcore

import (
	"bytes"
	"compress/zlib"
	"debug/elf"
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/bobuhiro11/gokvm/kvm"
)

const banner = "Linux version 6.12.0 (of a test)"

// symbolFile makes a vmlinux whose text is at an address. The text has 4 KiB, and the banner
// follows.
func symbolFile(at uint64) []byte {
	names := "\x00first\x00of_assembly\x00last\x00linux_banner\x00a_variable\x00"
	name := func(s string) uint32 { return uint32(strings.Index(names, "\x00"+s+"\x00")) + 1 }
	kind := func(t elf.SymType) uint8 { return elf.ST_INFO(elf.STB_GLOBAL, t) }
	symbols := []elf.Sym64{{},
		{Name: name("last"), Info: kind(elf.STT_FUNC), Shndx: 1, Value: at + 0x300, Size: 0x10},
		{Name: name("first"), Info: kind(elf.STT_FUNC), Shndx: 1, Value: at + 0x100, Size: 0x50},
		{Name: name("of_assembly"), Info: kind(elf.STT_NOTYPE), Shndx: 1, Value: at + 0x200},
		{Name: name("linux_banner"), Info: kind(elf.STT_OBJECT), Shndx: 2, Value: at + 0x1000, Size: uint64(len(banner))},
		{Name: name("a_variable"), Info: kind(elf.STT_OBJECT), Shndx: 2, Value: at + 0x400, Size: 8}}
	var table, head bytes.Buffer
	binary.Write(&table, binary.LittleEndian, symbols)
	h := elf.Header64{Type: uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: 1, Shoff: 64, Ehsize: 64,
		Shentsize: 64, Shnum: 5, Shstrndx: 4}
	copy(h.Ident[:], elf.ELFMAG+"\x02\x01\x01")
	off := uint64(64 + 5*64)
	sections := []elf.Section64{{},
		{Type: uint32(elf.SHT_NOBITS), Flags: uint64(elf.SHF_ALLOC | elf.SHF_EXECINSTR), Addr: at, Size: 0x1000},
		{Type: uint32(elf.SHT_PROGBITS), Flags: uint64(elf.SHF_ALLOC), Addr: at + 0x1000, Off: off,
			Size: uint64(len(banner))},
		{Type: uint32(elf.SHT_SYMTAB), Off: off + 64, Size: uint64(table.Len()), Link: 4, Entsize: elf.Sym64Size},
		{Type: uint32(elf.SHT_STRTAB), Off: off + 64 + uint64(table.Len()), Size: uint64(len(names))}}
	binary.Write(&head, binary.LittleEndian, h)
	binary.Write(&head, binary.LittleEndian, sections)
	head.WriteString(banner + strings.Repeat("\x00", 64-len(banner)))
	head.Write(table.Bytes())
	head.WriteString(names)
	return head.Bytes()
}

// TestStacks: each CPU's function, and the return addresses above its stack pointer, by the symbols
// of a kernel that may lie elsewhere. A stack ends at its size, and where nothing is mapped.
func TestStacks(t *testing.T) {
	for _, offset := range []uint64{0, 2 << 20, 64 << 20} {
		mem := memory(t, nil)
		write := func(at uint64, b []byte) {
			if err := mem.Write(textAt+at, b); err != nil {
				t.Fatal(err)
			}
		}
		write(0x1000, []byte(banner))
		for at, addr := range map[uint64]uint64{0x8ff0: text + 0x300, 0x9000: text + 0x14f, 0x9008: 0xdead,
			0x9010: text + 0x150, 0x9018: text + 0x2ff, 0x9020: text + 0x404, 0xbff8: text + 0x30f, 0xc000: text + 0x300} {
			write(at, binary.LittleEndian.AppendUint64(nil, addr))
		}
		kernel, program, lost := kernelCPU(true), kernelCPU(false), kernelCPU(false)
		kernel.Regs.RIP, kernel.Regs.RSP = text+0x101, text+0x9000
		program.Regs.RIP, program.Regs.RSP, program.Sregs.SS.DPL = 0x401000, text+0x9000, 3
		lost.Regs.RIP, lost.Regs.RSP = text+0x50, 1<<63
		symbols, err := ReadSymbols(bytes.NewReader(symbolFile(text - offset)))
		if err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		if err := Stacks(&b, mem, []CPU{kernel, program, lost}, symbols); err != nil {
			t.Fatal(err)
		}
		const want = "vCPU 0: rip 0xffffffff92200101 first+0x1/0x50\n  ? first+0x4f/0x50\n  ? of_assembly+0xff/0x100\n" +
			"  ? last+0xf/0x10\nvCPU 1: rip 0x401000, in user space\nvCPU 2: rip 0xffffffff92200050\n"
		if b.String() != want {
			t.Errorf("offset %#x: %s\nwant %s", offset, &b, want)
		}
	}
	symbols, err := ReadSymbols(bytes.NewReader(symbolFile(text)))
	if err != nil {
		t.Fatal(err)
	}
	mem := memory(t, nil)
	for at, b := range map[uint64][]byte{textAt + 0x1000: []byte(banner),
		0x18: binary.LittleEndian.AppendUint64(nil, text+0x14f)} {
		if err := mem.Write(at, b); err != nil {
			t.Fatal(err)
		}
	}
	reset := CPU{Regs: kvm.Regs{RIP: 0xfff0}}
	lost := reset
	lost.Lost = true
	var b bytes.Buffer
	if err := Stacks(&b, mem, []CPU{kernelCPU(true), reset, lost}, symbols); err != nil {
		t.Fatal(err)
	}
	const want = "vCPU 0: rip 0x0\nvCPU 1: rip 0xfff0\nvCPU 2: its registers are lost: on AMD, KVM resets a CPU that " +
		"had a triple fault\n"
	if b.String() != want {
		t.Errorf("without paging: %s\nwant %s", &b, want)
	}
	if err := Stacks(&bytes.Buffer{}, memory(t, nil), []CPU{kernelCPU(false)}, symbols); !errors.Is(err, ErrOtherKernel) {
		t.Error(err)
	}
}

// TestEndOfSection: the last symbol of a section, which marks its end, does not reach into the next
// one.
func TestEndOfSection(t *testing.T) {
	s := Symbols{functions: []function{{name: "_einittext", section: 1, value: 0x100},
		{name: "next", section: 2, value: 0x1000, size: 8}}}
	if name := s.name(0x200); name != "" {
		t.Errorf("between two sections there is %s", name)
	}
}

// TestHostileSymbols: a table that is compressed, to any size, or larger than those of kernels is
// not read.
func TestHostileSymbols(t *testing.T) {
	const symtab, strtab = 3, 4
	le := binary.LittleEndian
	file := func(section int, change func(header, data []byte) []byte) []byte {
		b := symbolFile(text)
		le.PutUint16(b[62:], 0) // e_shstrndx: the sections have no names
		header := b[64+section*64:][:64]
		off, size := le.Uint64(header[24:]), le.Uint64(header[32:])
		return append(b, change(header, b[off:][:size])...)
	}
	compress := func(section int) []byte {
		return file(section, func(header, data []byte) []byte {
			var zip bytes.Buffer
			size := uint64(len(data) + 1<<20)
			binary.Write(&zip, le, elf.Chdr64{Type: uint32(elf.COMPRESS_ZLIB), Size: size, Addralign: 1})
			z := zlib.NewWriter(&zip)
			z.Write(append(slices.Clone(data), make([]byte, 1<<20)...))
			z.Close()
			le.PutUint64(header[8:], uint64(elf.SHF_COMPRESSED))
			le.PutUint64(header[24:], uint64(len(symbolFile(text))))
			le.PutUint64(header[32:], uint64(zip.Len()))
			return zip.Bytes()
		})
	}
	enlarge := func(section int, size uint64) []byte {
		return file(section, func(header, _ []byte) []byte {
			le.PutUint64(header[32:], size)
			return nil
		})
	}
	if _, err := ReadSymbols(bytes.NewReader(enlarge(strtab, 1))); err != elf.ErrNoSymbols {
		t.Errorf("a table of one byte: %v", err)
	}
	for name, tt := range map[string]struct {
		b    []byte
		want string
	}{
		"compressed symbols": {compress(symtab), "the symbols: the section is compressed"},
		"compressed names":   {compress(strtab), "the names of symbols: the section is compressed"},
		"many symbols": {enlarge(symtab, maxSymbols*elf.Sym64Size+1),
			"the symbols: the section has 98304 KiB, and 98304 KiB are the most"},
		"long names": {enlarge(strtab, maxNames+1),
			"the names of symbols: the section has 131072 KiB, and 131072 KiB are the most"},
	} {
		if _, err := ReadSymbols(bytes.NewReader(tt.b)); err == nil || err.Error() != tt.want {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// FuzzSymbols: a damaged file has an error or symbols, which any stack can be read with.
func FuzzSymbols(f *testing.F) {
	f.Add(symbolFile(text), uint64(text+0x110))
	f.Fuzz(func(t *testing.T, file []byte, addr uint64) {
		s, err := ReadSymbols(bytes.NewReader(file))
		if err == nil {
			_ = s.name(addr)
		}
	})
}
