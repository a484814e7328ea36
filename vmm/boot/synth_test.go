package boot

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"testing"

	"gvm/guestmem"
)

// segment is a program header of a synthetic ELF file and its data.
type segment struct {
	kind                elf.ProgType
	vaddr, paddr, memsz uint64
	align               uint64
	data                []byte
}

// makeELF builds an x86-64 ELF file of the segments.
func makeELF(kind elf.Type, entry uint64, segs ...segment) []byte {
	h := elf.Header64{Type: uint16(kind), Machine: uint16(elf.EM_X86_64), Version: 1, Entry: entry,
		Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: uint16(len(segs))}
	copy(h.Ident[:], "\x7fELF\x02\x01\x01")
	var head, body bytes.Buffer
	put(&head, h)
	off := uint64(64 + 56*len(segs))
	for _, s := range segs {
		put(&head, elf.Prog64{Type: uint32(s.kind), Off: off + uint64(body.Len()), Vaddr: s.vaddr, Paddr: s.paddr,
			Filesz: uint64(len(s.data)), Memsz: max(s.memsz, uint64(len(s.data))), Align: s.align})
		body.Write(s.data)
	}
	return append(head.Bytes(), body.Bytes()...)
}

func put(b *bytes.Buffer, v any) {
	if err := binary.Write(b, binary.LittleEndian, v); err != nil {
		panic(err)
	}
}

// note builds one ELF note padded to align.
func note(name string, kind uint32, desc []byte, align int) []byte {
	var b bytes.Buffer
	put(&b, [3]uint32{uint32(len(name)), uint32(len(desc)), kind})
	b.WriteString(name)
	b.Write(make([]byte, -b.Len()&(align-1)))
	b.Write(desc)
	b.Write(make([]byte, -b.Len()&(align-1)))
	return b.Bytes()
}

func le32(v uint32) []byte { return binary.LittleEndian.AppendUint32(nil, v) }
func le64(v uint64) []byte { return binary.LittleEndian.AppendUint64(nil, v) }

// pattern returns n bytes that differ by seed and position.
func pattern(seed byte, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = seed ^ byte(i) ^ byte(i>>8)*3
	}
	return b
}

// kernelELF is a small kernel: text at 2 MiB, data with bss at 3 MiB, entered at
// 0x200040 by its ELF entry and at 0x200080 by PVH.
func kernelELF() []byte {
	notes := append(note("GNU\x00", 3, pattern(9, 20), 4), note("Xen\x00", 18, le64(0x200080), 4)...)
	return makeELF(elf.ET_EXEC, 0x200040,
		segment{kind: elf.PT_LOAD, vaddr: 0xffffffff80300000, paddr: 0x300000, memsz: 0x3000, data: pattern(2, 0x1800)},
		segment{kind: elf.PT_LOAD, vaddr: 0xffffffff80200000, paddr: 0x200000, data: pattern(1, 0x2345)},
		segment{kind: elf.PT_NOTE, data: notes, align: 4})
}

// file makes a File of bytes.
func file(name string, b []byte) *File {
	return &File{Name: name, ReaderAt: bytes.NewReader(b), Size: int64(len(b))}
}

func image(t testing.TB, b []byte) *Image {
	t.Helper()
	im, err := NewImage(file("kernel", b))
	if err != nil {
		t.Fatal(err)
	}
	return im
}

// read returns n bytes of guest memory.
func read(t testing.TB, mem *guestmem.Memory, addr, n uint64) []byte {
	t.Helper()
	b, err := mem.Slice(addr, n)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func u32at(t testing.TB, mem *guestmem.Memory, addr uint64) uint32 {
	t.Helper()
	return binary.LittleEndian.Uint32(read(t, mem, addr, 4))
}

func u64at(t testing.TB, mem *guestmem.Memory, addr uint64) uint64 {
	t.Helper()
	return binary.LittleEndian.Uint64(read(t, mem, addr, 8))
}

func equalBytes(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if !bytes.Equal(got, want) {
		i := 0
		for i < len(got) && i < len(want) && got[i] == want[i] {
			i++
		}
		t.Fatalf("%s: %d bytes, want %d; they differ at %d", what, len(got), len(want), i)
	}
}
