package boot

import (
	"debug/elf"
	"encoding/binary"
	"errors"
	"strings"
	"testing"

	"gvm/guestmem"
)

const (
	mib = 1 << 20
	gib = 1 << 30
)

// hollow reads as the previous content of the buffer except for its first and last bytes, so that a
// large file costs no memory.
type hollow struct{ size int64 }

func (h hollow) ReadAt(p []byte, off int64) (int, error) {
	if off == 0 {
		p[0] = 0x5a
	}
	if off+int64(len(p)) == h.size {
		p[len(p)-1] = 0xa5
	}
	return len(p), nil
}

// onlyPVH is kernelELF with an ELF entry point outside its segments.
func onlyPVH() []byte {
	notes := note("Xen\x00", 18, le64(0x200080), 4)
	return makeELF(elf.ET_EXEC, 0x10,
		segment{kind: elf.PT_LOAD, vaddr: 0xffffffff80200000, paddr: 0x200000, data: pattern(1, 0x2345)},
		segment{kind: elf.PT_NOTE, data: notes, align: 4})
}

// TestLargeInitrd: for an initrd that does not fit below 4 GiB the kernel is entered by the
// protocol that takes it above. If there is none, following the error's advice helps.
func TestLargeInitrd(t *testing.T) {
	gz := payloads(t, kernelELF())["gzip"]
	below4G := makeBzImage(gz, func(h []byte) { binary.LittleEndian.PutUint16(h[hdrXLoadFlags:], xlfKernel64) })
	for _, c := range []struct {
		name         string
		kernel       []byte
		memory, size int64
		cfg          Config
		want         Protocol // or
		err          string
	}{
		{"small", kernelELF(), 8 * gib, 1 * mib, Config{}, PVH32, ""},
		{"to the last page below 3 GiB", kernelELF(), 8 * gib, 3*gib - 4*mib, Config{}, PVH32, ""},
		{"above 4 GiB", kernelELF(), 8 * gib, 3*gib + 512*mib, Config{}, Linux64, ""},
		{"a size of 33 bits", kernelELF(), 10 * gib, 5*gib + 3, Config{}, Linux64, ""},
		{"all that is above 4 GiB", kernelELF(), 7 * gib, 4 * gib, Config{}, Linux64, ""},
		{"of a bzImage", makeBzImage(gz, nil), 8 * gib, 4 * gib, Config{}, Linux64, ""},
		{"of a bzImage that decompresses itself", makeBzImage(gz, nil), 8 * gib, 4 * gib, Config{Mode: BzImage}, Linux64, ""},
		{"in a guest of 1 TiB", kernelELF(), 1024 * gib, 4 * gib, Config{}, Linux64, ""},

		{"little memory", kernelELF(), 16 * mib, 20 * mib, Config{}, 0, "give the guest more memory or a smaller initrd"},
		{"short of 3 GiB", kernelELF(), 2 * gib, 2*gib + 512*mib, Config{}, 0,
			"give the guest more memory or a smaller initrd"},
		{"in pieces", kernelELF(), 4*gib + 512*mib, 3*gib + 512*mib, Config{}, 0,
			"3584 MiB in one piece, and the guest has 4608 MiB in all, kernel included: give the guest 6656 MiB of " +
				"memory or a smaller initrd"},
		{"and 6656 MiB of memory", kernelELF(), 6656 * mib, 3*gib + 512*mib, Config{}, Linux64, ""},
		{"PVH asked for", kernelELF(), 8 * gib, 3*gib + 512*mib, Config{Protocol: PVH32}, 0,
			"in one piece below 4096 MiB, and the guest has 8192 MiB in all, kernel included: give a smaller initrd or " +
				"use the 64-bit entry"},
		{"PVH alone", onlyPVH(), 8 * gib, 3*gib + 512*mib, Config{}, 0, "kernel included: give a smaller initrd"},
		{"not above 4 GiB", below4G, 8 * gib, 3*gib + 512*mib, Config{}, 0,
			"below 2048 MiB, and the guest has 8192 MiB in all, kernel included: give a smaller initrd or a kernel " +
				"with CONFIG_RELOCATABLE=y"},
		{"larger than any guest", kernelELF(), 8 * gib, 1 << 50, Config{}, 0, "kernel included: give a smaller initrd"},
	} {
		t.Run(c.name, func(t *testing.T) {
			mem, err := guestmem.Map(guestmem.Config{Size: uint64(c.memory)})
			if err != nil {
				t.Fatal(err)
			}
			defer mem.Close()
			c.cfg.Kernel = image(t, c.kernel)
			c.cfg.Initrds = []*File{{Name: "big.img", ReaderAt: hollow{c.size}, Size: c.size}}
			e, err := Load(mem, c.cfg)
			if c.err != "" {
				var ie *ImageError
				if !errors.As(err, &ie) || ie.Name != "big.img" || !strings.HasSuffix(err.Error(), c.err) {
					t.Fatalf("%+v, %v", e, err)
				}
				return
			}
			if err != nil || e.Protocol != c.want {
				t.Fatalf("%+v, %v", e, err)
			}
			var addr, size uint64
			if e.Protocol == PVH32 {
				mod := u64at(t, mem, e.StartInfo+16)
				addr, size = u64at(t, mem, mod), u64at(t, mem, mod+8)
			} else {
				zp := e.ZeroPage
				addr = uint64(u32at(t, mem, zp+hdrRamdisk)) | uint64(u32at(t, mem, zp+zpExtRamdisk))<<32
				size = uint64(u32at(t, mem, zp+hdrRamdiskSize)) | uint64(u32at(t, mem, zp+zpExtRDSize))<<32
				for _, a := range []uint64{addr, addr + size - 1} {
					if va, ok := walk(t, mem, e.CR3, a); !ok || va != a {
						t.Errorf("%#x of the initrd is mapped to %#x, %v", a, va, ok)
					}
				}
			}
			if size != uint64(c.size) || (addr >= 1<<32) != (e.Protocol == Linux64) {
				t.Fatalf("initrd at %#x, %d bytes", addr, size)
			}
			if first, last := read(t, mem, addr, 1)[0], read(t, mem, addr+size-1, 1)[0]; first != 0x5a || last != 0xa5 {
				t.Errorf("the initrd begins with %#x and ends with %#x", first, last)
			}
		})
	}
}

// TestKernelWithoutRoom: the error suggests more memory only if that helps.
func TestKernelWithoutRoom(t *testing.T) {
	at := func(addr uint64) []byte {
		return makeELF(elf.ET_EXEC, addr, segment{kind: elf.PT_LOAD, vaddr: addr, paddr: addr, data: pattern(1, 0x2000)})
	}
	const more, other = "give the guest more memory", "build it for addresses where guests have RAM"
	for addr, mend := range map[uint64]string{
		32 * mib: more, 5 * gib: more, 0xa0000: other, 3*gib - 0x1000: other, 0xfec0_0000: other,
	} {
		_, err := Load(guestmem.Heap(0, 16*mib), Config{Kernel: image(t, at(addr))})
		var ie *ImageError
		if !errors.As(err, &ie) || !strings.HasPrefix(ie.Mend, mend) {
			t.Errorf("at %#x: %v, want the mend %q", addr, err, mend)
		}
	}
}
