package gvm_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestLong checks that LONG of the Makefile names tests of guest-tests/linux: a test that has
// another name would run in `make test`.
func TestLong(t *testing.T) {
	makefile, err := os.ReadFile("Makefile")
	if err != nil {
		t.Fatal(err)
	}
	long := regexp.MustCompile(`(?m)^LONG = \^Test\((.*)\)\$\$$`).FindSubmatch(makefile)
	if long == nil {
		t.Fatal("no LONG in the Makefile")
	}
	files, err := filepath.Glob("guest-tests/linux/*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	var source strings.Builder
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		source.Write(b)
	}
	for name := range strings.SplitSeq(string(long[1]), "|") {
		if !strings.Contains(source.String(), "\nfunc Test"+name+"(t *testing.T)") {
			t.Errorf("LONG has Test%s, which guest-tests/linux has not", name)
		}
	}
}
