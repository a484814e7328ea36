package main

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

// TestTrim: after trim fewer of the program's pages are in this process, it still runs, and no
// writable page has changed.
func TestTrim(t *testing.T) {
	before := programRSS(t)
	files := newTrimmer()
	err := files.trim()
	files.close()
	if err != nil {
		t.Fatal(err)
	}
	if err := files.trim(); err != nil {
		t.Errorf("a machine that has ended: %v", err)
	}
	if after := programRSS(t); after >= before {
		t.Errorf("%d KiB of the program are resident, %d before", after, before)
	}
	files = newTrimmer()
	defer files.close()
	maps, err := files.programMaps()
	if err != nil || len(maps) < 2 { // code and constants
		t.Errorf("%x, %v", maps, err)
	}
	smaps := readSmaps(t)
	for _, m := range maps {
		if head := fmt.Sprintf("%08x-%08x r--p", m.from, m.to); !strings.Contains(smaps, head) &&
			!strings.Contains(smaps, strings.Replace(head, "r--p", "r-xp", 1)) {
			t.Errorf("%s is not a read-only mapping", head)
		}
	}
}

func readSmaps(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// programRSS returns the resident size of read-only mappings of the program's file, in KiB.
func programRSS(t *testing.T) (kib int) {
	t.Helper()
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	counts := false
	for line := range strings.Lines(readSmaps(t)) {
		var n int
		switch fields := strings.Fields(line); {
		case !strings.HasSuffix(fields[0], ":"): // the first line of a mapping
			counts = fields[1][1] == '-' && fields[len(fields)-1] == exe
		case counts:
			if _, err := fmt.Sscanf(line, "Rss: %d kB", &n); err == nil {
				kib += n
			}
		}
	}
	return kib
}
