package unixsocket

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestListen: of many at a time that find the same stale socket, one replaces it, and the others
// leave that one's alone.
func TestListen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "socket")
	open := func() *os.File {
		d, err := os.Open(filepath.Dir(path))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { d.Close() })
		return d
	}
	for range 10 {
		var all sync.WaitGroup
		winners := make(chan *net.UnixListener, 10)
		for range cap(winners) {
			dir := open()
			all.Go(func() {
				l, made, err := Listen(dir, path)
				if err != nil {
					if !errors.Is(err, ErrExists) {
						t.Error(err)
					}
					return
				}
				if now, err := os.Lstat(path); err != nil || !os.SameFile(made, now) || now.Mode() != os.ModeSocket|0o600 {
					t.Errorf("%v, %v", now, err)
				}
				winners <- l
			})
		}
		all.Wait()
		if n := len(winners); n != 1 {
			t.Fatalf("%d listen", n)
		}
		(<-winners).Close() // which leaves a stale socket
	}
}

// TestNoLocks: a directory that cannot be locked, here for its descriptor, has a socket too.
func TestNoLocks(t *testing.T) {
	path := t.TempDir()
	dir, err := os.OpenFile(path, unix.O_PATH, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != unix.EBADF {
		t.Fatalf("flock: %v", err)
	}
	l, _, err := Listen(dir, filepath.Join(path, "socket"))
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}

// TestLocked: another program has the directory's lock for as long as a Listen takes at most.
func TestLocked(t *testing.T) {
	dir := t.TempDir()
	held, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := lock(held); err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(10*time.Millisecond, func() { held.Close() })
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	l, _, err := Listen(d, filepath.Join(dir, "socket"))
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}
