package initramfs

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
)

// maxInfo bounds a .modinfo section; those of Linux have less than 100 KiB.
const maxInfo = 1 << 20

// moduleInfo is the part of a module's .modinfo section that tells of other modules.
type moduleInfo struct {
	depends   []string
	pre, post []string // softdep: to load before and after, if they exist
	aliases   []string
	size      int // of the section
}

// parseInfo reads the words "key=value" of a .modinfo section, each with a NUL behind it
// (include/linux/moduleparam.h). Names are as moduleName returns them.
func parseInfo(b []byte) (m moduleInfo) {
	for word := range bytes.SplitSeq(b, []byte("\x00")) {
		key, value, _ := strings.Cut(string(word), "=")
		switch key {
		case "depends":
			for name := range strings.SplitSeq(value, ",") {
				if name != "" {
					m.depends = append(m.depends, spelling(name))
				}
			}
		case "softdep":
			to := &[]string{} // words before pre: and post: have no meaning
			for name := range strings.FieldsSeq(value) {
				switch name {
				case "pre:":
					to = &m.pre
				case "post:":
					to = &m.post
				default:
					*to = append(*to, spelling(name))
				}
			}
		case "alias":
			m.aliases = append(m.aliases, spelling(value))
		}
	}
	return m
}

// readInfo reads the .modinfo section of a module.
func readInfo(r io.ReaderAt) (moduleInfo, error) {
	f, err := openELF(r)
	if err != nil {
		return moduleInfo{}, errors.New("it is no ELF file")
	}
	s := f.Section(".modinfo")
	if s == nil || s.Type == elf.SHT_NOBITS {
		return moduleInfo{}, errors.New("it has no section .modinfo")
	}
	if s.Size > maxInfo || s.FileSize > maxInfo {
		return moduleInfo{}, fmt.Errorf("its section .modinfo has %d KiB, and %d KiB are the most", s.Size>>10, maxInfo>>10)
	}
	b, err := s.Data()
	if err != nil {
		return moduleInfo{}, errors.New("its section .modinfo cannot be read")
	}
	m := parseInfo(b)
	m.size = len(b) + wordSize*(len(m.depends)+len(m.pre)+len(m.post)+len(m.aliases))
	return m, nil
}

// wordSize is about the memory for a word of a .modinfo section besides its bytes.
const wordSize = 100

// openELF opens an ELF file for x86. One whose table of section names is compressed is refused:
// elf.NewFile would decompress it to any size.
func openELF(r io.ReaderAt) (*elf.File, error) {
	errELF := errors.New("not an ELF file")
	var head [elf.EI_NIDENT]byte
	if _, err := r.ReadAt(head[:], 0); err != nil || head[elf.EI_DATA] != byte(elf.ELFDATA2LSB) {
		return nil, errELF
	}
	var h elf.Header64
	section := func(i uint32) (s elf.Section64, err error) {
		in := io.NewSectionReader(r, int64(h.Shoff)+int64(i)*int64(h.Shentsize), int64(binary.Size(s)))
		if elf.Class(head[elf.EI_CLASS]) == elf.ELFCLASS64 {
			return s, binary.Read(in, binary.LittleEndian, &s)
		}
		var s32 elf.Section32
		err = binary.Read(in, binary.LittleEndian, &s32)
		return elf.Section64{Flags: uint64(s32.Flags), Link: s32.Link}, err
	}
	in, err := io.NewSectionReader(r, 0, int64(binary.Size(h))), error(nil)
	if elf.Class(head[elf.EI_CLASS]) == elf.ELFCLASS64 {
		err = binary.Read(in, binary.LittleEndian, &h)
	} else {
		var h32 elf.Header32
		err = binary.Read(in, binary.LittleEndian, &h32)
		h.Shoff, h.Shentsize, h.Shstrndx = uint64(h32.Shoff), h32.Shentsize, h32.Shstrndx
	}
	if err != nil {
		return nil, errELF
	}
	if h.Shoff > 0 {
		names := uint32(h.Shstrndx)
		if elf.SectionIndex(names) == elf.SHN_XINDEX {
			first, err := section(0)
			if err != nil {
				return nil, errELF
			}
			names = first.Link
		}
		if s, err := section(names); err != nil || elf.SectionFlag(s.Flags)&elf.SHF_COMPRESSED != 0 {
			return nil, errELF
		}
	}
	return elf.NewFile(r)
}

// moduleName returns the kernel's spelling of a module's name or path.
func moduleName(s string) string {
	return spelling(strings.TrimSuffix(path.Base(uncompressed(s)), ".ko"))
}

// uncompressed returns a path without the suffix of a compression of modules.
func uncompressed(s string) string {
	for _, suffix := range []string{".xz", ".zst", ".gz"} {
		if rest, ok := strings.CutSuffix(s, ".ko"+suffix); ok {
			return rest + ".ko"
		}
	}
	return s
}

// spelling returns the kernel's spelling of a name or alias.
func spelling(s string) string { return strings.ReplaceAll(s, "-", "_") }
