package boot

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/mikelolasagasti/xz"
	"github.com/pierrec/lz4/v4"

	"gvm/guestmem"
)

// bigELF is a kernel of a little over 9 MiB, more than one block of lz4 and than four chunks of
// LZMA2. Its text is full of CALLs and JMPs for the x86 filter, and of the same opcode bytes in
// places that the filter must leave alone.
func bigELF() []byte {
	rnd := rand.New(rand.NewPCG(1, 2))
	text := make([]byte, 9<<20)
	for i := range 20 << 10 {
		switch rnd.IntN(8) {
		case 0, 1, 2:
			text[i] = 0xe8 + byte(rnd.IntN(2))
		case 3, 4:
			text[i] = 0xff * byte(rnd.IntN(2))
		default:
			text[i] = byte(rnd.Uint32())
		}
	}
	// The rest compresses well: the same code again without branches, and zeros.
	for i := 20 << 10; i < len(text); i += 4096 {
		if i < 1<<20 {
			copy(text[i:], text[:4096])
			for j, v := range text[i : i+4096] {
				if v&0xfe == 0xe8 {
					text[i+j] = 0x90
				}
			}
		}
		binary.LittleEndian.PutUint32(text[i:], uint32(i))
	}
	return makeELF(elf.ET_EXEC, 0x200000,
		segment{kind: elf.PT_LOAD, vaddr: 0xffffffff80200000, paddr: 0x200000, data: text},
		segment{kind: elf.PT_LOAD, vaddr: 0xffffffff80c00000, paddr: 0xc00000, memsz: 0x2000, data: pattern(7, 0x1000)},
		segment{kind: elf.PT_NOTE, data: note("Xen\x00", 18, le64(0x200100), 4), align: 4})
}

// makeBzImage builds a bzImage with the payload; set changes its header.
func makeBzImage(payload []byte, set func(h []byte)) []byte {
	const payloadOff = 0x300
	code := pattern(0x5c, payloadOff)
	code = append(code, payload...)
	code = append(code, pattern(0xc5, 64+-len(code)&15)...)
	b := make([]byte, 1024, 1024+len(code))
	le := binary.LittleEndian
	b[hdrSetupSects] = 1
	le.PutUint32(b[hdrSysSize:], uint32(len(code)/16))
	le.PutUint16(b[hdrBootFlag:], 0xaa55)
	b[hdrJump], b[hdrJump+1] = 0xeb, 0x6a
	copy(b[hdrMagic:], "HdrS")
	le.PutUint16(b[hdrVersion:], 0x20f)
	b[hdrLoadFlags] = 0x83
	le.PutUint32(b[hdrInitrdMax:], 0x7fffffff)
	le.PutUint32(b[hdrAlignment:], 0x200000)
	b[hdrRelocatable] = 1
	le.PutUint16(b[hdrXLoadFlags:], 0x7f)
	le.PutUint32(b[hdrCmdLineSize:], 2047)
	le.PutUint32(b[hdrPayloadOff:], payloadOff)
	le.PutUint32(b[hdrPayloadLen:], uint32(len(payload)))
	le.PutUint64(b[hdrPrefAddress:], 0x200000)
	le.PutUint32(b[hdrInitSize:], 0xb00000)
	le.PutUint32(b[0x268:], 0x11223344) // kernel_info_offset, newer than the fields that are read
	if set != nil {
		set(b)
	}
	return append(b, code...)
}

func sized(b []byte, n int) []byte { return append(b, le32(uint32(n))...) }

// payloads returns the ELF file compressed in each format that Go can write.
func payloads(t testing.TB, image []byte) map[string][]byte {
	var gz bytes.Buffer
	w := gzip.NewWriter(&gz)
	if _, err := w.Write(image); err != nil {
		t.Fatal(err)
	}
	w.Close()
	enc, err := zstd.NewWriter(nil, zstd.WithWindowSize(1<<23))
	if err != nil {
		t.Fatal(err)
	}
	legacy := []byte("\x02\x21\x4c\x18")
	for rest := image; len(rest) > 0; {
		n := min(len(rest), 8<<20)
		block := make([]byte, lz4.CompressBlockBound(n))
		size, err := lz4.CompressBlock(rest[:n], block, nil)
		if err != nil || size == 0 {
			t.Fatal("lz4", size, err)
		}
		legacy = append(append(legacy, le32(uint32(size))...), block[:size]...)
		rest = rest[n:]
	}
	return map[string][]byte{
		"gzip": gz.Bytes(),
		"zstd": sized(enc.EncodeAll(image, nil), len(image)),
		"lz4":  sized(legacy, len(image)),
	}
}

// allPayloads adds the payloads of testdata to payloads.
func allPayloads(t testing.TB, image []byte) map[string][]byte {
	all := payloads(t, image)
	for _, name := range []string{"xz", "lzma", "bzip2"} {
		b, err := os.ReadFile(filepath.Join("testdata", "vmlinux."+name))
		if err != nil {
			t.Fatal(err)
		}
		all[name] = sized(b, len(image))
	}
	return all
}

func TestLoadPayload(t *testing.T) {
	want := bigELF()
	for name, payload := range allPayloads(t, want) {
		t.Run(name, func(t *testing.T) {
			bz := makeBzImage(payload, nil)
			got, err := ExtractELF(file("kernel", bz))
			if err != nil {
				t.Fatal(err)
			}
			equalBytes(t, "vmlinux", got, want)

			mem := guestmem.Heap(0, 16<<20)
			e, err := Load(mem, Config{Kernel: image(t, bz), CmdLine: "quiet", Mode: ELF})
			if err != nil {
				t.Fatal(err)
			}
			if e.Payload != name || e.Protocol != PVH32 || e.RIP != 0x200100 {
				t.Errorf("entry %+v", e)
			}
			text := 64 + 3*56
			equalBytes(t, "text", read(t, mem, 0x200000, 9<<20), want[text:text+9<<20])
			equalBytes(t, "data", read(t, mem, 0xc00000, 0x1000), pattern(7, 0x1000))
		})
	}
}

// TestDamagedPayload changes single bytes: a format with a checksum must detect the change, and
// none may panic.
func TestDamagedPayload(t *testing.T) {
	want := bigELF()
	for name, payload := range allPayloads(t, want) {
		t.Run(name, func(t *testing.T) {
			for i := range 8 {
				b := bytes.Clone(payload)
				at := 12 + i*(len(b)-40)/8
				b[at] ^= 0x41
				got, err := ExtractELF(file("kernel", makeBzImage(b, nil)))
				var ie *ImageError
				if err != nil && !errors.As(err, &ie) {
					t.Errorf("byte %d: %v is no ImageError", at, err)
				}
				// A changed bit may have no effect.
				if err == nil && !bytes.Equal(got, want) && name != "lz4" && name != "lzma" {
					t.Errorf("byte %d: damage went unseen", at)
				}
			}
		})
	}
}

func TestFallback(t *testing.T) {
	good := payloads(t, kernelELF())["gzip"]
	moreLZ4 := payloads(t, kernelELF())["lz4"]
	moreLZ4 = slices.Concat(moreLZ4[:len(moreLZ4)-4], le32(2), []byte{0x10, 'x'}, moreLZ4[len(moreLZ4)-4:])
	for _, c := range []struct {
		name    string
		payload []byte
		set     func([]byte)
		want    string
	}{
		{"unknown compression", sized(pattern(1, 400), 100), nil, "unknown compression"},
		{"lzo", sized(append([]byte("\x89LZO"), pattern(1, 400)...), 100), nil, "lzo"},
		{"corrupt", append(bytes.Clone(good[:len(good)/2]), good[len(good)/2+1:]...), nil, "cannot be decompressed"},
		{"larger than init_size", sized(bytes.Clone(good[:len(good)-4]), 0xb00001), nil, "decompresses to 11534337 bytes"},
		{"larger than it says", sized(bytes.Clone(good[:len(good)-4]), 100), nil, "gzip"},
		{"payload past the end", good, func(h []byte) { binary.LittleEndian.PutUint32(h[hdrPayloadLen:], 1<<31) },
			"no payload"},
		{"no payload", good, func(h []byte) { binary.LittleEndian.PutUint32(h[hdrPayloadLen:], 0) }, "no payload"},
		{"not an ELF file", payloads(t, pattern(3, 5000))["gzip"], nil, "ELF"},
		{"segment where no RAM is", payloads(t,
			makeELF(elf.ET_EXEC, 1<<40, segment{kind: elf.PT_LOAD, paddr: 0x200000, data: pattern(1, 64)},
				segment{kind: elf.PT_LOAD, paddr: 1 << 40, data: pattern(1, 64)}))["gzip"], nil, "0x10000000000"},
		{"more lz4 blocks than it says", moreLZ4, nil, "lz4"},
	} {
		t.Run(c.name, func(t *testing.T) {
			bz := makeBzImage(c.payload, c.set)
			var notes []string
			mem := guestmem.Heap(0, 16<<20)
			cfg := Config{Kernel: image(t, bz), Note: func(s string) { notes = append(notes, s) }}
			e, err := Load(mem, cfg)
			if err != nil {
				t.Fatal(err)
			}
			if e.Protocol != Linux64 || e.RIP != 0x200200 || e.Payload != "" {
				t.Errorf("entry %+v", e)
			}
			if len(notes) != 1 || !strings.Contains(notes[0], c.want) || strings.Contains(notes[0], "\n") {
				t.Errorf("notes %q, want one with %q", notes, c.want)
			}
			equalBytes(t, "code", read(t, mem, 0x200000, uint64(len(bz)-1024)), bz[1024:])

			cfg.Mode = ELF
			var ie *ImageError
			if _, err := Load(guestmem.Heap(0, 16<<20), cfg); !errors.As(err, &ie) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("mode elf: %v", err)
			}
		})
	}
}

func TestPlaceBzImage(t *testing.T) {
	bz := func(set func([]byte)) []byte { return makeBzImage(payloads(t, kernelELF())["gzip"], set) }
	reserved := E820Entry{0x280000, 0x1000, E820Reserved}
	for _, c := range []struct {
		name string
		set  func([]byte)
		want uint64 // 0: an error
	}{
		{"moved", func(h []byte) { binary.LittleEndian.PutUint32(h[hdrInitSize:], 0x300000) }, 0x400000},
		{"aligned", func(h []byte) {
			binary.LittleEndian.PutUint32(h[hdrInitSize:], 0x300000)
			binary.LittleEndian.PutUint32(h[hdrAlignment:], 0x800000)
		}, 0x800000},
		{"not below pref_address", func(h []byte) {
			binary.LittleEndian.PutUint64(h[hdrPrefAddress:], 0x280000)
			binary.LittleEndian.PutUint32(h[hdrInitSize:], 0x90000)
			binary.LittleEndian.PutUint32(h[hdrAlignment:], 0x10000)
		}, 0x290000},
		{"fixed", func(h []byte) { h[hdrRelocatable] = 0 }, 0},
		{"too large", func(h []byte) { binary.LittleEndian.PutUint32(h[hdrInitSize:], 0xe00000) }, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			mem := guestmem.Heap(0, 16<<20)
			e, err := Load(mem, Config{Kernel: image(t, bz(c.set)), Mode: BzImage, E820: E820(mem, reserved)})
			var ie *ImageError
			if c.want == 0 {
				if !errors.As(err, &ie) {
					t.Fatalf("%+v, %v; want an ImageError", e, err)
				}
				return
			}
			if err != nil || e.RIP != c.want+0x200 {
				t.Fatalf("%+v, %v; want it at %#x", e, err, c.want)
			}
		})
	}
}

func TestTruncated(t *testing.T) {
	for name, b := range map[string][]byte{
		"bzImage": makeBzImage(payloads(t, kernelELF())["gzip"], nil),
		"ELF":     kernelELF(),
	} {
		t.Run(name, func(t *testing.T) {
			for n := range len(b) {
				if n > 0x500 && n%37 != 0 && n != len(b)-1 {
					continue
				}
				im, err := NewImage(file("kernel", b[:n:n]))
				var ie *ImageError
				if err == nil && name == "bzImage" && n > len(b)-16 {
					_, err = Load(guestmem.Heap(0, 16<<20), Config{Kernel: im, Mode: BzImage})
					if err != nil {
						t.Errorf("cut in the last unit: %v", err)
					}
					continue
				}
				// The notes are at the end of the ELF file.
				if !errors.As(err, &ie) {
					t.Fatalf("cut at %#x: %v; want an ImageError", n, err)
				}
				if s := err.Error(); n >= 0x206 && !strings.Contains(s, "truncated") {
					t.Fatalf("cut at %#x: %s", n, s)
				}
			}
		})
	}
}

// never is the end of a context that does not end.
func never() error { return nil }

// TestDecompressEnds: the end of the context ends the decompression of a stream, and no mode of the
// boot goes on after that.
func TestDecompressEnds(t *testing.T) {
	all := allPayloads(t, bigELF())
	for _, name := range []string{"gzip", "xz", "lzma", "bzip2", "lz4"} {
		bz := makeBzImage(all[name], nil)
		for _, mode := range []Mode{Auto, ELF} {
			looks := 0
			im, err := NewImage(&File{"kernel", bytes.NewReader(bz), int64(len(bz)), func() error {
				if looks++; looks > 1 {
					return &stoppedError{io.ErrClosedPipe}
				}
				return nil
			}})
			if err != nil {
				t.Fatal(err)
			}
			note := func(s string) { t.Errorf("%s: %s", name, s) }
			if _, err = Load(guestmem.Heap(0, 16<<20), Config{Kernel: im, Mode: mode, Note: note}); err == nil ||
				!errors.Is(err, io.ErrClosedPipe) || looks != 2 {
				t.Errorf("%s: %v after %d looks at the context", name, err, looks)
			}
		}
	}
	ctx, stop := context.WithCancel(t.Context())
	f := InMemory(ctx, "kernel", nil)
	if err := f.ended(); err != nil {
		t.Error(err)
	}
	if stop(); !errors.Is(f.ended(), context.Canceled) {
		t.Errorf("after the end of the context: %v", f.ended())
	}
}

// BenchmarkDecompress decompresses synthetic kernels, which do not show a format's true speed, and
// the bzImage named by GVM_TEST_KERNEL, which does.
func BenchmarkDecompress(b *testing.B) {
	want := bigELF()
	if path := os.Getenv("GVM_TEST_KERNEL"); path != "" {
		im, err := Open(context.Background(), path)
		if err != nil {
			b.Fatal(err)
		}
		defer im.Close()
		for name, dir := range map[string]string{"kernel": "", "kernel-cached": b.TempDir()} {
			b.Run(name, func(b *testing.B) {
				if dir != "" {
					v, err := im.extract(dir)
					if err != nil {
						b.Fatal(err)
					}
					v.free()
				}
				for b.Loop() {
					v, err := im.extract(dir)
					if err != nil {
						b.Fatal(err)
					}
					b.SetBytes(int64(len(v.image)))
					v.free()
				}
			})
		}
	}
	for name, payload := range allPayloads(b, want) {
		b.Run(name, func(b *testing.B) {
			im := image(b, makeBzImage(payload, nil))
			b.SetBytes(int64(len(want)))
			for b.Loop() {
				v, err := im.extract("")
				if err != nil {
					b.Fatal(err)
				}
				v.free()
			}
		})
	}
}

// TestCutPayload truncates the payloads of testdata, and puts other data after them or in place of
// their second half.
func TestCutPayload(t *testing.T) {
	dst := make([]byte, len(bigELF()))
	for _, name := range []string{"xz", "lzma", "bzip2"} {
		b, err := os.ReadFile(filepath.Join("testdata", "vmlinux."+name))
		if err != nil {
			t.Fatal(err)
		}
		c := detect(b)
		for _, n := range []int{6, 13, 16, 17, 18, 30, 36, len(b) / 2, len(b) - 30, len(b) - 1} {
			if err := c.decompress(dst, b[:n:n], never); err == nil {
				t.Errorf("%s cut at %d of %d went unseen", name, n, len(b))
			}
			if err := c.decompress(dst, append(b[:n:n], "\x00YZ"...), never); err == nil && n <= len(b)/2 {
				t.Errorf("%s with other data from %d of %d went unseen", name, n, len(b))
			}
		}
		if err := c.decompress(dst, append(b[:len(b):len(b)], 0), never); err == nil {
			t.Errorf("%s: took data behind the end", name)
		}
	}
}

// TestLargeWindow uses headers that ask for dictionaries of 4 GiB.
func TestLargeWindow(t *testing.T) {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	dst := make([]byte, len(bigELF()))
	b, err := os.ReadFile(filepath.Join("testdata", "vmlinux.xz"))
	if err != nil {
		t.Fatal(err)
	}
	// The block's header is 12 bytes: the 7th is the dictionary's size, and the last four are its
	// CRC32.
	h := b[12:24]
	h[6] = 40
	binary.LittleEndian.PutUint32(h[8:], crc32.ChecksumIEEE(h[:8]))
	if err := detect(b).decompress(dst, b, never); !errors.Is(err, xz.ErrMemlimit) {
		t.Errorf("xz: a dictionary of 4 GiB: %v", err)
	}
	if b, err = os.ReadFile(filepath.Join("testdata", "vmlinux.lzma")); err != nil {
		t.Fatal(err)
	}
	copy(b[1:], "\x00\x00\xff\xff")
	if err := detect(b).decompress(dst, b, never); err == nil {
		t.Error("lzma: took a dictionary of 4 GiB")
	}
	if runtime.ReadMemStats(&after); after.TotalAlloc-before.TotalAlloc > maxWindow {
		t.Errorf("allocated %d bytes", after.TotalAlloc-before.TotalAlloc)
	}
}

// holes reads as b and then as zeroes, and counts the bytes read.
type holes struct {
	b    []byte
	read int64
}

func (h *holes) ReadAt(p []byte, off int64) (int, error) {
	h.read += int64(len(p))
	clear(p)
	if off < int64(len(h.b)) {
		copy(p, h.b[off:])
	}
	return len(p), nil
}

// TestLargePayload: a payload larger than the largest kernel is not read.
func TestLargePayload(t *testing.T) {
	bz := makeBzImage(payloads(t, kernelELF())["gzip"], func(h []byte) {
		binary.LittleEndian.PutUint32(h[hdrPayloadLen:], 3<<30)
		binary.LittleEndian.PutUint32(h[hdrSysSize:], (4<<30-1024)/16)
	})
	h := &holes{b: bz}
	im, err := NewImage(&File{Name: "sparse", ReaderAt: h, Size: 4 << 30})
	if err != nil {
		t.Fatal(err)
	}
	_, err = im.extract(t.TempDir())
	var ie *ImageError
	if !errors.As(err, &ie) || ie.Name != "sparse" || h.read > 1<<20 {
		t.Errorf("read %d bytes: %v", h.read, err)
	}
}

// TestInitrdSizes uses sizes whose sum needs more than 64 bits.
func TestInitrdSizes(t *testing.T) {
	var list []*File
	for range 4 {
		list = append(list, &File{Name: "huge", ReaderAt: &holes{}, Size: 1 << 62})
	}
	_, err := Load(sparse(t), Config{Kernel: image(t, kernelELF()), Initrds: list})
	var ie *ImageError
	if !errors.As(err, &ie) || !strings.Contains(err.Error(), "does not fit as initrd") {
		t.Errorf("%v", err)
	}
}
