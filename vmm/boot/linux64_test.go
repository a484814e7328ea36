package boot

import (
	"encoding/binary"
	"errors"
	"strings"
	"testing"

	"gvm/guestmem"
)

func TestLoadBzImage64(t *testing.T) {
	bz := makeBzImage(payloads(t, kernelELF())["gzip"], nil)
	mem := guestmem.Heap(0, 16<<20)
	e, err := Load(mem, Config{Kernel: image(t, bz), Initrds: []*File{file("initrd", pattern(6, 5000))},
		CmdLine: "root=/dev/sda", RSDP: 0xe0020, Mode: BzImage, Note: func(s string) { t.Errorf("note %q", s) }})
	if err != nil {
		t.Fatal(err)
	}
	if e.Protocol != Linux64 || e.RIP != 0x200200 || e.StartInfo != 0 || e.GDTLimit != 31 {
		t.Fatalf("entry %+v", e)
	}
	equalBytes(t, "code", read(t, mem, 0x200000, uint64(len(bz)-1024)), bz[1024:])

	zp := read(t, mem, e.ZeroPage, 4096)
	want := make([]byte, 4096)
	copy(want[0x1f1:0x26c], bz[0x1f1:])
	le := binary.LittleEndian
	le.PutUint64(want[0x70:], 0xe0020)
	want[0x210], want[0x211] = 0xff, 0x01 // type_of_loader; LOADED_HIGH alone
	le.PutUint32(want[0x218:], 16<<20-8192)
	le.PutUint32(want[0x21c:], 5000)
	cmdline := le.Uint32(zp[0x228:])
	le.PutUint32(want[0x228:], cmdline)
	want[0x1e8] = 3
	for i, r := range []E820Entry{{0, 0x9fc00, 1}, {0x9fc00, 0x60400, 2}, {0x100000, 15 << 20, 1}} {
		le.PutUint64(want[0x2d0+20*i:], r.Addr)
		le.PutUint64(want[0x2d8+20*i:], r.Size)
		le.PutUint32(want[0x2e0+20*i:], r.Type)
	}
	equalBytes(t, "zero page", zp, want)
	equalBytes(t, "command line", read(t, mem, uint64(cmdline), 14), []byte("root=/dev/sda\x00"))
	equalBytes(t, "initrd", read(t, mem, 16<<20-8192, 5000), pattern(6, 5000))

	// CS 0x10: present, code, long mode. DS 0x18: present, writable data, 32-bit, 4 GiB.
	for i, d := range []uint64{0, 0, 0x00af9b000000ffff, 0x00cf93000000ffff} {
		if got := u64at(t, mem, e.GDT+8*uint64(i)); got != d {
			t.Errorf("GDT[%d] = %#x, want %#x", i, got, d)
		}
	}
	for _, a := range []uint64{0, 0x200200, 0xfee00000, 0xffffffff} {
		if got, ok := walk(t, mem, e.CR3, a); !ok || got != a {
			t.Errorf("%#x maps to %#x, %v", a, got, ok)
		}
	}
	if _, ok := walk(t, mem, e.CR3, 1<<32); ok {
		t.Error("4 GiB is mapped")
	}
}

// walk translates a virtual address through page tables of 2 MiB pages.
func walk(t *testing.T, mem *guestmem.Memory, table, va uint64) (uint64, bool) {
	for shift := 39; shift >= 30; shift -= 9 {
		e := u64at(t, mem, table+8*(va>>shift&511))
		if e&3 != 3 {
			return 0, false
		}
		table = e &^ 0xfff
	}
	e := u64at(t, mem, table+8*(va>>21&511))
	return e&^0x1fffff | va&0x1fffff, e&0x83 == 0x83
}

func TestLoadELF64(t *testing.T) {
	mem := guestmem.Heap(0, 16<<20)
	e, err := Load(mem, Config{Kernel: image(t, kernelELF()), Protocol: Linux64, CmdLine: "a b"})
	if err != nil {
		t.Fatal(err)
	}
	if e.Protocol != Linux64 || e.RIP != 0x200040 {
		t.Fatalf("entry %+v", e)
	}
	zp := read(t, mem, e.ZeroPage, 4096)
	if string(zp[0x202:0x208]) != "HdrS\x0c\x02" || zp[0x1fe] != 0x55 || zp[0x1ff] != 0xaa || zp[0x210] != 0xff ||
		zp[0x211] != 1 {
		t.Errorf("setup header % x", zp[0x1f1:0x230])
	}
}

// sparse is a Memory with the memory of a guest of some GiB only at 0, around 2 GiB, below 3 GiB
// and above 4 GiB.
func sparse(t *testing.T) *guestmem.Memory {
	mem, err := guestmem.Of(
		guestmem.Region{Base: 0, Bytes: make([]byte, 4<<20)},
		guestmem.Region{Base: 0x7fff8000, Bytes: make([]byte, 0x10000)},
		guestmem.Region{Base: 0xbfff0000, Bytes: make([]byte, 0x10000)},
		guestmem.Region{Base: 0x180000000, Bytes: make([]byte, 8<<20)})
	if err != nil {
		t.Fatal(err)
	}
	return mem
}

func TestInitrdPlace(t *testing.T) {
	below4G := func(h []byte) { binary.LittleEndian.PutUint16(h[hdrXLoadFlags:], xlfKernel64) }
	for _, c := range []struct {
		name string
		size int
		set  func([]byte)
		want uint64
	}{
		{"under the hole", 0xf000, nil, 0xbfff1000},
		{"under initrd_addr_max", 0x8000, below4G, 0x7fff8000},
		{"not over initrd_addr_max", 0x8001, below4G, 0x3f7000},
		{"above 4 GiB", 5 << 20, nil, 0x180300000},
		{"too large", 5 << 20, below4G, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			bz := makeBzImage(payloads(t, kernelELF())["gzip"], func(h []byte) {
				binary.LittleEndian.PutUint32(h[hdrInitSize:], 0x100000)
				if c.set != nil {
					c.set(h)
				}
			})
			mem := sparse(t)
			initrd := pattern(0x77, c.size)
			e, err := Load(mem, Config{Kernel: image(t, bz), Initrds: []*File{file("big.img", initrd)}, Mode: BzImage})
			if c.want == 0 {
				var ie *ImageError
				if !errors.As(err, &ie) || ie.Name != "big.img" {
					t.Fatalf("%+v, %v", e, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			got := uint64(u32at(t, mem, e.ZeroPage+0x218)) | uint64(u32at(t, mem, e.ZeroPage+0xc0))<<32
			if got != c.want {
				t.Fatalf("at %#x, want %#x", got, c.want)
			}
			equalBytes(t, "initrd", read(t, mem, got, uint64(c.size)), initrd)
			if end := got + uint64(c.size) - 1; end >= 1<<32 {
				if va, ok := walk(t, mem, e.CR3, end); !ok || va != end {
					t.Errorf("initrd's end %#x is mapped to %#x, %v", end, va, ok)
				}
			}
		})
	}
}

func TestCmdLine(t *testing.T) {
	bz := makeBzImage(payloads(t, kernelELF())["gzip"],
		func(h []byte) { binary.LittleEndian.PutUint32(h[hdrCmdLineSize:], 300) })
	for _, c := range []struct {
		name    string
		kernel  []byte
		cmdline string
		want    string // of the error
	}{
		{"as long as may be", bz, strings.Repeat("x", 300), ""},
		{"too long", bz, strings.Repeat("x", 301), "is 301 bytes long, and the kernel takes 300"},
		{"ELF, as long as may be", kernelELF(), strings.Repeat("x", 2047), ""},
		{"ELF, too long", kernelELF(), strings.Repeat("x", 2048), "is 2048 bytes long, and the kernel takes 2047"},
		{"NUL", bz, "a\x00b", "NUL"},
		{"newline", bz, "a\nb", "newline"},
	} {
		for _, mode := range []Mode{Auto, BzImage} {
			if mode == BzImage && c.kernel[0] == 0x7f {
				continue
			}
			_, err := Load(guestmem.Heap(0, 16<<20), Config{Kernel: image(t, c.kernel), CmdLine: c.cmdline, Mode: mode})
			var ie *ImageError
			if c.want == "" && err != nil || c.want != "" && (!errors.As(err, &ie) || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("%s, %v: %v", c.name, mode, err)
			}
		}
	}
}
