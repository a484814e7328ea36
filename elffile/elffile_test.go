package elffile

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"io"
	"slices"
	"strings"
	"testing"
)

// file makes an ELF file with a program header and the sections .text, .strtab and .shstrtab.
func file(class elf.Class, change func(h *elf.Header64, sections []elf.Section64)) []byte {
	const words, names = "\x00one\x00two\x00", "\x00.text\x00.strtab\x00.shstrtab\x00"
	head, prog, sect := 64, 56, 64
	if class == elf.ELFCLASS32 {
		head, prog, sect = 52, 32, 40
	}
	at := uint64(head + prog + 4*sect)
	h := elf.Header64{Type: uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: 1, Phoff: uint64(head),
		Shoff: uint64(head + prog), Phentsize: uint16(prog), Phnum: 1, Shentsize: uint16(sect), Shnum: 4, Shstrndx: 3}
	copy(h.Ident[:], elf.ELFMAG+string([]byte{byte(class), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)}))
	p := elf.Prog64{Type: uint32(elf.PT_INTERP), Flags: 4, Off: at, Filesz: 3, Vaddr: 5, Paddr: 6, Memsz: 7, Align: 8}
	sections := []elf.Section64{{},
		{Name: 1, Type: uint32(elf.SHT_NOBITS), Flags: uint64(elf.SHF_EXECINSTR), Addr: 0x1000, Size: 1 << 20},
		{Name: 7, Type: uint32(elf.SHT_STRTAB), Off: at, Size: uint64(len(words)), Link: 1, Info: 2},
		{Name: 15, Type: uint32(elf.SHT_STRTAB), Off: at + uint64(len(words)), Size: uint64(len(names))}}
	if change != nil {
		change(&h, sections)
	}
	var b bytes.Buffer
	put := func(v any) {
		if err := binary.Write(&b, binary.LittleEndian, v); err != nil {
			panic(err)
		}
	}
	if class == elf.ELFCLASS64 {
		put(h)
		put(p)
		put(sections)
	} else {
		put(elf.Header32{Ident: h.Ident, Type: h.Type, Machine: h.Machine, Version: h.Version, Phoff: uint32(h.Phoff),
			Shoff: uint32(h.Shoff), Phentsize: h.Phentsize, Phnum: h.Phnum, Shentsize: h.Shentsize, Shnum: h.Shnum,
			Shstrndx: h.Shstrndx})
		put(elf.Prog32{Type: p.Type, Flags: p.Flags, Off: uint32(p.Off), Filesz: uint32(p.Filesz),
			Vaddr: uint32(p.Vaddr), Paddr: uint32(p.Paddr), Memsz: uint32(p.Memsz), Align: uint32(p.Align)})
		for _, s := range sections {
			put(elf.Section32{Name: s.Name, Type: s.Type, Flags: uint32(s.Flags), Addr: uint32(s.Addr),
				Off: uint32(s.Off), Size: uint32(s.Size), Link: s.Link, Info: s.Info})
		}
	}
	b.WriteString(words + names)
	return b.Bytes()
}

// TestOpen reads files of both classes, cut at each byte too, and one whose first section has the
// numbers that do not fit into the header.
func TestOpen(t *testing.T) {
	for _, class := range []elf.Class{elf.ELFCLASS32, elf.ELFCLASS64} {
		whole := file(class, nil)
		f, err := Open(bytes.NewReader(whole))
		if err != nil {
			t.Fatal(err)
		}
		p := elf.Prog64{Type: uint32(elf.PT_INTERP), Flags: 4, Off: f.Sections[2].Off, Filesz: 3, Vaddr: 5, Paddr: 6,
			Memsz: 7, Align: 8}
		if f.Class != class || f.Type != elf.ET_EXEC || f.Machine != elf.EM_X86_64 ||
			!slices.Equal(f.Progs, []elf.Prog64{p}) {
			t.Errorf("%v: %v, %v, %v, %+v", class, f.Class, f.Type, f.Machine, f.Progs)
		}
		text, words := f.Section(".text"), f.SectionOf(elf.SHT_STRTAB)
		if text == nil || text.Addr != 0x1000 || text.Size != 1<<20 || f.Section(".tex") != nil || f.Section("text") != nil {
			t.Errorf("%v: .text is %+v", class, text)
		}
		if words == nil || words.Link != 1 || words.Info != 2 {
			t.Fatalf("%v: the strings are %+v", class, words)
		}
		if b, err := f.Data(words, 9); err != nil || string(b) != "\x00one\x00two\x00" {
			t.Errorf("%v: %q, %v", class, b, err)
		}
		if b, err := f.Table(2, 9); err != nil || len(b) != 9 {
			t.Errorf("%v: %q, %v", class, b, err)
		}
		for n := range whole {
			if _, err := Open(bytes.NewReader(whole[:n])); err == nil {
				t.Errorf("%v: %d bytes of %d are taken", class, n, len(whole))
			}
		}
		more := file(class, func(h *elf.Header64, s []elf.Section64) {
			h.Shnum, h.Shstrndx, s[0].Size, s[0].Link = 0, uint16(elf.SHN_XINDEX), 4, 3
		})
		if f, err := Open(bytes.NewReader(more)); err != nil || len(f.Sections) != 4 || f.Section(".strtab") == nil {
			t.Errorf("%v: the numbers in the first section: %v", class, err)
		}
	}
}

// TestHostile: no header makes Open or Data read a compressed table, or one larger than its bound.
func TestHostile(t *testing.T) {
	const strtab, shstrtab = 2, 3
	for _, tt := range []struct {
		name   string
		change func(h *elf.Header64, s []elf.Section64)
		want   string // the error
	}{
		{"no ELF", func(h *elf.Header64, _ []elf.Section64) { h.Ident[0] = 0 }, "not an ELF file for x86"},
		{"class", func(h *elf.Header64, _ []elf.Section64) { h.Ident[4] = 3 }, "not an ELF file for x86"},
		{"big-endian", func(h *elf.Header64, _ []elf.Section64) { h.Ident[5] = 2 }, "not an ELF file for x86"},
		{"large program headers", func(h *elf.Header64, _ []elf.Section64) { h.Phentsize, h.Phnum = 1<<16-1, 1<<16-1 },
			"not an ELF file for x86"},
		{"large sections", func(h *elf.Header64, _ []elf.Section64) { h.Shentsize = 1<<16 - 1 }, "not an ELF file for x86"},
		{"program headers elsewhere", func(h *elf.Header64, _ []elf.Section64) { h.Phoff = 1 << 63 }, "unexpected EOF"},
		{"sections elsewhere", func(h *elf.Header64, _ []elf.Section64) { h.Shoff = 1<<64 - 1 }, "unexpected EOF"},
		{"many sections", func(h *elf.Header64, s []elf.Section64) { h.Shnum, s[0].Size = 0, 1<<40 },
			"1099511627776 sections, and 262144 are the most"},
		{"names in no section", func(h *elf.Header64, _ []elf.Section64) { h.Shstrndx = 4 },
			"the names of sections: there is no section 4"},
		{"large names", func(_ *elf.Header64, s []elf.Section64) { s[shstrtab].Size = 1 << 40 },
			"the names of sections: the section has 1073741824 KiB, and 16384 KiB are the most"},
		{"compressed names", func(_ *elf.Header64, s []elf.Section64) { s[shstrtab].Flags = uint64(elf.SHF_COMPRESSED) },
			"the names of sections: the section is compressed"},
		{"large table", func(_ *elf.Header64, s []elf.Section64) { s[strtab].Size = 1<<20 + 1 },
			"the section has 1024 KiB, and 1024 KiB are the most"},
		{"table elsewhere", func(_ *elf.Header64, s []elf.Section64) { s[strtab].Off = 1 << 63 }, "unexpected EOF"},
		{"compressed table", func(_ *elf.Header64, s []elf.Section64) { s[strtab].Flags = uint64(elf.SHF_COMPRESSED) },
			"the section is compressed"},
		{"table without data", func(_ *elf.Header64, s []elf.Section64) { s[strtab].Type = uint32(elf.SHT_NOBITS) },
			"the section has no data in the file"},
	} {
		f, err := Open(bytes.NewReader(file(elf.ELFCLASS64, tt.change)))
		if err == nil {
			_, err = f.Table(strtab, 1<<20)
		}
		if err == nil || err.Error() != tt.want {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

// TestWord reads strings that end, and looks no further than it is allowed.
func TestWord(t *testing.T) {
	table := []byte("one\x00" + strings.Repeat("x", 10))
	for _, tt := range []struct {
		at   uint64
		most int
		want string
		ok   bool
	}{
		{0, 3, "one", true}, {1, 2, "ne", true}, {3, 0, "", true}, {0, 2, "", false}, {4, 100, "", false},
		{4, 5, "", false}, {14, 5, "", false}, {1<<64 - 1, 5, "", false},
	} {
		if b, ok := Word(table, tt.at, tt.most); string(b) != tt.want || ok != tt.ok {
			t.Errorf("at %d: %q, %v", tt.at, b, ok)
		}
	}
}

// FuzzFile reads arbitrary files: each has headers and names within its bounds, or an error.
func FuzzFile(f *testing.F) {
	f.Add(file(elf.ELFCLASS32, nil))
	f.Add(file(elf.ELFCLASS64, nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		file, err := Open(bytes.NewReader(b))
		if err != nil {
			return
		}
		_ = file.Section(".text")
		for i := range file.Sections {
			if data, err := file.Table(uint32(i), 1<<10); err == nil && len(data) > 1<<10 {
				t.Errorf("section %d: %d bytes", i, len(data))
			}
		}
		if err := file.ReadFull(make([]byte, len(b)+1), 0); err != io.ErrUnexpectedEOF {
			t.Error(err)
		}
	})
}
