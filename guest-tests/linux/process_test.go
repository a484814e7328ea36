package linux

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"gvm/guest-tests/lab"
)

// patience is how long a run of gvm may take before it is killed and the test fails. A guest that
// the lab loses in a hang costs it, and its test runs again in a new lab.
var patience = 150 * time.Second

// process is a running gvm, or a program that it is compared with.
type process struct {
	t    testing.TB
	cmd  *exec.Cmd
	temp string // its TMPDIR
	ctx  context.Context
	stop context.CancelFunc
	errs bytes.Buffer

	done chan struct{} // closed once err is set
	err  error         // of cmd.Wait

	mu      sync.Mutex
	changed sync.Cond
	console bytes.Buffer // without carriage returns
	raw     bytes.Buffer
	ended   bool
}

// sandboxNote is gvm's line on parts of the sandbox that L1 lacks, or a gvm that racelab builds
// with cgo.
var sandboxNote = regexp.MustCompile(`(?m)^gvm: sandbox: .*\n`)

// result is a gvm that ended. Console is without carriage returns, and stderr without sandboxNote.
type result struct {
	status          int // -1: ended by a signal
	console, stderr string
	late            bool // it was killed
}

// start starts gvm. A nil stdin is an input at its end.
func start(t testing.TB, stdin io.Reader, args ...string) *process {
	t.Helper()
	return startProgram(t, lab.Program("gvm"), stdin, cacheHome, args...)
}

func startProgram(t testing.TB, program string, stdin io.Reader, cache string, args ...string) *process {
	t.Helper()
	ctx, stop := context.WithTimeout(context.Background(), patience)
	p := &process{t: t, temp: t.TempDir(), ctx: ctx, stop: stop}
	p.changed.L = &p.mu
	p.cmd = exec.CommandContext(ctx, program, args...)
	p.cmd.Env = append(os.Environ(), "XDG_CACHE_HOME="+cache, "TMPDIR="+p.temp)
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = stdin, p, &p.errs
	// A late gvm prints its goroutines on standard error.
	p.cmd.Cancel = func() error { return p.cmd.Process.Signal(syscall.SIGQUIT) }
	p.cmd.WaitDelay = 3 * time.Second // Wait does not wait for an input that does not end
	// A process that gvm left behind would be in its group.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p.done = make(chan struct{})
	go func() {
		defer close(p.done)
		p.err = p.cmd.Wait()
		p.mu.Lock()
		p.ended = true
		p.mu.Unlock()
		p.changed.Broadcast()
	}()
	// If a test failed halfway, end gvm normally.
	t.Cleanup(func() {
		_ = p.cmd.Process.Signal(syscall.SIGTERM)
		<-p.done
		stop()
	})
	return p
}

// Write takes console output.
func (p *process) Write(b []byte) (int, error) {
	p.mu.Lock()
	p.raw.Write(b)
	p.console.Write(bytes.ReplaceAll(b, []byte("\r"), nil))
	p.mu.Unlock()
	p.changed.Broadcast()
	return len(b), nil
}

// waitFor waits for a line on the console.
func (p *process) waitFor(line string) { p.t.Helper(); p.waitForText("\n" + line + "\n") }

// waitForText waits for text on the console.
func (p *process) waitForText(text string) {
	p.t.Helper()
	if !p.shows(text) {
		p.t.Fatalf("gvm ended with no %q on the console:\n%s\nstandard error:\n%s",
			text, p.console.String(), p.errs.String())
	}
}

// shows waits for text on the console, and reports false if gvm ends without it.
func (p *process) shows(text string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for !strings.Contains("\n"+p.console.String(), text) {
		if p.ended {
			return false
		}
		p.changed.Wait()
	}
	return true
}

// printed reports whether a line is on the console, or gvm has ended.
func (p *process) printed(line string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ended || strings.Contains("\n"+p.console.String(), "\n"+line+"\n")
}

func (p *process) signal(s syscall.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

// wait returns how gvm ended. It fails the test if gvm did not end by itself, or left a process or
// a temporary file behind.
func (p *process) wait() result {
	p.t.Helper()
	r := p.end()
	if r.late {
		r.fatalf(p.t, "gvm did not end within %v", patience)
	}
	return r
}

// end is like wait, but allows a process that was killed for being late.
func (p *process) end() (r result) {
	p.t.Helper()
	<-p.done
	err := p.err
	late := errors.Is(p.ctx.Err(), context.DeadlineExceeded)
	p.stop()
	r = result{p.cmd.ProcessState.ExitCode(), p.console.String(), sandboxNote.ReplaceAllString(p.errs.String(), ""), late}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) && !errors.Is(err, exec.ErrWaitDelay) && !late {
		r.fatalf(p.t, "gvm: %v", err)
	}
	if err := syscall.Kill(-p.cmd.Process.Pid, 0); !errors.Is(err, syscall.ESRCH) {
		p.t.Errorf("gvm left a process behind: a signal to its group gives %v", err)
	}
	left, err := os.ReadDir(p.temp)
	if err != nil {
		p.t.Fatal(err)
	}
	for _, f := range left {
		p.t.Errorf("gvm left the temporary file %s behind", f.Name())
	}
	return r
}

// gvm runs gvm to its end without input.
func gvm(t testing.TB, args ...string) result {
	t.Helper()
	return start(t, nil, args...).wait()
}

// fatalf fails the test and shows gvm's output.
func (r result) fatalf(t testing.TB, format string, args ...any) {
	t.Helper()
	t.Errorf(format, args...)
	const most = 64 << 10 // of a console
	t.Fatalf("exit status %d\nconsole:\n%s\nstandard error:\n%s", r.status, r.console[max(0, len(r.console)-most):],
		r.stderr)
}

// wantStatus fails the test unless gvm ended with status.
func (r result) wantStatus(t testing.TB, status int) {
	t.Helper()
	if r.status != status {
		r.fatalf(t, "exit status %d, want %d", r.status, status)
	}
}

// want fails the test unless the guest said all of these, name by name, with `say NAME VALUE`, and
// later said nothing different under the same name.
func (r result) want(t testing.TB, said map[string]string) {
	t.Helper()
	for name, want := range said {
		if got := r.said(t, name); got != want {
			t.Errorf("%s: the guest says %q, want %q", name, got, want)
		}
	}
	if t.Failed() {
		r.fatalf(t, "the guest did not say the expected values")
	}
}

var saidLine = regexp.MustCompile(`(?m)^= (\S+) ?(.*)$`)

// said returns the guest's last value for a name.
func (r result) said(t testing.TB, name string) string {
	t.Helper()
	value, ok := "", false
	for _, m := range saidLine.FindAllStringSubmatch(r.console, -1) {
		if m[1] == name {
			value, ok = m[2], true
		}
	}
	if !ok {
		r.fatalf(t, "the guest did not say %s", name)
	}
	return value
}
