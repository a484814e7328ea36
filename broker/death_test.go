package broker

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvm/control"
	"gvm/sandbox"
)

// idle is a machine with a real broker. It prints a line when the broker has its files, and ends
// when its input does.
func idle(dir string) {
	fail := func(err error) {
		if err != nil {
			println(err.Error())
			os.Exit(1)
		}
	}
	d := control.In(dir)
	var s *control.Server
	var err error
	if os.Getenv(aloneEnv) == "" {
		s, err = control.Claim(d, "m")
		fail(err)
	}
	early := os.Getenv(earlyEnv) != ""
	if early {
		holdTime = time.Hour
	}
	c := Start("m", func(s string) { println("note: " + s) }, nil)
	if s != nil {
		fail(c.Serve(s, d))
	}
	if early {
		<-c.started
	}
	own := dir + ".sock"
	fail(os.WriteFile(own, nil, 0o600))
	made, err := os.Lstat(own)
	fail(err)
	remove := c.RemoveAtEnd(own, made)
	if early {
		_, _ = os.Stdout.WriteString("ready\n")
		_, _ = os.Stdin.Read(make([]byte, 1))
	}
	fail(c.Shut())
	if os.Getenv(sandboxEnv) != "" {
		p := sandbox.Policy{Mode: sandbox.On, Uses: sandbox.Broker,
			Refused: func(c sandbox.Refusal) { println(c.String()) }}
		if s != nil {
			p.Paths = []sandbox.Path{{Name: d.Path(), Rights: sandbox.RemoveDir, Own: true},
				{Name: d.Machine("m"), Rights: sandbox.Remove, Own: true}}
		}
		_, err := sandbox.Prepare(p).Enter()
		fail(err)
	}
	end := func() error {
		_ = c.End()
		return nil
	}
	if s != nil {
		s.Serve(&fakeMachine{files: c})
		end = s.Close
	}
	_, _ = os.Stdout.WriteString("ready\n")
	_, _ = os.Stdin.Read(make([]byte, 1))
	fail(remove())
	fail(end())
	os.Exit(0)
}

// TestDeath kills the machine, or its broker, or its keeper, or neither, or stops the broker until
// the machine has ended, or stops the broker or the keeper and kills the machine, by which they go
// on. None leaves a process, a file or a socket elsewhere; one in the sandbox may leave the
// directory of all empty. A machine without a control socket has all that too, and one that is
// killed before it has shut itself in, while it holds its broker.
func TestDeath(t *testing.T) {
	for _, how := range []string{"neither", "machine", "broker", "keeper", "stop", "neither sandboxed",
		"machine sandboxed", "broker sandboxed", "keeper sandboxed", "stop sandboxed", "neither alone",
		"machine alone", "broker alone", "keeper alone", "neither sandboxed alone", "machine sandboxed alone",
		"broker sandboxed alone", "keeper sandboxed alone", "machine early alone", "neither early alone",
		"stopped broker", "stopped broker sandboxed", "stopped broker sandboxed alone", "stopped keeper sandboxed"} {
		t.Run(how, func(t *testing.T) {
			kill, alone := strings.CutSuffix(how, " alone")
			kill, early := strings.CutSuffix(kill, " early")
			kill, boxed := strings.CutSuffix(kill, " sandboxed")
			dir := filepath.Join(t.TempDir(), "run")
			exe, err := os.Executable()
			if err != nil {
				t.Fatal(err)
			}
			c := exec.CommandContext(t.Context(), exe)
			c.Env = append(os.Environ(), machineEnv+"="+dir)
			if boxed {
				c.Env = append(c.Env, sandboxEnv+"=1")
			}
			if alone {
				c.Env = append(c.Env, aloneEnv+"=1")
			}
			if early {
				c.Env = append(c.Env, earlyEnv+"=1")
			}
			in, err := c.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			out, err := c.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			// The broker and the keeper have the other end of errs too, so that its end is that of all
			// processes.
			errs, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer errs.Close()
			c.Stderr = w
			if err := c.Start(); err != nil {
				t.Fatal(err)
			}
			w.Close()
			if _, err := out.Read(make([]byte, 16)); err != nil {
				t.Fatal(err)
			}
			if i, err := control.NewClient(control.In(dir), "m").Info(t.Context()); (err != nil || i.Name != "m") && !alone {
				t.Errorf("%+v, %v", i, err)
			}
			if early { // the start holds it
				awaitStopped(t, child(t, c.Process.Pid, Arg0))
			}
			var stopped *os.Process
			const note = "disks can no longer be added"
			said := ""
			read := func(until string) {
				for b := make([]byte, 4096); until == "" || !strings.Contains(said, until); {
					n, err := errs.Read(b)
					if said += string(b[:n]); err != nil {
						return
					}
				}
			}
			switch kill {
			case "machine":
				_ = c.Process.Kill()
			case "broker":
				_ = unix.Kill(child(t, c.Process.Pid, Arg0), unix.SIGKILL)
				if !alone { // which is of no use to its user after the start
					read(note)
				}
			case "keeper":
				_ = unix.Kill(child(t, c.Process.Pid, KeeperArg0), unix.SIGKILL)
			case "stopped broker", "stopped keeper":
				helper := child(t, c.Process.Pid, map[string]string{"stopped broker": Arg0, "stopped keeper": KeeperArg0}[kill])
				_ = unix.Kill(helper, unix.SIGSTOP)
				awaitStopped(t, helper)
				_ = c.Process.Kill()
			case "stop":
				stopped, _ = os.FindProcess(child(t, c.Process.Pid, Arg0))
				_ = stopped.Signal(unix.SIGSTOP)
				awaitStopped(t, stopped.Pid)
			}
			in.Close()
			err = c.Wait()
			if stopped != nil {
				if left, _ := filepath.Glob(dir + "/*"); len(left) > 0 {
					t.Errorf("left beside the stopped broker: %v", left)
				}
				_ = stopped.Signal(unix.SIGCONT)
			}
			read("")
			if killed := kill == "machine" || strings.HasPrefix(kill, "stopped "); (err != nil) != killed {
				t.Errorf("%v: %s", err, said)
			}
			if strings.Contains(said, note) != (kill == "broker" && !alone) || kill != "broker" && said != "" {
				t.Errorf("%q", said)
			}
			if _, err := os.Lstat(dir + ".sock"); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the socket: %v", err)
			}
			if left, _ := filepath.Glob(dir + "/*"); len(left) > 0 {
				t.Errorf("left: %v: %s", left, said)
			}
			if list, err := control.In(dir).List(); err != nil || list != nil {
				t.Errorf("%v, %v", list, err)
			}
			if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the directory is left: %v", err)
			}
		})
	}
}

// awaitStopped waits until a process is stopped: until then its other threads run on.
func awaitStopped(t *testing.T, pid int) {
	t.Helper()
	for stat := ""; !strings.Contains(stat, ") T "); {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if stat = string(b); err != nil {
			t.Fatal(err)
		}
	}
}

// child returns the child of a process that has the first word, which it may get a moment after its
// start.
func child(t *testing.T, pid int, word string) int {
	t.Helper()
	for unix.Kill(pid, 0) == nil {
		stats, _ := filepath.Glob("/proc/[0-9]*/status")
		for _, file := range stats {
			b, _ := os.ReadFile(file)
			words, _ := os.ReadFile(filepath.Join(filepath.Dir(file), "cmdline"))
			if !bytes.Contains(b, []byte("\nPPid:\t"+strconv.Itoa(pid)+"\n")) || !bytes.HasPrefix(words, []byte(word+"\x00")) {
				continue
			}
			if child, err := strconv.Atoi(filepath.Base(filepath.Dir(file))); err == nil {
				return child
			}
		}
	}
	t.Fatalf("no %s", word)
	return 0
}
