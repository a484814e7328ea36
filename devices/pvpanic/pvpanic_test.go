package pvpanic

import "testing"

func TestWrite(t *testing.T) {
	for _, c := range []struct {
		name string
		off  uint64
		p    []byte
		want []Event
	}{
		{"panicked", 0, []byte{1}, []Event{1}},
		{"crash kernel loaded", 0, []byte{2}, []Event{2}},
		{"shutdown", 0, []byte{4}, []Event{4}},
		{"two at once", 0, []byte{3}, []Event{3}},
		{"unknown bits beside a known one", 0, []byte{0xf9}, []Event{1}},
		{"unknown bits alone", 0, []byte{0xf8}, nil},
		{"nothing", 0, []byte{0}, nil},
		{"past the register", 1, []byte{1}, nil},
		{"empty", 0, nil, nil},
		{"wide: the second byte is not the register", 0, []byte{0, 1}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got []Event
			Handler(func(e Event) { got = append(got, e) }).Write(c.off, c.p)
			if len(got) != len(c.want) || len(got) == 1 && got[0] != c.want[0] {
				t.Errorf("events %v, want %v", got, c.want)
			}
		})
	}
}

func TestReadTellsSupportedEvents(t *testing.T) {
	p := []byte{0xaa, 0xbb}
	Handler(nil).Read(0, p)
	if p[0] != 7 || p[1] != 0 {
		t.Errorf("read %#x, want 0x07 0x00", p)
	}
}
