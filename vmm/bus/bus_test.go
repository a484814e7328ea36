package bus

import (
	"bytes"
	"strings"
	"testing"
)

// recorder answers reads with its name's first byte and the offset.
type recorder struct {
	name  byte
	wrote []byte
}

func (r *recorder) Read(off uint64, p []byte)  { p[0] = r.name; p[len(p)-1] += byte(off) }
func (r *recorder) Write(off uint64, p []byte) { r.wrote = append(append(r.wrote, byte(off)), p...) }

func TestBusFindsHandlers(t *testing.T) {
	var b Bus
	lo, hi := &recorder{name: 'l'}, &recorder{name: 'h'}
	for _, err := range []error{b.Add("hi", 0x2000, 0x100, hi), b.Add("lo", 0x1000, 0x10, lo)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	p := make([]byte, 2)
	if !b.Read(0x1004, p) || !bytes.Equal(p, []byte{'l', 4}) {
		t.Errorf("read of lo+4 gave %q", p)
	}
	for _, a := range []uint64{0xfff, 0x100f, 0x1010, 0x20ff, 0x3000, ^uint64(0)} {
		p[0], p[1] = 0, 0
		if b.Read(a, p) || !bytes.Equal(p, []byte{0xff, 0xff}) {
			t.Errorf("read at %#x gave % x", a, p)
		}
		if b.Write(a, p) {
			t.Errorf("write at %#x found a device", a)
		}
	}
	if !b.Write(0x20fe, []byte{1, 2}) || !bytes.Equal(hi.wrote, []byte{0xfe, 1, 2}) {
		t.Errorf("hi got % x", hi.wrote)
	}
	if err := b.Remove(0x2000); err != nil {
		t.Error(err)
	}
	if err := b.Remove(0x2000); err == nil {
		t.Error("the same range was removed twice")
	}
	if b.Read(0x2000, p) {
		t.Error("hi still answers")
	}
}

func TestBusRefusesOverlap(t *testing.T) {
	var b Bus
	if err := b.Add("a", 0x100, 0x10, &recorder{}); err != nil {
		t.Fatal(err)
	}
	for _, r := range [][2]uint64{{0x100, 0x10}, {0xff, 2}, {0x10f, 1}, {0, 0x1000}, {0x108, 1}, {5, 0}, {^uint64(0), 2}} {
		err := b.Add("b", r[0], r[1], &recorder{})
		if err == nil {
			t.Errorf("%#x+%#x was mapped", r[0], r[1])
		} else if r[0] == 0x108 && !strings.Contains(err.Error(), "b at 0x108+0x1 overlaps a at 0x100+0x10") {
			t.Errorf("the error does not name both: %v", err)
		}
	}
	if err := b.Add("top", ^uint64(0)-3, 4, &recorder{}); err != nil {
		t.Errorf("the last four addresses: %v", err)
	}
	if err := b.Add("next", 0x110, 0x10, &recorder{}); err != nil {
		t.Errorf("an adjoining range: %v", err)
	}
}
