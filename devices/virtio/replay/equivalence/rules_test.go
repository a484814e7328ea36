package equivalence

import (
	"os"
	"slices"
	"testing"

	"gvm/devices/scsi"
	"gvm/devices/scsi/trace"
	"gvm/devices/virtio/replay"
)

// TestRows holds docs/backends.md to have a row for each rule, and no other.
func TestRows(t *testing.T) {
	doc, err := os.ReadFile("../../../../docs/backends.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := Rows(string(doc))
	want := []string{consequence}
	for _, r := range rules {
		want = append(want, r.id)
	}
	slices.Sort(rows)
	slices.Sort(want)
	if !slices.Equal(rows, want) {
		t.Errorf("the document has the rows\n%q\nthe rules are\n%q", rows, want)
	}
}

func difference(cdb string, what []string, sense byte, response uint8) *replay.Difference {
	b := replay.Answer{Response: response, Status: scsi.CheckCondition,
		Sense: []byte{0x70, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, sense, 0, 0, 0}}
	r := &trace.Record{Kind: trace.Command, LUN: trace.UnitLUN(0), CDB: []byte(cdb)}
	return &replay.Difference{Record: r, What: what, B: b}
}

// TestExplain has differences that no row explains, and ones that a row does.
func TestExplain(t *testing.T) {
	what := []string{"status", "sense"}
	same := "\x93\x01\x00\x00\x00\x00\x00\x00\x00\x40\x00\x00\x00\x20\x00\x00"
	write := "\x2a\x00\x00\x00\x00\x08\x00\x00\x01\x00"
	plain := []trace.Disk{{BlockSize: 512}}
	readOnly := []trace.Disk{{BlockSize: 512, ReadOnly: true}, {LUN: 1, BlockSize: 512}}
	refused := difference(write, what, 0x24, 0)
	refused.A = replay.Answer{Status: scsi.CheckCondition, Sense: []byte{0x70, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x27, 0}}
	elsewhere := *refused
	record := *refused.Record
	record.LUN = trace.UnitLUN(1)
	elsewhere.Record = &record
	for _, tt := range []struct {
		name  string
		disks []trace.Disk
		d     *replay.Difference
		rows  []string
		left  int
	}{
		{"TEST UNIT READY fails", plain, difference("\x00\x00\x00\x00\x00\x00", what, 0x04, 0), nil, 2},
		// A row is about the answers that it names, and no others.
		{"WRITE SAME, as the row has it", plain, difference(same, what, 0x24, 0), []string{"write-same"}, 0},
		{"WRITE SAME, by another sense", plain, difference(same, what, 0x26, 0), nil, 2},
		{"a response too", plain, difference(same, what, 0x24, 9), nil, 2},
		{"a write to a read-only disk", readOnly, refused, []string{"read-only"}, 0},
		{"to one that may be written", plain, refused, []string{}, 2},
		{"to another LUN", readOnly, &elsewhere, nil, 2},
	} {
		l := NewList(trace.Header{Devices: []trace.Device{{Disks: tt.disks}}}, false)
		rows, left := l.Explain(tt.d)
		if len(left) != tt.left || len(tt.rows) > 0 && !slices.Equal(rows, tt.rows) {
			t.Errorf("%s: rows %q, left %q", tt.name, rows, left)
		}
		for _, r := range rows {
			if l.Used[r] != 1 {
				t.Errorf("%s: %s is used %d times", tt.name, r, l.Used[r])
			}
		}
	}
}
