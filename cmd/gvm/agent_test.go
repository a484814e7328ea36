package main

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"gvm/guest-tests/lab"
	"gvm/guest/agent/wire"
)

// TestAgentIn: only the gvm-agent that was built with gvm becomes an agent. Any other file of the
// name is left alone, and a FIFO does not hold gvm up.
func TestAgentIn(t *testing.T) {
	program := lab.Program("gvm-net") // any program of Go
	id, err := wire.BuildID(program)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		make func(path string) error
		id   string
		want bool
	}{
		{"none", func(string) error { return nil }, id, false},
		{"of the build", func(path string) error { return os.Symlink(program, path) }, id, true},
		{"of another build", func(path string) error { return os.Symlink(self(t), path) }, id, false},
		{"empty", func(path string) error { return os.WriteFile(path, nil, 0o755) }, id, false},
		{"a directory", func(path string) error { return os.Mkdir(path, 0o755) }, id, false},
		{"a FIFO", func(path string) error { return unix.Mkfifo(path, 0o755) }, id, false},
	} {
		dir := t.TempDir()
		path := filepath.Join(dir, "gvm-agent")
		if err := tt.make(path); err != nil {
			t.Fatal(err)
		}
		if got := agentIn(dir, tt.id); (got == path) != tt.want || !tt.want && got != "" {
			t.Errorf("%s: %q", tt.name, got)
		}
	}
}
