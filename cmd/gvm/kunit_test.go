package main

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"gvm/guest/embedded"
	"gvm/verdict"
)

// TestKunitResults prints a table, and the tests that did not pass with their logs. A name is in
// one column, for any name that the guest chooses.
func TestKunitResults(t *testing.T) {
	r := verdict.NewReader(verdict.Policy{}, nil)
	io.WriteString(r, `KTAP version 1
1..5
    KTAP version 1
    # Subtest: list
    1..3
    ok 1 add
    # del: EXPECTATION FAILED at lib/list-test.c:30
    not ok 2 del
    ok 3 swap # SKIP
not ok 1 list
    # Subtest: init
    1..1
    ok 1 one
    the exit failed
not ok 2 init
    # Subtest: sort
    1..1
    # one: begins
not ok 3 sort
not ok 4 größe	of
`)
	var b strings.Builder
	if err := printResults(&b, r.Close()); err != nil {
		t.Fatal(err)
	}
	const want = `list.del: fail
    # del: EXPECTATION FAILED at lib/list-test.c:30

init: fail
    the exit failed

sort.test 1 of 1: crash no result
    # one: begins

größe\u0009of: fail

test 5 of 5: crash no result

suite          passed  failed  crashed  skipped
list                1       1        0        1
init                1       1        0        0
sort                0       0        1        0
größe\u0009of       0       1        0        0
test 5 of 5         0       0        1        0
total               2       3        2        1
`
	if b.String() != want {
		t.Errorf("got\n%s\nwant\n%s", b.String(), want)
	}
}

// TestKunitWords: gvm kunit refuses wrong words, finds a tree's kernel, and ends with status 1 or
// more for a guest that is no kernel with tests.
func TestKunitWords(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, f := range []string{"Kbuild", "MAINTAINERS", "arch/x86/Makefile"} {
		if err := os.MkdirAll(filepath.Join(dir, "tree", filepath.Dir(f)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "tree", f), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		args   string
		status int
		errs   string
	}{
		{"a b", exitUsage, `unexpected argument "b"; one GLOB selects the tests`},
		{"--timeout 0s", exitUsage, "--timeout 0s: want a positive duration"},
		{"-k none", exitUsage, "none does not exist"},
		{"-k .", exitUsage, ". is a directory without a kernel"},
		{"-k tree", exitUsage, "is a kernel tree without arch/x86/boot/bzImage or vmlinux"},
		{"-k kernel --results r.json", exitPanic, "no test ran; a kernel for gvm kunit has CONFIG_KUNIT=y"},
		{"-k tree list*", exitPanic, "no test ran; a kernel for gvm kunit has CONFIG_KUNIT=y"},
	} {
		if tt.status == exitPanic { // the embedded guest, which powers off with a failure
			for _, f := range []string{"kernel", "tree/vmlinux"} {
				if err := os.WriteFile(filepath.Join(dir, f), embedded.Image, 0o644); err != nil {
					t.Fatal(err)
				}
			}
		}
		c := command(t, append([]string{"kunit"}, strings.Fields(tt.args)...)...)
		c.Dir = dir
		if r := gvmRuns(t, c); r.status != tt.status || !strings.Contains(r.errs, tt.errs) || r.out != "" {
			t.Errorf("%s: status %d, want %d; %s%s", tt.args, r.status, tt.status, r.errs, r.out)
		}
	}
}
