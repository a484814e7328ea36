package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"gvm/machine"
	"gvm/verdict"
)

const (
	passing = "KTAP version 1\n1..1\nok 1 a\n"
	failing = "KTAP version 1\n1..2\nok 1 a\nnot ok 2 b\n"
	oops    = "BUG: kernel NULL pointer dereference, address: 0\nCall Trace:\n do_it+0x10/0x20\n"
	warning = "WARNING: CPU: 0 PID: 1 at lib/a.c:1 a+0x1/0x2\n"
)

// TestVerdict: the guest's end comes first, then the kernel's reports, then the tests.
func TestVerdict(t *testing.T) {
	panicked := endError{exitPanic, errors.New("guest panic")}
	for _, tt := range []struct {
		name, console string
		policy        verdict.Policy
		tests         bool
		end           error
		status        int
		text          string
	}{
		{"nothing asked", failing + oops, verdict.Policy{}, false, nil, 0, ""},
		{"passed", passing + warning, verdict.Policy{Fail: true}, true, nil, 0, ""},
		{"failed", failing, verdict.Policy{}, true, nil, exitTests, "tests failed: 1 passed, 1 failed, 0 crashed, 0 skipped"},
		{"no results", "hello\n", verdict.Policy{}, true, nil, exitTests, "no results of tests on the console"},
		{"oops", failing + oops, verdict.Policy{Fail: true}, true, nil, exitFault,
			"the guest's kernel reported oops: BUG: kernel NULL pointer dereference, address: 0 (fingerprint "},
		{"its frames", oops + "hello\n" + oops, verdict.Policy{Fail: true}, false, nil, exitFault,
			"), and 1 more\n  do_it+0x10"},
		{"a warning, strict", warning, verdict.Policy{Fail: true, Strict: true}, false, nil, exitFault, "reported warn: "},
		{"panic", failing + oops, verdict.Policy{Fail: true}, true, panicked, exitPanic, "guest panic"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := &watch{reader: verdict.NewReader(tt.policy, nil), tests: tt.tests}
			if _, err := io.WriteString(w.console(machine.Output(io.Discard)), tt.console); err != nil {
				t.Fatal(err)
			}
			r, err := w.finish(tt.end)
			if status := exitStatus(err); status != tt.status || r.Exit != status {
				t.Errorf("status %d, in the results %d, want %d", status, r.Exit, tt.status)
			}
			if text := fmt.Sprint(err); tt.text != "" && !strings.Contains(text, tt.text) {
				t.Errorf("%q lacks %q", text, tt.text)
			}
		})
	}
}

// TestResultFiles: a run fills both files, however it ends, and a file of an earlier run is
// replaced.
func TestResultFiles(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, tt := range []struct {
		args   []string
		status int
		end    string
	}{
		{nil, exitTests, "no results of tests"},
		{[]string{"--guest-arg", "crash=panic"}, exitPanic, "guest panic: "},
		{[]string{"--timeout", "1ns"}, exitTimeout, "--timeout 1ns elapsed"},
		{[]string{"--disk", "none"}, exitUsage, "none: file does not exist"},
	} {
		c := command(t, append([]string{"run", "--results", "r.json", "--junit", "j.xml"}, tt.args...)...)
		c.Dir = dir
		if r := gvmRuns(t, c); r.status != tt.status {
			t.Errorf("%q: status %d, want %d: %s", tt.args, r.status, tt.status, r.errs)
		}
		var results verdict.Results
		b, err := os.ReadFile(filepath.Join(dir, "r.json"))
		if err == nil {
			err = json.Unmarshal(b, &results)
		}
		if err != nil || results.Exit != tt.status || !strings.Contains(results.End, tt.end) {
			t.Errorf("%q: %v, results %s", tt.args, err, b)
		}
		j, err := os.ReadFile(filepath.Join(dir, "j.xml"))
		want := fmt.Sprintf(`<error message="exit status %d">`, tt.status)
		if err != nil || !strings.Contains(string(j), want) {
			t.Errorf("%q: %v, JUnit %s", tt.args, err, j)
		}
	}
}

// TestStuckReader: when the end of a run was asked for, a pipe that its reader does not empty does
// not hold it up, and other outputs are whole.
func TestStuckReader(t *testing.T) {
	dir := t.TempDir()
	pipe, file := filepath.Join(dir, "results"), filepath.Join(dir, "junit")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := os.OpenFile(pipe, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	w := &watch{reader: verdict.NewReader(verdict.Policy{}, nil), tests: true, outputs: []*resultFile{
		{outputFile{flag: "--results", path: pipe}, (*verdict.Results).JSON},
		{outputFile{flag: "--junit", path: file}, (*verdict.Results).JUnit},
	}}
	if err := w.open(); err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(w.console(machine.Output(io.Discard)), "KTAP version 1\n1..2000\n")
	for i := range 2000 {
		fmt.Fprintf(w.console(machine.Output(io.Discard)), "ok %d - %s\n", i+1, strings.Repeat("x", 100))
	}
	_, err = w.finish(endError{exitTimeout, errors.New("--timeout elapsed")})
	if exitStatus(err) != exitTimeout || !strings.Contains(err.Error(), "--results: write "+pipe) {
		t.Error(err)
	}
	if b := readTestFile(t, file); !strings.HasSuffix(string(b), "</testsuites>\n") {
		t.Errorf("%d bytes of JUnit", len(b))
	}
}
