package statusport

import (
	"slices"
	"testing"
)

func TestDevice(t *testing.T) {
	var got []Report
	d := New(func(r Report) { got = append(got, r) })
	d.Write(0, []byte{7, byte(Exited)}) // one access of two bytes
	d.Write(0, []byte{9})               // /dev/port makes two
	d.Write(1, []byte{byte(Signaled)})
	d.Write(1, []byte{byte(Alive), 3}) // the byte behind the device is none of its
	d.Write(0, nil)
	if want := []Report{{Exited, 7}, {Signaled, 9}, {Alive, 9}}; !slices.Equal(got, want) {
		t.Errorf("reports %v, want %v", got, want)
	}
	if value, reports, last := d.State(); value != 9 || reports != 3 || last != (Report{Alive, 9}) {
		t.Errorf("the state is %d, %d, %v", value, reports, last)
	}
	p := []byte{1, 2, 3}
	if d.Read(0, p); string(p) != Magic+"\xff" {
		t.Errorf("read %q", p)
	}
	if d.Read(1, p[:1]); p[0] != 'v' {
		t.Errorf("the second port reads %q", p[:1])
	}
}
