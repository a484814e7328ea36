package main

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"gvm/machine/disk"
)

// TestRootWords has what --cmdline, initrds and read-only disks make of root=, in disks that
// were opened as for a run.
func TestRootWords(t *testing.T) {
	a, b := image(t, "a", 1, 1<<20), image(t, "b", 2, 1<<20)
	table := make([]byte, 512)
	binary.LittleEndian.PutUint32(table[440:], 0xdeadbeef)
	copy(table[446:], []byte{4: 0x83, 8: 1, 12: 8}) // a Linux partition
	table[510], table[511] = 0x55, 0xaa
	part := filepath.Join(t.TempDir(), "part")
	if err := os.WriteFile(part, append(table, make([]byte, 1<<20-512)...), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		disks string
		rc    runConfig
		want  string // at the end of the words
		noted bool
	}{
		{a, runConfig{}, " root=/dev/sda rw", false},
		{a + ",readonly", runConfig{cmdline: "quiet"}, " root=/dev/sda ro quiet", false},
		{a + " " + b, runConfig{cmdline: "quiet"}, " quiet", true},
		{a + " " + b, runConfig{cmdline: "root=/dev/sda"}, " root=/dev/sda", false},
		{a + " " + b, runConfig{initrds: []string{"x"}, cmdline: "quiet"}, " quiet", false},
		{part + " " + b, runConfig{}, " root=PARTUUID=deadbeef-01 rw", false},
		{part + ",overlay=on " + b, runConfig{}, " root=PARTUUID=deadbeef-01 rw", false},
		{a + " " + b, runConfig{bareCmdline: true, cmdline: "x"}, "x", false},
	} {
		rc := tt.rc
		for _, s := range strings.Fields(tt.disks) {
			d, err := disk.Parse(s)
			if err != nil {
				t.Fatal(err)
			}
			rc.disks = append(rc.disks, d)
		}
		ds, err := disk.Open(rc.disks, disk.Config{Note: func(string) {}})
		if err != nil {
			t.Fatal(err)
		}
		notes := 0
		got := rc.kernelCmdLine(ds.Root, func(string) { notes++ })
		if !strings.HasSuffix(got, tt.want) || strings.Count(got, "root=") != strings.Count(tt.want, "root=") || (notes > 0) != tt.noted {
			t.Errorf("%s: %q with %d notes, want %q", tt.disks, got, notes, tt.want)
		}
		if err := ds.Close(false); err != nil {
			t.Error(err)
		}
	}
}
