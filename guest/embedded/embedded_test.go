package embedded_test

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"os"
	"regexp"
	"slices"
	"testing"

	"gvm/guest-tests/imagetest"
	"gvm/guest/embedded"
)

// TestImage checks the properties that a loader relies on: one segment of plain RAM, and a PVH note
// whose entry lies in it.
func TestImage(t *testing.T) {
	if n := len(embedded.Image); n >= 64<<10 {
		t.Errorf("the image is %d bytes, want less than 64 KiB", n)
	}
	f, err := elf.NewFile(bytes.NewReader(embedded.Image))
	if err != nil {
		t.Fatal(err)
	}
	if f.Class != elf.ELFCLASS64 || f.Machine != elf.EM_X86_64 || f.Type != elf.ET_EXEC {
		t.Errorf("the image is %v %v %v, want a 64-bit x86-64 executable", f.Class, f.Machine, f.Type)
	}
	if f.Section(".symtab") != nil || f.Section(".comment") != nil || f.Section(".note.gnu.build-id") != nil {
		t.Error("the image is not stripped")
	}
	var loads []*elf.Prog
	var entry uint64
	for _, p := range f.Progs {
		switch p.Type {
		case elf.PT_LOAD:
			loads = append(loads, p)
		case elf.PT_NOTE:
			note := make([]byte, p.Filesz)
			if _, err := p.ReadAt(note, 0); err != nil {
				t.Fatal(err)
			}
			const name, descriptor, physEntry32 = 4, 8, 18
			want := append([]byte{name, 0, 0, 0, descriptor, 0, 0, 0, physEntry32, 0, 0, 0}, "Xen\x00"...)
			if len(note) != len(want)+descriptor || !bytes.HasPrefix(note, want) {
				t.Fatalf("PT_NOTE holds % x, want one XEN_ELFNOTE_PHYS32_ENTRY of %d bytes", note, descriptor)
			}
			entry = binary.LittleEndian.Uint64(note[len(want):])
		}
	}
	if len(loads) != 1 {
		t.Fatalf("%d PT_LOAD segments, want 1", len(loads))
	}
	if l := loads[0]; l.Paddr != 1<<20 || l.Paddr+l.Memsz > 2<<20 || entry < l.Paddr || entry >= l.Paddr+l.Filesz {
		t.Errorf("segment %#x+%#x with PVH entry %#x, want it and the entry within the second MiB", l.Paddr, l.Memsz, entry)
	}
}

// TestWords: the table for users has exactly the words that the guest knows.
func TestWords(t *testing.T) {
	source, err := os.ReadFile("src/main.c")
	if err != nil {
		t.Fatal(err)
	}
	var guest, table []string
	word := regexp.MustCompile(`(?m)^\t(?:\{ |static const char name\[\] = )"([a-z0-9=-]+)"`)
	for _, m := range word.FindAllStringSubmatch(string(source), -1) {
		guest = append(guest, m[1])
	}
	for _, w := range embedded.Words {
		table = append(table, w.Name)
	}
	slices.Sort(guest)
	slices.Sort(table)
	if !slices.Equal(guest, table) {
		t.Errorf("the guest knows %q, the table %q", guest, table)
	}
	for word, want := range map[string]bool{"write": true, "bench-ms=5": true, "bench-ms=": false, "bench-ms=0": false,
		"bench-ms=x": false, "Write": false, "": false} {
		if embedded.Known(word) != want {
			t.Errorf("%q: known %v", word, !want)
		}
	}
}

// TestImageIsBuiltFromItsSource rebuilds the image in another directory and compares.
func TestImageIsBuiltFromItsSource(t *testing.T) {
	imagetest.BuiltFromSource(t, "guest.elf", embedded.Image)
}
