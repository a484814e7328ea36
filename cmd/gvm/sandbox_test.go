package main

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvm/broker"
	"gvm/control"
	"gvm/devices/scsi/lio"
	"gvm/devices/scsi/trace"
	"gvm/devices/virtio/vsock"
	"gvm/panics"
	"gvm/sandbox"
	"gvm/vmm/boot"
)

const (
	// sandboxEnv is the default of --sandbox of the test binary as gvm.
	sandboxEnv = "GVM_TEST_SANDBOX"
	// attackEnv is its action at SIGUSR1, as if its guest had taken it over.
	attackEnv = "GVM_TEST_ATTACK"
)

// tries are the attacks of attackEnv; package sandbox has more.
var tries = map[string]func() error{
	// As an exploit has it: Go's Exec first stops new threads, which the message may need.
	"execve": func() error {
		_, _, errno := syscall.Syscall(unix.SYS_EXECVE, 0, 0, 0)
		return errno
	},
	"socket": func() error {
		_, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		return err
	},
	"ptrace": func() error { return unix.PtraceAttach(1) },
	"open": func() error {
		_, err := os.ReadFile("/etc/passwd")
		return err
	},
	"lio": func() error { return unix.Rmdir(lio.DefaultRoot + "/core") },
	"crashes": func() error { // a neighbour's record, in the directory of --crash-dir
		dir := filepath.Join(os.TempDir(), "crashes")
		_, read := os.ReadFile(dir + "/other")
		_, list := os.ReadDir(dir)
		for _, err := range []error{read, list, os.WriteFile(dir+"/other", nil, 0o600),
			unix.Unlink(dir + "/other"), os.Rename(dir+"/other", dir+"/mine"), os.Mkdir(dir+"/new", 0o700),
			os.WriteFile(dir+"/new", nil, 0o600)} {
			if !errors.Is(err, unix.EACCES) {
				return fmt.Errorf("one was not refused: %v", err)
			}
		}
		return read
	},
	"cache": func() error { // another machine's kernel
		_, err := os.ReadFile(filepath.Join(boot.CacheDir(), "other.vmlinux"))
		return err
	},
	// Not in /etc, which is read-only in the lab.
	"create": func() error { return os.WriteFile(filepath.Join(os.TempDir(), "gvm-attack"), nil, 0o600) },
}

// sandboxLacks reports whether the sandbox lacks a part on this kernel, or in a build with cgo.
func sandboxLacks() bool {
	_, _, errno := syscall.AllThreadsSyscall(unix.SYS_GETPID, 0, 0, 0)
	return errno != 0 || len(sandbox.Check().Missing) > 0
}

func attackAtSignal(what string) {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGUSR1)
	panics.Go(func() {
		<-c
		note(fmt.Sprintf("%s: %v", what, errors.Is(tries[what](), unix.EACCES)))
	})
}

// TestSandbox: by default a guest runs in the sandbox, and attacks from gvm's process are refused:
// gvm ends with one line and restores the terminal, which wait checks; files are not there. Without
// Landlock gvm says that files are not confined, and system calls are refused all the same.
func TestSandbox(t *testing.T) {
	t.Parallel()
	if r := gvmRuns(t, command(t, "run")); r.status != 0 || !strings.Contains(r.out, "PASS") {
		t.Errorf("status %d: %s%s", r.status, r.out, r.errs)
	}
	for _, tt := range []struct{ what, refused, text string }{
		{"execve", "", "gvm: the sandbox refused the system call execve (59), arguments 0x0 0x0 0x0: "},
		{"socket", "", "gvm: the sandbox refused the system call socket (41), arguments 0x2 0x1 0x0: "},
		{"ptrace", "", "gvm: the sandbox refused the system call ptrace (101), arguments 0x10 0x1 0x0: "},
		{"open", "", "gvm: open: true"},
		{"create", "", "gvm: create: true"},
		{"crashes", "", "gvm: crashes: true"},
		{"cache", "", "gvm: cache: true"},
		{"socket", "landlock", "gvm: the sandbox refused the system call socket (41), arguments 0x2 0x1 0x0: "},
		{"open", "landlock", "gvm: open: false"}, // which gvm said before
		{"create", "landlock", "gvm: create: false"},
	} {
		t.Run(strings.TrimSpace(tt.what+" "+tt.refused), func(t *testing.T) {
			t.Parallel()
			attacks(t, tt.what, tt.refused, tt.text)
		})
	}
}

// TestSandboxVhost: gvm has no right to the kernel's SCSI target.
func TestSandboxVhost(t *testing.T) {
	needsVhost(t)
	attacks(t, "lio", "", "gvm: lio: true", "--disk="+image(t, "k.img", 0, 1<<20)+",backend=vhost")
}

// attacks runs a guest with args, attacks from its gvm, whose kernel lacks the part refused of the
// sandbox, and wants text.
func attacks(t *testing.T, what, refused, text string, args ...string) {
	t.Helper()
	file := !strings.Contains(text, "refused")
	if file && refused == "" && sandboxLacks() {
		t.Skip("Landlock is missing, or lacks the threads of a gvm with cgo: see the case without")
	}
	temp := t.TempDir()
	crashes := filepath.Join(temp, "crashes")
	if what == "crashes" {
		args = append(args, "--crash-dir="+crashes, "--crash-core")
	}
	if err := errors.Join(os.Mkdir(crashes, 0o755), os.WriteFile(crashes+"/other", []byte("text"), 0o600),
		os.MkdirAll(temp+"/gvm/kernels", 0o700),
		os.WriteFile(temp+"/gvm/kernels/other.vmlinux", nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	p := startOnTerminalAs(t, func(p *proc) {
		p.cmd.Env = append(p.cmd.Env, attackEnv+"="+what, refusedEnv+"="+refused, "TMPDIR="+temp,
			"XDG_CACHE_HOME="+temp)
	}, guestRun(append([]string{"spin"}, args...)...)...)
	if refused != "" {
		p.expect("files are not confined")
	}
	p.expect("spinning")
	p.signal(syscall.SIGUSR1)
	p.expect(text)
	want := exitBug
	if file {
		want = exitTerminated
		p.signal(syscall.SIGTERM)
	}
	if r := p.wait(); r.status != want {
		t.Errorf("status %d, want %d: %q", r.status, want, r.out)
	}
	if b, err := os.ReadFile(crashes + "/other"); err != nil || string(b) != "text" {
		t.Errorf("a neighbour's record has %q, %v", b, err)
	}
}

// TestSandboxPaths: gvm has no right to the directories of its sockets for gdb and vsock, and to
// that of --crash-dir.
func TestSandboxPaths(t *testing.T) {
	t.Parallel()
	record, err := newCrashRecord(t.TempDir(), true)
	if err != nil {
		t.Fatal(err)
	}
	defer record.files.Close()
	rc := runConfig{sandbox: sandbox.On, broker: &broker.Client{}, vsock: &vsockConfig{path: "/a/vsock"}, record: record}
	rc.spec.Name, rc.spec.Vsock = "vm", &vsock.Config{}
	rc.seal(exitBug, note)
	dir := control.DefaultDirectory()
	for _, p := range rc.spec.Sandbox.Policy.Paths {
		if p.Name != dir.Path() && p.Name != dir.Machine("vm") {
			t.Errorf("%+v", p)
		}
	}
}

// TestSandboxKunit: a kernel of gvm kunit, which may be anyone's, is in the sandbox as well.
func TestSandboxKunit(t *testing.T) {
	t.Parallel()
	p := startOnTerminalAs(t, func(p *proc) { p.cmd.Env = append(p.cmd.Env, attackEnv+"=execve") },
		"kunit", "--raw", "-k", testKernel(t), "-a", "spin")
	p.expect("spinning")
	p.signal(syscall.SIGUSR1)
	p.expect("gvm: the sandbox refused the system call execve (59), ")
	if r := p.wait(); r.status != exitBug {
		t.Errorf("status %d: %q", r.status, r.out)
	}
}

// TestSandboxLacks: if the kernel lacks a part of the sandbox, gvm says so in one line and goes on,
// and by --sandbox=strict it does not.
func TestSandboxLacks(t *testing.T) {
	t.Parallel()
	without := func(calls string, args ...string) result {
		c := command(t, args...)
		c.Env = append(c.Env, refusedEnv+"="+calls)
		return gvmRuns(t, c)
	}
	for calls, lack := range map[string]string{"landlock": "files are not confined",
		"seccomp": "system calls are not confined"} {
		if r := without(calls, "run"); r.status != 0 || strings.Count(r.errs, "\n") != 1 || !strings.Contains(r.errs, lack) ||
			strings.Contains(r.out, lack) {
			t.Errorf("without %s: status %d, %q, %q", calls, r.status, r.errs, r.out)
		}
		if r := without(calls, "run", "--sandbox=strict"); r.status != exitHost || strings.Count(r.errs, "\n") != 1 ||
			!strings.Contains(r.errs, lack) || !strings.Contains(r.errs, "--sandbox=on runs without") {
			t.Errorf("strict without %s: status %d, %q", calls, r.status, r.errs)
		}
		if r := without(calls, "doctor"); !strings.Contains(r.out, lack) {
			t.Errorf("doctor without %s: %q", calls, r.out)
		}
	}
	// Without its broker, for which it starts a program, it does not run in the sandbox.
	const want = "gvm: broker: start gvm-broker: fork/exec /proc/self/exe: operation not permitted " +
		"(--sandbox=off runs without)\n"
	if r := without("execve", "run"); r.status != exitHost || r.errs != want {
		t.Errorf("without execve: status %d, %q, want %q", r.status, r.errs, want)
	}
	if r := without("execve", "run", "--sandbox=off"); r.status != 0 || r.errs != "" {
		t.Errorf("off, without execve: status %d, %q", r.status, r.errs)
	}
}

// TestSandboxReplay: gvm replay reads the records of a trace, and sends their requests, in the
// sandbox, and leaves nothing.
func TestSandboxReplay(t *testing.T) {
	t.Parallel()
	unit := trace.UnitLUN(0)
	whole := record(t, false, func(g *traced) {
		g.do(0, unit, make([]byte, 6), nil, 0)
		g.do(0, unit, rw(0x2a, 8, 2), make([]byte, 1024), 0)
		g.do(1, unit, rw(0x28, 8, 2), nil, 1024)
	})
	path, temp := filepath.Join(t.TempDir(), "a.trace"), t.TempDir()
	if err := os.WriteFile(path, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	replay := func(calls string, args ...string) result {
		c := command(t, append([]string{"replay", path}, args...)...)
		c.Env = append(c.Env, refusedEnv+"="+calls, "TMPDIR="+temp)
		return gvmRuns(t, c)
	}
	const fine = "3 requests, 0 answered differently\n"
	for _, mode := range sandbox.ModeNames[:2] {
		if r := replay("", "--sandbox="+mode); r.status != 0 || r.out != fine || r.errs != "" && !sandboxLacks() {
			t.Errorf("--sandbox=%s: status %d, %q, %q", mode, r.status, r.out, r.errs)
		}
	}
	const lack = "system calls are not confined"
	if r := replay("seccomp"); r.status != 0 || r.out != fine || !strings.Contains(r.errs, lack) {
		t.Errorf("without seccomp: status %d, %q, %q", r.status, r.out, r.errs)
	}
	if r := replay("seccomp", "--sandbox=strict"); r.status != exitHost || r.out != "" || !strings.Contains(r.errs, lack) {
		t.Errorf("strict without seccomp: status %d, %q, %q", r.status, r.out, r.errs)
	}
	if left, err := os.ReadDir(temp); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// TestSandboxReplayVhost: gvm replay has no right to the kernel's SCSI target while it sends
// requests, and leaves no object there at its end, and after SIGKILL.
func TestSandboxReplayVhost(t *testing.T) {
	needsVhost(t)
	whole := record(t, false, func(g *traced) { g.do(0, trace.UnitLUN(0), make([]byte, 6), nil, 0) })
	for _, kill := range []bool{false, true} {
		f, _ := openFIFO(t)
		fifo := f.Name()
		if _, err := f.Write(whole); err != nil {
			t.Fatal(err)
		}
		p := startOnTerminalAs(t, func(p *proc) { p.cmd.Env = append(p.cmd.Env, attackEnv+"=lio") },
			"replay", "--backend=vhost", fifo)
		p.eventually("the kernel's target and the sandbox", func() bool {
			if strings.Contains(p.text(), "older than Linux 5.11") { // it is refused then
				return true
			}
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
			return err == nil && strings.Contains(string(b), "Seccomp:\t2") && lio.Owns(p.cmd.Process.Pid)
		})
		if strings.Contains(p.text(), "older than Linux 5.11") {
			if r := p.wait(); r.status != exitHost || lio.Owns(p.cmd.Process.Pid) {
				t.Errorf("status %d: %q", r.status, r.out)
			}
			t.Skip("the kernel's SCSI target is older than Linux 5.11")
		}
		p.signal(syscall.SIGUSR1)
		if sandboxLacks() {
			t.Log("Landlock is missing, or lacks the threads of a gvm with cgo")
			p.expect("gvm: lio: false")
		} else {
			p.expect("gvm: lio: true")
		}
		if kill {
			p.signal(syscall.SIGKILL)
			_ = p.cmd.Wait()
		} else {
			f.Close()
			if r := p.wait(); r.status != 0 && r.status != exitTests { // as the answers differ
				t.Errorf("status %d: %s", r.status, r.out)
			}
		}
		p.eventually("no object of the kernel's is left", func() bool { return !lio.Owns(p.cmd.Process.Pid) })
	}
}

// TestSandboxBench: the machine that gvm bench guest measures is in the sandbox, by default too,
// and ends with the benchmark, also if it is stopped.
func TestSandboxBench(t *testing.T) {
	t.Parallel()
	image := filepath.Join(t.TempDir(), "a,b.img")
	if err := os.WriteFile(image, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	bench := []string{"bench", "guest", "--disk", image, "--qemu=none", "--rounds=1"}
	for mode, want := range map[string]int{"off": 0, "strict": exitHost} {
		c := command(t, append(bench, "--time=1ms", "--sandbox="+mode)...)
		c.Env = append(c.Env, refusedEnv+"=seccomp")
		r := gvmRuns(t, c)
		if r.status != want || strings.Contains(r.out, " gvm ") != (want == 0) ||
			strings.Contains(r.errs, "system calls are not confined") != (want != 0) {
			t.Errorf("%s without seccomp: status %d, %q, %q", mode, r.status, r.out, r.errs)
		}
	}
	for _, stopped := range []bool{false, true} {
		p := startGVM(t, "", append(bench, "--time=1m")...)
		machine := p.machine("\x00run\x00--sandbox="+sandbox.On.String()+"\x00", "\nSeccomp:\t2\n")
		if stopped {
			if err := syscall.Kill(machine, syscall.SIGSTOP); err != nil {
				t.Error(err)
			}
		}
		p.signal(syscall.SIGTERM)
		_ = p.cmd.Wait()
		if status := p.cmd.ProcessState.ExitCode(); status != exitTerminated {
			t.Errorf("stopped %v: status %d", stopped, status)
		}
		awaitEnd(t, machine)
	}
}

// TestBenchKilled: the machines of a benchmark that is killed end, also those that wait for input.
func TestBenchKilled(t *testing.T) {
	t.Parallel()
	p := startGVM(t, "", "bench", "footprint", "--qemu=none", "--rounds=1", "--guests=1")
	machine := p.machine("\x00run\x00", "")
	p.eventually("had a guest that waits", func() bool {
		r := ask(t, t.TempDir(), "inspect", fmt.Sprintf("gvm-%d", machine), "vcpu/0/mp_state")
		return r.out == "vcpu/0/mp_state halted\n"
	})
	p.signal(syscall.SIGKILL)
	_ = p.cmd.Wait()
	awaitEnd(t, machine)
}

// awaitEnd waits for the end of the machine of a benchmark that has ended.
func awaitEnd(t *testing.T, pid int) {
	t.Helper()
	for end := time.Now().Add(tooLong); syscall.Kill(pid, 0) == nil; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the machine outlives the benchmark")
		}
	}
}

// machine waits for a child with words in its command line and status, and returns its PID.
func (p *proc) machine(words, status string) (pid int) {
	p.t.Helper()
	parent := fmt.Sprintf("\nPPid:\t%d\n", p.cmd.Process.Pid)
	p.eventually("had a machine", func() bool {
		all, _ := filepath.Glob("/proc/[0-9]*")
		for _, dir := range all {
			line, _ := os.ReadFile(dir + "/cmdline")
			is, _ := os.ReadFile(dir + "/status")
			if strings.Contains(string(line), words) && strings.Contains(string(is), parent) &&
				strings.Contains(string(is), status) {
				pid, _ = strconv.Atoi(filepath.Base(dir))
			}
		}
		return pid != 0
	})
	return pid
}

// TestSandboxWords: a value that is none.
func TestSandboxWords(t *testing.T) {
	t.Parallel()
	const want = "--sandbox strikt: want off, on or strict; did you mean strict?"
	for _, verb := range []string{"run", "kunit", "replay", "bench boot", "bench guest"} {
		r := gvmRuns(t, command(t, append(strings.Fields(verb), "--sandbox=strikt")...))
		if r.status != exitUsage || !strings.Contains(r.errs, want) {
			t.Errorf("%s: status %d: %s", verb, r.status, r.errs)
		}
	}
}
