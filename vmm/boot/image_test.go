package boot

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestNotAKernel(t *testing.T) {
	le := binary.LittleEndian
	bz := func(set func(h []byte)) []byte { return makeBzImage(payloads(t, kernelELF())["gzip"], set) }
	edit := func(b []byte, f func(b []byte)) []byte { f(b); return b }
	at := func(off int, s string) []byte { return append(make([]byte, off), s+strings.Repeat("\x00", 600)...) }
	load := segment{kind: elf.PT_LOAD, paddr: 0x200000, data: pattern(1, 64)}
	for _, c := range []struct {
		name string
		data []byte
		want string
	}{
		{"empty", nil, "is empty"},
		{"text", []byte("#!/bin/sh\n"), "neither a bzImage nor an ELF file"},
		{"arm64 Image", at(0x38, "ARM\x64"), "arm64"},
		{"RISC-V Image", at(0x38, "RSC\x05"), "RISC-V"},
		{"arm64 zboot", append([]byte("MZ\x00\x00zimg"), make([]byte, 800)...), "another architecture"},
		{"EFI program", append([]byte("MZ"), make([]byte, 800)...), "EFI or DOS program"},
		{"uImage", at(0, "\x27\x05\x19\x56"), "uImage"},
		{"cpio", at(0, "070701"), "cpio archive"},
		{"gzip", at(0, "\x1f\x8b\x08"), "compressed with gzip"},
		{"xz", at(0, "\xfd7zXZ\x00"), "compressed with xz"},
		{"zstd", at(0, "\x28\xb5\x2f\xfd"), "compressed with zstd"},
		{"deb", at(0, "!<arch>\ndebian-binary"), "archive"},
		{"qcow2", at(0, "QFI\xfb"), "disk image"},
		{"MBR", at(0x1fe, "\x55\xaa"), "disk image"},
		{"ext4", at(0x438, "\x53\xef"), "disk image"},
		{"32-bit bzImage", bz(func(h []byte) { h[hdrXLoadFlags] = 0x7e }), "32-bit kernel"},
		{"old bzImage", bz(func(h []byte) { le.PutUint16(h[hdrVersion:], 0x20b) }), "boot protocol 2.11"},
		{"bzImage without flag", bz(func(h []byte) { h[hdrBootFlag] = 0 }), "boot flag"},
		{"bzImage with a short header", bz(func(h []byte) { h[hdrJump+1] = 0x61 }), "ends at 0x263"},
		{"bzImage with a long header", bz(func(h []byte) { h[hdrJump+1] = 0x8f }), "ends at 0x291"},
		{"bzImage alignment", bz(func(h []byte) { le.PutUint32(h[hdrAlignment:], 3) }), "kernel_alignment 0x3"},
		{"bzImage without code", bz(func(h []byte) { le.PutUint32(h[hdrSysSize:], 0x20) }), "kernel of 512 bytes"},
		{"bzImage that claims more", bz(func(h []byte) { le.PutUint32(h[hdrSysSize:], ^uint32(0)) }), "truncated bzImage"},
		{"32-bit ELF", edit(kernelELF(), func(b []byte) { b[4], b[18] = 1, 3 }), "32-bit ELF"},
		{"arm64 ELF", edit(kernelELF(), func(b []byte) { b[18] = 183 }), "EM_AARCH64"},
		{"s390 ELF", edit(kernelELF(), func(b []byte) { b[5] = 2 }), "big-endian"},
		{"module", makeELF(elf.ET_REL, 0), "kernel module"},
		{"shared object", makeELF(elf.ET_DYN, 0, load), "shared object"},
		{"core", makeELF(elf.ET_CORE, 0, load), "ET_CORE"},
		{"no headers", makeELF(elf.ET_EXEC, 0x200000), "without program headers"},
		{"nothing to load", makeELF(elf.ET_EXEC, 0x200000, segment{kind: elf.PT_NULL}), "nothing to load"},
		{"program", makeELF(elf.ET_EXEC, 0x200000, load, segment{kind: elf.PT_TLS}), "is a program"},
		{"phentsize", edit(kernelELF(), func(b []byte) { b[54] = 55 }), "headers of 55 bytes"},
		{"phnum", edit(kernelELF(), func(b []byte) { b[57] = 0x20 }), "8195 ELF program headers"},
		{"filesz over memsz", edit(kernelELF(), func(b []byte) { le.PutUint64(b[64+40:], 1) }), "bad ELF segment"},
		{"paddr wraps", edit(kernelELF(), func(b []byte) { le.PutUint64(b[64+24:], ^uint64(0)-0xff) }), "bad ELF segment"},
		{"offset wraps", edit(kernelELF(), func(b []byte) { le.PutUint64(b[64+8:], ^uint64(0)-0xff) }), "truncated ELF"},
		{"overlap", makeELF(elf.ET_EXEC, 0x200000, load, segment{kind: elf.PT_LOAD, paddr: 0x20003f, data: []byte{1}}),
			"overlap at 0x20003f"},
		{"entry outside", makeELF(elf.ET_EXEC, 0x200040, load), "entry point 0x200040"},
		{"PVH entry outside", makeELF(elf.ET_EXEC, 0x200000, load,
			segment{kind: elf.PT_NOTE, data: note("Xen\x00", 18, le32(0x1fffff), 4)}), "PVH entry point 0x1fffff"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := NewImage(file("some/file", c.data))
			var ie *ImageError
			if !errors.As(err, &ie) {
				t.Fatalf("%v: no ImageError", err)
			}
			if s := err.Error(); !strings.HasPrefix(s, "some/file ") || !strings.Contains(s, c.want) ||
				strings.Contains(s, "\n") || ie.Mend == "" {
				t.Errorf("%q, want %q in it", s, c.want)
			}
		})
	}
}

func TestEntryPoints(t *testing.T) {
	load := segment{kind: elf.PT_LOAD, vaddr: 0xffffffff80000000, paddr: 0x200000, data: pattern(1, 64)}
	for _, c := range []struct {
		name       string
		image      []byte
		entry, pvh uint64
	}{
		{"physical entry", makeELF(elf.ET_EXEC, 0x200010, load), 0x200010, 0},
		{"virtual entry", makeELF(elf.ET_EXEC, 0xffffffff80000020, load), 0x200020, 0},
		{"32-bit note", makeELF(elf.ET_EXEC, 0, load,
			segment{kind: elf.PT_NOTE, data: note("Xen\x00", 18, le32(0x200008), 4)}), 0, 0x200008},
		{"note of 8-byte alignment", makeELF(elf.ET_EXEC, 0x200000, load, segment{kind: elf.PT_NOTE, align: 8,
			data: append(note("GNU\x00", 5, pattern(1, 9), 8), note("Xen\x00", 18, le64(0x20000c), 8)...)}), 0x200000, 0x20000c},
		{"another owner's note", makeELF(elf.ET_EXEC, 0x200000, load,
			segment{kind: elf.PT_NOTE, data: note("Xem\x00", 18, le64(0x200004), 4)}), 0x200000, 0},
		{"another note", makeELF(elf.ET_EXEC, 0x200000, load,
			segment{kind: elf.PT_NOTE, data: note("Xen\x00", 1, le64(0x200004), 4)}), 0x200000, 0},
		{"note cut off", makeELF(elf.ET_EXEC, 0x200000, load,
			segment{kind: elf.PT_NOTE, data: note("Xen\x00", 18, le64(0x200004), 4)[:23]}), 0x200000, 0},
		{"note of huge sizes", makeELF(elf.ET_EXEC, 0x200000, load,
			segment{kind: elf.PT_NOTE, data: bytes.Repeat([]byte{0xff}, 40)}), 0x200000, 0},
	} {
		im := image(t, c.image)
		if im.elf.entry != c.entry || im.elf.pvh != c.pvh {
			t.Errorf("%s: entry %#x, PVH %#x; want %#x, %#x", c.name, im.elf.entry, im.elf.pvh, c.entry, c.pvh)
		}
	}
}

func TestOpen(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, b []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for path, want := range map[string]string{
		dir:                         "is a directory",
		filepath.Join(dir, "none"):  "does not exist",
		write("empty", nil):         "is empty",
		write("text", []byte("hi")): "neither a bzImage nor an ELF file",
	} {
		_, err := Open(context.Background(), path)
		var ie *ImageError
		if !errors.As(err, &ie) || ie.Name != path || !strings.Contains(ie.What, want) {
			t.Errorf("%s: %v, want %q", path, err, want)
		}
	}
	im, err := Open(context.Background(), write("vmlinux", kernelELF()))
	if err != nil || im.elf.pvh != 0x200080 {
		t.Fatal(im, err)
	}
	if err := im.Close(); err != nil {
		t.Error(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	go func() {
		w.Write(kernelELF())
		w.Close()
	}()
	if im, err = Open(context.Background(), "/dev/fd/"+itoa(r.Fd())); err != nil || im.elf.pvh != 0x200080 {
		t.Errorf("through a pipe: %v", err)
	}
}

// TestInputStopped: later reads end with the context too, in the middle of a file.
func TestInputStopped(t *testing.T) {
	ctx, stop := context.WithCancelCause(context.Background())
	path := filepath.Join(t.TempDir(), "initrd")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := OpenFile(ctx, path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.ReadFull(make([]byte, f.Size), 0); err != nil {
		t.Fatal(err)
	}
	cause := errors.New("stopped")
	stop(cause)
	err = f.ReadFull(make([]byte, f.Size), 0)
	if image := (*ImageError)(nil); !errors.Is(err, cause) || errors.As(err, &image) {
		t.Errorf("after the end of the context: %v", err)
	}
	for _, open := range []func() error{
		func() error { _, err := OpenFile(ctx, "/proc/self/maps"); return err }, // it reports no size
		func() error { _, err := Open(ctx, path); return err },
		func() error { _, err := NewImage(f); return err },
	} {
		if err := open(); !errors.Is(err, cause) {
			t.Errorf("opened after the end of the context: %v", err)
		}
	}
}
