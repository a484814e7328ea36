package i8042

import "testing"

func TestWrite(t *testing.T) {
	for _, c := range []struct {
		name  string
		p     []byte
		reset int
	}{
		{"pulse reset", []byte{0xfe}, 1},
		{"pulse every line", []byte{0xf0}, 1},
		{"pulse no line", []byte{0xff}, 0},
		{"pulse A20 alone", []byte{0xfd}, 0},
		{"self-test", []byte{0xaa}, 0},
		{"disable keyboard", []byte{0xad}, 0},
		{"nothing", nil, 0},
		{"second byte belongs to another port", []byte{0x20, 0xfe}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := 0
			Handler(func() { n++ }).Write(0, c.p)
			if n != c.reset {
				t.Errorf("%d resets, want %d", n, c.reset)
			}
		})
	}
}

// TestProbeEnds makes the accesses of Linux's i8042_flush and kb_wait.
func TestProbeEnds(t *testing.T) {
	p := []byte{0xff}
	Handler(nil).Read(0, p)
	if p[0]&1 == 0 {
		t.Error("the output buffer empties: a probe goes on to the self-test")
	}
	if p[0]&2 != 0 {
		t.Error("the input buffer is full: a reset by this port waits")
	}
}
