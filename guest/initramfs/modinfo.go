package initramfs

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"gvm/elffile"
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
	f, err := elffile.Open(r)
	if err != nil {
		return moduleInfo{}, errors.New("it is no ELF file")
	}
	s := f.Section(".modinfo")
	if s == nil || elf.SectionType(s.Type) == elf.SHT_NOBITS {
		return moduleInfo{}, errors.New("it has no section .modinfo")
	}
	b, err := f.Data(s, maxInfo)
	if err != nil {
		return moduleInfo{}, fmt.Errorf("its section .modinfo cannot be read: %w", err)
	}
	m := parseInfo(b)
	m.size = len(b) + wordSize*(len(m.depends)+len(m.pre)+len(m.post)+len(m.aliases))
	return m, nil
}

// wordSize is about the memory for a word of a .modinfo section besides its bytes.
const wordSize = 100

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
