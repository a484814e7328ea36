package nowait_test

import (
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"gvm/kvmapi/nowait"
)

// TestOpen opens every type of file, wanted and not. The FIFO has no other end.
func TestOpen(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	if err := errors.Join(os.WriteFile(at("file"), []byte("text"), 0o600), unix.Mkfifo(at("fifo"), 0o600)); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", at("socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	paths := map[string]nowait.Kinds{at("file"): nowait.Regular, at("fifo"): nowait.Pipe, "/dev/null": nowait.CharDevice,
		dir: nowait.Directory, at("socket"): nowait.Socket}
	for path, is := range paths {
		for _, want := range []nowait.Kinds{is, ^is} {
			f, err := nowait.Open(path, os.O_RDONLY, 0, want)
			var kind *nowait.KindError
			switch {
			case want != is:
				if !errors.As(err, &kind) || kind.Is != is {
					t.Errorf("%s: %v", path, err)
				}
			case is == nowait.Socket:
				if !errors.Is(err, unix.ENXIO) {
					t.Errorf("%s: %v", path, err)
				}
			case err != nil:
				t.Errorf("%s: %v", path, err)
			default:
				f.Close()
			}
		}
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	if err := os.Symlink("../"+filepath.Base(dir)+"/file", at("out")); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{"file": true, "fifo": false, "out": false, "../x": false} {
		f, err := nowait.OpenIn(root, name, nowait.Regular)
		if (err == nil) != want {
			t.Errorf("%s in a root: %v", name, err)
		}
		f.Close()
	}
	if _, err := nowait.Open(at("none"), os.O_RDONLY, 0, nowait.Regular); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if _, err := nowait.Open(at("fifo"), os.O_WRONLY, 0, nowait.Pipe); !errors.Is(err, unix.ENXIO) {
		t.Errorf("a FIFO that no program reads: %v", err)
	}
	const want = "a regular file, a block device or a pipe"
	if got := (nowait.Regular | nowait.BlockDevice | nowait.Pipe).String(); got != want {
		t.Errorf("%q, want %q", got, want)
	}
	// Data in a pipe is read when it comes.
	r, err := nowait.Open(at("fifo"), os.O_RDONLY, 0, nowait.Pipe)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	w, err := nowait.Open(at("fifo"), os.O_WRONLY, 0, nowait.Pipe)
	if err != nil {
		t.Fatal(err)
	}
	text := make(chan string)
	go func() {
		b, _ := io.ReadAll(r)
		text <- string(b)
	}()
	_, err = w.WriteString("late")
	if got := <-func() chan string { w.Close(); return text }(); got != "late" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
}
