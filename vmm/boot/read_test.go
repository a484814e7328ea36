package boot

import (
	"bytes"
	"encoding/binary"
	"io"
	"strings"
	"testing"
)

// TestRelease reads the release of a bzImage's header.
func TestRelease(t *testing.T) {
	for _, tt := range []struct {
		name string
		at   uint16 // kernel_version
		text string // at 0x300
		want string
	}{
		{"usual", 0x100, "6.1.0-13-amd64 (debian-kernel@lists.debian.org) #1 SMP\x00", "6.1.0-13-amd64"},
		{"the release alone", 0x100, "6.12.0\x00", "6.12.0"},
		{"none", 0, "6.12.0\x00", ""},
		{"outside the setup code", 0x1ff, "", ""},
		{"behind the setup code", 0x200, "6.12.0\x00", ""},
		{"far outside", 0xffff, "6.12.0\x00", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := makeBzImage(payloads(t, kernelELF())["gzip"], func(h []byte) {
				binary.LittleEndian.PutUint16(h[hdrKernelVer:], tt.at)
				copy(h[0x300:], tt.text)
			})
			if got := image(t, b).Release(); got != tt.want {
				t.Errorf("%q, want %q", got, tt.want)
			}
		})
	}
	if got := image(t, kernelELF()).Release(); got != "" {
		t.Errorf("an ELF kernel: %q", got)
	}
}

// TestSegments reads the segments of an ELF kernel and of bzImages, in physical order.
func TestSegments(t *testing.T) {
	whole := bigELF()
	kernels := map[string][]byte{"ELF": whole}
	for name, p := range allPayloads(t, whole) {
		kernels[name] = makeBzImage(p, nil)
	}
	for name, b := range kernels {
		t.Run(name, func(t *testing.T) {
			for most := 1; most <= 2; most++ {
				var got [][]byte
				if err := image(t, b).Segments("", func(s []byte) bool {
					got = append(got, s)
					return len(got) < most
				}); err != nil {
					t.Fatal(err)
				}
				if len(got) != most {
					t.Fatalf("%d segments, want %d", len(got), most)
				}
				for i, want := range [][]byte{whole[64+3*56:][:9<<20], pattern(7, 0x1000)}[:most] {
					equalBytes(t, "segment", got[i], want)
				}
			}
		})
	}
}

// TestDecompress reads streams of the formats that have one, and plain data.
func TestDecompress(t *testing.T) {
	want := bigELF()
	all := allPayloads(t, want)
	all["plain"] = want
	for name, b := range all {
		t.Run(name, func(t *testing.T) {
			if name != "gzip" && name != "plain" {
				b = b[:len(b)-4] // without the size that the kernel build appends
			}
			r, err := Decompress(bytes.NewReader(b))
			if name == "lz4" {
				if err == nil || !strings.Contains(err.Error(), "lz4") {
					t.Error(err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(r)
			if err != nil {
				t.Fatal(err)
			}
			equalBytes(t, "data", got, want)
			if err := r.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}
