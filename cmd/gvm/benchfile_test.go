package main

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// TestFailedBenchRecord: a failed benchmark removes only a file that it made.
func TestFailedBenchRecord(t *testing.T) {
	path := filepath.Join(t.TempDir(), "out.json")
	failed := errors.New("failed")
	for _, there := range []bool{true, false} {
		if there {
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		} else if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		r, err := openBenchRecord(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := r.close(failed); !errors.Is(err, failed) {
			t.Error(err)
		}
		if _, err := os.Stat(path); (err == nil) != there {
			t.Errorf("an empty file was there: %t; afterwards: %v", there, err)
		}
	}
}

// TestBenchDirAtEnd: no directory is made behind the steps of an immediate end, as it would stay.
func TestBenchDirAtEnd(t *testing.T) {
	temp := t.TempDir()
	t.Setenv("TMPDIR", temp)
	urgent.making.Lock() // as such an end does
	made := make(chan error, 1)
	go func() {
		_, remove, err := benchDir()
		if err == nil {
			err = remove()
		}
		made <- err
	}()
	for !waitsForLock("benchDir") {
		runtime.Gosched()
	}
	if left, err := os.ReadDir(temp); err != nil || len(left) > 0 {
		t.Errorf("made: %v, %v", left, err)
	}
	urgent.making.Unlock()
	if err := <-made; err != nil {
		t.Error(err)
	}
}

// TestSocketsAtEnd: no socket is made behind the steps of an immediate end either, for a debugger,
// the guest's vsock or the machine's name.
func TestSocketsAtEnd(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("XDG_RUNTIME_DIR", dir)
	rc := &runConfig{vsock: &vsockConfig{kind: vsockUnix, path: filepath.Join(dir, "vsock")}}
	rc.spec.Name = "vm"
	for function, listen := range map[string]func() (io.Closer, error){
		"(*gdbServer).listenUnix": func() (io.Closer, error) {
			s := &gdbServer{}
			err := s.listenUnix(filepath.Join(dir, "gdb"), nil)
			return closer(s.close), err
		},
		"(*runConfig).listenVsock": func() (io.Closer, error) { return rc.listenVsock(true) },
		"(*runConfig).claimName": func() (io.Closer, error) {
			s, err := rc.claimName(func(string) {})
			return closer(func() error { return rc.closeSocket(s) }), err
		},
	} {
		urgent.making.Lock() // as such an end does
		made := make(chan error, 1)
		go func() {
			c, err := listen()
			made <- errors.Join(err, c.Close())
		}()
		for !waitsForLock(function) && len(made) == 0 {
			runtime.Gosched()
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 || len(made) > 0 {
			t.Errorf("%s made: %v, %v", function, left, err)
		}
		urgent.making.Unlock()
		if err := <-made; err != nil {
			t.Error(err)
		}
	}
}

type closer func() error

func (c closer) Close() error { return c() }

// TestEndSaysFirst: an immediate end says why, and removes what there is, before it waits for
// storage on which a file is made.
func TestEndSaysFirst(t *testing.T) {
	removed := make(chan string, 2)
	removeAtEnd(func() error { removed <- "first"; return nil })
	urgent.making.Lock()
	said, over := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(over)
		tidy(func() { close(said) })
		urgent.making.Unlock()
		urgent.Unlock()
	}()
	<-said
	if r := <-removed; r != "first" {
		t.Errorf("removed the %s", r)
	}
	removeAtEnd(func() error { removed <- "second"; return nil })
	urgent.making.Unlock()
	<-over
	if r := <-removed; r != "second" {
		t.Errorf("removed the %s", r)
	}
}

// waitsForLock reports whether a goroutine in the function waits for a lock.
func waitsForLock(function string) bool {
	for s := range strings.SplitSeq(string(stacks()), "\n\n") {
		if strings.Contains(s, "[sync.Mutex.Lock") && strings.Contains(s, "."+function+"(") {
			return true
		}
	}
	return false
}
