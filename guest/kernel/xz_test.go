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

// TestNotParallel: files that are not one stream of some blocks are decompressed as others.
func TestNotParallel(t *testing.T) {
	data := bytes.Repeat([]byte("0123456789"), 1000)
	one, two := xzOf(t, data, 1<<20), xzOf(t, data, 5000)
	le := binary.LittleEndian
	// index returns two, with an index of its own.
	index := func(b []byte) []byte {
		b = append(b, make([]byte, -len(b)&3)...)
		b = le.AppendUint32(b, crc32.ChecksumIEEE(b))
		end := append(le.AppendUint32(nil, uint32(len(b)/4-1)), two[6:8]...)
		b = append(append(le.AppendUint32(b, crc32.ChecksumIEEE(end)), end...), "YZ"...)
		return append(bytes.Clone(two[:len(two)-24]), b...)
	}
	number := binary.AppendUvarint
	for name, file := range map[string][]byte{
		"empty": nil, "one block": one, "two streams": append(bytes.Clone(one), two...), "gzip": zip(data), "cut": two[:100],
		"large block":     index(number(number(number(number([]byte{0, 2}, 40), maxBlock+1), 40), 5000)),
		"many blocks":     index(number([]byte{0}, 1<<40)),
		"sizes":           index(number(number(number(number([]byte{0, 2}, 1<<62), 5000), 1<<62), 5000)),
		"unending number": index(append([]byte{0, 2}, bytes.Repeat([]byte{0xff}, 20)...)),
		"no checksum":     append(bytes.Clone(two[:len(two)-13]), append([]byte{^two[len(two)-13]}, two[len(two)-12:]...)...),
	} {
		if blocks, _ := xzBlocks(bytes.NewReader(file), int64(len(file))); blocks != nil {
			t.Errorf("%s: %v", name, blocks)
		}
	}
}

// FuzzBlocks: data that several threads read out of a file are those that one thread reads.
func FuzzBlocks(f *testing.F) {
	data := bytes.Repeat([]byte("0123456789"), 1000)
	f.Add(xzOf(f, data, 5000))
	f.Add(xzOf(f, data, 3333))
	f.Fuzz(func(t *testing.T, file []byte) {
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
