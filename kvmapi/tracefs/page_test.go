package tracefs

import (
	"encoding/binary"
	"reflect"
	"testing"
)

const formatText = `name: target_cmd_complete
ID: 1234
format:
	field:unsigned short common_type;	offset:0;	size:2;	signed:0;
	field:unsigned char common_flags;	offset:2;	size:1;	signed:0;
	field:unsigned char common_preempt_count;	offset:3;	size:1;	signed:0;
	field:int common_pid;	offset:4;	size:4;	signed:1;

	field:unsigned int lun;	offset:8;	size:4;	signed:0;
	field:unsigned char cdb[4];	offset:12;	size:4;	signed:0;
	field:__data_loc char[] initiator;	offset:16;	size:4;	signed:0;

print fmt: "%s", __get_str(initiator)
`

func format(t testing.TB) *Format {
	f, err := parseFormat(formatText)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// data is an event's: LUN n, with an initiator's name.
func data(n uint32) []byte {
	b := make([]byte, 20)
	le := binary.LittleEndian
	le.PutUint16(b, 1234)
	le.PutUint32(b[8:], n)
	copy(b[12:], "\x28\x01\x02\x03")
	le.PutUint16(b[16:], 20)
	le.PutUint16(b[18:], 4)
	return append(b, "naa\x00"...)
}

// page is a ring buffer's page of events, each with its header.
func page(time, commit uint64, events ...[]byte) []byte {
	b := make([]byte, 16)
	for _, e := range events {
		b = append(b, e...)
	}
	binary.LittleEndian.PutUint64(b, time)
	binary.LittleEndian.PutUint64(b[8:], commit|uint64(len(b)-16))
	return append(b, 7, 0, 0, 0, 0, 0, 0, 0) // the number of lost events, if commit says so
}

func words(w ...uint32) (b []byte) {
	for _, v := range w {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	return b
}

func TestParsePage(t *testing.T) {
	f := format(t)
	short := append(words(6|10<<5), data(1)...)           // 24 bytes in words, 10 ns later
	long := append(words(0|20<<5, 4+24), data(2)...)      // the length in a word of its own
	other := append(words(1|5<<5), 0xff, 0xff, 0, 0)      // an event that was not enabled
	extend, stamp := words(30|1<<5, 2), words(31|3<<5, 9) // 2<<27+1 ns more; at 9<<27+3
	padding, end := words(29|2<<5, 12, 0, 0), words(29, 0, 0)
	p := page(1000, missedEvents|missedStored, short, other, extend, long, padding, stamp, short, end, long)
	events, missed, err := parsePage(p, map[uint16]*Format{1234: f})
	if err != nil || missed != 7 {
		t.Fatalf("%v, %d missed", err, missed)
	}
	var got [][2]uint64
	for _, e := range events {
		got = append(got, [2]uint64{e.Uint("lun"), e.Time})
		if string(e.Bytes("cdb")) != "\x28\x01\x02\x03" || string(e.Bytes("initiator")) != "naa\x00" ||
			e.Bytes("none") != nil {
			t.Errorf("cdb % x, initiator %q", e.Bytes("cdb"), e.Bytes("initiator"))
		}
	}
	want := [][2]uint64{{1, 1010}, {2, 1015 + 2<<27 + 1 + 20}, {1, 9<<27 + 3 + 10}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("events %v, want %v", got, want)
	}
	for _, bad := range [][]byte{nil, p[:20], page(0, 0, words(6)), page(0, 0, words(0, 1)), page(0, 0, words(0, 4096))} {
		if _, _, err := parsePage(bad, nil); err == nil {
			t.Errorf("% x is a page", bad)
		}
	}
}

func TestParseFormat(t *testing.T) {
	for _, bad := range []string{"", "name: x\n", "name: x\nID: 70000\n",
		"name: x\nID: 1\n\tfield:int a;\toffset:-1;\tsize:4;\n", "name: x\nID: 1\n\tfield:a;\toffset:1;\tsize:4;\n"} {
		if f, err := parseFormat(bad); err == nil {
			t.Errorf("%q: %+v", bad, f)
		}
	}
}

// FuzzParsePage reads arbitrary pages of a trace. No field of an event has more than the page.
func FuzzParsePage(f *testing.F) {
	fm := format(f)
	f.Add(page(1000, missedEvents, append(words(6|10<<5), data(1)...), words(30, 5), words(29)))
	f.Fuzz(func(t *testing.T, b []byte) {
		events, _, _ := parsePage(b, map[uint16]*Format{1234: fm})
		for _, e := range events {
			_ = e.Uint("lun")
			if n := e.Bytes("initiator"); len(n) > len(b) {
				t.Fatal("more than the page")
			}
		}
	})
}
