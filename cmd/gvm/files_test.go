package main

import (
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestOpenOutput: gvm does not overwrite a file that it did not write.
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

// TestFillEscapes: files for people and programs have no control characters of a guest.
func TestFillEscapes(t *testing.T) {
	o := outputFile{flag: "--results", path: filepath.Join(t.TempDir(), "out")}
	if err := openOutputs(&o); err != nil {
		t.Fatal(err)
	}
	defer o.close()
	if err := o.fill(func(w io.Writer) error { return writeJSON(w, evil) }); err != nil {
		t.Fatal(err)
	}
	b := readTestFile(t, o.path)
	harmless(t, "JSON", string(b))
	var s string
	if err := json.Unmarshal(b, &s); err != nil || s != strings.ToValidUTF8(evil, "\ufffd") {
		t.Errorf("%s is %q, %v", b, s, err)
	}
}

// TestOpenLog: a log of an earlier run is overwritten, and nothing that may be an image.
func TestOpenLog(t *testing.T) {
	for text, ok := range map[string]bool{
		"": true, "Linux version 6.1\r\n": true, "[    0.0] x": true, "QFI\xfb\x00": false,
	} {
		path := filepath.Join(t.TempDir(), "log")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		f, _, err := openLog(path)
		if err == nil {
			f.Close()
		}
		if (err == nil) != ok {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// mountTmpfs returns a directory with a small file system of its own.
func mountTmpfs(t *testing.T, size string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("a small file system needs root, to mount it")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Fatal("mounting a tmpfs: ", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, 0) })
	return dir
}

// TestOutputOnFullFileSystem: an output for which there is no room leaves an existing file
// unchanged, also through a link, and creates no new one.
func TestOutputOnFullFileSystem(t *testing.T) {
	dir := mountTmpfs(t, "64k")
	old, large := "[\n 1\n]\n", strings.Repeat("x", 128<<10)
	record := func(path string) error {
		r, err := openBenchRecord(path)
		if err != nil {
			return err
		}
		return r.close(r.write(large))
	}
	if err := os.Symlink("there", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	for how, write := range map[string]func(path string) error{
		"output": func(path string) error { return writeOutput(path, []byte(large)) }, "record": record,
	} {
		for _, name := range []string{"there", "link", "new"} {
			if err := os.WriteFile(filepath.Join(dir, "there"), []byte(old), 0o600); err != nil {
				t.Fatal(err)
			}
			err := write(filepath.Join(dir, name))
			if !errors.Is(err, unix.ENOSPC) || exitStatus(err) != exitHost || !strings.Contains(err.Error(), name) {
				t.Errorf("%s, %s: %v", how, name, err)
			}
			if b, err := os.ReadFile(filepath.Join(dir, "there")); err != nil || string(b) != old {
				t.Errorf("%s, %s: the file that was there has %.20q, %v", how, name, b, err)
			}
			if list, err := os.ReadDir(dir); err != nil || len(list) != 2 {
				t.Errorf("%s, %s: left %v, %v", how, name, list, err)
			}
		}
	}
	path := filepath.Join(dir, "there")
	if err := writeOutput(path, []byte("[]")); err != nil {
		t.Error(err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "[]" {
		t.Errorf("a shorter output: %q, %v", b, err)
	}
}

// TestFullFileSystem: a file for which there is no room gives one line that names it, and leaves no
// empty file.
func TestFullFileSystem(t *testing.T) {
	full := mountTmpfs(t, "64k")
	if err := os.WriteFile(filepath.Join(full, "fill"), make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("filling: %v", err)
	}
	img := image(t, "disk", 3, 1<<20)
	for _, tt := range []struct {
		args, tmp, want string
		lines           int
	}{
		{"--trace " + full + "/tr", "", "trace " + full + "/tr: ", 1},
		{"--disk " + img + ",overlay=" + full + "/ovl", "", full + "/ovl: no space left", 1},
		{"--disk " + img + ",overlay=on", full, "temporary file in " + full + ": " +
			"no space left on device; set TMPDIR", 2},
		{"--disk temp:1M", full + "/none", "temp:1M: temporary file in " + full + "/none: no such file", 2},
		{"--disk " + img + ",overlay=on", full + "/none", "temporary file in " + full + "/none: no such file", 2},
	} {
		c := command(t, append([]string{"run"}, strings.Fields(tt.args)...)...)
		if tt.tmp != "" {
			c.Env = append(c.Environ(), "TMPDIR="+tt.tmp)
		}
		r := gvmRuns(t, c)
		if r.status == 0 || !strings.Contains(r.errs, tt.want) || strings.Count(r.errs, "\n") > tt.lines ||
			strings.Contains(r.errs, "invalid argument") {
			t.Errorf("%s: status %d, %q; want %q", tt.args, r.status, r.errs, tt.want)
		}
	}
	c := command(t, "bench", "disk")
	c.Env = append(c.Environ(), "TMPDIR="+full+"/none")
	if r := gvmRuns(t, c); r.status != 2 || !strings.Contains(r.errs, "set TMPDIR to") {
		t.Errorf("bench disk: %+v", r)
	}
	if list, err := os.ReadDir(full); err != nil || len(list) != 1 {
		t.Errorf("left behind: %v, %v", list, err)
	}
}

// TestNoProc: without the proc file system an error names the file there that gvm needs.
func TestNoProc(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to hide /proc")
	}
	const mount = "; mount /proc: mount -t proc proc /proc\n"
	jail := t.TempDir()
	if err := errors.Join(os.Chmod(filepath.Dir(jail), 0o755), os.Chmod(jail, 0o755)); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		args   []string
		status int
		want   string
	}{
		{[]string{"run"}, exitHost, "gvm: broker: start gvm-broker: fork/exec /proc/self/exe: no such file or directory " +
			"(--sandbox=off runs without)" + mount},
		{[]string{"run"}, exitHost, "gvm: gvm disk and gvm list will not find this machine: control socket: "},
		{[]string{"run", "--jail", jail, "--uid", "41234", "--gid", "41234"}, exitHost,
			"start the janitor: fork/exec /proc/self/exe: no such file or directory" + mount},
		{[]string{"run", "--sandbox=off", "--vsock", "unix,path=" + jail + "/vsock"}, exitUsage,
			"gvm: --vsock: " + jail + "/vsock: no such file or directory" + mount},
		{[]string{"bench", "guest"}, exitHost, "gvm: readlink /proc/self/exe: no such file or directory" + mount},
	} {
		c := command(t, tt.args...)
		c.Args = append([]string{"sh", "-c", `mount -t tmpfs none /proc && exec "$0" "$@"`, c.Path}, c.Args[1:]...)
		c.Path, c.SysProcAttr.Unshareflags = "/bin/sh", unix.CLONE_NEWNS
		if r := gvmRuns(t, c); r.status != tt.status || !strings.Contains(r.errs, tt.want) {
			t.Errorf("%q: status %d, %s; want %d, %s", tt.args, r.status, r.errs, tt.status, tt.want)
		}
	}
}

// TestOutputError: only a pipe waits for a reader; a device with the same error does not.
func TestOutputError(t *testing.T) {
	pipe := filepath.Join(t.TempDir(), "pipe")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		pipe:        ": is a pipe that no program reads; start that first, or name another file",
		"/dev/null": ": no such device or address; name another file",
	} {
		err := outputError(path, &fs.PathError{Op: "open", Path: path, Err: unix.ENXIO})
		if err.Error() != path+want || exitStatus(err) != exitUsage {
			t.Errorf("%v, status %d; want %s", err, exitStatus(err), want)
		}
	}
}
