package trace

import (
	"bytes"
	"reflect"
	"testing"

	"gvm/devices/scsi"
)

// TestParseSense reads back sense data of a target, in both formats, and sense data that is cut
// short.
func TestParseSense(t *testing.T) {
	s := scsi.Sense{Key: scsi.MediumError, ASC: 0x11, ASCQ: 4, Info: 0x01020304, InfoValid: true,
		Specific: [3]byte{0xc8, 5, 6}}
	for _, b := range [][]byte{s.Fixed(), s.Descriptor()} {
		if got, ok := ParseSense(b); !ok || !reflect.DeepEqual(got, s) {
			t.Errorf("% x: %+v, %v", b, got, ok)
		}
		for n := range b {
			got, ok := ParseSense(b[:n])
			if ok != (n >= 4) || ok && got.Key != s.Key {
				t.Errorf("% x: %+v, %v", b[:n], got, ok)
			}
		}
	}
	for _, b := range [][]byte{{0, 0, 0, 0}, {0x7f, 1, 2, 3}, {0x72, 3, 0x11, 4, 0, 0, 0, 99, 0, 200, 1}} {
		if got, ok := ParseSense(b); ok != (b[0] == 0x72) || got.InfoValid {
			t.Errorf("% x: %+v, %v", b, got, ok)
		}
	}
}

func TestWords(t *testing.T) {
	lun := UnitLUN(300)
	info := scsi.Sense{Key: scsi.Miscompare, ASC: 0x1d, Info: 7, InfoValid: true}
	for _, tt := range []struct {
		r                         Record
		op, unit, detail, outcome string
		failed                    bool
	}{
		{Record{Kind: Command, LUN: lun, CDB: []byte{0x2a, 8, 0, 0, 0, 9, 0, 0, 2, 0}}, "WRITE(10)", "300",
			"9+2 FUA", "GOOD", false},
		{Record{Kind: Command, LUN: lun, CDB: []byte{0x41, 8, 0, 0, 0, 9, 0, 0, 2, 0}}, "WRITE SAME(10)", "300",
			"9+2 UNMAP", "GOOD", false},
		{Record{Kind: Command, LUN: [8]byte{1, 0, 0, 9}, CDB: []byte{0x1a, 0, 0x88, 0, 9, 0}, Status: scsi.Busy},
			"MODE SENSE(6)", "9", "page 08h", "BUSY", true},
		{Record{Kind: Command, LUN: [8]byte{0xc1, 1}, CDB: []byte{0xa0}, Status: 0x77}, "REPORT LUNS", "wlun", "",
			"status 77h", true},
		{Record{Kind: Command, LUN: [8]byte{1, 0, 0xc1, 1}, CDB: []byte{0xa3, 0x1f}, Response: 99},
			"MAINTENANCE IN, service action 1fh", "wlun", "a3 1f", "response 99", true},
		{Record{Kind: Command, LUN: [8]byte{2}, Status: scsi.CheckCondition, Sense: info.Descriptor()},
			"no CDB", "none", "",
			"CHECK CONDITION: MISCOMPARE, miscompare during verify (information 7)", true},
		{Record{Kind: Command, LUN: lun, CDB: cdb(6), Status: scsi.CheckCondition,
			Sense: scsi.Sense{Key: 9, ASC: 0x99, ASCQ: 1}.Fixed()}, "TEST UNIT READY", "300", "",
			"CHECK CONDITION: sense key 9h, additional sense 99h/01h", true},
		{Record{Kind: Command, LUN: lun, CDB: cdb(6), Status: scsi.CheckCondition, Sense: []byte{1, 2}},
			"TEST UNIT READY", "300", "", "CHECK CONDITION: sense data 01 02", true},
		{Record{Kind: Command, LUN: lun, CDB: []byte{0x5f, 1, 6, 9: 0}, Status: scsi.ReservationConflict},
			"PERSISTENT RESERVE OUT, RESERVE", "300",
			"Exclusive Access, registrants only", "RESERVATION CONFLICT", true},
		{Record{Kind: Command, LUN: lun, CDB: []byte{0x5f, 4, 0xc, 9: 0}}, "PERSISTENT RESERVE OUT, PREEMPT", "300",
			"type ch", "GOOD", false},
		{Record{Kind: Command, LUN: lun, CDB: []byte{0x5f, 3, 6, 9: 0}, Status: scsi.CheckCondition,
			Sense: scsi.RegistrationsPreempted.Fixed()},
			"PERSISTENT RESERVE OUT, CLEAR", "300", "",
			"CHECK CONDITION: UNIT ATTENTION, registrations preempted", true},
		{Record{Kind: Command, LUN: lun, CDB: cdb(6), Status: scsi.ConditionMet}, "TEST UNIT READY", "300", "",
			"CONDITION MET", false},
		{Record{Kind: TaskManagement, LUN: lun, Function: 6, Tag: 0xab, Response: 10}, "QUERY TASK", "300", "tag ab",
			"FUNCTION SUCCEEDED", false},
		{Record{Kind: TaskManagement, LUN: lun, Function: 0x80000000, Response: 11}, "unknown function", "300",
			"2147483648", "FUNCTION REJECTED", true},
		{Record{Kind: Reset}, "device reset", "", "", "", false},
		{Record{Kind: PowerOn}, "power on", "", "", "", false},
		{Record{Kind: Lost, Count: 3}, "lost", "", "", "3 requests are missing here", true},
	} {
		r := &tt.r
		if r.Op() != tt.op || r.Unit() != tt.unit || r.Detail() != tt.detail || r.Outcome() != tt.outcome ||
			r.Failed() != tt.failed {
			t.Errorf("%+v: %q, %q, %q, %q, %v", tt.r, r.Op(), r.Unit(), r.Detail(), r.Outcome(), r.Failed())
		}
	}
}

func read10(lun int, lba byte, r Record) Record {
	r.Kind, r.LUN, r.CDB = Command, UnitLUN(lun), []byte{0x28, 0, 0, 0, 0, lba, 0, 0, 1, 0}
	return r
}

func TestCompare(t *testing.T) {
	plain := func(luns ...int) (list []Record) {
		for i, lun := range luns {
			list = append(list, read10(lun, byte(i), Record{Time: 1}))
		}
		return list
	}
	abc := plain(1, 1, 1)
	for _, tt := range []struct {
		name         string
		a, b         []Record
		pairs, moved int
		changed      []string
		onlyA, onlyB []byte // LBAs
		same         bool
	}{
		{"nothing", nil, nil, 0, 0, nil, nil, nil, true},
		{"the same", abc, abc, 3, 0, nil, nil, nil, true},
		{"one less", abc, abc[1:], 2, 0, nil, []byte{0}, nil, false},
		{"one more", abc[:2], abc, 2, 0, nil, nil, []byte{2}, false},
		{"another order", abc, []Record{abc[1], abc[2], abc[0]}, 3, 1, nil, nil, nil, true},
		{"another LUN", plain(1), plain(2), 0, 0, nil, []byte{0}, []byte{0}, false},
		{"no LUNs", []Record{{Kind: Command, LUN: [8]byte{2}}}, []Record{{Kind: Command, LUN: [8]byte{3}}}, 0, 0, nil,
			[]byte{0}, []byte{0}, false},
		{"LUNs interleaved otherwise", []Record{read10(1, 1, Record{}), read10(2, 2, Record{})},
			[]Record{read10(2, 2, Record{}), read10(1, 1, Record{})}, 2, 0, nil, nil, nil, true},
		{"what does not count", plain(1),
			[]Record{read10(1, 0, Record{Time: 5, Latency: 6, Tag: 7, Queue: 8, Attr: 1})}, 1, 0, nil, nil, nil, true},
		{"what counts", plain(1), []Record{read10(1, 0,
			Record{Status: 8, Response: 1, Residual: 2, Sense: []byte{1}, In: 3})}, 1, 0,
			[]string{"response", "status", "sense", "residual", "length"}, nil, nil, false},
		{"an unknown one", plain(1), []Record{read10(1, 0,
			Record{Response: 1, Residual: 2, Missing: NoResidual | NoResponse})}, 1, 0, nil, nil, nil, true},
		{"a longer buffer of sense data", []Record{read10(1, 0, Record{Sense: []byte{1, 0}})},
			[]Record{read10(1, 0, Record{Sense: []byte{1}})}, 1, 0, nil, nil, nil, true},
		{"by time", []Record{read10(1, 0, Record{Time: 9}), read10(1, 1, Record{Time: 2})},
			[]Record{read10(1, 1, Record{Time: 2}), read10(1, 0, Record{Time: 9})}, 2, 0, nil, nil, nil, true},
		{"a task management function is no command", []Record{{Kind: TaskManagement, LUN: UnitLUN(1)}},
			[]Record{{Kind: Command, LUN: UnitLUN(1)}}, 0, 0, nil, []byte{0}, []byte{0}, false},
	} {
		var sides [2]*Reader
		for i, list := range [][]Record{tt.a, tt.b} {
			r, err := NewReader(bytes.NewReader(write(t, list...)))
			if err != nil {
				t.Fatal(err)
			}
			sides[i] = r
		}
		d, err := Compare(sides[0], sides[1])
		if err != nil {
			t.Fatal(err)
		}
		lbas := func(list []*Record) (out []byte) {
			for _, r := range list {
				out = append(out, append(r.CDB, make([]byte, 6)...)[5])
			}
			return out
		}
		var changed []string
		for _, c := range d.Changed {
			changed = append(changed, c.What...)
		}
		if d.Requests != tt.pairs || d.Moved != tt.moved || !reflect.DeepEqual(changed, tt.changed) ||
			!bytes.Equal(lbas(d.OnlyA), tt.onlyA) || !bytes.Equal(lbas(d.OnlyB), tt.onlyB) || d.Same() != tt.same {
			t.Errorf("%s: %+v", tt.name, d)
		}
	}
}

func TestOutcomesDiffer(t *testing.T) {
	a, b := read10(1, 0, Record{In: 512}), read10(1, 0, Record{In: 4096})
	for _, tt := range []struct {
		c    Change
		a, b string
	}{
		{Change{&a, &b, []string{"length"}}, "GOOD (out 0, in 512)", "GOOD (out 0, in 4096)"},
		{Change{&Record{Kind: Command, Status: 2, Sense: scsi.InvalidFieldInCDB.Fixed()},
			&Record{Kind: Command, Status: 2, Sense: scsi.InvalidFieldInCDB.Descriptor()}, []string{"sense"}},
			"CHECK CONDITION: ILLEGAL REQUEST, invalid field in CDB " +
				"[70 00 05 00 00 00 00 0a 00 00 00 00 24 00 00 00 00 00]",
			"CHECK CONDITION: ILLEGAL REQUEST, invalid field in CDB [72 05 24 00 00 00 00 00]"},
	} {
		if x, y := tt.c.Outcomes(); x != tt.a || y != tt.b {
			t.Errorf("%q and %q", x, y)
		}
	}
}
