package main

import (
	"errors"
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

// TestEndSaysFirst: an immediate end says why before it waits for storage on which a file is made.
func TestEndSaysFirst(t *testing.T) {
	urgent.making.Lock()
	said, over := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(over)
		tidy(func() { close(said) })
		urgent.making.Unlock()
		urgent.Unlock()
	}()
	<-said
	urgent.making.Unlock()
	<-over
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
