// Package linux tests gvm with stock Linux kernels: directly if this host's KVM runs them, else
// inside the lab. GVM_TEST_L1=6.12 makes the lab run on Debian's 6.12 kernel; lab.Versions lists
// the others. GVM_TEST_USER=65534 makes it run the tests and gvm as an ordinary user.
package linux

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"gvm/guest-tests/lab"
	"gvm/kvmapi/vhost"
	"gvm/vmm"
)

// cacheHome is XDG_CACHE_HOME of every gvm, so that they share decompressed kernels.
var cacheHome string

// labCPUs is the number of L1's CPUs. With two, whose threads compete with QEMU's own for the
// processors of a small host, the lab loses guests and L1: see README.md of package lab. Guests of
// dozens of CPUs, and benchmarks, need two.
var labCPUs = 1

// lost matches the output of a test whose guest, or whose gvm by a fault of the Go runtime, was
// lost by the lab, not by gvm: see README.md of package lab. No test brings a double fault about.
var lost = regexp.MustCompile(`KVM_EXIT_SHUTDOWN|SIGQUIT: quit|BUG: soft lockup|rcu: .*ticks this GP|` +
	`asm_exc_double_fault|no progress for [13]m0s before the agent|rip 0xffffffffc042220c|fatal error: |` +
	regexp.QuoteMeta(errLate.Error()))

// again runs a guest, and in the lab up to three times more if it is lost before it is done.
func again(t testing.TB, done func(result) bool, run func() result) (r result) {
	t.Helper()
	for tries := range 4 {
		r = run()
		if done(r) || os.Getenv(lab.InLabEnv) != "1" || r.status != 0 && !lost.MatchString(r.stderr) {
			break
		}
		t.Logf("try %d: the lab lost a guest", tries+1)
	}
	return r
}

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	dir, remove, err := lab.TempDir("gvm-linux-test")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer remove()
	cacheHome = dir
	// The directory of every gvm's control socket: sockets of killed ones stay.
	run := filepath.Join(cacheHome, "run")
	if err := errors.Join(os.Mkdir(run, 0o700), os.Setenv("XDG_RUNTIME_DIR", run)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if os.Getenv(lab.InLabEnv) == "1" {
		if err := takeKernels(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	if slices.ContainsFunc(os.Args, func(arg string) bool { return strings.HasPrefix(arg, "-test.bench=") }) {
		labCPUs = 2
	}
	options := lab.Options{
		Direct: direct,
		Build: []string{"gvm/cmd/gvm", "gvm/cmd/gvm-agent", "gvm/cmd/gvm-net", "gvm/guest/diskload", "gvm/guest/vsockecho",
			"gvm/guest-tests/cmd/posixtest", "gvm/guest-tests/cmd/escapes"},
		Memory:  10 << 10, // for a guest of 6 GiB
		CPUs:    labCPUs,
		Labs:    2,
		Modules: []string{"nbd", "dm-mod", "raid0", "vhost_vsock"},
		Lost:    lost,
	}
	for _, env := range []string{"BLKTESTS", "XFSTESTS"} { // the trees of suites, which the host has anywhere
		if dir := os.Getenv(env); dir != "" {
			options.Visible = append(options.Visible, dir)
		}
	}
	return lab.Main(m, options)
}

// takeKernels puts the lab's decompressed kernels into gvm's cache.
func takeKernels() error {
	l, err := lab.Setup(context.Background(), os.Stderr)
	if err != nil {
		return err
	}
	dir := filepath.Join(cacheHome, "gvm", "kernels")
	files, err := filepath.Glob(filepath.Join(l.KernelCache(), "*"))
	for _, f := range files {
		err = errors.Join(err, os.MkdirAll(dir, 0o700), os.Symlink(f, filepath.Join(dir, filepath.Base(f))))
	}
	return err
}

// direct requires a KVM that runs Linux and a vhost-scsi on this machine; the lab has both.
func direct() (bool, string) {
	ok, why := vmm.RunsLinux()
	if !ok {
		return false, why
	}
	dev, err := vhost.OpenSCSI()
	if err != nil {
		return false, err.Error()
	}
	dev.Close()
	return true, why
}

// needsRoot skips a test of something that no ordinary user may do (lab.UserEnv).
func needsRoot(t testing.TB, what string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip(what + " needs root")
	}
}

// kernel returns a kernel of the lab: see lab.Lab.Kernel.
func kernel(t testing.TB, name string) *lab.Kernel {
	t.Helper()
	k, err := theLab(t).Kernel(name)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// theLab returns the prepared lab: kernels and images.
func theLab(t testing.TB) *lab.Lab {
	t.Helper()
	l, err := lab.Setup(t.Context(), lab.Log(t))
	if err != nil {
		t.Fatal(err)
	}
	return l
}
