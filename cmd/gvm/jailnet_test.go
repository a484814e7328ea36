package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"gvm/guest/embedded"
)

// TestJailUserNet: gvm-net of a machine in a jail is the jail's user's and in its control group,
// serves the published port, and nothing is left after the end of each process.
func TestJailUserNet(t *testing.T) {
	needsJail(t)
	needsGroups(t)
	dir, kernel := filepath.Join(t.TempDir(), "jail"), filepath.Join(t.TempDir(), "guest.elf")
	if err := errors.Join(os.Mkdir(dir, 0o755), os.WriteFile(kernel, embedded.Image, 0o600),
		os.Chmod(kernel, 0o644)); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	args := []string{"run", "--kernel", kernel, "--cmdline=spin", "--jail", dir, "--uid=41234", "--gid=41235",
		"--jail-limit=pids=300,nofile=900", "--memory=64M", "--net=user", "--publish"}
	for _, tt := range []struct {
		killed string // before the signal
		signal syscall.Signal
	}{
		{"", syscall.SIGTERM}, {"", syscall.SIGKILL}, {"gvm-net", syscall.SIGTERM}, {"gvm-janitor", syscall.SIGTERM},
		{"gvm-broker", syscall.SIGKILL},
	} {
		p := startOnTerminal(t, append(args, addr+":80")...)
		p.expect("spinning")
		machine := p.cmd.Process.Pid
		program := childOf(t, machine, "gvm-net")
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", program))
		for _, line := range []string{"Uid:\t41234\t41234\t41234\t41234", "Gid:\t41235\t41235\t41235\t41235",
			"NoNewPrivs:\t1", "CapEff:\t0000000000000000", "CapBnd:\t0000000000000000"} {
			if err != nil || !strings.Contains(string(status), line+"\n") {
				t.Errorf("%v: gvm-net has no line %q:\n%s", err, line, status)
			}
		}
		for _, file := range []string{"cgroup", "limits", "mounts"} {
			of := func(pid int) string {
				b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file))
				if err != nil {
					t.Error(err)
				}
				return string(b)
			}
			if got, want := of(program), of(machine); got != want || got == of(os.Getpid()) {
				t.Errorf("%s of gvm-net:\n%s\nand of gvm:\n%s", file, got, want)
			}
		}
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		if tt.killed != "" {
			if err := syscall.Kill(childOf(t, machine, tt.killed), syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
		if tt.killed == "gvm-net" {
			p.expect("the guest's network is down: gvm-net: signal: killed")
		}
		p.signal(tt.signal)
		if tt.signal == syscall.SIGKILL { // the terminal stays as it is
			_ = p.cmd.Wait()
		} else if r := p.wait(); r.status != exitTerminated {
			t.Errorf("status %d: %q", r.status, r.out)
		}
		var left []os.DirEntry
		gone := false
		for range 1000 {
			left, _ = os.ReadDir(dir)
			l, err = net.Listen("tcp", addr)
			if err == nil {
				l.Close()
			}
			// A janitor that was killed leaves the directory to the next machine.
			gone = err == nil && syscall.Kill(program, 0) != nil && (len(left) == 0 || tt.killed == "gvm-janitor")
			if gone {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		if !gone {
			t.Errorf("killed %q, %v: left %v, %v, gvm-net: %v", tt.killed, tt.signal, left, err, syscall.Kill(program, 0))
		}
	}
	if r := gvmRuns(t, command(t, append(args, "80:80")...)); r.status != exitUsage ||
		!strings.Contains(r.errs, "--publish 80:80: 127.0.0.1:80: permission denied; choose another port") {
		t.Errorf("a port of root's: status %d: %s%s", r.status, r.out, r.errs)
	}
}
