package main

import (
	"os"
	"path/filepath"
	"testing"
)

// TestOpenOutput: a file that gvm did not write is not overwritten.
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
