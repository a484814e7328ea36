package backends

import (
	"os"
	"slices"
	"strings"
	"testing"
)

// TestRows holds docs/backends.md to have a row for each rule, and no other.
func TestRows(t *testing.T) {
	doc, err := os.ReadFile("../../docs/backends.md")
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

const line = `{"request":{"device":0,"op":"TEST UNIT READY","cdb":"000000000000","out":0,"in":0,"attr":0,"lun_bytes":"0100400000000000"},` +
	`"what":["status","sense"],"a":{"status":0},"b":{"status":2,"sense":"70000200000000000000000004010000"}}`

// TestUnlisted has a difference that no row explains.
func TestUnlisted(t *testing.T) {
	d, left, err := NewList().Unlisted([]byte(line))
	if err != nil || !slices.Equal(left, []string{"status", "sense"}) || d.B.code() != "2/04/01" {
		t.Errorf("%+v, %q, %v", d, left, err)
	}
	// A row is about the answers that it names, and no others.
	same := `{"request":{"device":0,"op":"WRITE SAME(16)","cdb":"93010000000000000040000000200000","out":0,"in":0,"lun_bytes":"0100400000000000"},` +
		`"what":["status","sense"],"a":{"status":0},"b":{"status":2,"sense":"70000500000000000000000024000000"}}`
	if _, left, err := NewList().Unlisted([]byte(same)); err != nil || len(left) > 0 {
		t.Errorf("%q, %v", left, err)
	}
	if _, left, err := NewList().Unlisted([]byte(strings.Replace(same, "24000000\"}", "26000000\"}", 1))); err != nil || len(left) != 2 {
		t.Errorf("%q, %v", left, err)
	}
	if _, _, err := NewList().Unlisted([]byte("{")); err == nil {
		t.Error("took half an object")
	}
}
