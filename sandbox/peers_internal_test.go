package sandbox

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// TestPeers: docs/security.md compares all attacks with those on other programs, and says for each
// which filters refuse it.
func TestPeers(t *testing.T) {
	b, err := os.ReadFile("../docs/security.md")
	if err != nil {
		t.Fatal(err)
	}
	part := regexp.MustCompile(`(?s)<!-- peers -->\n(.*?)<!-- end -->`).FindSubmatch(b)
	if part == nil {
		t.Fatal("docs/security.md has no table of peers")
	}
	rows := strings.Split(strings.TrimSpace(string(part[1])), "\n")[2:]
	for i, a := range attacks {
		if i >= len(rows) {
			t.Fatalf("%d rows for %d attacks", len(rows), len(attacks))
		}
		cells := strings.Split(rows[i], "|")
		if len(cells) != 5 || strings.TrimSpace(cells[1]) != a.what {
			t.Fatalf("row %d is %q, want the attack %q and two answers", i+1, rows[i], a.what)
		}
	}
	if len(rows) != len(attacks) {
		t.Errorf("%d rows for %d attacks", len(rows), len(attacks))
	}
}
