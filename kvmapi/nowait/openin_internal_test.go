package nowait

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestOpenInWithoutOpenat2 opens a file in a root, and none outside of it, on a kernel and in a
// container without openat2(2).
func TestOpenInWithoutOpenat2(t *testing.T) {
	defer func(f func(int, string, *unix.OpenHow) (int, error)) { openat2 = f }(openat2)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("text"), 0o600); err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	for _, lacks := range []error{unix.ENOSYS, unix.EPERM} {
		openat2 = func(int, string, *unix.OpenHow) (int, error) { return -1, lacks }
		f, err := OpenIn(root, "file", Regular)
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 5)
		if n, err := f.ReadAt(b, 0); string(b[:n]) != "text" || f.Close() != nil {
			t.Errorf("read %q, %v", b[:n], err)
		}
		if f, err := OpenIn(root, "../"+filepath.Base(dir)+"/file", Regular); err == nil {
			t.Error("opened a file outside")
			f.Close()
		}
	}
}
