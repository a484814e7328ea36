package main

import (
	"bytes"
	"context"
	"debug/elf"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvm/guest/embedded"
	"gvm/guestmem"
	"gvm/vmm/vmcore"
)

// TestCrashCore: with --crash-core the record has the guest's memory, in the sandbox too, or the
// message has the reason, and no part of a core is left.
func TestCrashCore(t *testing.T) {
	kernel, initrd := filepath.Join(t.TempDir(), "vmlinux"), filepath.Join(t.TempDir(), "initrd")
	for path, b := range map[string][]byte{kernel: embedded.Image, initrd: bytes.Repeat([]byte("x"), 1<<20)} {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		word, sandbox string
		status        int
		size, want    string // of a small file system, and at the end of a line of the message
	}{
		{"crash=triple", "on", exitCrash, "", ""},
		{"crash=panic", "off", exitPanic, "", ""},
		{"spin", "on", exitTimeout, "", ""},
		{"crash=panic", "on", exitPanic, "256k", "/vmcore: no space left on device"},
	} {
		t.Run(fmt.Sprint(tt.word, " ", tt.size), func(t *testing.T) {
			dir := t.TempDir()
			if tt.size != "" {
				dir = mountTmpfs(t, tt.size)
			}
			args := []string{"run", "-k", kernel, "--initrd", initrd, "--bare-cmdline", "-a", tt.word, "--memory=64M",
				"--sandbox=" + tt.sandbox, "--crash-core"}
			var r result
			for timeout := 2 * time.Second; ; timeout *= 2 {
				more := []string{"--crash-dir", dir}
				if tt.status == exitTimeout {
					more = append(more, "--timeout", timeout.String())
				}
				r = gvmRuns(t, command(t, slices.Concat(args, more)...))
				if !strings.Contains(r.errs, " elapsed while ") { // before the guest ran, on a busy host
					break
				}
				dir = t.TempDir()
			}
			if r.status != tt.status || tt.want != "" && !strings.Contains(r.errs, tt.want+"\n") {
				t.Errorf("status %d, want %d\n%s", r.status, tt.status, r.errs)
			}
			names, err := filepath.Glob(dir + "/*/*")
			if want := 6; err != nil || len(names) != want && tt.want == "" || len(names) != want-1 && tt.want != "" {
				t.Errorf("%v, %v\n%s", names, err, r.errs)
			}
			if tt.want != "" {
				return
			}
			if !strings.Contains(r.errs, "the machine's state and the guest's memory are in ") {
				t.Error(r.errs)
			}
			names, _ = filepath.Glob(dir + "/*/vmcore")
			if len(names) != 1 {
				return
			}
			f, err := elf.Open(names[0])
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			memory, err := io.ReadAll(f.Progs[len(f.Progs)-1].Open())
			if err != nil || len(memory) != 64<<20 || !bytes.Contains(memory, []byte("gvm embedded guest")) {
				t.Errorf("the guest's memory has %d bytes, %v", len(memory), err)
			}
			fi, err := os.Stat(names[0])
			if err != nil {
				t.Fatal(err)
			}
			if used := fi.Sys().(*syscall.Stat_t).Blocks * 512; used > 16<<20 || fi.Mode() != 0o600 {
				t.Errorf("%v, %d bytes on the disk", fi.Mode(), used)
			}
		})
	}
	if r := gvmRuns(t, command(t, "run", "--crash-core")); r.status != exitUsage ||
		!strings.Contains(r.errs, "--crash-core needs --crash-dir DIR") {
		t.Errorf("alone: status %d, %q", r.status, r.errs)
	}
}

// TestCrashCoreSignals: a signal in the middle of a core gives it up: no part of it is left, the
// record has the rest, one line says so, and the status is that of the guest's end.
func TestCrashCoreSignals(t *testing.T) {
	dir := t.TempDir()
	kernel, initrd := filepath.Join(dir, "vmlinux"), filepath.Join(dir, "initrd")
	if err := os.WriteFile(kernel, embedded.Image, 0o600); err != nil {
		t.Fatal(err)
	}
	// run sends a signal when the record is there, before the core of a guest with so much data.
	run := func(word, timeout string, signal syscall.Signal, mib int) (r result, names []string) {
		if err := os.WriteFile(initrd, bytes.Repeat([]byte("x"), mib<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		crashes := t.TempDir()
		p := startGVM(t, "", "run", "-k", kernel, "--initrd", initrd, "--bare-cmdline", "-a", word, "--timeout="+timeout,
			fmt.Sprintf("--memory=%dM", mib+64), "--crash-dir", crashes, "--crash-core")
		p.eventually("a record", func() bool {
			names, _ = filepath.Glob(crashes + "/*")
			return len(names) > 0
		})
		p.signal(signal)
		begin := time.Now()
		r = p.wait()
		t.Logf("%s: gvm ended %v after the signal", word, time.Since(begin).Round(time.Millisecond))
		names, err := filepath.Glob(crashes + "/*/*")
		if err != nil {
			t.Fatal(err)
		}
		return r, names
	}
	for _, tt := range []struct {
		signal        syscall.Signal
		word, timeout string
		status        int
	}{
		{syscall.SIGTERM, "crash=panic", "1h", exitPanic},
		{syscall.SIGINT, "crash=triple", "1h", exitCrash},
		{syscall.SIGTERM, "hang", "10s", exitTimeout},
	} {
		r, names := run(tt.word, tt.timeout, tt.signal, 24)
		for mib := 48; mib <= 768 && strings.Contains(r.errs, "guest's memory are in "); mib *= 2 {
			t.Log("the signal came after the core")
			r, names = run(tt.word, tt.timeout, tt.signal, mib)
		}
		line := "--crash-core: given up: stopped by " + unix.SignalName(tt.signal) + "\n"
		if r.status != tt.status || strings.Count(r.errs, line) != 1 {
			t.Errorf("%s, %v: status %d, want %d\n%s", tt.word, tt.signal, r.status, tt.status, r.errs)
		}
		isCore := func(path string) bool { return filepath.Base(path) == "vmcore" }
		if len(names) != 5 || slices.ContainsFunc(names, isCore) {
			t.Errorf("%s, %v: the record has %v", tt.word, tt.signal, names)
		}
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

// TestCrashCoreGivenUp: a signal gives up a core that is being written, unless it is what ended the
// machine.
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
