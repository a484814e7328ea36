package boot

import (
	"slices"
	"strconv"
	"testing"

	"gvm/guestmem"
)

func itoa(fd uintptr) string { return strconv.Itoa(int(fd)) }

func TestE820(t *testing.T) {
	mem, err := guestmem.Of(
		guestmem.Region{Base: 0, Bytes: make([]byte, 3<<20)},
		guestmem.Region{Base: 1 << 32, Bytes: make([]byte, 1<<20)})
	if err != nil {
		t.Fatal(err)
	}
	got := E820(mem,
		E820Entry{0xb0000000, 0x10000000, E820Reserved},
		E820Entry{0x2f0000, 0x8000, E820ACPI})
	want := []E820Entry{
		{0, 0x9fc00, 1},
		{0x9fc00, 0x60400, 2},
		{0x100000, 0x1f0000, 1},
		{0x2f0000, 0x8000, 3},
		{0x2f8000, 0x8000, 1},
		{0xb0000000, 0x10000000, 2},
		{0x100000000, 0x100000, 1},
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %#v\nwant %#v", got, want)
	}
	free := newLayout(mem, got).free
	if !slices.Equal(free, []span{{0x1000, 0x9fc00}, {0x100000, 0x2f0000}, {0x2f8000, 0x300000},
		{0x100000000, 0x100100000}}) {
		t.Errorf("free %#v", free)
	}
	// A map with more RAM than there is, twice and unsorted.
	free = newLayout(mem, []E820Entry{{0x200000, 1 << 40, 1}, {0x100000, 0x180000, 1}, {0x110000, 0x10000, 2}}).free
	if !slices.Equal(free, []span{{0x100000, 0x110000}, {0x120000, 0x300000}, {0x100000000, 0x100100000}}) {
		t.Errorf("free %#v", free)
	}
	// A map with less RAM.
	free = newLayout(mem, []E820Entry{{0x110000, 0x1000, 1}}).free
	if !slices.Equal(free, []span{{0x110000, 0x111000}}) {
		t.Errorf("free %#v", free)
	}
}

func TestLayout(t *testing.T) {
	l := layout{[]span{{0x1000, 0x9000}, {0x100000, 0x200000}}}
	for _, c := range []struct {
		what string
		f    func() (uint64, bool)
		want uint64 // ^0: no place
	}{
		{"low", func() (uint64, bool) { return l.low(0x100, 16, 0, 1<<32) }, 0x1000},
		{"low aligned", func() (uint64, bool) { return l.low(0x1000, 0x1000, 0, 1<<32) }, 0x2000},
		{"low from", func() (uint64, bool) { return l.low(0x10, 16, 0x7008, 1<<32) }, 0x7010},
		{"low too large", func() (uint64, bool) { return l.low(0x100001, 1, 0, 1<<32) }, ^uint64(0)},
		{"low beyond to", func() (uint64, bool) { return l.low(0x2000, 1, 0x8000, 0x101000) }, ^uint64(0)},
		{"high", func() (uint64, bool) { return l.high(0x1800, 0x1000, 0, 1<<32) }, 0x1fe000},
		{"high below to", func() (uint64, bool) { return l.high(0x1800, 0x1000, 0, 0x180000) }, 0x17e000},
		{"high in the rest", func() (uint64, bool) { return l.high(0x1000, 0x1000, 0, 1<<32) }, 0x1fd000},
		{"high too large", func() (uint64, bool) { return l.high(0x100001, 1, 0, 1<<32) }, ^uint64(0)},
		{"low huge", func() (uint64, bool) { return l.low(^uint64(0), 1, 0, ^uint64(0)) }, ^uint64(0)},
		{"low align overflow", func() (uint64, bool) { return l.low(1, 1<<63, 0x1001, ^uint64(0)) }, ^uint64(0)},
	} {
		if got, ok := c.f(); ok != (c.want != ^uint64(0)) || ok && got != c.want {
			t.Errorf("%s: %#x, %v; want %#x", c.what, got, ok, c.want)
		}
	}
	if l.take(0x8fff, 2) || l.take(0xfffff, 2) || l.take(0x1050, 1) || l.take(0x100000, ^uint64(0)) {
		t.Error("took memory that is not free")
	}
	if !l.take(0x100000, 0x1000) || l.take(0x100fff, 1) {
		t.Error("take does not take")
	}
}
