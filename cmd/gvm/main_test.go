package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvm/devices/scsi/lio"
	"gvm/devices/virtio/vhostscsi"
	"gvm/guest-tests/lab"
)

// With asGVM the test binary is gvm. With readOnlyEnv it first makes that directory read-only for
// itself.
const (
	asGVM       = "GVM_TEST_AS_GVM"
	readOnlyEnv = "GVM_TEST_READ_ONLY"
)

// tooLong is the time after which a test gives up waiting: long enough for the lab, and for QEMU's
// firmware where KVM emulates it, on a busy machine.
const tooLong = 4 * time.Minute

// runtimeDir has the control sockets.
var runtimeDir string

func TestMain(m *testing.M) {
	if os.Getenv(asGVM) != "" {
		jailEnvironment = append(jailEnvironment, asGVM)
		if dir := os.Getenv(readOnlyEnv); dir != "" {
			if err := makeReadOnly(dir); err != nil {
				fmt.Println("read-only mount:", err)
				os.Exit(99)
			}
		}
		sandboxNotes = !sandboxLacks() // of which the tests of other things know nothing
		if calls := os.Getenv(refusedEnv); calls != "" {
			sandboxNotes = sandboxNotes || calls != "locks" // else they are for the sandbox
			refuse(calls)
			os.Unsetenv(refusedEnv) // its children have the filter
		}
		if os.Getenv(asStuck) != "" {
			stuck()
		}
		if lock := os.Getenv(panicsEnv); lock != "" {
			panicAtSignal(lock == "locked")
		}
		if what := os.Getenv(attackEnv); what != "" {
			attackAtSignal(what)
		}
		if mode := os.Getenv(sandboxEnv); mode != "" {
			sandboxDefault = mode
		}
		if os.Getenv(netEnv) != "" {
			startNet()
			os.Exit(1)
		}
		if os.Getenv(asShell) != "" {
			os.Exit(shell())
		}
		os.Exit(gvm(os.Args))
	}
	os.Exit(testMain(m))
}

// machineless matches tests that start gvm many times, or work long, but start no machine: they
// need no lab, where they take up to ten times as long.
func machineless() *regexp.Regexp {
	const names = "AgentIn|BadInput|Bench(Disk|Nothing|Record)|Cell(Output|RunsOn)|Check(Memory|Threads(OfStorage)?)|" +
		"Completion(OfDisks)?|Copy|Crash(Log|RecordNames)|Exec|Foreign(Answers|Words)|Help(Width)?|Hugepages|Image|" +
		"InputEnds|InspectWord|JailWords|KernelCheck|KnownDifferences|KubernetesWords|LioWords|" +
		"Matrix(StuckReader|Words)|NothingToPrint|Operands|PlotterFails|ReplayEnds|RunAsksLimits|(Sandbox)?Replay|" +
		"SandboxWords|SecondSignal|StatTables|StolenInput|StuckReader|Suggestions|SurplusArguments|" +
		"Test(Shares|StopEarly|Words)|Trace(Cut|Golden|Mistakes|Plot)|Unreadable|UserThreads|VerbsOfStranger"
	return regexp.MustCompile("^Test(" + names + ")$")
}

func testMain(m *testing.M) int {
	dir, remove, err := lab.TempDir("gvm-run")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer remove()
	runtimeDir = dir
	// One CPU: two guests at a time on an L1 with two processors can make the lab hang. Two labs, as
	// most of the time is the labs' own.
	return lab.Main(withPlotter{m}, lab.Options{Build: []string{"gvm/cmd/gvm-plot", "gvm/cmd/gvm-net"},
		Visible: []string{runtimeDir}, Direct: lab.KVM, CPUs: 1, Labs: 2, Here: machineless(), Needs: []lab.Need{
			{Tests: regexp.MustCompile("^Test(JailVhost|Sandbox(Replay)?Vhost)$"), Lacks: lacksVhost},
			{Tests: regexp.MustCompile("^TestJail(Limits|UserNet)$"), Lacks: lacksGroups},
		}})
}

// lacksVhost returns an error if this kernel serves no disks.
func lacksVhost() error { return errors.Join(lio.Check(""), vhostscsi.Check(vhostscsi.ABIPolicy{})) }

// needsVhost skips a test that was chosen by name on a machine whose kernel serves no disks: Main
// runs it in the lab otherwise.
func needsVhost(t *testing.T) {
	t.Helper()
	if err := lacksVhost(); err != nil {
		t.Skip(err)
	}
}

// withPlotter runs the tests with gvm-plot and gvm-net in $PATH.
type withPlotter struct{ *testing.M }

func (m withPlotter) Run() int {
	if err := os.Setenv("PATH", filepath.Dir(lab.Program("gvm-plot"))+":"+os.Getenv("PATH")); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.M.Run()
}

// makeReadOnly makes dir read-only in a mount namespace of the process.
func makeReadOnly(dir string) error {
	if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	if err := unix.Mount("", dir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		return err
	}
	return os.Chdir(dir) // enters the mount from the directory below it
}

// command returns gvm with args, in a process group, directory and environment of its own. It is
// for tests of the command line: words, messages, exit statuses, signals, terminals, a process that
// is killed. The tests of package machine run machines in their own process, which takes less time.
func command(t testing.TB, args ...string) *exec.Cmd {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), tooLong)
	t.Cleanup(cancel)
	c := exec.CommandContext(ctx, self(t), args...)
	c.Args[0] = "gvm"
	c.Dir = t.TempDir()
	c.Env = environment(t.TempDir())
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return c
}

func self(t testing.TB) string {
	t.Helper()
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// copyOfSelf returns the path of a copy of self in dir, which other users can run: the directory
// that the go command makes for a test's program is its user's alone.
func copyOfSelf(t testing.TB, dir string) string {
	t.Helper()
	path := filepath.Join(dir, "gvm")
	if _, err := os.Stat(path); err == nil {
		return path
	}
	program, err := os.ReadFile(self(t))
	if err := errors.Join(err, os.WriteFile(path, program, 0o755)); err != nil {
		t.Fatal(err)
	}
	return path
}

// tempEnv names the directory of environment.
const tempEnv = "GVM_TEST_TEMP"

// environment is a gvm's, whose temporary files and cache are in temp: of each gvm alone, so that
// no gvm that was killed fails another's test. It includes a directory for the output of coverage
// instrumentation.
func environment(temp string) []string {
	env := append(os.Environ(), asGVM+"=1", tempEnv+"="+temp, "TMPDIR="+temp, "XDG_CACHE_HOME="+temp,
		"XDG_RUNTIME_DIR="+runtimeDir)
	if testing.CoverMode() != "" {
		dir := os.DevNull
		if f := flag.Lookup("test.gocoverdir"); f != nil && f.Value.String() != "" {
			dir = f.Value.String()
		}
		env = append(env, "GOCOVERDIR="+dir)
	}
	return env
}

// result is the result of a gvm that ended.
type result struct {
	status    int // 128+n after signal n killed it
	out, errs string
}

// gvmRuns runs the command to its end and checks that it left nothing behind.
func gvmRuns(t testing.TB, c *exec.Cmd) result {
	t.Helper()
	var out, errs bytes.Buffer
	if c.Stdout == nil {
		c.Stdout = &out
	}
	if c.Stderr == nil {
		c.Stderr = &errs
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	r := wait(t, c)
	r.out, r.errs = out.String(), errs.String()
	return r
}

// wait waits for a started command.
func wait(t testing.TB, c *exec.Cmd) result {
	t.Helper()
	start := time.Now()
	err := c.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if time.Since(start) >= tooLong {
		t.Fatalf("gvm %s hangs", strings.Join(c.Args[1:], " "))
	}
	if err := syscall.Kill(-c.Process.Pid, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("a process of gvm's group is left: %v", err)
	}
	i := slices.IndexFunc(c.Env, func(word string) bool { return strings.HasPrefix(word, tempEnv+"=") })
	if left, err := os.ReadDir(c.Env[i][len(tempEnv)+1:]); err != nil || len(left) > 0 {
		t.Errorf("left in TMPDIR or the cache directory: %v, %v", left, err)
	}
	ws := c.ProcessState.Sys().(syscall.WaitStatus)
	if ws.Signaled() {
		return result{status: 128 + int(ws.Signal())}
	}
	return result{status: ws.ExitStatus()}
}

// image makes a file of n bytes, in which all blocks differ, also from those of an image with
// another seed.
func image(t testing.TB, name string, seed byte, n int) string {
	t.Helper()
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i) ^ byte(i>>8)*7 ^ byte(i>>16)*13 ^ seed
	}
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
