package boot

import (
	"testing"

	"gvm/guestmem"
)

func TestLoadPVH(t *testing.T) {
	mem := guestmem.Heap(0, 16<<20)
	all := read(t, mem, 0, 16<<20)
	for i := range all {
		all[i] = 0xa5
	}
	initrds := []*File{file("one", pattern(3, 4097)), file("two", pattern(4, 70))}
	e, err := Load(mem, Config{Kernel: image(t, kernelELF()), Initrds: initrds, CmdLine: "console=ttyS0 x=1",
		RSDP: 0xe0010, Dirty: true})
	if err != nil {
		t.Fatal(err)
	}
	if e.Protocol != PVH32 || e.RIP != 0x200080 || e.ZeroPage != 0 || e.CR3 != 0 {
		t.Fatalf("entry %+v", e)
	}
	equalBytes(t, "text", read(t, mem, 0x200000, 0x2345), pattern(1, 0x2345))
	equalBytes(t, "data", read(t, mem, 0x300000, 0x1800), pattern(2, 0x1800))
	equalBytes(t, "bss", read(t, mem, 0x301800, 0x1800), make([]byte, 0x1800))

	s := e.StartInfo
	for _, f := range []struct {
		name string
		off  uint64
		want uint32
	}{{"magic", 0, 0x336ec578}, {"version", 4, 1}, {"flags", 8, 0}, {"nr_modules", 12, 1}, {"memmap_entries", 48, 3},
		{"reserved", 52, 0}} {
		if got := u32at(t, mem, s+f.off); got != f.want {
			t.Errorf("%s = %#x, want %#x", f.name, got, f.want)
		}
	}
	if got := u64at(t, mem, s+32); got != 0xe0010 {
		t.Errorf("rsdp_paddr = %#x", got)
	}
	equalBytes(t, "command line", read(t, mem, u64at(t, mem, s+24), 18), []byte("console=ttyS0 x=1\x00"))

	mod := u64at(t, mem, s+16)
	addr, size := u64at(t, mem, mod), u64at(t, mem, mod+8)
	if size != 4100+70 || u64at(t, mem, mod+16) != 0 {
		t.Errorf("module at %#x of %d bytes", addr, size)
	}
	// The highest page-aligned place for 4170 bytes in 16 MiB.
	if addr != 16<<20-8192 {
		t.Errorf("module at %#x", addr)
	}
	want := append(append(pattern(3, 4097), 0, 0, 0), pattern(4, 70)...)
	equalBytes(t, "initrd", read(t, mem, addr, size), want)

	mm := u64at(t, mem, s+40)
	for i, want := range []E820Entry{{0, 0x9fc00, 1}, {0x9fc00, 0x60400, 2}, {0x100000, 15 << 20, 1}} {
		at := mm + 24*uint64(i)
		got := E820Entry{u64at(t, mem, at), u64at(t, mem, at+8), u32at(t, mem, at+16)}
		if got != want || u32at(t, mem, at+20) != 0 {
			t.Errorf("memory map %d = %+v, want %+v", i, got, want)
		}
	}
}
