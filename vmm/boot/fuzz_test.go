package boot

import (
	"errors"
	"os"
	"testing"

	"gvm/vmm/guestmem"
)

// FuzzLoad loads what may be a kernel in every mode: a kernel is loaded with all parts
// in place and apart from each other, or there is an ImageError.
func FuzzLoad(f *testing.F) {
	f.Add(kernelELF())
	f.Add(kernelELF()[:300])
	for _, p := range payloads(f, kernelELF()) {
		f.Add(makeBzImage(p, nil))
	}
	f.Add(makeBzImage(sized(pattern(1, 100), 100), nil))
	mem := guestmem.Heap(0, 16<<20)
	f.Fuzz(func(t *testing.T, data []byte) {
		im, err := NewImage(file("kernel", data))
		var ie *ImageError
		if err != nil {
			if !errors.As(err, &ie) {
				t.Fatalf("%v is no ImageError", err)
			}
			return
		}
		initrd := pattern(0x33, 5003)
		for _, mode := range []Mode{Auto, BzImage} {
			for _, proto := range []Protocol{0, PVH32, Linux64} {
				e, err := Load(mem, Config{Kernel: im, Mode: mode, Protocol: proto, CmdLine: "a=b", Dirty: true, Initrds: []*File{file("initrd", initrd)}})
				if err != nil {
					if !errors.As(err, &ie) {
						t.Fatalf("%v is no ImageError", err)
					}
					continue
				}
				var cmdline, at, tables uint64
				if e.Protocol == PVH32 {
					cmdline, at = u64at(t, mem, e.StartInfo+24), u64at(t, mem, u64at(t, mem, e.StartInfo+16))
				} else {
					cmdline, at, tables = uint64(u32at(t, mem, e.ZeroPage+0x228)), uint64(u32at(t, mem, e.ZeroPage+0x218)), e.CR3
				}
				equalBytes(t, "command line", read(t, mem, cmdline, 4), []byte("a=b\x00"))
				equalBytes(t, "initrd", read(t, mem, at, 5003), initrd)
				if tables != 0 && u64at(t, mem, tables) != tables+4096|3 {
					t.Fatalf("page tables at %#x", tables)
				}
				if im.elf != nil {
					for _, p := range im.elf.loads {
						equalBytes(t, "segment", read(t, mem, p.Paddr, p.Filesz), data[p.Off:p.Off+p.Filesz])
					}
				}
			}
		}
	})
}

// FuzzXZ decodes .xz streams whose header checksums are right and whose data has none.
func FuzzXZ(f *testing.F) {
	f.Add([]byte{filterX86, 0, filterLZMA2, 1, 22}, byte(1), []byte("\x01\x00\x05\xe8cd\x00\x00\xe8\x02\x00\x01ef\x00"))
	f.Add([]byte{9, 9, filterX86, 4, 1, 2, 3, 4, filterLZMA2, 1, 40}, byte(0xc1), []byte("\x01\x00\x03abcd\x02\x00\x01ef\x00"))
	x, err := os.ReadFile("testdata/vmlinux.xz")
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte{filterLZMA2, 1, 22}, byte(0), x[28:3000])
	f.Fuzz(func(t *testing.T, filters []byte, flags byte, packed []byte) {
		b := makeXZ(0, xzChecks[0].sum, filters[:min(len(filters), 1000)], int(flags), packed, nil)
		_ = decodeXZ(make([]byte, 1<<16), append(b, "\x00YZ"...))
	})
}
