package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/urfave/cli/v2"

	"gvm/guest/embedded"
	"gvm/guest/initramfs"
)

// testKernel makes a kernel that never runs an agent: the embedded guest.
func testKernel(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kernel")
	if err := os.WriteFile(path, embedded.Image, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestTestEnds: each end of a guest without an agent has its status, its verdict and its text, and
// none is a success. Nothing of it is on standard output.
func TestTestEnds(t *testing.T) {
	t.Parallel()
	kernel := testKernel(t)
	for _, tt := range []struct {
		words, flags string
		status       int
		kind         string
		errs         string
	}{
		{"", "--disk=mem:1M", 125, "not-tested", "gvm: the guest powered off before the agent said hello\n"},
		{"", "--scratch=2x5G", 125, "not-tested", "gvm: the guest powered off before the agent said hello\n"},
		{"crash=reset", "", 125, "not-tested", "gvm: the guest reset before the agent said hello\n"},
		{"crash=panic", "", 120, "panic", "gvm: guest panic before the agent said hello: "},
		{"crash=triple", "", 121, "crash", "gvm: the guest crashed before the agent said hello: "},
		{"spin", "--hang=3s", 122, "hang", "gvm: the guest hangs: no progress for 3s before the agent said hello\n"},
		{"spin", "--timeout=10s", 124, "timeout", "gvm: the timeout of 10s elapsed before the agent said hello\n"},
	} {
		t.Run(tt.words+tt.flags, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			log, verdict := filepath.Join(dir, "log"), filepath.Join(dir, "verdict")
			c := command(t, append(append([]string{"test", "-k", kernel, "-a", tt.words, "--klog", log, "--verdict", verdict},
				strings.Fields(tt.flags)...), "--", "sh")...)
			r := gvmRuns(t, c)
			if r.status != tt.status || r.out != "" || !strings.Contains(r.errs, tt.errs) ||
				!strings.Contains(r.errs, "gvm: the end of the kernel's log:\n") {
				t.Errorf("status %d, want %d; output %q, standard error, want %q:\n%s", r.status, tt.status, r.out, tt.errs, r.errs)
			}
			if b, err := os.ReadFile(log); err != nil || !strings.Contains(string(b), "gvm embedded guest") {
				t.Errorf("the kernel's log is %q, %v", b, err)
			}
			b, err := os.ReadFile(verdict)
			var v struct {
				Format, Kind, Kernel string
				Status               int
				Log, Detail          []string
			}
			if err == nil {
				err = json.Unmarshal(b, &v)
			}
			if err != nil || v.Format != "gvm-test-1" || v.Kind != tt.kind || v.Status != tt.status || v.Kernel != kernel ||
				len(v.Log) == 0 {
				t.Errorf("the verdict is %s, %v", b, err)
			}
			if tt.kind == "hang" && !slices.ContainsFunc(v.Detail, func(s string) bool {
				return strings.HasPrefix(s, "vcpu/0: mp_state runnable, rip 0x") || s == "vcpu/0: busy" // the host
			}) {
				t.Errorf("the hang has no CPU: %q", v.Detail)
			}
		})
	}
}

// TestTestWords: wrong words and missing files are one line and status 125, and a command that is
// missing or no program has the shell's status.
func TestTestWords(t *testing.T) {
	t.Parallel()
	kernel := testKernel(t)
	for _, tt := range []struct {
		args   string
		status int
		errs   string
	}{
		{"--no-such", 125, "unknown flag --no-such"},
		{"--cpus x", 125, `--cpus "x": want a number`},
		{"--cpus 0", 125, "--cpus 0: want 1 or more"},
		{"--hang 2s", 125, "--hang 2s: want 3s or more"},
		{"--timeout 0s", 125, "--timeout 0s: want a positive duration"},
		{"--grace -1s", 125, "--grace -1s: want 0 to "},
		{"--rung x", 125, "--rung x: want auto, vsock, console, com2 or status"},
		{"--user no-such-user", 125, "--user no-such-user: is no user of this host"},
		{"--cwd here", 125, "--cwd here: want an absolute path"},
		{"--env =x", 125, `--env "=x": want NAME or NAME=VALUE`},
		{"--allow x --oops ignore", 125, "--allow needs --oops=fail or --strict"},
		{"--scratch 0x1G", 125, "--scratch 0x1G: want 1 to 64 disks, such as 5x5G"},
		{"--scratch 65x1G", 125, "--scratch 65x1G: want 1 to 64 disks"},
		{"--scratch x1G", 125, "--scratch x1G: want 1 to 64 disks"},
		{"--scratch 5x", 125, `--scratch 5x: size "": want a number and K, M, G or T`},
		{"--scratch 1G,lun=3", 125, `--scratch 1G,lun=3: size "1G,lun=3": want a number`},
		{"--scratch 2x0", 125, "--scratch 2x0: size 0: want 512 bytes or more"},
		{"--scratch 1000", 125, "--scratch 1000: want a multiple of 4 KiB"},
		{"--module= --", 125, "--module: the name is empty"},
		{"--tty", 125, "--tty: standard input and output are no terminal"},
		{"-k none", 125, "none does not exist"},
		{"-k {} --file none -- sh", 125, "none does not exist"},
		{"-k {} --klog / -- sh", 125, "--klog: /: is a directory"},
		{"-k {} -- no-such-program", 127, "no-such-program: no such file or directory"},
		{"-k {} --bisect -- no-such-program", 125, "no-such-program: no such file or directory"},
		{"-k {} -- {}", 126, "kernel: permission denied"},
		{"-k {} -- /etc", 126, "/etc: is a directory"},
		{"-k {} -- /etc/passwd/x", 127, "/etc/passwd/x: not a directory"},
		{"-k {} --rw= -- sh", 125, "--rw: the value is empty"},
		{"-k {} --file= -- sh", 125, "--file: the value is empty"},
		{"-k {} --root= -- sh", 125, "--root: the value is empty"},
		{"-k {} --verdict= -- sh", 125, "--verdict: the value is empty"},
	} {
		r := gvmRuns(t, command(t, append([]string{"test"}, strings.Fields(strings.ReplaceAll(tt.args, "{}", kernel))...)...))
		if r.status != tt.status || !strings.Contains(r.errs, tt.errs) || r.out != "" || strings.Count(r.errs, "\n") != 1 {
			t.Errorf("%s: status %d, want %d; %q, want %q", tt.args, r.status, tt.status, r.errs+r.out, tt.errs)
		}
	}
}

// TestFileLink: --file with a symbolic link to a directory gives the guest the directory's files.
func TestFileLink(t *testing.T) {
	dir := t.TempDir()
	link := filepath.Join(dir, "link")
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "to"), 0o755),
		os.WriteFile(filepath.Join(dir, "to/file"), []byte("its content"), 0o644), os.Symlink("to", link)); err != nil {
		t.Fatal(err)
	}
	b := initramfs.New()
	defer b.Close()
	if err := (&testConfig{}).addFile(t.Context(), b, link); err != nil {
		t.Fatal(err)
	}
	image, err := b.Image()
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	all := make([]byte, image.Size)
	if err := image.ReadFull(all, 0); err != nil || !strings.Contains(string(all), link[1:]+"/file\x00") ||
		!strings.Contains(string(all), "its content") {
		t.Errorf("%q, %v", all, err)
	}
}

// haltedTest returns a gvm test whose guest halts until it is stopped, and a function that waits
// for the guest. The kernel's log is a FIFO.
func haltedTest(t *testing.T, args ...string) (c *exec.Cmd, wait func()) {
	t.Helper()
	log, _ := openFIFO(t)
	args = append([]string{"test", "-k", testKernel(t), "-a", "hang", "--klog", log.Name()}, args...)
	return command(t, append(args, "--", "sh")...), func() {
		t.Helper()
		if _, err := log.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
}

// TestTestStop: a signal before the agent's hello ends the machine at once.
func TestTestStop(t *testing.T) {
	t.Parallel()
	verdict := filepath.Join(t.TempDir(), "verdict")
	c, running := haltedTest(t, "--verdict", verdict)
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	running()
	if err := c.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if r := wait(t, c); r.status != 143 {
		t.Errorf("status %d", r.status)
	}
	if b, err := os.ReadFile(verdict); err != nil || !strings.Contains(string(b), `"kind": "stopped"`) {
		t.Errorf("the verdict is %s, %v", b, err)
	}
}

// TestTestLostVerdict: a verdict that cannot be written is an error, and its text is printed.
func TestTestLostVerdict(t *testing.T) {
	t.Parallel()
	verdict := filepath.Join(t.TempDir(), "verdict")
	if err := syscall.Mkfifo(verdict, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(verdict, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	c, running := haltedTest(t, "--verdict", verdict)
	var errs bytes.Buffer
	c.Stderr = &errs
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	running()
	f.Close()
	if err := c.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	const want = "gvm: stopped by SIGTERM\ngvm: --verdict: write "
	if r := wait(t, c); r.status != 125 || !strings.Contains(errs.String(), want) {
		t.Errorf("status %d, standard error:\n%s", r.status, &errs)
	}
}

// TestTestPanic: a bug of gvm, also one after which it cannot end in order, is no verdict.
func TestTestPanic(t *testing.T) {
	for _, lock := range []string{"free", "locked"} {
		t.Run(lock, func(t *testing.T) {
			t.Parallel()
			c, running := haltedTest(t)
			c.Env = append(c.Env, panicsEnv+"="+lock)
			var errs bytes.Buffer
			c.Stderr = &errs
			if err := c.Start(); err != nil {
				t.Fatal(err)
			}
			running()
			if err := c.Process.Signal(syscall.SIGUSR1); err != nil {
				t.Fatal(err)
			}
			if r := wait(t, c); r.status != 125 || lock == "free" &&
				strings.Count(errs.String(), "a bug in gvm, please report it: panic: broken") != 1 {
				t.Errorf("status %d: %s", r.status, &errs)
			}
		})
	}
}

// TestTestStatus: gvm ends with each status of a command, which may be that of a bug of gvm run.
func TestTestStatus(t *testing.T) {
	all := commands
	t.Cleanup(func() { commands = all })
	commands = slices.Clone(commands)
	i := slices.IndexFunc(commands, func(c struct {
		name string
		make func() *cli.Command
	}) bool {
		return c.name == "test"
	})
	for _, status := range []int{0, 1, exitCrash, exitFault, exitBug, exitUntested, 255} {
		commands[i].make = func() *cli.Command {
			return &cli.Command{Name: "test", Action: func(*cli.Context) error { return endError{status, errors.New("")} }}
		}
		if got := gvm([]string{"gvm", "test"}); got != status {
			t.Errorf("status %d, want %d", got, status)
		}
	}
}

// TestTestStopEarly: so does one before the guest, while gvm reads the kernel.
func TestTestStopEarly(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	kernel, verdict := filepath.Join(dir, "kernel"), filepath.Join(dir, "verdict")
	if err := syscall.Mkfifo(kernel, 0o600); err != nil {
		t.Fatal(err)
	}
	c := command(t, "test", "-k", kernel, "--verdict", verdict, "--", "sh")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(kernel, os.O_WRONLY, 0) // returns when gvm reads it
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := c.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if r := wait(t, c); r.status != 130 {
		t.Errorf("status %d", r.status)
	}
	if b, err := os.ReadFile(verdict); err != nil || !strings.Contains(string(b), `"kind": "stopped"`) {
		t.Errorf("the verdict is %s, %v", b, err)
	}
}

// TestEnvironment: the command gets a subset of gvm's environment, and what --env adds.
func TestEnvironment(t *testing.T) {
	t.Setenv("LC_NUMERIC", "de_DE")
	t.Setenv("GVM_SECRET", "x")
	t.Setenv("WANTED", "a b")
	tc := testConfig{env: []string{"WANTED", "PATH=/p", "UNSET_HERE", "EMPTY="}}
	env := tc.environment("/root", "root")
	for _, want := range []string{"LC_NUMERIC=de_DE", "WANTED=a b", "PATH=/p", "EMPTY=", "HOME=/root", "USER=root"} {
		if !slices.Contains(env, want) {
			t.Errorf("no %s in %q", want, env)
		}
	}
	for _, e := range env {
		if name, _, _ := strings.Cut(e, "="); name == "GVM_SECRET" || name == "UNSET_HERE" ||
			e == "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" {
			t.Errorf("%s is passed", e)
		}
	}
	// A walk over all variables for each one would take minutes of these.
	tc.env = nil
	for i := range 1 << 19 {
		tc.env = append(tc.env, fmt.Sprintf("V%d=", i))
	}
	if got := tc.environment("/root", "root"); !slices.Contains(got, tc.env[len(tc.env)-1]) {
		t.Error("the last of many variables is not passed")
	}
}

// TestScratchVariables: each number of disks gives variables that xfstests takes.
func TestScratchVariables(t *testing.T) {
	for n, want := range map[int]string{
		0: "",
		1: "TEST_DEVS=1 TEST_DEV=1",
		2: "TEST_DEVS=1,2 TEST_DEV=1 SCRATCH_DEV=2",
		3: "TEST_DEVS=1,2,3 TEST_DEV=1 LOGWRITES_DEV=3 SCRATCH_DEV=2",
		5: "TEST_DEVS=1,2,3,4,5 TEST_DEV=1 LOGWRITES_DEV=5 SCRATCH_DEV_POOL=2,3,4",
	} {
		var tc testConfig
		if n > 0 {
			if err := tc.parseScratch(fmt.Sprintf("%dx1M", n)); err != nil {
				t.Fatal(err)
			}
		}
		var got []string
		for _, v := range scratchVariables(tc.scratch) {
			got = append(got, v.Name+"="+strings.ReplaceAll(strings.Join(v.Serials, ","), "gvm-scratch-", ""))
		}
		if s := strings.Join(got, " "); s != want || len(tc.scratch) != n {
			t.Errorf("%d disks: %s, want %s", len(tc.scratch), s, want)
		}
	}
}

// TestTestShares: mistakes in --root, --rw and --ro end gvm test before the machine.
func TestTestShares(t *testing.T) {
	t.Parallel()
	for want, args := range map[string][]string{
		"gvm: --root: none: no such ":                           {"--root", "none"},
		"gvm: --rw: /etc/passwd: is a regular file; want a dir": {"--root", "/", "--rw", "/etc/passwd"},
		"gvm: --ro: none: no such ":                             {"--ro", "none"},
		"gvm: --file is for a guest withou":                     {"--root", "/", "--file", "/etc/passwd"},
		"gvm: share gvm0: /proc: it s":                          {"--rw", "/proc"},
	} {
		c := command(t, slices.Concat([]string{"test", "-k", testKernel(t)}, args, []string{"--", "sh"})...)
		if r := gvmRuns(t, c); r.status != 125 || r.out != "" || !strings.HasPrefix(r.errs, want) {
			t.Errorf("%v: status %d, output %q, standard error %q, want %q", args, r.status, r.out, r.errs, want)
		}
	}
}
