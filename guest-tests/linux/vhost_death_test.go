package linux

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// helperOf returns a pidfd of the broker or the keeper of the machine with the name.
func helperOf(t *testing.T, helper, name string) int {
	t.Helper()
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	must(t, err)
	for _, file := range lines {
		if b, _ := os.ReadFile(file); !strings.HasPrefix(string(b), helper+"\x00"+name+"\x00") {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		must(t, err)
		fd, err := unix.PidfdOpen(pid, 0)
		must(t, err)
		t.Cleanup(func() {
			_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
			unix.Close(fd)
		})
		return fd
	}
	t.Fatalf("%s has no %s", name, helper)
	return -1
}

// awaitDeath returns when the process has ended.
func awaitDeath(t *testing.T, process int) {
	t.Helper()
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(process), Events: unix.POLLIN}}, int(patience.Milliseconds()))
		if n == 1 {
			return
		}
		if !errors.Is(err, unix.EINTR) {
			t.Fatalf("the process has not ended: %v", err)
		}
	}
}

// TestVhostDeaths: in the sandbox, with a disk of the kernel's, a signal comes to the broker, or
// SIGKILL to the keeper, and then gvm ends. Nothing is left of the machine: no target, file or
// process. If the broker and gvm are killed, the next gvm removes the files.
func TestVhostDeaths(t *testing.T) {
	needsTarget(t)
	const note = "gvm: the broker has ended: disks can no longer be added"
	for _, c := range []struct {
		name   string
		broker unix.Signal // 0: none; -1: SIGKILL to the keeper
		end    string      // signals' names, or input of the guest
		status int
	}{
		{"neither", 0, "SIGTERM", 143},
		{"gvm killed", 0, "SIGKILL", -1},
		{"keeper killed then SIGTERM", -1, "SIGTERM", 143},
		{"keeper and gvm killed", -1, "SIGKILL", -1},
		{"gvm killed in its end", unix.SIGSTOP, "SIGTERM SIGKILL", -1},
		{"broker killed then power-off", unix.SIGKILL, "q", 0},
		{"broker killed then SIGTERM", unix.SIGKILL, "SIGTERM", 143},
		{"broker killed then SIGINT", unix.SIGKILL, "SIGINT", 130},
		{"both killed", unix.SIGKILL, "SIGKILL", -1},
		{"broker stopped then power-off", unix.SIGSTOP, "q", 0},
		{"broker stopped then SIGTERM", unix.SIGSTOP, "SIGTERM", 143},
		{"broker stopped then gvm killed", unix.SIGSTOP, "SIGKILL", -1},
	} {
		t.Run(c.name, func(t *testing.T) {
			lioUnchanged(t)
			run := t.TempDir()
			t.Setenv("XDG_RUNTIME_DIR", run)
			in, input, err := os.Pipe()
			must(t, err)
			defer in.Close()
			defer input.Close()
			// A guest that writes for ever takes no input.
			words, ready := []string{"--guest-arg", "write", "--guest-arg", "journal"}, "\nwrote 9\n"
			if c.end == "q" {
				words, ready = []string{"--guest-arg", "echo"}, "\nready\n"
			}
			image := diskFile(t, make([]byte, 1<<20))
			p := start(t, in, append([]string{"run", "--sandbox=on", "--name=dying", "--disk", image + ",backend=vhost"},
				words...)...)
			p.waitForText(ready)
			broker, keeper := helperOf(t, "gvm-broker", "dying"), helperOf(t, "gvm-keeper", "dying")
			if c.broker == -1 {
				must(t, unix.PidfdSendSignal(keeper, unix.SIGKILL, nil, 0))
			} else if c.broker != 0 {
				must(t, unix.PidfdSendSignal(broker, c.broker, nil, 0))
			}
			if c.broker == unix.SIGKILL && c.end != "SIGKILL" {
				awaitDeath(t, broker)
				told := fmt.Sprintf("gvm: machine dying does not answer: nothing listens on its control socket: its broker "+
					"has ended, or the machine ends just now; kill -TERM PID ends it (process %d)\n", p.cmd.Process.Pid)
				for _, words := range []string{"stop dying", "disk add dying mem:1M"} {
					if r := gvm(t, strings.Fields(words)...); r.status == 0 || r.stderr != told {
						r.fatalf(t, "gvm %s: standard error is not %q", words, told)
					}
				}
			}
			for _, word := range strings.Fields(c.end) {
				if s := unix.SignalNum(word); s != 0 {
					p.signal(s)
				} else {
					_, err := input.WriteString(c.end)
					must(t, err)
				}
			}
			r := p.wait() // also if the broker is stopped
			r.wantStatus(t, c.status)
			if c.broker == unix.SIGKILL && c.end != "SIGKILL" && strings.Count(r.stderr, note) != 1 {
				r.fatalf(t, "standard error does not say once that the broker has ended")
			}
			awaitDeath(t, broker) // which goes on when gvm ends, if it was stopped
			awaitDeath(t, keeper)
			if c.broker == unix.SIGKILL {
				list := gvm(t, "lio", "list")
				if dead := fmt.Sprintf("gvm %d", p.cmd.Process.Pid); strings.Contains(list.console, dead) {
					list.fatalf(t, "targets of %s are left", dead)
				}
				gvm(t, "run", "--sandbox=on", "--name=next", "--disk", image+",backend=vhost").wantStatus(t, 0)
			}
			if left, err := filepath.Glob(run + "/*/*"); err != nil || len(left) > 0 {
				t.Errorf("%v are left, %v", left, err)
			}
		})
	}
}
