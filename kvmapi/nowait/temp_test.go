package nowait_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"gvm/kvmapi/nowait"
)

// TestTempDir: the files that a killed process has left are removed, and those in use stay.
func TestTempDir(t *testing.T) {
	parent := t.TempDir()
	t.Setenv("TMPDIR", parent)
	for _, dir := range []string{"name-1/in", "name-2", "name-mine", "name-3", "other-4"} {
		if err := os.MkdirAll(filepath.Join(parent, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	used, err := os.Open(filepath.Join(parent, "name-2"))
	if err == nil {
		err = errors.Join(unix.Flock(int(used.Fd()), unix.LOCK_EX), os.Chmod(filepath.Join(parent, "name-3"), 0o755))
	}
	if err != nil {
		t.Fatal(err)
	}
	defer used.Close()
	dirs := func() (names []string) {
		entries, err := os.ReadDir(parent)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			names = append(names, filepath.Join(parent, e.Name()))
		}
		return names
	}
	var want []string
	for _, name := range []string{"name-2", "name-3", "name-mine", "other-4"} {
		want = append(want, filepath.Join(parent, name))
	}
	first, err := nowait.TempDir("name-")
	if err != nil {
		t.Fatal(err)
	}
	second, err := nowait.TempDir("name-")
	if err != nil {
		t.Fatal(err)
	}
	made := append([]string{first, second}, want...)
	slices.Sort(made)
	if got := dirs(); !slices.Equal(got, made) {
		t.Errorf("%q, want %q", got, made)
	}
}
