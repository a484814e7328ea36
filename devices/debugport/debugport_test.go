package debugport

import (
	"bytes"
	"testing"
)

func TestHandler(t *testing.T) {
	var got []byte
	h := Handler(func(code byte) { got = append(got, code) })
	h.Write(0, []byte{0x41})
	h.Write(0, []byte{0x7b, 0x99})
	h.Write(0, nil)
	if want := []byte{0x41, 0x7b}; !bytes.Equal(got, want) {
		t.Errorf("codes %#x, want %#x", got, want)
	}
	p := []byte{1, 2}
	h.Read(0, p)
	if want := []byte{0xff, 0xff}; !bytes.Equal(p, want) {
		t.Errorf("read %#x, want %#x", p, want)
	}
}
