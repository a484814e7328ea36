package main

import (
	"bytes"
	"debug/elf"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestDump: a core has the guest's memory and CPUs, goes into a file or a pipe, and the machine
// runs on, also if the file fails.
func TestDump(t *testing.T) {
	t.Parallel()
	name := fmt.Sprintf("dump-%d", os.Getpid())
	p := startGVM(t, t.TempDir(), guestRun("--name="+name, "--cpus=2", "--memory=64M", "echo")...)
	p.expect("ready")
	dir := t.TempDir()
	file := filepath.Join(dir, "core")
	if r := ask(t, dir, "dump", name, file); r.status != 0 || r.out != "" || strings.Count(r.errs, "\n") != 1 ||
		!strings.Contains(r.errs, "the memory of "+name+" has no VMCOREINFO: ") {
		t.Fatalf("status %d, %q, %q", r.status, r.out, r.errs)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	e, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	if len(e.Progs) != 2 || e.Type != elf.ET_CORE || e.Progs[1].Paddr != 0 || e.Progs[1].Filesz != 64<<20 {
		t.Errorf("%+v: %d segments", e.FileHeader, len(e.Progs))
	}
	// The guest's own image is in its memory.
	if memory, err := io.ReadAll(e.Progs[1].Open()); err != nil || !bytes.Contains(memory, []byte("ready")) {
		t.Errorf("the guest's memory: %v", err)
	}
	fi, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	if used := fi.Sys().(*syscall.Stat_t).Blocks * 512; used > 16<<20 || fi.Size() < 64<<20 || fi.Mode() != 0o600 {
		t.Errorf("%v: %d bytes, of which %d are on the disk", fi.Mode(), fi.Size(), used)
	}
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args   string
		status int
		want   string
	}{
		{"", 2, "dump takes VM FILE, and got 0 words"},
		{"VM", 2, "dump takes VM FILE, and got 1 word"},
		{"VM a b", 2, "dump takes VM FILE, and got 3 words"},
		{"absent core2", 2, "no machine of this user has the name or PID absent"},
		{"VM " + file, 2, file + ": exists; remove it, or name another file"},
		{"VM .", 2, ".: is a directory; want a character device or a pipe"},
		{"VM none/core", 2, "none/core: "},
		{"VM fifo", 2, "fifo: is a pipe that no program reads; start that first"},
		{"VM /dev/full", 3, "write /dev/full: no space left on device"},
		{"VM /dev/null", 0, "has no VMCOREINFO"},
	} {
		var words []string
		for _, w := range strings.Fields(c.args) {
			words = append(words, strings.Replace(w, "VM", name, 1))
		}
		if r := ask(t, dir, append([]string{"dump"}, words...)...); r.status != c.status || r.out != "" ||
			strings.Count(r.errs, "\n") != 1 || !strings.Contains(r.errs, c.want) {
			t.Errorf("dump %s: status %d, %q, %q", c.args, r.status, r.out, r.errs)
		}
	}
	if r := ask(t, dir, "dump", name, "-"); r.status != 0 || len(r.out) != len(b) ||
		!strings.HasPrefix(r.out, elf.ELFMAG) {
		t.Errorf("standard output: status %d, %d bytes, %q", r.status, len(r.out), r.errs)
	}
	for _, s := range endSignals {
		stalled, dir := openFIFO(t)
		interrupted := startGVM(t, dir, "dump", name, "fifo")
		if _, err := io.ReadFull(stalled, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		interrupted.signal(s.Signal)
		if r := interrupted.wait(); r.status != s.status || !strings.HasPrefix(r.errs, "gvm: stopped by "+s.name) ||
			strings.Count(r.errs, "\n") != 1 {
			t.Errorf("%s: status %d, %q", s.name, r.status, r.errs)
		}
	}
	if files, err := os.ReadDir(dir); err != nil || len(files) != 2 {
		t.Errorf("files are left: %v, %v", files, err)
	}
	p.typeIn("q")
	if r := p.wait(); r.status != 0 {
		t.Errorf("the guest: status %d, %q, %q", r.status, r.out, r.errs)
	}
}
