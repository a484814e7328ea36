package boot

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"
	"time"

	"gvm/guestmem"
)

func TestCache(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	bz := makeBzImage(payloads(t, bigELF())["gzip"], nil)
	want := trim(bigELF())
	im := image(t, bz)
	get := func() *vmlinux {
		t.Helper()
		v, err := im.extract(dir)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	if path := im.Cached(); path != "" {
		t.Errorf("%s before it is made", path)
	}
	get().free()
	names, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(names) != 1 {
		t.Fatalf("%q, %v", names, err)
	}
	path := names[0]
	if got := im.Cached(); got != path {
		t.Errorf("made %s, want %s", got, path)
	}
	im = image(t, bz)
	whole, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(whole[:len(want)], want) {
		t.Fatal(err)
	}
	v := get()
	equalBytes(t, "vmlinux", v.image, want)
	v.free()
	if got := im.Cached(); got != path {
		t.Errorf("found %s, want %s", got, path)
	}
	// A kernel that only the cache has proves that the cache is used.
	other := bytes.Clone(want)
	other[len(other)/2] ^= 0xff
	if err := os.WriteFile(path, append(bytes.Clone(other), footer(other)...), 0o600); err != nil {
		t.Fatal(err)
	}
	v = get()
	equalBytes(t, "cached vmlinux", v.image, other)
	v.free()

	flip := func(at int) []byte { b := bytes.Clone(whole); b[at] ^= 4; return b }
	for name, b := range map[string][]byte{
		"first byte":   flip(0),
		"a middle bit": flip(len(want) / 2),
		"last byte":    flip(len(want) - 1),
		"magic":        flip(len(want)),
		"size":         flip(len(want) + 8),
		"checksum":     flip(len(want) + 16),
		"cut":          whole[:len(whole)-1],
		"cut to half":  whole[:len(whole)/2],
		"longer":       append(bytes.Clone(whole), 0),
		"footer alone": whole[len(want):],
		"empty":        nil,
	} {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		get().free()
		if after, err := os.ReadFile(path); err != nil || !bytes.Equal(after, whole) {
			t.Errorf("%s: the damaged file was not replaced (%v)", name, err)
		}
	}
	if names, _ := filepath.Glob(filepath.Join(dir, "*")); len(names) != 1 {
		t.Errorf("left behind: %q", names)
	}
}

// TestTrim: a trimmed kernel loads like the whole one, into memory with other data.
func TestTrim(t *testing.T) {
	load := func(b []byte, memory byte) []byte {
		mem := guestmem.Heap(0, 4<<20)
		all := read(t, mem, 0, 4<<20)
		for i := range all {
			all[i] = memory
		}
		if _, err := Load(mem, Config{Kernel: image(t, b), Dirty: true}); err != nil {
			t.Fatal(err)
		}
		return all[2<<20:]
	}
	zeros := func(b []byte) []byte { return append(b, make([]byte, 0x1000)...) }
	whole := append(makeELF(elf.ET_EXEC, 0x200040,
		segment{kind: elf.PT_LOAD, paddr: 0x200000, data: zeros(pattern(1, 0x2345))},
		segment{kind: elf.PT_NOTE, data: note("Xen\x00", 18, le64(0x200080), 4), align: 4},
		segment{kind: elf.PT_LOAD, paddr: 0x280000, data: zeros(nil)},
		segment{kind: elf.PT_LOAD, paddr: 0x300000, memsz: 0x3000, data: zeros(pattern(2, 0x1800))}), "sections"...)
	trimmed := trim(bytes.Clone(whole))
	if want := len(whole) - len("sections") - 0x1000; len(trimmed) != want {
		t.Errorf("%d of %d bytes are left, want %d", len(trimmed), len(whole), want)
	}
	equalBytes(t, "memory", load(trimmed, 0xaa), load(whole, 0xaa))

	// The headers are loaded too and must not change.
	mapped := bytes.Clone(whole)
	binary.LittleEndian.PutUint64(mapped[64+8:], 0)
	equalBytes(t, "a file with its headers in a segment", trim(bytes.Clone(mapped)), mapped)
}

// TestCacheUnwritable: an unusable cache is not an error.
func TestCacheUnwritable(t *testing.T) {
	plain := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(plain, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	want := kernelELF()
	v, err := image(t, makeBzImage(payloads(t, want)["zstd"], nil)).extract(plain)
	if err != nil {
		t.Fatal(err)
	}
	equalBytes(t, "vmlinux", v.image, want)
	v.free()
}

func TestPrune(t *testing.T) {
	dir := t.TempDir()
	now := time.Now()
	for name, age := range map[string]time.Duration{
		"a.vmlinux": 3 * time.Hour, "b.vmlinux": time.Hour, "c.modules": 2 * time.Hour,
		"old.tmp": 2 * time.Hour, "new.tmp": time.Minute, "other": 9 * time.Hour,
	} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, make([]byte, 100), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, now.Add(-age), now.Add(-age)); err != nil {
			t.Fatal(err)
		}
	}
	left := func() (s string) {
		names, _ := os.ReadDir(dir)
		for _, e := range names {
			s += e.Name() + " "
		}
		return s
	}
	prune(dir, 200)
	if got := left(); got != "b.vmlinux c.modules new.tmp other " {
		t.Errorf("left %s", got)
	}
	prune(dir, 50)
	if got := left(); got != "b.vmlinux new.tmp other " {
		t.Errorf("left %s", got)
	}
}
