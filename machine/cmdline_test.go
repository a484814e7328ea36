package machine

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"gvm/machine/disk"
	"gvm/vmm/boot"
)

// TestRootWords checks root= for combinations of --cmdline, initrds and read-only disks. The disks
// are opened as for a run.
func TestRootWords(t *testing.T) {
	dir := t.TempDir()
	file := func(name string, b []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	a, b := file("a", make([]byte, 1<<20)), file("b", make([]byte, 1<<20))
	table := make([]byte, 512)
	binary.LittleEndian.PutUint32(table[440:], 0xdeadbeef)
	copy(table[446:], []byte{4: 0x83, 8: 1, 12: 8}) // a Linux partition
	table[510], table[511] = 0x55, 0xaa
	part := file("part", append(table, make([]byte, 1<<20-512)...))
	for _, tt := range []struct {
		disks string
		spec  Spec
		want  string // at the end of the words
		noted bool
	}{
		{a, Spec{}, " root=/dev/sda rw", false},
		{a + ",readonly", Spec{CmdLine: "quiet"}, " root=/dev/sda ro quiet", false},
		{a + " " + b, Spec{CmdLine: "quiet"}, " quiet", true},
		{a + " " + b, Spec{CmdLine: "root=/dev/sda"}, " root=/dev/sda", false},
		{a + " " + b, Spec{Initrds: []*boot.File{{}}, CmdLine: "quiet"}, " quiet", false},
		{part + " " + b, Spec{}, " root=PARTUUID=deadbeef-01 rw", false},
		{part + ",overlay=on " + b, Spec{}, " root=PARTUUID=deadbeef-01 rw", false},
		{a + " " + b, Spec{BareCmdLine: true, CmdLine: "x"}, "x", false},
		{a, Spec{Debug: true, BootMode: boot.BzImage, CmdLine: "quiet"}, " nokaslr root=/dev/sda rw quiet", false},
		{a, Spec{Debug: true, BootMode: boot.BzImage, CmdLine: "kaslr"}, "panic=-1 root=/dev/sda rw kaslr", false},
		{a, Spec{Debug: true}, "panic=-1 root=/dev/sda rw", false},
	} {
		spec := tt.spec
		for _, s := range strings.Fields(tt.disks) {
			d, err := disk.Parse(s)
			if err != nil {
				t.Fatal(err)
			}
			spec.Disks = append(spec.Disks, d)
		}
		ds, err := disk.Open(t.Context(), spec.Disks, disk.Config{Note: func(string) {}})
		if err != nil {
			t.Fatal(err)
		}
		notes := 0
		spec.Note = func(string) { notes++ }
		got := spec.cmdLine(ds.Root)
		if !strings.HasSuffix(got, tt.want) || strings.Count(got, "root=") != strings.Count(tt.want, "root=") ||
			(notes > 0) != tt.noted {
			t.Errorf("%s: %q with %d notes, want %q", tt.disks, got, notes, tt.want)
		}
		if err := ds.Close(t.Context(), false); err != nil {
			t.Error(err)
		}
	}
}
