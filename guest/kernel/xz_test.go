package kernel

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/ulikunitz/xz"
)

// xzOf compresses data in blocks of a size.
func xzOf(t testing.TB, data []byte, block int64) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := xz.WriterConfig{BlockSize: block, DictCap: 1 << 16}.NewWriter(&out)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func section(b []byte) *io.SectionReader {
	return io.NewSectionReader(bytes.NewReader(b), 0, int64(len(b)))
}

// TestParallel decompresses a file of many blocks, also one with blocks of different sizes, and
// stops amid it.
func TestParallel(t *testing.T) {
	data := make([]byte, 300_000)
	r := rand.New(rand.NewPCG(1, 2))
	for i := range data {
		data[i] = byte(r.IntN(3))
	}
	for _, block := range []int64{10_000, 99_999, 150_000} {
		file := xzOf(t, data, block)
		blocks, header := xzBlocks(bytes.NewReader(file), int64(len(file)))
		if n := (int64(len(data)) + block - 1) / block; int64(len(blocks)) != n {
			t.Fatalf("%d blocks, want %d", len(blocks), n)
		}
		p := newParallel(t.Context(), bytes.NewReader(file), blocks, header)
		got, err := io.ReadAll(p)
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		if err := p.Close(); err != nil {
			t.Error(err)
		}
		d, err := decompress(t.Context(), section(file), true)
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := d.ReadCloser.(*parallel); !ok {
			t.Errorf("%T", d.ReadCloser)
		}
		if _, err := io.ReadFull(d, make([]byte, 1000)); err != nil {
			t.Error(err)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		damaged := bytes.Clone(file)
		damaged[len(damaged)/2] ^= 1
		p = newParallel(t.Context(), bytes.NewReader(damaged), blocks, header)
		if got, err := io.ReadAll(p); err == nil || len(got) >= len(data) {
			t.Errorf("a damaged file: %d bytes, %v", len(got), err)
		}
		p.Close()
		cause := errors.New("asked to end")
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(cause)
		p = newParallel(ctx, bytes.NewReader(file), blocks, header)
		if _, err := p.Read(make([]byte, 1)); !errors.Is(err, cause) {
			t.Error(err)
		}
		p.Close()
	}
}

// indexSize is the length of an index without its checksum, with the footer at the end of b.
func indexSize(b []byte) int { return int(binary.LittleEndian.Uint32(b[len(b)-8:])) * 4 }

// sealed returns the file with another index, which gets a checksum, and a footer for it.
func sealed(file, index []byte) []byte {
	le := binary.LittleEndian
	b := bytes.Clone(file[:len(file)-xzHeader-4-indexSize(file)])
	b = le.AppendUint32(append(b, index...), crc32.ChecksumIEEE(index))
	end := append(le.AppendUint32(nil, uint32(len(index)/4)), file[6:8]...)
	return append(append(le.AppendUint32(b, crc32.ChecksumIEEE(end)), end...), "YZ"...)
}

// TestNotParallel: files that are not one stream of some blocks are decompressed as others.
func TestNotParallel(t *testing.T) {
	data := bytes.Repeat([]byte("0123456789"), 1000)
	one, two, four := xzOf(t, data, 1<<20), xzOf(t, data, 5000), xzOf(t, data, 3000)
	number := binary.AppendUvarint
	index := func(b []byte) []byte { return sealed(two, append(b, make([]byte, -len(b)&3)...)) }
	own := func(file []byte) []byte {
		return bytes.Clone(file[len(file)-xzHeader-4-indexSize(file):][:indexSize(file)])
	}
	for _, file := range [][]byte{two, four} {
		if !bytes.Equal(sealed(file, own(file)), file) {
			t.Fatal("sealed changes a file")
		}
	}
	long := own(two)
	long = append(append(long[:2], long[2]|0x80, 0), own(two)[3:]...)
	padded := own(four)
	if padded[len(padded)-2]++; padded[len(padded)-2] != 1 {
		t.Fatalf("no padding: % x", padded)
	}
	indicator := own(two)
	indicator[0] = 1
	for name, file := range map[string][]byte{
		"empty": nil, "one block": one, "two streams": append(bytes.Clone(one), two...), "gzip": zip(data), "cut": two[:100],
		"large block":     index(number(number(number(number([]byte{0, 2}, 40), maxBlock+1), 40), 5000)),
		"many blocks":     index(number([]byte{0}, 1<<40)),
		"sizes":           index(number(number(number(number([]byte{0, 2}, 1<<62), 5000), 1<<62), 5000)),
		"unending number": index(append([]byte{0, 2}, bytes.Repeat([]byte{0xff}, 20)...)),
		"long number":     index(long),
		"number amid":     index(own(two)[:4]),
		"indicator":       sealed(two, indicator),
		"padding":         sealed(four, padded),
		"long padding":    sealed(two, append(own(two), 0, 0, 0, 0)),
	} {
		if blocks, _ := xzBlocks(bytes.NewReader(file), int64(len(file))); blocks != nil {
			t.Errorf("%s: %v", name, blocks)
		}
	}
}

// TestDamaged: a file with another bit behind its magic has an error, for several threads as for
// one, or the same data: the decoder does not look at the first byte of LZMA's range coder.
func TestDamaged(t *testing.T) {
	data := bytes.Repeat([]byte("0123456789"), 1000)
	file := xzOf(t, data, 3000)
	for bit := 8 * len(xzMagic); bit < 8*len(file); bit++ {
		damaged := bytes.Clone(file)
		damaged[bit/8] ^= 1 << (bit % 8)
		d, err := decompress(t.Context(), section(damaged), true)
		if err != nil {
			continue
		}
		inIndex := bit/8 >= len(file)-xzHeader-4-indexSize(file)
		if got, err := io.ReadAll(d); err == nil && (inIndex || !bytes.Equal(got, data)) {
			t.Errorf("no error for bit %d of byte %d of %d", bit%8, bit/8, len(file))
		}
		d.Close()
	}
}

// FuzzBlocks: data that several threads read out of a file are those that one thread reads.
func FuzzBlocks(f *testing.F) {
	data := bytes.Repeat([]byte("0123456789"), 1000)
	f.Add(xzOf(f, data, 5000))
	f.Add(xzOf(f, data, 3333))
	f.Fuzz(func(t *testing.T, file []byte) {
		if len(file) > 3*xzHeader { // else few inputs get beyond the checksums
			if at := len(file) - xzHeader - 4 - indexSize(file); at > xzHeader && at < len(file)-xzHeader-4 {
				file = sealed(file, bytes.Clone(file[at:len(file)-xzHeader-4]))
			}
		}
		blocks, header := xzBlocks(bytes.NewReader(file), int64(len(file)))
		if blocks == nil {
			return
		}
		p := newParallel(t.Context(), bytes.NewReader(file), blocks, header)
		defer p.Close()
		got, err := io.ReadAll(p)
		if err != nil {
			return
		}
		d, err := decompress(t.Context(), section(file), false)
		if err != nil {
			t.Fatal(err)
		}
		if want, err := io.ReadAll(d); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d bytes, want %d, %v", len(got), len(want), err)
		}
	})
}
