package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvm/control"
	"gvm/guest/agent/archive"
	"gvm/guest/agent/wire"
)

// copyMachine has an agent without a guest, whose files are in a directory of the host.
type copyMachine struct {
	evilMachine
	build, dir string
	got        chan string // the path of a copy that does not end
}

func (copyMachine) Info() control.Info { return control.Info{Name: "fake"} }

func (m copyMachine) Agent(context.Context) (io.ReadWriteCloser, error) {
	near, far := net.Pipe()
	go func() {
		defer far.Close()
		a, err := wire.Dial(far, wire.AgentConfig{Hello: wire.Hello{Build: m.build}})
		if err != nil {
			return
		}
		cmd, err := a.Command()
		if err != nil || cmd.Copy == nil {
			return
		}
		e, ok := m.copy(a, cmd.Copy)
		if ok {
			_ = a.Stdout.Close()
			_ = a.Stderr.Close()
			_ = a.Exit(e, time.Minute)
		}
	}()
	return near, nil
}

// copy returns false for an agent that ends without a word.
func (m copyMachine) copy(a *wire.Agent, c *wire.Copy) (e wire.Exit, ok bool) {
	var whole bytes.Buffer
	_ = archive.PackStream(&whole, strings.NewReader(strings.Repeat("part", 1<<20)))
	part := whole.Bytes()[:1<<20]
	switch path := string(c.Path); path {
	case "lost":
		_, _ = a.Stdout.Write(part)
		return e, false
	case "hang":
		_, _ = a.Stdout.Write(part)
		m.got <- path
		<-a.Gone()
		return e, false
	case "noise":
		_, _ = io.WriteString(a.Stderr, "evil\x1b[2J\n"+strings.Repeat("x", 1<<20))
		return wire.Exit{Status: 3}, true
	case "odd":
		return wire.Exit{Status: 77}, true
	case "escape":
		part[15], part[17], part[18], part[19] = 3, '\x1b', '/', 'x' // a name for the top
		_, _ = a.Stdout.Write(part)
		return e, true
	}
	path, err := filepath.Join(m.dir, string(c.Path)), error(nil)
	if strings.HasSuffix(string(c.Path), "/") {
		path += "/"
	}
	if c.Into {
		err = archive.Unpack(a.Stdin, path, string(c.Base))
	} else {
		err = archive.Pack(a.Stdout, path, c.Recursive)
	}
	if err == nil {
		return e, true
	}
	_, _ = io.WriteString(a.Stderr, err.Error()+"\n")
	if archive.Refused(err) {
		return wire.Exit{Status: wire.CopyRefused}, true
	}
	return wire.Exit{Status: wire.CopyFailed}, true
}

// TestCopy: files and directories get where cp(1) would put them, and all that keeps them from it
// is one line and its status.
func TestCopy(t *testing.T) {
	dir, guest, host := t.TempDir(), t.TempDir(), t.TempDir()
	t.Setenv("XDG_RUNTIME_DIR", dir)
	build, err := wire.BuildID(ownProgram)
	if err != nil {
		t.Fatal(err)
	}
	m := copyMachine{build: build, dir: guest, got: make(chan string)}
	for name, m := range map[string]control.Machine{"fake": m, "bare": evilMachine{},
		"other": copyMachine{build: "another"}} {
		s, err := control.Claim(control.DefaultDirectory(), name)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		s.Serve(m)
	}
	big := strings.Repeat("in\xff\x00put", 100_000)
	for _, f := range []struct{ path, data string }{{guest + "/file", "of the guest"}, {guest + "/big", big},
		{guest + "/dir/sub/in", "deep"}, {host + "/own", "of the host"}, {host + "/tree/t", "t"}} {
		if err := errors.Join(os.MkdirAll(filepath.Dir(f.path), 0o755),
			os.WriteFile(f.path, []byte(f.data), 0o640)); err != nil {
			t.Fatal(err)
		}
	}
	for _, path := range []string{host + "/pipe", host + "/d/file"} {
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), unix.Mkfifo(path, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		args   string
		status int
		errs   string
		path   string // of a file that is there then, below host or guest
		data   string
	}{
		{"fake:file .", 0, "", "host/file", "of the guest"},
		{"fake:big renamed", 0, "", "host/renamed", big},
		{"fake:file -", 0, "", "out", "of the guest"},
		{"-r fake:dir new", 0, "", "host/new/sub/in", "deep"},
		{"fake:dir/. new --recursive", 0, "", "host/new/sub/in", "deep"},
		{"own fake:", 0, "", "guest/own", "of the host"},
		{"./own fake:dir", 0, "", "guest/dir/own", "of the host"},
		{"own fake:dir/as", 0, "", "guest/dir/as", "of the host"},
		{"-r tree fake:dir", 0, "", "guest/dir/tree/t", "t"},
		{"- fake:stdin", 0, "", "guest/stdin", big},
		{"- fake:dir", 2, "gvm: machine fake: " + guest + "/dir: is a directory: name the file in it\n", "", ""},
		{"fake:none .", 2, "gvm: machine fake: " + guest + "/none: no such file or directory; check the path\n", "", ""},
		{"fake:dir .", 2, "gvm: machine fake: " + guest + "/dir: is a directory, which --recursive copies\n", "", ""},
		{"tree fake:", 2, "gvm: tree: is a directory, which --recursive copies\n", "", ""},
		{"none fake:x", 2, "gvm: none: no such file or directory; check the path\n", "", ""},
		{"fake:file none/x", 2, "gvm: none/x: no such file or directory; there is no directory none: make it first, " +
			"or name another\n", "", ""},
		{"fake:file none/", 2, "gvm: none/: there is no such directory; make it first, or name another\n", "", ""},
		{"fake:file own/x", 2, "gvm: own/x: not a directory; own is a file, or lies below one: check the path\n", "", ""},
		{"fake:file pipe", 2, "gvm: pipe: is no file, directory or symbolic link; name another\n", "", ""},
		{"fake:file d", 2, "gvm: d/file: is there already, and is no file; remove it first, or name another\n",
			"", ""},
		{"-r fake:dir own", 2, "gvm: own: is not a directory; remove it first, or name another\n", "", ""},
		{"pipe fake:x", 2, "gvm: pipe: is no file, directory or symbolic link; name another\n", "", ""},
		{"own fake:none/x", 2, "gvm: machine fake: " + guest + "/none/x: no such file or directory; there is no directory " +
			guest + "/none: make it first, or name another\n", "", ""},
		{"- fake:none/x", 2, "gvm: machine fake: " + guest + "/none/x: no such file or directory; there is no directory " +
			guest + "/none: make it first, or name another\n", "", ""},
		{"fake:lost x", 3, "gvm: machine fake ended, or its agent, before the command did\n", "", ""},
		{"fake:noise x", 3, `gvm: machine fake: evil\u001b[2J\u000axxxxx`, "", ""},
		{"fake:odd x", 3, "gvm: machine fake: its agent could not copy:  (status 77, signal 0)\n", "", ""},
		{"fake:escape x", 3, `gvm: the archive is broken: it begins with "\x1b/x"` + "\n", "", ""},
		{"bare:x .", 3, "gvm: unsupported operation\n", "", ""},
		{"other:x .", 3, "gvm: wait for the agent: the agent and gvm are of different builds: ", "", ""},
		{"absent:x .", 2, "gvm: no machine of this user has the name or PID absent; there are ", "", ""},
		{":x .", 2, `gvm: cp: ":x" names no machine: want VM:PATH; a path here begins with ./ or /` + "\n", "", ""},
		{"own :x", 2, `gvm: cp: ":x" names no machine: want VM:PATH; a path here begins with ./ or /` + "\n", "", ""},
		{"fake:x", 2, "gvm: cp takes SOURCE DESTINATION, and got 1 word\n", "", ""},
		{"fake:x fake:y", 2, "gvm: cp: SOURCE and DESTINATION are in guests; if fake:y is a path here, write ./fake:y\n",
			"", ""},
		{"x y", 2, "gvm: cp: neither SOURCE nor DESTINATION is in a guest: want VM:PATH\n", "", ""},
		{"-r - fake:x", 2, "gvm: cp: - is for one file, and --recursive for a directory\n", "", ""},
	} {
		cmd := command(t, append([]string{"cp"}, strings.Fields(c.args)...)...)
		cmd.Env = append(cmd.Env, "XDG_RUNTIME_DIR="+dir)
		cmd.Dir, cmd.Stdin = host, strings.NewReader(big)
		var out, errs strings.Builder
		cmd.Stdout, cmd.Stderr = &out, &errs
		_ = cmd.Run()
		if cmd.ProcessState.ExitCode() != c.status || !strings.HasPrefix(errs.String(), c.errs) ||
			strings.Count(errs.String(), "\n") != min(c.status, 1) {
			t.Errorf("gvm cp %s: status %d, %.300q", c.args, cmd.ProcessState.ExitCode(), &errs)
		}
		data := out.String()
		if c.path != "out" && c.path != "" {
			b, err := os.ReadFile(strings.NewReplacer("host", host, "guest", guest).Replace(c.path))
			if data = string(b); err != nil {
				t.Errorf("gvm cp %s: %v", c.args, err)
			}
		}
		if data != c.data {
			t.Errorf("gvm cp %s: %d bytes, want %d", c.args, len(data), len(c.data))
		}
	}
	for _, c := range []struct {
		path   string
		flag   int
		status int
		errs   string
	}{
		{"/proc/self/mem", os.O_RDONLY, exitHost, "gvm: standard input: input/output error\n"},
		{dir, os.O_RDONLY, exitUsage, "gvm: standard input: is a directory\n"},
		{os.DevNull, os.O_WRONLY, exitHost, "gvm: standard input: bad file descriptor\n"},
	} {
		in, err := os.OpenFile(c.path, c.flag, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		cmd := command(t, "cp", "-", "fake:unread")
		cmd.Env = append(cmd.Env, "XDG_RUNTIME_DIR="+dir)
		var errs strings.Builder
		cmd.Stdin, cmd.Stderr = in, &errs
		_ = cmd.Run()
		if cmd.ProcessState.ExitCode() != c.status || errs.String() != c.errs {
			t.Errorf("input from %s: status %d, %q", c.path, cmd.ProcessState.ExitCode(), &errs)
		}
		if _, err := os.Stat(guest + "/unread"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("input from %s: the guest has the file: %v", c.path, err)
		}
	}
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	cmd := command(t, "cp", "fake:file", "-")
	cmd.Env = append(cmd.Env, "XDG_RUNTIME_DIR="+dir)
	var errs strings.Builder
	cmd.Stdout, cmd.Stderr = full, &errs
	if _ = cmd.Run(); cmd.ProcessState.ExitCode() != exitHost ||
		errs.String() != "gvm: write /dev/stdout: no space left on device\n" {
		t.Errorf("a full device: status %d, %q", cmd.ProcessState.ExitCode(), &errs)
	}

	inDir := func(p *proc) { p.cmd.Env = append(p.cmd.Env, "XDG_RUNTIME_DIR="+dir) }
	for _, s := range endSignals {
		p := startGVMAs(t, host, inDir, "cp", "fake:hang", "cut")
		<-m.got
		p.signal(s.Signal)
		if r := p.wait(); r.status != s.status || r.errs != "gvm: stopped by "+s.name+"\n" {
			t.Errorf("%s: status %d, %q", s.name, r.status, r.errs)
		}
	}
	for _, dir := range []string{host, guest} {
		if err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if name := d.Name(); strings.HasPrefix(name, ".") || name == "cut" {
				t.Errorf("left behind: %s", path)
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
}

// TestCopyEndsEarly: files that were left out are told of also if the agent's end comes before this
// side knows its own.
func TestCopyEndsEarly(t *testing.T) {
	t.Setenv("XDG_RUNTIME_DIR", t.TempDir())
	builds, err := agentIDs()
	if err != nil {
		t.Fatal(err)
	}
	s, err := control.Claim(control.DefaultDirectory(), "fake")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	s.Serve(copyMachine{build: builds[0], dir: t.TempDir()})
	client := control.NewClient(control.DefaultDirectory(), "fake")
	want := &archive.LeftOutError{First: errors.New("a pipe"), Count: 1}
	for range 20 { // the two ends come at a time
		err := runCopy(client, &wire.Copy{Path: "file", Base: "file", Into: true}, func(h *wire.Host) error {
			if err := archive.PackStream(h.Stdin, strings.NewReader("data")); err != nil {
				t.Error(err)
			}
			_ = h.Stdin.Close()
			if _, err := h.Wait(); err != nil {
				t.Error(err)
			}
			for range 100 {
				runtime.Gosched()
			}
			return want
		})
		if !errors.Is(err, want) || exitStatus(err) != exitUsage {
			t.Fatalf("%v, want %v", err, want)
		}
	}
}
