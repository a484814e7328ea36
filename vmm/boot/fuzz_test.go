package boot

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"gvm/guestmem"
)

// FuzzLoad loads arbitrary input in every mode. Either all parts of the kernel are in place and do
// not overlap, or there is an ImageError.
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
		if im.elf != nil {
			// The trimmed kernel of the cache loads the same.
			trimmed := trim(bytes.Clone(data))
			elf, err := parseELF("trimmed", bytes.NewReader(trimmed), int64(len(trimmed)))
			if err != nil && !strings.Contains(err.Error(), "entry point") { // the entry point may lie in trimmed zeros
				t.Fatal(err)
			}
			for i := 0; err == nil && i < len(im.elf.loads); i++ {
				whole, p := im.elf.loads[i], elf.loads[i]
				equalBytes(t, "segment", append(bytes.Clone(trimmed[p.Off:p.Off+p.Filesz]),
					make([]byte, whole.Filesz-p.Filesz)...), data[whole.Off:whole.Off+whole.Filesz])
			}
		}
		initrd := pattern(0x33, 5003)
		for _, mode := range []Mode{Auto, BzImage} {
			for _, proto := range []Protocol{0, PVH32, Linux64} {
				e, err := Load(mem, Config{Kernel: im, Mode: mode, Protocol: proto, CmdLine: "a=b", Dirty: true,
					Initrds: []*File{file("initrd", initrd)}})
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
