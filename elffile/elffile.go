// Package elffile reads the headers and tables of ELF files for x86, which may be hostile. A table
// takes no more memory than its reader allows, and a compressed one is refused: debug/elf
// decompresses tables, that of the section names too, to any size.
package elffile

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Bounds of the headers.
const (
	maxSections = 1 << 18  // modules of Linux have some thousands
	maxNames    = 16 << 20 // bytes of the sections' names
)

var errELF = errors.New("not an ELF file for x86")

// File has the headers of an ELF file. Those of a 32-bit file are widened.
type File struct {
	Class    elf.Class
	Type     elf.Type
	Machine  elf.Machine
	Progs    []elf.Prog64
	Sections []elf.Section64

	r     io.ReaderAt
	names []byte // of Sections
}

// Open reads the headers.
func Open(r io.ReaderAt) (*File, error) {
	f := &File{r: r}
	var ident [elf.EI_NIDENT]byte
	if f.ReadFull(ident[:], 0) != nil || string(ident[:4]) != elf.ELFMAG ||
		elf.Data(ident[elf.EI_DATA]) != elf.ELFDATA2LSB || elf.Version(ident[elf.EI_VERSION]) != elf.EV_CURRENT {
		return nil, errELF
	}
	f.Class = elf.Class(ident[elf.EI_CLASS])
	h, err := f.header()
	if err != nil {
		return nil, err
	}
	f.Type, f.Machine = elf.Type(h.Type), elf.Machine(h.Machine)
	if h.Phoff > 0 {
		if f.Progs, err = f.progs(h.Phoff, h.Phentsize, h.Phnum); err != nil {
			return nil, err
		}
	}
	if h.Shoff == 0 {
		return f, nil
	}
	n, names := uint64(h.Shnum), uint32(h.Shstrndx)
	if n == 0 || elf.SectionIndex(names) == elf.SHN_XINDEX { // the first header has what does not fit
		first, err := f.sections(h.Shoff, h.Shentsize, 1)
		if err != nil {
			return nil, err
		}
		if n == 0 {
			n = first[0].Size
		}
		if elf.SectionIndex(names) == elf.SHN_XINDEX {
			names = first[0].Link
		}
	}
	if f.Sections, err = f.sections(h.Shoff, h.Shentsize, n); err != nil || names == 0 {
		return f, err
	}
	if f.names, err = f.Table(names, maxNames); err != nil {
		return nil, fmt.Errorf("the names of sections: %w", err)
	}
	return f, nil
}

func (f *File) header() (elf.Header64, error) {
	switch f.Class {
	case elf.ELFCLASS64:
		h, err := table[elf.Header64](f, 0, 64, 1)
		if err != nil {
			return elf.Header64{}, err
		}
		return h[0], nil
	case elf.ELFCLASS32:
		h, err := table[elf.Header32](f, 0, 52, 1)
		if err != nil {
			return elf.Header64{}, err
		}
		s := h[0]
		return elf.Header64{Type: s.Type, Machine: s.Machine, Phoff: uint64(s.Phoff), Shoff: uint64(s.Shoff),
			Phentsize: s.Phentsize, Phnum: s.Phnum, Shentsize: s.Shentsize, Shnum: s.Shnum, Shstrndx: s.Shstrndx}, nil
	}
	return elf.Header64{}, errELF
}

func (f *File) progs(off uint64, size, n uint16) ([]elf.Prog64, error) {
	if f.Class == elf.ELFCLASS64 {
		return table[elf.Prog64](f, off, size, uint64(n))
	}
	all, err := table[elf.Prog32](f, off, size, uint64(n))
	progs := make([]elf.Prog64, len(all))
	for i, p := range all {
		progs[i] = elf.Prog64{Type: p.Type, Flags: p.Flags, Off: uint64(p.Off), Vaddr: uint64(p.Vaddr),
			Paddr: uint64(p.Paddr), Filesz: uint64(p.Filesz), Memsz: uint64(p.Memsz), Align: uint64(p.Align)}
	}
	return progs, err
}

func (f *File) sections(off uint64, size uint16, n uint64) ([]elf.Section64, error) {
	if n > maxSections {
		return nil, fmt.Errorf("%d sections, and %d are the most", n, maxSections)
	}
	if f.Class == elf.ELFCLASS64 {
		return table[elf.Section64](f, off, size, n)
	}
	all, err := table[elf.Section32](f, off, size, n)
	sections := make([]elf.Section64, len(all))
	for i, s := range all {
		sections[i] = elf.Section64{Name: s.Name, Type: s.Type, Flags: uint64(s.Flags), Addr: uint64(s.Addr),
			Off: uint64(s.Off), Size: uint64(s.Size), Link: s.Link, Info: s.Info}
	}
	return sections, err
}

// table reads n headers, each of which has size bytes in the file.
func table[T any](f *File, off uint64, size uint16, n uint64) ([]T, error) {
	headers := make([]T, n)
	if n == 0 {
		return headers, nil
	}
	if int(size) != binary.Size(headers[0]) {
		return nil, errELF
	}
	b := make([]byte, n*uint64(size))
	if err := f.ReadFull(b, off); err != nil {
		return nil, err
	}
	_, err := binary.Decode(b, binary.LittleEndian, headers)
	return headers, err
}

// ReadFull fills b with the file's bytes from off.
func (f *File) ReadFull(b []byte, off uint64) error {
	if int64(off) < 0 {
		return io.ErrUnexpectedEOF
	}
	n, err := f.r.ReadAt(b, int64(off))
	if n == len(b) {
		return nil
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// Section returns the first section with a name; nil: there is none.
func (f *File) Section(name string) *elf.Section64 {
	for i := range f.Sections {
		s := &f.Sections[i]
		if word, ok := Word(f.names, uint64(s.Name), len(name)); ok && string(word) == name {
			return s
		}
	}
	return nil
}

// SectionOf returns the first section of a type; nil: there is none.
func (f *File) SectionOf(t elf.SectionType) *elf.Section64 {
	for i := range f.Sections {
		if s := &f.Sections[i]; elf.SectionType(s.Type) == t {
			return s
		}
	}
	return nil
}

// Table is Data of the section with a number, such as the Link of another section.
func (f *File) Table(number uint32, most uint64) ([]byte, error) {
	if uint64(number) >= uint64(len(f.Sections)) {
		return nil, fmt.Errorf("there is no section %d", number)
	}
	return f.Data(&f.Sections[number], most)
}

// Data reads a section of at most most bytes.
func (f *File) Data(s *elf.Section64, most uint64) ([]byte, error) {
	switch {
	case elf.SectionType(s.Type) == elf.SHT_NOBITS:
		return nil, errors.New("the section has no data in the file")
	case elf.SectionFlag(s.Flags)&elf.SHF_COMPRESSED != 0:
		return nil, errors.New("the section is compressed")
	case s.Size > most:
		return nil, fmt.Errorf("the section has %d KiB, and %d KiB are the most", s.Size>>10, most>>10)
	}
	b := make([]byte, s.Size)
	return b, f.ReadFull(b, s.Off)
}

// Word returns the string at an offset of a table, which ends with a NUL, if it is there and has at
// most most bytes.
func Word(table []byte, at uint64, most int) ([]byte, bool) {
	if at >= uint64(len(table)) {
		return nil, false
	}
	rest := table[at:]
	n := bytes.IndexByte(rest[:min(len(rest), most+1)], 0)
	if n < 0 {
		return nil, false
	}
	return rest[:n], true
}
