package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestOpenOutput: gvm does not overwrite a file that it did not write.
func TestOpenOutput(t *testing.T) {
	for text, ok := range map[string]bool{
		"": true, "[1]": true, "{}": true, "<?xml version": true, "<svg>": true, "\x89PNG\r\n\x1a\n": true,
		string(make([]byte, 4096)): false, "GVMOVL1": false, "text": false,
	} {
		path := filepath.Join(t.TempDir(), "out.json")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		f, _, err := openOutput(path)
		if err == nil {
			f.Close()
		}
		if (err == nil) != ok || err != nil && exitStatus(err) != exitUsage {
			t.Errorf("%.20q: %v", text, err)
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != text {
			t.Errorf("%.20q became %.20q, %v", text, got, err)
		}
	}
}

// TestOutputOnFullFileSystem: an output for which there is no room leaves an existing file
// unchanged, also through a link, and creates no new one.
func TestOutputOnFullFileSystem(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Skipf("mounting a tmpfs: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, 0) })
	old, large := "[\n 1\n]\n", strings.Repeat("x", 128<<10)
	record := func(path string) error {
		r, err := openBenchRecord(path)
		if err != nil {
			return err
		}
		return r.close(r.write(large))
	}
	if err := os.Symlink("there", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	for how, write := range map[string]func(path string) error{
		"output": func(path string) error { return writeOutput(path, []byte(large)) }, "record": record,
	} {
		for _, name := range []string{"there", "link", "new"} {
			if err := os.WriteFile(filepath.Join(dir, "there"), []byte(old), 0o600); err != nil {
				t.Fatal(err)
			}
			err := write(filepath.Join(dir, name))
			if !errors.Is(err, unix.ENOSPC) || exitStatus(err) != exitHost || !strings.Contains(err.Error(), name) {
				t.Errorf("%s, %s: %v", how, name, err)
			}
			if b, err := os.ReadFile(filepath.Join(dir, "there")); err != nil || string(b) != old {
				t.Errorf("%s, %s: the file that was there has %.20q, %v", how, name, b, err)
			}
			if list, err := os.ReadDir(dir); err != nil || len(list) != 2 {
				t.Errorf("%s, %s: left %v, %v", how, name, list, err)
			}
		}
	}
	path := filepath.Join(dir, "there")
	if err := writeOutput(path, []byte("[]")); err != nil {
		t.Error(err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "[]" {
		t.Errorf("a shorter output: %q, %v", b, err)
	}
}
