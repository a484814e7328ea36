package main

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// asShell makes a gvm of the tests a shell with job control whose only job is gvm.
const asShell = "GVM_TEST_AS_SHELL"

// shell executes commands from descriptor 3, a word a line, and answers each on descriptor 4.
func shell() int {
	commands, answers := bufio.NewScanner(os.NewFile(3, "commands")), os.NewFile(4, "answers")
	_ = os.Unsetenv(asShell)
	exe, err := os.Executable()
	if err != nil {
		return 98
	}
	job := exec.Command(exe, os.Args[1:]...)
	job.Args[0] = "gvm"
	job.Stdin, job.Stdout, job.Stderr = os.Stdin, os.Stdout, os.Stderr
	job.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := job.Start(); err != nil {
		return 97
	}
	signal.Ignore(syscall.SIGTTOU, syscall.SIGHUP) // only now, as the job would inherit this
	pid := job.Process.Pid
	for commands.Scan() {
		var err error
		switch commands.Text() {
		case "give": // gives the job the terminal, without a signal
			err = unix.IoctlSetPointerInt(0, unix.TIOCSPGRP, pid)
		case "take":
			err = unix.IoctlSetPointerInt(0, unix.TIOCSPGRP, unix.Getpgrp())
		case "continue":
			err = syscall.Kill(-pid, syscall.SIGCONT)
		case "TSTP":
			err = syscall.Kill(-pid, syscall.SIGTSTP)
		case "STOP":
			err = syscall.Kill(-pid, syscall.SIGSTOP)
		case "TERM":
			err = syscall.Kill(-pid, syscall.SIGTERM)
		case "stopped": // waits for it
			var ws syscall.WaitStatus
			if _, err = syscall.Wait4(pid, &ws, syscall.WUNTRACED, nil); err == nil && !ws.Stopped() {
				err = fmt.Errorf("not stopped: %#x", ws)
			}
		case "wait":
			_ = job.Wait() // the caller checks the exit status
			fmt.Fprintln(answers, job.ProcessState.ExitCode())
			return 0
		}
		fmt.Fprintln(answers, err)
	}
	_ = job.Process.Kill()
	return 96
}

// jobs is gvm as a job of a shell.
type jobs struct {
	*proc
	commands *os.File
	answers  *bufio.Scanner
}

func startJob(t *testing.T, lflag uint32, args ...string) *jobs {
	t.Helper()
	in, commands, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	answers, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	j := &jobs{commands: commands, answers: bufio.NewScanner(answers)}
	j.proc = startOnTerminalAs(t, func(p *proc) {
		p.cmd.Env = append(p.cmd.Env, asShell+"=1")
		p.cmd.ExtraFiles = []*os.File{in, out}
		p.settings.Lflag |= lflag
		p.setTermios(p.settings)
		p.settings = p.termios()
	}, args...)
	in.Close()
	out.Close()
	t.Cleanup(func() { commands.Close(); answers.Close() })
	return j
}

// do makes the shell execute words.
func (j *jobs) do(words ...string) {
	j.t.Helper()
	for _, w := range words {
		if got := j.ask(w); got != "<nil>" {
			j.t.Fatalf("%s: %s", w, got)
		}
	}
}

func (j *jobs) ask(word string) string {
	j.t.Helper()
	if _, err := fmt.Fprintln(j.commands, word); err != nil {
		j.t.Fatal(err)
	}
	if !j.answers.Scan() {
		j.t.Fatalf("%s: the shell is gone: %q", word, j.text())
	}
	return j.answers.Text()
}

// end waits for the job and for the shell.
func (j *jobs) end(status int) {
	j.t.Helper()
	got := j.ask("wait")
	if r := j.proc.wait(); got != fmt.Sprint(status) {
		j.t.Errorf("status %s, want %d: %q", got, status, r.out)
	}
}

// settle waits until done returns true for the terminal's settings.
func (j *jobs) settle(what string, done func(unix.Termios) bool) {
	j.t.Helper()
	j.proc.eventually(what, func() bool { return done(j.termios()) })
}

func isRaw(s unix.Termios) bool { return s.Lflag&(unix.ICANON|unix.ECHO) == 0 }

// TestRawSettings: gvm knows the settings of a raw terminal without reading them. A process that
// was stopped meanwhile would read those of another job.
func TestRawSettings(t *testing.T) {
	_, slave := openPTY(t)
	fd := int(slave.Fd())
	before, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := term.MakeRaw(fd); err != nil {
		t.Fatal(err)
	}
	if raw, err := unix.IoctlGetTermios(fd, unix.TCGETS); err != nil || *raw != rawSettings(*before) {
		t.Errorf("%+v, %v, want %+v", raw, err, rawSettings(*before))
	}
}

// TestJobControl moves gvm between the foreground and the background of its terminal.
func TestJobControl(t *testing.T) {
	const note = "in the background of this terminal"
	asBefore := func(j *jobs) func(unix.Termios) bool {
		return func(s unix.Termios) bool { return s == j.settings }
	}
	for name, lflag := range map[string]uint32{"background": 0, "background, tostop": unix.TOSTOP} {
		t.Run(name, func(t *testing.T) { // as timeout(1) in a script
			t.Parallel()
			j := startJob(t, lflag, guestRun("echo")...)
			j.expect(note, "ready")
			j.typeIn("shell\n")
			j.do("TERM")
			j.end(143)
			if strings.Count(j.text(), "shell") != 1 { // echoed by the terminal
				t.Error("gvm read another job's input")
			}
		})
		t.Run(name+", timeout", func(t *testing.T) {
			t.Parallel()
			startJob(t, lflag, guestRun("--timeout=1s", "spin")...).end(exitTimeout)
		})
	}
	t.Run("to the foreground", func(t *testing.T) {
		t.Parallel()
		j := startJob(t, 0, guestRun("echo")...)
		j.expect(note, "ready")
		if s := j.termios(); s != j.settings {
			t.Errorf("set from the background: %+v", s)
		}
		for range 2 {
			j.do("give")
			j.settle("raw", isRaw)
			j.do("take")
			j.settle("restored", asBefore(j))
		}
		j.do("give")
		j.settle("raw", isRaw)
		j.typeIn("abcq")
		j.expect("abc")
		j.end(0)
	})
	t.Run("SIGTSTP", func(t *testing.T) {
		t.Parallel()
		j := startJob(t, 0, guestRun("echo")...)
		j.expect("ready")
		j.do("give")
		j.settle("raw", isRaw)
		j.do("TSTP", "stopped", "take")
		if s := j.termios(); s != j.settings {
			t.Errorf("stopped, and the terminal is not as it was: %+v", s)
		}
		j.do("continue") // bg
		j.do("give")
		j.settle("raw", isRaw)
		j.typeIn("\x01x")
		j.end(exitQuit)
	})
	t.Run("SIGSTOP", func(t *testing.T) { // leaves the terminal raw: shells then set it
		t.Parallel()
		j := startJob(t, 0, guestRun("echo")...)
		j.expect("ready")
		j.do("give")
		j.settle("raw", isRaw)
		j.do("STOP", "stopped", "take")
		j.setTermios(j.settings)
		j.do("give", "continue")
		j.settle("raw", isRaw)
		j.do("TERM")
		j.end(143)
	})
	t.Run("another job's settings", func(t *testing.T) {
		t.Parallel()
		j := startJob(t, 0, guestRun("echo")...)
		j.expect("ready")
		j.do("give")
		j.settle("raw", isRaw)
		j.do("STOP", "stopped", "take")
		s := j.settings
		s.Lflag &^= unix.ECHOE
		s.Cc[unix.VMIN] = 3
		j.setTermios(s)
		j.settings = j.termios()
		j.do("continue", "TERM")
		j.end(143) // compares the settings
	})
	t.Run("orphaned", func(t *testing.T) { // nothing could continue the group
		t.Parallel()
		p := startOnTerminal(t, guestRun("echo")...)
		p.expect("ready")
		p.signal(syscall.SIGTSTP)
		p.typeIn("abcq")
		if r := p.wait(); r.status != 0 {
			t.Errorf("status %d: %q", r.status, r.out)
		}
	})
}
