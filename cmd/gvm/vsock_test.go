package main

import (
	"bufio"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestParseVsock(t *testing.T) {
	t.Parallel()
	for s, want := range map[string]vsockConfig{
		"unix":                     {vsockUnix, 0, ""},
		"cid=3":                    {vsockUnix, 3, ""},
		"unix,cid=4294967294":      {vsockUnix, 4294967294, ""},
		"vhost,cid=5":              {vsockVhost, 5, ""},
		"path=a":                   {vsockUnix, 0, "a"},
		"unix,cid=7,path=a,cid=8,": {vsockUnix, 7, "a,cid=8,"},
	} {
		if got, err := parseVsock(s); err != nil || !reflect.DeepEqual(*got, want) {
			t.Errorf("%s: %v, %v; want %v", s, got, err, want)
		}
	}
}

// connectVsock asks for a port of the guest, and returns the answer.
func connectVsock(t *testing.T, path string) string {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, "CONNECT 52\n")
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		t.Error(err)
	}
	return line
}

// TestVsockSocket: a machine has its socket, its user's alone, until it ends; that of a killed gvm
// without a broker is replaced, and that of a living one is not. Clients that hang delay nothing.
func TestVsockSocket(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	const noDriver = "ERR dial vsock port 52 of the guest: the guest has no vsock driver\n"
	for _, named := range []bool{false, true} {
		path := filepath.Join(dir, "a,b")
		args := guestRun("--vsock=unix,cid=5,path="+path, "hang")
		if named {
			path = filepath.Join(dir, "gvm", "vsock-test", "vsock")
			args = guestRun("--vsock=unix", "--name=vsock-test", "hang")
		}
		start := func(more ...string) *proc {
			p := startGVMAs(t, dir, func(p *proc) { p.cmd.Env = append(p.cmd.Env, "XDG_RUNTIME_DIR="+dir) },
				append(args, more...)...)
			p.expect("hanging")
			return p
		}
		killed := start("--sandbox=off")
		if fi, err := os.Lstat(path); err != nil || fi.Mode() != os.ModeSocket|0o600 {
			t.Errorf("the socket: %+v, %v", fi, err)
		}
		if got := connectVsock(t, path); got != noDriver {
			t.Errorf("%q, want %q", got, noDriver)
		}
		if !named {
			if r := ask(t, dir, args...); r.status != exitUsage || !strings.Contains(r.errs, "a program listens there") {
				t.Errorf("a second machine: status %d, %s", r.status, r.errs)
			}
		}
		killed.signal(syscall.SIGKILL)
		killed.wait()
		if _, err := os.Lstat(path); err != nil {
			t.Fatal(err)
		}
		next := start()
		for range 100 {
			c, err := net.Dial("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
		}
		if got := connectVsock(t, path); got != noDriver {
			t.Errorf("%q, want %q", got, noDriver)
		}
		next.signal(syscall.SIGTERM)
		if r := next.wait(); r.status != exitTerminated {
			t.Errorf("status %d: %s", r.status, r.errs)
		}
		if _, err := os.Lstat(path); err == nil {
			t.Error("the socket is left")
		}
		if says := "gvm: the guest's vsock is at " + path; strings.Contains(next.errs.String(), says) != named {
			t.Errorf("standard error: %s", next.errs.String())
		}
	}
}

// TestVsockSocketKilled: a machine that has no control socket leaves no other socket either when it
// is killed.
func TestVsockSocketKilled(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := unix.Mkdir(filepath.Join(dir, "gvm"), 0o755); err != nil { // open to others: no control socket
		t.Fatal(err)
	}
	path := filepath.Join(dir, "vsock")
	p := startGVMAs(t, dir, func(p *proc) { p.cmd.Env = append(p.cmd.Env, "XDG_RUNTIME_DIR="+dir) },
		guestRun("--vsock=unix,path="+path, "hang")...)
	p.expect("hanging")
	if _, err := os.Lstat(path); err != nil {
		t.Error(err)
	}
	p.signal(syscall.SIGKILL)
	p.wait()
	for end := time.Now().Add(tooLong); ; time.Sleep(time.Millisecond) {
		if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the socket is left")
		}
	}
	if errs := p.errs.String(); !strings.Contains(errs, "will not find this machine") {
		t.Errorf("standard error: %s", errs)
	}
}
