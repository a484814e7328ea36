package rtc

import (
	"testing"
	"time"
)

func read(r *RTC, reg byte) byte {
	r.Write(0, []byte{reg})
	p := []byte{0}
	r.Read(1, p)
	return p[0]
}

func write(r *RTC, reg, v byte) {
	r.Write(0, []byte{reg})
	r.Write(1, []byte{v})
}

func check(t *testing.T, r *RTC, want map[byte]byte) {
	t.Helper()
	for reg, v := range want {
		if got := read(r, reg); got != v {
			t.Errorf("register %#02x reads %#02x, want %#02x", reg, got, v)
		}
	}
}

func TestTime(t *testing.T) {
	for _, c := range []struct {
		name string
		now  time.Time
		want map[byte]byte
	}{
		{"each field distinct", time.Date(2031, 12, 24, 23, 59, 58, 0, time.UTC), map[byte]byte{
			0x00: 0x58, 0x02: 0x59, 0x04: 0x23, 0x06: 0x04, 0x07: 0x24, 0x08: 0x12, 0x09: 0x31, 0x32: 0x20}},
		{"another century", time.Date(1999, 1, 2, 3, 4, 5, 0, time.UTC), map[byte]byte{
			0x00: 0x05, 0x02: 0x04, 0x04: 0x03, 0x06: 0x07, 0x07: 0x02, 0x08: 0x01, 0x09: 0x99, 0x32: 0x19}},
		{"told in UTC", time.Date(2026, 6, 1, 1, 0, 0, 0, time.FixedZone("", 2*3600)), map[byte]byte{
			0x04: 0x23, 0x07: 0x31, 0x08: 0x05, 0x09: 0x26}},
		{"at reset", time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), map[byte]byte{
			0x0a: 0x26, 0x0b: 0x02, 0x0c: 0x00, 0x0d: 0x80, 0x0f: 0x00}},
	} {
		t.Run(c.name, func(t *testing.T) { check(t, New(Config{Now: func() time.Time { return c.now }}), c.want) })
	}
}

func TestUpdateInProgress(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 7, 0, time.UTC)
	r := New(Config{Now: func() time.Time { return now }})
	for _, c := range []struct {
		ns   int
		want byte
	}{{0, 0x26}, {999_755_999, 0x26}, {999_756_000, 0xa6}, {999_999_999, 0xa6}} {
		now = now.Truncate(time.Second).Add(time.Duration(c.ns))
		if got := read(r, 0x0a); got != c.want {
			t.Errorf("%d ns into the second: register A %#02x, want %#02x", c.ns, got, c.want)
		}
	}
	write(r, 0x0b, 0x80)
	if got := read(r, 0x0a); got != 0x26 {
		t.Errorf("updates held: register A %#02x, want 0x26", got)
	}
}

// TestSetTime sets 28 February on 31 March: the intermediate states are not valid dates.
func TestSetTime(t *testing.T) {
	now := time.Date(2026, 3, 31, 10, 20, 30, 0, time.UTC)
	r := New(Config{Now: func() time.Time { return now }})
	write(r, 0x0b, 0x82)
	now = now.Add(time.Minute)
	check(t, r, map[byte]byte{0x00: 0x30, 0x02: 0x20, 0x0b: 0x82})
	for _, w := range [][2]byte{{0x09, 0x99}, {0x08, 0x02}, {0x07, 0x28}, {0x04, 0x23}, {0x02, 0x59}, {0x00, 0x58},
		{0x32, 0x19}} {
		write(r, w[0], w[1])
	}
	now = now.Add(time.Hour)
	write(r, 0x0b, 0x02)
	check(t, r, map[byte]byte{0x00: 0x58, 0x02: 0x59, 0x04: 0x23, 0x06: 0x01, 0x07: 0x28, 0x08: 0x02, 0x09: 0x99,
		0x32: 0x19})
	now = now.Add(2 * time.Second)
	check(t, r, map[byte]byte{0x00: 0x00, 0x02: 0x00, 0x04: 0x00, 0x06: 0x02, 0x07: 0x01, 0x08: 0x03})
	write(r, 0x02, 0x45) // without holding the clock
	now = now.Add(time.Second)
	check(t, r, map[byte]byte{0x00: 0x01, 0x02: 0x45, 0x04: 0x00, 0x09: 0x99})
}

func TestRegisters(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		name           string
		reg, put, want byte
	}{
		{"alarm seconds are kept", 0x01, 0x11, 0x11},
		{"alarm minutes are kept", 0x03, 0x22, 0x22},
		{"alarm hours are kept", 0x05, 0xc3, 0xc3},
		{"shutdown status is kept", 0x0f, 0x0a, 0x0a},
		{"last byte is kept", 0x7f, 0x5a, 0x5a},
		{"UIP cannot be written", 0x0a, 0xf5, 0x75},
		{"interrupt enables and format are kept", 0x0b, 0x7d, 0x7d},
		{"the rise of SET clears UIE", 0x0b, 0xf2, 0xe2},
		{"C is read-only", 0x0c, 0xff, 0x00},
		{"D is read-only", 0x0d, 0x00, 0x80},
		{"bit 7 of the index masks NMI", 0x8f, 0x3c, 0x3c},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := New(Config{Now: func() time.Time { return now }})
			write(r, c.reg, c.put)
			if got := read(r, c.reg&0x7f); got != c.want {
				t.Errorf("wrote %#02x, read %#02x, want %#02x", c.put, got, c.want)
			}
		})
	}
	r := New(Config{})
	r.Write(0, []byte{0x40, 0x77}) // one 16-bit write: index and data
	p := []byte{0, 0}
	r.Read(0, p)
	if p[0] != 0xff || p[1] != 0x77 {
		t.Errorf("16-bit read %#x, want 0xff 0x77", p)
	}
}

// FuzzWrites: no register value causes a panic or a field that is not BCD.
func FuzzWrites(f *testing.F) {
	f.Add([]byte{0x0b, 0x80, 0x08, 0xff, 0x32, 0xff, 0x0b, 0x00})
	f.Add([]byte{0x04, 0x00, 0x07, 0x00, 0x08, 0x00, 0x09, 0x00, 0x32, 0x00})
	f.Add([]byte{0x0b, 0x76, 0x0a, 0x7f, 0x01, 0xff, 0x03, 0x99, 0x05, 0xc0, 0x0a, 0x23, 0x0b, 0xf4})
	// 30 November before year 0.
	f.Add([]byte{0x0b, 0x82, 0x32, 0x00, 0x09, 0x00, 0x08, 0x00, 0x07, 0x00, 0x0b, 0x02})
	f.Fuzz(func(t *testing.T, b []byte) {
		r := New(Config{Now: func() time.Time { return time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC) }})
		for i := 0; i+1 < len(b); i += 2 {
			write(r, b[i], b[i+1])
		}
		write(r, 0x0b, 2)
		write(r, 0x0a, 0x26)
		for _, reg := range []byte{0, 2, 4, 6, 7, 8, 9, 0x32} {
			if v := read(r, reg); v>>4 > 9 || v&0xf > 9 {
				t.Errorf("register %#02x reads %#02x, which is not BCD", reg, v)
			}
		}
	})
}
