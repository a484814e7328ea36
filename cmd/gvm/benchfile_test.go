package main

import (
	"errors"
	"os"
	"path/filepath"
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
