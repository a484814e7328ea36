package block

import (
	"os"
	"path/filepath"
	"testing"
)

type closer func()

func (c closer) Close() error { c(); return nil }

// TestUsesEndFirst: from the end of a descriptor on, its inode number may be another file's, which
// must not be taken for the one that was closed.
func TestUsesEndFirst(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	b, err := Open(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	of := b.uses[0].of
	b.below = append(b.below, closer(func() {
		other := new(File)
		if err := other.use(of, "another", writing, whole); err != nil {
			t.Error(err)
		}
		other.endUses()
	}))
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
}
