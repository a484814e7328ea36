package nowait_test

import (
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"gvm/devices/virtio/fs/hostfs/hostfstest"
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

// TestNoPoll: the kernel asks the server of a FUSE file system for no POLL. Go's runtime would wait
// for the answer without its scheduler, so that all goroutines would stop at the next garbage
// collection.
func TestNoPoll(t *testing.T) {
	in := func(dir string) (*os.File, error) {
		root, err := os.OpenRoot(dir)
		if err != nil {
			return nil, err
		}
		defer root.Close()
		return nowait.OpenIn(root, "file", nowait.Regular)
	}
	for name, open := range map[string]func(dir string) (*os.File, error){
		"open": func(dir string) (*os.File, error) {
			return nowait.Open(filepath.Join(dir, "file"), os.O_RDWR, 0, nowait.Regular)
		},
		"open in a root": in,
		"open a directory": func(dir string) (*os.File, error) {
			return nowait.Open(dir, os.O_RDONLY, 0, nowait.Directory)
		},
		"make": func(dir string) (*os.File, error) {
			f, _, err := nowait.Make(filepath.Join(dir, "file"), os.O_RDWR, 0o600, nowait.Regular)
			return f, err
		},
		"make a temporary file": func(dir string) (*os.File, error) {
			return nowait.CreateTemp(dir, "a", ".tmp")
		},
		"adopt": func(dir string) (*os.File, error) {
			fd, err := unix.Open(filepath.Join(dir, "file"), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
			if err != nil {
				return nil, err
			}
			return nowait.NewFile(fd, "file")
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "fuse")
			var there, polled atomic.Bool
			there.Store(name[0] != 'm')
			hostfstest.Mount(t, dir, func(opcode uint32) unix.Errno {
				switch opcode {
				case hostfstest.Lookup:
					if !there.Load() {
						return unix.ENOENT
					}
				case hostfstest.Create:
					there.Store(true)
				case hostfstest.Poll:
					polled.Store(true)
				}
				return 0
			})
			f, err := open(dir)
			if err != nil {
				t.Fatal(err)
			}
			if err := f.Close(); err != nil {
				t.Error(err)
			}
			if polled.Load() {
				t.Error("the server was asked for POLL")
			}
		})
	}
}
