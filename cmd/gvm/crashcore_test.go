package main

import (
	"bytes"
	"context"
	"debug/elf"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"gvm/guest/embedded"
	"gvm/guestmem"
	"gvm/vmm/vmcore"
)

// TestCrashCore: with --crash-core the record has the guest's memory, in the sandbox too, or the message
// has the reason, and no part of a core is left.
func TestCrashCore(t *testing.T) {
	full := t.TempDir()
	if err := unix.Mount("tmpfs", full, "tmpfs", 0, "size=256k"); err != nil {
		t.Skipf("mounting a tmpfs: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(full, 0) })
	kernel, initrd := filepath.Join(t.TempDir(), "vmlinux"), filepath.Join(t.TempDir(), "initrd")
	for path, b := range map[string][]byte{kernel: embedded.Image, initrd: bytes.Repeat([]byte("x"), 1<<20)} {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		word, dir, sandbox string
		status             int
		want               string // at the end of a line of the message
	}{
		{"crash=triple", t.TempDir(), "on", exitCrash, ""},
		{"crash=panic", t.TempDir(), "off", exitPanic, ""},
		{"spin", t.TempDir(), "on", exitTimeout, ""},
		{"crash=panic", full, "on", exitPanic, "/vmcore: no space left on device"},
	} {
		args := []string{"run", "-k", kernel, "--initrd", initrd, "--bare-cmdline", "-a", tt.word, "--memory=64M",
			"--sandbox=" + tt.sandbox, "--crash-dir", tt.dir, "--crash-core"}
		if tt.status == exitTimeout {
			args = append(args, "--timeout=2s")
		}
		r := gvmRuns(t, command(t, args...))
		if r.status != tt.status || tt.want != "" && !strings.Contains(r.errs, tt.want+"\n") {
			t.Errorf("%s: status %d, want %d\n%s", tt.word, r.status, tt.status, r.errs)
		}
		names, err := filepath.Glob(tt.dir + "/*/*")
		if want := 6; err != nil || len(names) != want && tt.want == "" || len(names) != want-1 && tt.want != "" {
			t.Errorf("%s: %v, %v\n%s", tt.word, names, err, r.errs)
		}
		if tt.want != "" {
			continue
		}
		if !strings.Contains(r.errs, "the machine's state and the guest's memory are in ") {
			t.Errorf("%s: %s", tt.word, r.errs)
		}
		names, _ = filepath.Glob(tt.dir + "/*/vmcore")
		if len(names) != 1 {
			continue
		}
		f, err := elf.Open(names[0])
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		memory, err := io.ReadAll(f.Progs[len(f.Progs)-1].Open())
		if err != nil || len(memory) != 64<<20 || !bytes.Contains(memory, []byte("gvm embedded guest")) {
			t.Errorf("%s: the guest's memory has %d bytes, %v", tt.word, len(memory), err)
		}
		fi, err := os.Stat(names[0])
		if err != nil {
			t.Fatal(err)
		}
		if used := fi.Sys().(*syscall.Stat_t).Blocks * 512; used > 16<<20 || fi.Mode() != 0o600 {
			t.Errorf("%s: %v, %d bytes on the disk", tt.word, fi.Mode(), used)
		}
	}
	if r := gvmRuns(t, command(t, "run", "--crash-core")); r.status != exitUsage ||
		!strings.Contains(r.errs, "--crash-core needs --crash-dir DIR") {
		t.Errorf("alone: status %d, %q", r.status, r.errs)
	}
}

// endsAfter is a context that ends after its first use.
type endsAfter struct {
	context.Context
	uses int
}

func (e *endsAfter) Err() error {
	if e.uses++; e.uses == 1 {
		return nil
	}
	return context.Canceled
}

// TestCrashCoreGivenUp: a signal gives up a core that is being written, unless it is what ended the machine.
func TestCrashCoreGivenUp(t *testing.T) {
	region := guestmem.Heap(0, 8<<20).Regions()[0]
	mem, err := guestmem.Of(region)
	if err != nil {
		t.Fatal(err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for _, tt := range []struct {
		ctx   context.Context
		given bool
	}{{&endsAfter{Context: t.Context()}, true}, {t.Context(), false}, {ended, false}} {
		r, err := newCrashRecord(t.TempDir(), true)
		if err != nil {
			t.Fatal(err)
		}
		r.ctx = tt.ctx
		err = r.writeCore(mem, make([]vmcore.CPU, 1), func() {})
		files, _ := filepath.Glob(r.dir + "/*/*")
		if tt.given != (err != nil && strings.HasPrefix(err.Error(), "given up: ")) || tt.given != (len(files) == 0) ||
			!tt.given && err != nil {
			t.Errorf("given up %v: %v, %v", tt.given, err, files)
		}
	}
}
