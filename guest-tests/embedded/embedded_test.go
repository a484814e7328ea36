package embedded_test

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"gvm/guest-tests/embedded"
)

// TestImage: what a loader relies on. One segment of plain RAM and a PVH note whose entry lies in it.
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

// The tools that made guest.elf. Others may well translate the same sources to other bytes.
const (
	imageCompiler = "gcc (Debian 12.2.0-14+deb12u1) 12.2.0"
	imageLinker   = "GNU ld (GNU Binutils for Debian) 2.40"
)

// TestImageIsBuiltFromItsSource rebuilds the image in another directory and compares.
func TestImageIsBuiltFromItsSource(t *testing.T) {
	for _, tool := range []struct{ name, want, pkg string }{
		{"make", "GNU Make", "make"}, {"gcc", imageCompiler, "gcc"}, {"ld", imageLinker, "binutils"},
	} {
		out, err := exec.Command(tool.name, "--version").Output()
		if err != nil {
			t.Skipf("%s --version: %v (install Debian 12's %s)", tool.name, err, tool.pkg)
		}
		if first, _, _ := strings.Cut(string(out), "\n"); !strings.HasPrefix(first, tool.want) {
			t.Skipf("%s is %q; the image was made with %q", tool.name, first, tool.want)
		}
	}
	dir := t.TempDir()
	if err := os.CopyFS(filepath.Join(dir, "src"), os.DirFS("src")); err != nil {
		t.Fatal(err)
	}
	makefile, err := os.ReadFile("Makefile")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "Makefile"), makefile, 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("make", "-C", dir).CombinedOutput(); err != nil {
		t.Fatalf("make: %v\n%s", err, out)
	}
	rebuilt, err := os.ReadFile(filepath.Join(dir, "guest.elf"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(rebuilt, embedded.Image) {
		t.Errorf("guest.elf (%d bytes) is not what src builds (%d bytes): run make -C guest-tests/embedded", len(embedded.Image), len(rebuilt))
	}
}
