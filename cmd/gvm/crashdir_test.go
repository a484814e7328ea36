package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"gvm/guest/embedded"
)

// TestCrashDir: an end that the guest did not choose leaves its message, the console and the state of
// the CPUs; another end leaves nothing.
func TestCrashDir(t *testing.T) {
	dir := t.TempDir()
	vmlinux := filepath.Join(t.TempDir(), "vmlinux")
	if err := os.WriteFile(vmlinux, embedded.Image, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		word   string
		status int
		end    string
		kernel string
	}{
		{"crash=triple", exitCrash, "gvm: the guest crashed: vCPU 0: KVM_EXIT_SHUTDOWN (triple fault)\n", ""},
		{"crash=panic", exitPanic, "gvm: guest panic: ", ""},
		{"crash=reset", exitReset, "", ""},
		{"crash=triple", exitCrash, "gvm: the guest crashed: ", vmlinux},
	} {
		args := []string{"run", "--guest-arg", tt.word, "--crash-dir", dir, "--name", "a"}
		if tt.kernel != "" {
			args = []string{"run", "-k", tt.kernel, "--bare-cmdline", "-a", tt.word, "--crash-dir", dir, "--name", "a"}
		}
		r := gvmRuns(t, command(t, args...))
		if r.status != tt.status {
			t.Fatalf("%s: status %d, want %d\n%s", tt.word, r.status, tt.status, r.errs)
		}
		records, err := filepath.Glob(dir + "/*Z-a*")
		if err != nil || len(records) != min(1, len(tt.end)) {
			t.Fatalf("%s: records %v, %v", tt.word, records, err)
		}
		if tt.end == "" {
			continue
		}
		if !strings.Contains(r.errs, "are in "+records[0]+"\n") {
			t.Errorf("%s: %q does not name %s", tt.word, r.errs, records[0])
		}
		text := func(name string) []byte {
			b, err := os.ReadFile(records[0] + "/" + name)
			if err != nil {
				t.Fatal(err)
			}
			return b
		}
		if end := string(text("end")); !strings.HasPrefix(end, tt.end) {
			t.Errorf("%s: the end is %q", tt.word, end)
		}
		if console := string(text("console")); console != r.out {
			t.Errorf("%s: the console is %q, want %q", tt.word, console, r.out)
		}
		if tt.kernel != "" { // which has no symbols
			if stacks := string(text("stacks")); stacks != "no stacks: "+vmlinux+": no symbol section\n" {
				t.Errorf("the stacks are %q", stacks)
			}
		}
		var state struct {
			VCPU map[string]struct{ Rip string }
		}
		if err := json.Unmarshal(text("state.json"), &state); err != nil || state.VCPU["0"].Rip == "" {
			t.Errorf("%s: %v, %+v", tt.word, err, state)
		}
		if err := os.RemoveAll(records[0]); err != nil {
			t.Fatal(err)
		}
	}
}

// TestCrashRecordNames: records of one second have names of their own, and the console's end is kept.
func TestCrashRecordNames(t *testing.T) {
	dir := t.TempDir()
	r, err := newCrashRecord(dir)
	if err != nil {
		t.Fatal(err)
	}
	r.machine = "a"
	line := strings.Repeat("x", 1000) + "\n"
	for range 5 * recordConsole / len(line) {
		r.keep([]byte(line))
	}
	r.keep([]byte("last\n"))
	for range 3 {
		if err := r.write("end"); err != nil {
			t.Fatal(err)
		}
	}
	records, err := filepath.Glob(dir + "/*/console")
	if err != nil || len(records) != 3 {
		t.Fatalf("%v, %v", records, err)
	}
	b, err := os.ReadFile(records[0])
	if err != nil || len(b) != recordConsole || !strings.HasSuffix(string(b), "x\nlast\n") {
		t.Errorf("%d bytes, %v", len(b), err)
	}
}
