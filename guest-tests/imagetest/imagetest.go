// Package imagetest proves that the committed guest programs are built from their sources.
package imagetest

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// The tools that made the programs. Others may translate the same sources to other bytes.
const (
	compiler = "gcc (Debian 12.2.0-14+deb12u1) 12.2.0"
	linker   = "GNU ld (GNU Binutils for Debian) 2.40"
)

// BuiltFromSource makes the named file from a copy of the current directory, and fails the test
// unless the result is image. It skips the test if the tools are not those of Debian 12.
func BuiltFromSource(t *testing.T, name string, image []byte) {
	t.Helper()
	for _, tool := range []struct{ name, want, pkg string }{
		{"make", "GNU Make", "make"}, {"gcc", compiler, "gcc"}, {"ld", linker, "binutils"},
	} {
		out, err := exec.Command(tool.name, "--version").Output()
		if err != nil {
			t.Skipf("%s --version: %v (install Debian 12's %s)", tool.name, err, tool.pkg)
		}
		if first, _, _ := strings.Cut(string(out), "\n"); !strings.HasPrefix(first, tool.want) {
			t.Skipf("%s is %q; the image was made with %q", tool.name, first, tool.want)
		}
	}
	dir := filepath.Join(t.TempDir(), "copy")
	if err := os.CopyFS(dir, os.DirFS(".")); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, name)); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("make", "-C", dir).CombinedOutput(); err != nil {
		t.Fatalf("make: %v\n%s", err, out)
	}
	rebuilt, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(rebuilt, image) {
		t.Errorf("%s (%d bytes) differs from the build of its source (%d bytes): run make here",
			name, len(image), len(rebuilt))
	}
}
