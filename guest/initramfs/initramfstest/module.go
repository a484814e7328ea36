// Package initramfstest makes modules of Linux for tests.
package initramfstest

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"strings"
)

// Signature is the end of a signed module: an empty signature, a struct module_signature, and the
// mark (scripts/sign-file.c of Linux).
const Signature = "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00~Module signature appended~\n"

// Module returns an ELF file with words such as "depends=virtio,virtio_ring" as its section
// .modinfo, and Signature behind it. It has no code.
func Module(words ...string) []byte {
	info := []byte(strings.Join(words, "\x00") + "\x00")
	names := []byte("\x00.modinfo\x00.shstrtab\x00")
	h := elf.Header64{Type: uint16(elf.ET_REL), Machine: uint16(elf.EM_X86_64), Version: 1, Ehsize: 64, Shentsize: 64,
		Shnum: 3, Shstrndx: 2, Shoff: uint64(64 + len(info) + len(names))}
	copy(h.Ident[:], "\x7fELF\x02\x01\x01")
	var b bytes.Buffer
	for _, v := range []any{h, info, names, elf.Section64{},
		elf.Section64{Name: 1, Type: uint32(elf.SHT_PROGBITS), Off: 64, Size: uint64(len(info))},
		elf.Section64{Name: 10, Type: uint32(elf.SHT_STRTAB), Off: uint64(64 + len(info)), Size: uint64(len(names))},
		[]byte(Signature)} {
		if err := binary.Write(&b, binary.LittleEndian, v); err != nil {
			panic(err)
		}
	}
	return b.Bytes()
}
