package lab

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvm/kvmapi"
	"gvm/vmm/x86"
)

// testMainEnv makes this test binary one whose tests run in the lab.
const testMainEnv = "GVM_LAB_TEST_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(testMainEnv) == "1" {
		os.Exit(Main(m, Options{
			Direct: func() (bool, string) { return false, "this test says so" },
			Build:  []string{"gvm/guest-tests/cmd/lab"},
		}))
	}
	os.Exit(m.Run())
}

func setUp(t *testing.T) *Lab {
	t.Helper()
	l, err := Setup(t.Context(), Log(t))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func shell(script string, args ...string) []string {
	return append([]string{"sh", "-c", script, "sh"}, args...)
}

func TestRunShell(t *testing.T) {
	l := setUp(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "in"), []byte("from the host"), 0o644); err != nil {
		t.Fatal(err)
	}
	var out, errs bytes.Buffer
	code, err := l.Run(t.Context(), Command{
		Args: shell(`cat in; cat in > result; echo oops >&2
			pwd; ls /tmp; echo "$GVM_IN_LAB"; cat /dev/stdin
			touch /lab-was-here 2>/dev/null && echo root is writable
			[ $(nproc) = 2 ] || echo $(nproc) processors
			exit 42`),
		Writable: []string{dir}, Stdout: &out, Stderr: &errs, Log: Log(t),
	})
	if err != nil || code != 42 {
		t.Fatalf("status %d, %v; want 42", code, err)
	}
	first, _, _ := strings.Cut(strings.TrimPrefix(dir, "/tmp/"), "/")
	if want := "from the host" + dir + "\n" + first + "\n1\n"; out.String() != want {
		t.Errorf("stdout %q, want %q", out.String(), want)
	}
	if errs.String() != "oops\n" {
		t.Errorf("stderr %q", errs.String())
	}
	if b, err := os.ReadFile(filepath.Join(dir, "result")); string(b) != "from the host" {
		t.Errorf("result file %q, %v", b, err)
	}
	noChildren(t)
}

// TestRunUser: an ordinary user reads visible files, also below a directory that the user cannot
// enter, has a home, and the devices of the group kvm, and no others.
func TestRunUser(t *testing.T) {
	l := setUp(t)
	dir, err := os.MkdirTemp("/var/tmp", "gvm-lab-test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	visible := filepath.Join(dir, "closed", "visible")
	for _, err := range []error{os.MkdirAll(visible, 0o755), os.Chmod(filepath.Dir(visible), 0o700),
		os.WriteFile(filepath.Join(visible, "file"), []byte("from the host\n"), 0o644),
		os.WriteFile(filepath.Join(dir, "other"), nil, 0o644)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	var out, errs bytes.Buffer
	code, err := l.Run(t.Context(), Command{
		Args: shell(`cat "$1"/file; ls "$2"; id -u; id -G
			echo "$HOME $XDG_RUNTIME_DIR"; touch ~/file; [ -r "$GVM_LAB_CACHE" ] && echo cache
			for d in kvm vhost-net vhost-scsi; do [ -w /dev/$d ] && echo $d; done
			grep ^CapEff /proc/self/status`, visible, dir),
		Env: append(os.Environ(), "XDG_RUNTIME_DIR=/run/user/0"), User: 65534, Visible: []string{visible},
		Stdout: &out, Stderr: &errs, Log: Log(t),
	})
	want := "from the host\nclosed\n65534\n65534\n/tmp \ncache\nkvm\nvhost-net\nCapEff:\t0000000000000000\n"
	if err != nil || code != 0 || out.String() != want || errs.String() != "" {
		t.Errorf("status %d, %v, %q, want %q; %s", code, err, out.String(), want, errs.String())
	}
}

// TestRunBytes sends one MiB of random data into the lab and back.
func TestRunBytes(t *testing.T) {
	l := setUp(t)
	data := make([]byte, 1<<20)
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range data {
		data[i] = byte(rng.Uint32())
	}
	var out bytes.Buffer
	code, err := l.Run(t.Context(), Command{
		Args: []string{"cat"}, Stdin: bytes.NewReader(data), Stdout: &out, Stderr: &out, Log: Log(t),
	})
	if err != nil || code != 0 {
		t.Fatalf("status %d, %v", code, err)
	}
	if !bytes.Equal(out.Bytes(), data) {
		t.Errorf("%d bytes came back, not the %d that went in", out.Len(), len(data))
	}
}

// TestRunKVM: the kernels provide the devices that gvm needs, and KVM works from this very test
// binary.
func TestRunKVM(t *testing.T) {
	l := setUp(t)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	two := make(chan struct{}, 2) // labs at once
	for _, k := range l.kernels {
		if k == l.Cloud { // it has no 9p
			continue
		}
		wg.Go(func() {
			two <- struct{}{}
			defer func() { <-two }()
			var out bytes.Buffer
			code, err := l.Run(t.Context(), Command{
				Args: []string{exe, "-test.run=^TestProbe$", "-test.v"}, Kernel: k, Modules: []string{"brd"},
				Env: append(os.Environ(), "PROBE_MODULE=brd"), Stdout: &out, Stderr: &out, Log: Log(t),
			})
			if err != nil || code != 0 || !strings.Contains(out.String(), "--- PASS: TestProbe") {
				t.Errorf("on %s: status %d, %v:\n%s", k.Release, code, err, &out)
			}
		})
	}
}

// TestGuest boots the initramfs of Initramfs on the lab's KVM with a hypervisor that is known to
// work, and continues to the root image: the basis of guest tests.
func TestGuest(t *testing.T) {
	if os.Getenv(InLabEnv) != "1" {
		l := setUp(t)
		exe, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		code, err := l.Run(t.Context(), Command{
			Args: []string{exe, "-test.run=^TestGuest$", "-test.v"}, Env: os.Environ(), CPUs: 1, Fast: true,
			Stdout: &out, Stderr: &out, Log: Log(t),
		})
		if err != nil || code != 0 {
			t.Errorf("status %d, %v", code, err)
		}
		t.Logf("in the lab:\n%s", &out)
		return
	}
	l := setUp(t)
	qemu, err := hostTool(qemuName)
	if err != nil {
		t.Fatal(err)
	}
	k := l.Debian
	dir := t.TempDir()
	initrd, disk := filepath.Join(dir, "initrd"), filepath.Join(dir, "root.ext4")
	start := time.Now()
	err = Initramfs{
		Kernel: k, Modules: []string{"virtio_pci", "virtio_scsi", "sd_mod", "ext4"},
		Binaries: []string{filepath.Join(l.Tree, "sbin/mke2fs")}, Root: l.Tree,
		Init: "echo initramfs is up; /bin/mke2fs -V\n" + SwitchRoot,
	}.Build(initrd)
	if err != nil {
		t.Fatal(err)
	}
	built := time.Now()
	const script = "uname -r; cat /etc/debian_version; echo done > /mark; mount | grep ' / '"
	if err := l.CopyRootImage(t.Context(), disk, script); err != nil {
		t.Fatal(err)
	}
	copied := time.Now()
	cmd := exec.CommandContext(t.Context(), qemu, "-accel", "kvm", "-cpu", "host", "-m", "512", "-nodefaults",
		"-display", "none", "-serial", "stdio", "-no-reboot",
		"-device", "virtio-scsi-pci", "-drive", "if=none,id=d,format=raw,file="+disk, "-device", "scsi-hd,drive=d",
		"-kernel", k.VMLinux, "-initrd", initrd, "-append", "console=ttyS0 quiet panic=-1 root=/dev/sda")
	out, err := cmd.CombinedOutput()
	t.Logf("%s: initramfs built in %.1f s, disk copied in %.1f s, guest ran for %.1f s:\n%s", k.Release,
		built.Sub(start).Seconds(), copied.Sub(built).Seconds(), time.Since(copied).Seconds(), out)
	if err != nil {
		t.Error(err)
	}
	for _, s := range []string{"initramfs is up\r\n", "Using EXT2FS Library", k.Release + "\r\n",
		"/dev/sda on / type ext4 (rw"} {
		if !bytes.Contains(out, []byte(s)) {
			t.Errorf("no %q in the guest's output", s)
		}
	}
	debugfs, err := hostTool("debugfs")
	if err != nil {
		t.Fatal(err)
	}
	if mark, err := run("", debugfs, "-R", "cat mark", disk); err != nil || string(mark) != "done\n" {
		t.Errorf("the guest's file on the disk is %q, %v", mark, err)
	}
}

// TestProbe is run in the lab by other tests; PROBE_FAIL makes it fail.
func TestProbe(t *testing.T) {
	if os.Getenv(InLabEnv) != "1" {
		t.Skip("not in a lab")
	}
	if os.Getenv("PROBE_FAIL") != "" {
		t.Fatal("failing on request")
	}
	kvm, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer kvm.Close()
	const createVM, createVCPU = 0xae01, 0xae41
	var vm int
	for err = unix.EINTR; err == unix.EINTR; { // Go's own signals interrupt it
		vm, err = unix.IoctlRetInt(int(kvm.Fd()), createVM)
	}
	if err != nil {
		t.Fatalf("KVM_CREATE_VM: %v", err)
	}
	if _, err := unix.IoctlRetInt(vm, createVCPU); err != nil {
		t.Errorf("KVM_CREATE_VCPU: %v", err)
	}
	sys, err := kvmapi.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer sys.Close()
	cpuid, err := sys.SupportedCPUID()
	if err != nil {
		t.Fatal(err)
	}
	if orphans, missing := x86.Orphans(cpuid); len(orphans) > 0 {
		t.Errorf("the processor has %s without %s: no such processor exists", orphans, missing)
	}
	kmsg, err := exec.Command("dmesg").Output()
	if err != nil {
		t.Fatal(err)
	}
	// See calibratedTSC.
	tsc := bytes.Index(kmsg, []byte("clocksource: Switched to clocksource tsc\n"))
	svm := bytes.Index(kmsg, []byte("Nested Virtualization enabled"))
	if tsc < 0 || svm < tsc {
		t.Errorf("KVM was loaded before the kernel knew the TSC's frequency:\n%s", kmsg)
	}
	vhost, err := os.OpenFile("/dev/vhost-scsi", os.O_RDWR, 0)
	if err != nil {
		t.Error(err)
	}
	vhost.Close()
	for _, d := range []string{"/sys/kernel/config/target/core", "/sys/kernel/config/target/vhost"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Error(err)
		}
	}
	if root, err := os.ReadFile("/sys/kernel/config/target/dbroot"); err != nil ||
		strings.TrimSpace(string(root)) != "/etc/target" {
		t.Errorf("LIO's database is in %q, %v", root, err)
	}
	if m := os.Getenv("PROBE_MODULE"); m != "" {
		if _, err := os.Stat("/sys/module/" + m); err != nil {
			t.Error(err)
		}
	}
	if err := exec.Command("unshare", "--user", "--map-root-user", "true").Run(); err != nil {
		t.Errorf("a user namespace is refused: %v", err)
	}
	if os.Getenv(testMainEnv) == "1" {
		// Status 2: it runs, and was given no command.
		var exit *exec.ExitError
		if err := exec.Command(Program("lab")).Run(); !errors.As(err, &exit) || exit.ExitCode() != 2 {
			t.Errorf("the program that Main built: %v", err)
		}
	}
	l, err := Setup(t.Context(), io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(l.Cloud.BZImage); err != nil {
		t.Error(err)
	}
}

// TestMainInLab: Main runs the binary it is in, passes on flags, status and output, and lets it
// write the profile.
func TestMainInLab(t *testing.T) {
	setUp(t)
	for _, tt := range []struct {
		fail, want string
		code       int
	}{
		{"", "--- PASS: TestProbe", 0},
		{"yes", "--- FAIL: TestProbe", 1},
	} {
		t.Run("fail="+tt.fail, func(t *testing.T) {
			dir := t.TempDir()
			cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestProbe$", "-test.v",
				"-test.timeout=5m", "-test.cpuprofile="+filepath.Join(dir, "cpu"), "-test.testlogfile="+filepath.Join(dir, "log"))
			cmd.Env = append(os.Environ(), testMainEnv+"=1", "PROBE_FAIL="+tt.fail)
			out, err := cmd.CombinedOutput()
			if code := cmd.ProcessState.ExitCode(); code != tt.code {
				t.Errorf("status %d, %v; want %d", code, err, tt.code)
			}
			for _, s := range []string{"lab: tests run in the lab: this test says so\n", tt.want} {
				if !strings.Contains(string(out), s) {
					t.Errorf("no %q in:\n%s", s, out)
				}
			}
			if _, err := os.Stat(filepath.Join(dir, "cpu")); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestMainDirect(t *testing.T) {
	ran := 0
	m := runner(func() int { ran++; return 7 })
	if code := Main(m, Options{Direct: func() (bool, string) { return true, "it can" }}); code != 7 || ran != 1 {
		t.Errorf("status %d after %d runs", code, ran)
	}
}

type runner func() int

func (r runner) Run() int { return r() }

// onText calls f once, when s has been written.
type onText struct {
	s    string
	f    func()
	seen bytes.Buffer
	once sync.Once
}

func (o *onText) Write(p []byte) (int, error) {
	o.seen.Write(p)
	if strings.Contains(o.seen.String(), o.s) {
		o.once.Do(o.f)
	}
	return len(p), nil
}

func TestRunCancelled(t *testing.T) {
	l := setUp(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	because := errors.New("the test had enough")
	_, err := l.Run(ctx, Command{
		Args: shell("echo ready; sleep 1000"), Stdout: &onText{s: "ready\n", f: func() { cancel(because) }}, Log: Log(t),
	})
	if !errors.Is(err, because) {
		t.Errorf("error %v", err)
	}
	noChildren(t)
}

func TestRunTimeout(t *testing.T) {
	l := setUp(t)
	_, err := l.Run(t.Context(), Command{Args: shell("sleep 1000"), Timeout: time.Second, Log: Log(t)})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
	noChildren(t)
}

// TestRunWedged: a panic with panic=0 halts L1 without a sign of life, which is a wedge, tried
// twice. The command's earlier output has a second to get out.
func TestRunWedged(t *testing.T) {
	l := setUp(t)
	var out, log, console bytes.Buffer
	_, err := l.Run(t.Context(), Command{
		Args:   shell("echo attempt; sleep 1; echo 0 > /proc/sys/kernel/panic; echo c > /proc/sysrq-trigger"),
		Stdout: &out, Silence: 8 * time.Second, Console: &console, Log: &log,
	})
	t.Logf("log:\n%s", &log)
	if !errors.Is(err, ErrWedged) {
		t.Errorf("error %v", err)
	}
	if out.String() != "attempt\nattempt\n" {
		t.Errorf("output %q, want that of two attempts", &out)
	}
	if n := strings.Count(log.String(), "trying once more"); n != 1 {
		t.Errorf("the log speaks of %d retries", n)
	}
	for _, s := range []string{"sysrq triggered crash", "RIP="} {
		if !strings.Contains(console.String(), s) {
			t.Errorf("no %q on the console", s)
		}
	}
	noChildren(t)
}

func TestRunCrashed(t *testing.T) {
	l := setUp(t)
	var log bytes.Buffer
	_, err := l.Run(t.Context(), Command{Args: shell("echo c > /proc/sysrq-trigger"), Log: &log})
	if !errors.Is(err, ErrCrashed) || !strings.Contains(log.String(), "Kernel panic - not syncing") {
		t.Errorf("error %v; log:\n%s", err, &log)
	}
}

// TestKeeper: several commands run in one lab. Of the one before, each sees the files in /tmp and
// no process. A program that does not exist is no reason to end the lab, and a crash is.
func TestKeeper(t *testing.T) {
	l := setUp(t)
	var k keeper
	defer k.end()
	lab := k.m
	for i, c := range []struct {
		args      []string
		code      int
		out, errs string
	}{
		{shell("echo first >/tmp/mark; sleep 1000 & exit 3"), 3, "", ""},
		{shell("cat /tmp/mark; pgrep sleep; exit 4"), 4, "first\n", ""},
		{[]string{"no-such-program"}, 127, "", "no-such-program"},
		{shell("cat /tmp/mark"), 0, "first\n", ""},
	} {
		var out, errs bytes.Buffer
		code, err := l.run(t.Context(), Command{Args: c.args, Stdout: &out, Stderr: &errs, Log: Log(t)}, &k)
		if code != c.code || err != nil || out.String() != c.out || !strings.Contains(errs.String(), c.errs) {
			t.Errorf("%q: status %d, %v, stdout %q, stderr %q", c.args, code, err, &out, &errs)
		}
		if k.m == nil || i > 0 && k.m != lab {
			t.Fatalf("%q ran in another lab, or left none", c.args)
		}
		lab = k.m
	}
	_, err := l.run(t.Context(), Command{Args: shell("echo c > /proc/sysrq-trigger"), Log: Log(t)}, &k)
	if !errors.Is(err, ErrCrashed) || k.m != nil {
		t.Errorf("error %v; kept a lab: %t", err, k.m != nil)
	}
	noChildren(t)
}

// TestRunKilled: a killed process takes its QEMU with it.
func TestRunKilled(t *testing.T) {
	setUp(t)
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestProbe$")
	cmd.Env = append(os.Environ(), testMainEnv+"=1", "TMPDIR="+t.TempDir()) // Main's builds stay there
	errs, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	sc := bufio.NewScanner(errs)
	for sc.Scan() && !strings.Contains(sc.Text(), "L1 is up") {
	}
	qemu := children(t, cmd.Process.Pid)
	cmd.Process.Kill()
	cmd.Wait()
	if len(qemu) != 1 {
		t.Fatalf("the lab's process has children %v, want one", qemu)
	}
	for alive(qemu[0]) { // until the test's own timeout
		time.Sleep(10 * time.Millisecond)
	}
}

// children returns the processes that pid has started.
func children(t *testing.T, pid int) []int {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil || len(files) == 0 {
		t.Fatalf("children of process %d: %v", pid, err)
	}
	var pids []int
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ESRCH) {
			t.Fatal(err)
		}
		for _, s := range strings.Fields(string(b)) {
			n, err := strconv.Atoi(s)
			if err != nil {
				t.Fatal(err)
			}
			pids = append(pids, n)
		}
	}
	return pids
}

func noChildren(t *testing.T) {
	t.Helper()
	if c := children(t, os.Getpid()); len(c) != 0 {
		t.Errorf("processes left: %v", c)
	}
}

// alive reports whether a process exists and is not a zombie.
func alive(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, after, _ := strings.Cut(string(b), ") ")
	return !strings.HasPrefix(after, "Z") && !strings.HasPrefix(after, "X")
}
