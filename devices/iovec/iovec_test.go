package iovec_test

import (
	"bytes"
	"testing"

	"gvm/devices/iovec"
)

func TestIovec(t *testing.T) {
	pieces := func() [][]byte { return [][]byte{[]byte("ab"), nil, []byte("cdef"), []byte("g")} }
	if n := iovec.Len(pieces()); n != 7 {
		t.Errorf("Len is %d, want 7", n)
	}
	for size, want := range map[int]string{0: "", 3: "abc", 7: "abcdefg", 9: "abcdefg"} {
		p := make([]byte, size)
		if n := iovec.Gather(p, pieces()); string(p[:n]) != want {
			t.Errorf("Gather of %d bytes: %q, want %q", size, p[:n], want)
		}
	}
	for src, want := range map[string]string{"": "abcdefg", "123": "123defg",
		"1234567": "1234567", "123456789": "1234567"} {
		to := pieces()
		if n := iovec.Scatter(to, []byte(src)); n != min(len(src), 7) || string(bytes.Join(to, nil)) != want {
			t.Errorf("Scatter of %q: %d bytes, %q, want %q", src, n, to, want)
		}
	}
	for off := range 8 {
		for n := range 8 - off {
			got := iovec.Cut([][]byte{[]byte("x")}, pieces(), off, n)
			if want := "x" + "abcdefg"[off:off+n]; string(bytes.Join(got, nil)) != want {
				t.Errorf("Cut of %d bytes at %d: %q, want %q", n, off, got, want)
			}
		}
	}
}
