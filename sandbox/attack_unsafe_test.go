package sandbox

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Environment of the test binary as a process that enters a sandbox.
const (
	childEnv  = "GVM_TEST_SANDBOX_CHILD"  // its action
	modeEnv   = "GVM_TEST_SANDBOX_MODE"   // "" is on
	kernelEnv = "GVM_TEST_SANDBOX_KERNEL" // an older kernel: no Landlock, no notices
	dirEnv    = "GVM_TEST_SANDBOX_DIR"    // has read/file, write/, run/ and other/file
)

const statusRefused = 70

func TestMain(m *testing.M) {
	if what := os.Getenv(childEnv); what != "" {
		if err := child(what); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// child is a process that enters a sandbox and then does something.
func child(what string) error {
	if kernel := os.Getenv(kernelEnv); kernel != "" {
		kernelABI = func() int { return 0 }
		install = func(program []unix.SockFilter, flags uintptr) (int, error) {
			if flags&unix.SECCOMP_FILTER_FLAG_NEW_LISTENER != 0 {
				return -1, unix.EINVAL
			}
			return loadFilter(program, flags)
		}
	}
	mode := On
	if m := os.Getenv(modeEnv); m != "" {
		mode, _ = ParseMode(m)
	}
	dir := os.Getenv(dirEnv)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: filepath.Join(dir, "write/socket")})
	if err != nil {
		return err
	}
	c, err := net.Dial("unix", filepath.Join(dir, "write/socket"))
	if err != nil {
		return err
	}
	stop := make(chan struct{})
	for range 3 { // threads that are there before
		go func() {
			runtime.LockOSThread()
			<-stop
		}()
	}
	r, err := Prepare(Policy{Mode: mode, Paths: []Path{
		{Name: filepath.Join(dir, "read"), Rights: Read},
		{Name: filepath.Join(dir, "write"), Rights: Read | Write | Make | Remove},
		{Name: filepath.Join(dir, "run"), Rights: RemoveDir, Own: true},
		{Name: filepath.Join(dir, "run/own"), Rights: Remove, Own: true},
		{Name: filepath.Join(dir, "none"), Rights: Read},
		{Name: filepath.Join(dir, "read/file/none"), Rights: Read}, // that cannot be opened, as another user's
	}, Refused: func(c Refusal) {
		fmt.Println(c)
		os.Exit(statusRefused)
	}}).Enter()
	if err != nil {
		return err
	}
	fmt.Printf("%+v\n", r)
	switch i := slices.IndexFunc(attacks, func(a attack) bool { return a.what == what }); {
	case i >= 0:
		a := &attacks[i]
		_, _, errno := unix.Syscall6(a.nr, a.arg(0), a.arg(1), a.arg(2), a.arg(3), a.arg(4), a.arg(5))
		fmt.Println("the system call returned", int(errno))
		return nil
	case what == "hold":
		go func() {
			for {
				runtime.GC() // waits for the goroutine of the call
			}
		}()
		time.Sleep(10 * time.Millisecond)
		_, _, errno := unix.RawSyscall(unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_STREAM, 0)
		fmt.Println("the system call returned", int(errno))
		select {}
	case what == "wait":
		_, err = io.Copy(io.Discard, os.Stdin)
		return err
	}
	close(stop)
	return works(dir, l, c)
}

// works does much of a machine's work.
func works(dir string, l *net.UnixListener, c net.Conn) error {
	var all sync.WaitGroup
	errs := make([]error, 16)
	for i := range errs {
		all.Go(func() {
			runtime.LockOSThread() // a new thread, which ends
			b, err := os.ReadFile(filepath.Join(dir, "read/file"))
			name := filepath.Join(dir, "write", fmt.Sprint(i))
			errs[i] = errors.Join(err, os.WriteFile(name+".tmp", b, 0o600), os.Rename(name+".tmp", name), os.Remove(name))
			time.Sleep(time.Millisecond)
		})
	}
	for range 3 {
		runtime.GC()
	}
	all.Wait()
	s, err := l.Accept()
	if err != nil {
		return err
	}
	_, err = s.Write([]byte("hello"))
	b := make([]byte, 5)
	_, err2 := io.ReadFull(c, b)
	if _, err := Prepare(Policy{Mode: On}).Enter(); err == nil {
		return errors.New("the process entered twice")
	}
	fmt.Println("works")
	return errors.Join(append(errs, err, err2, s.Close(), l.Close())...)
}

// attack is a system call of a process that its guest has taken over. err is its error; 0: it is
// refused.
type attack struct {
	what string
	nr   uintptr
	args []any
	err  unix.Errno
}

// arg returns an argument; a string is a path, below the test's directory unless it is absolute.
func (a *attack) arg(i int) uintptr {
	if i >= len(a.args) {
		return 0
	}
	switch v := a.args[i].(type) {
	case int:
		return uintptr(v)
	case string:
		if below, ok := strings.CutPrefix(v, "lio/"); ok {
			if _, err := os.Stat(lioRoot); err == nil {
				v = filepath.Join(lioRoot, below)
			}
		}
		if v[0] != '/' {
			v = filepath.Join(os.Getenv(dirEnv), v)
		}
		p, err := unix.BytePtrFromString(v)
		if err != nil {
			panic(err)
		}
		kept = append(kept, p)
		return uintptr(unsafe.Pointer(p))
	}
	panic(a.what)
}

var kept []*byte // of attack.arg

// lioRoot is the directory of the kernel's SCSI target, for which lio in the test's directory
// stands on a host without one.
const lioRoot = "/sys/kernel/config/target"

const cwd = unix.AT_FDCWD

// attacks are in docs/security.md.
var attacks = []attack{
	{"read /etc/shadow", unix.SYS_OPENAT, []any{cwd, "/etc/shadow", unix.O_RDONLY}, unix.EACCES},
	{"read another file", unix.SYS_OPENAT, []any{cwd, "other/file", unix.O_RDONLY}, unix.EACCES},
	{"list another directory", unix.SYS_OPENAT, []any{cwd, "other", unix.O_RDONLY | unix.O_DIRECTORY}, unix.EACCES},
	{"write a file that is only read", unix.SYS_OPENAT, []any{cwd, "read/file", unix.O_WRONLY}, unix.EACCES},
	{"write elsewhere", unix.SYS_OPENAT, []any{cwd, "other/file", unix.O_WRONLY | unix.O_TRUNC}, unix.EACCES},
	{"make a file elsewhere", unix.SYS_OPENAT, []any{cwd, "other/new", unix.O_WRONLY | unix.O_CREAT, 0o600}, unix.EACCES},
	{"make a directory elsewhere", unix.SYS_MKDIRAT, []any{cwd, "other/new", 0o700}, unix.EACCES},
	{"remove a file elsewhere", unix.SYS_UNLINKAT, []any{cwd, "other/file", 0}, unix.EACCES},
	{"rename a file elsewhere", unix.SYS_RENAMEAT, []any{cwd, "other/file", cwd, "other/new"}, unix.EACCES},
	{"remove a neighbour's control socket", unix.SYS_UNLINKAT, []any{cwd, "run/neighbour/sock", 0}, unix.EACCES},
	{"take a neighbour's control socket", unix.SYS_RENAMEAT, []any{cwd, "run/neighbour/sock", cwd, "run/own/sock"},
		unix.EACCES},
	{"remove a neighbour of gvm's gdb socket", unix.SYS_UNLINKAT, []any{cwd, "gdb/neighbour", 0}, unix.EACCES},
	{"remove gvm's gdb socket", unix.SYS_UNLINKAT, []any{cwd, "gdb/sock", 0}, unix.EACCES},
	{"list --crash-dir", unix.SYS_OPENAT, []any{cwd, "crashes", unix.O_RDONLY | unix.O_DIRECTORY}, unix.EACCES},
	{"read another machine's record", unix.SYS_OPENAT, []any{cwd, "crashes/other/end", unix.O_RDONLY}, unix.EACCES},
	{"change another machine's record", unix.SYS_OPENAT, []any{cwd, "crashes/other/end", unix.O_WRONLY}, unix.EACCES},
	{"remove another machine's record", unix.SYS_UNLINKAT, []any{cwd, "crashes/other/end", 0}, unix.EACCES},
	{"make a record", unix.SYS_MKDIRAT, []any{cwd, "crashes/new", 0o700}, unix.EACCES},
	{"write to the kernel's SCSI target", unix.SYS_OPENAT, []any{cwd, "lio/dbroot", unix.O_WRONLY}, unix.EACCES},
	{"remove objects of the kernel's SCSI target", unix.SYS_UNLINKAT, []any{cwd, "lio/core", unix.AT_REMOVEDIR},
		unix.EACCES},
	{"make objects of the kernel's SCSI target", unix.SYS_MKDIRAT, []any{cwd, "lio/vhost", 0o700}, unix.EACCES},
	{"open the processor's memory", unix.SYS_OPENAT, []any{cwd, "/proc/self/mem", unix.O_RDWR}, unix.EACCES},
	{"open a device", unix.SYS_OPENAT, []any{cwd, "/dev/null", unix.O_RDWR}, unix.EACCES},
	{"change a file's times", unix.SYS_UTIMENSAT, []any{cwd, "read/file", 0, 0}, unix.EPERM},
	{"clone3", unix.SYS_CLONE3, nil, unix.ENOSYS},
	{"execve", unix.SYS_EXECVE, []any{"/bin/sh"}, 0},
	{"execveat", unix.SYS_EXECVEAT, []any{cwd, "/bin/sh"}, 0},
	{"fork", unix.SYS_CLONE, []any{int(unix.SIGCHLD)}, 0},
	{"vfork", unix.SYS_VFORK, nil, 0},
	{"socket of the Internet", unix.SYS_SOCKET, []any{unix.AF_INET, unix.SOCK_STREAM}, 0},
	{"unix socket", unix.SYS_SOCKET, []any{unix.AF_UNIX, unix.SOCK_STREAM}, 0},
	{"netlink socket", unix.SYS_SOCKET, []any{unix.AF_NETLINK, unix.SOCK_RAW}, 0},
	{"connect", unix.SYS_CONNECT, []any{0}, 0},
	{"bind", unix.SYS_BIND, []any{0}, 0},
	{"listen", unix.SYS_LISTEN, []any{0}, 0},
	{"ptrace", unix.SYS_PTRACE, []any{unix.PTRACE_ATTACH, 1}, 0},
	{"read another process", unix.SYS_PROCESS_VM_READV, []any{1}, 0},
	{"write another process", unix.SYS_PROCESS_VM_WRITEV, []any{1}, 0},
	{"kill another process", unix.SYS_KILL, []any{1, int(unix.SIGTERM)}, 0},
	{"signal another process", unix.SYS_TGKILL, []any{1, 1, int(unix.SIGTERM)}, 0},
	{"queue a signal", unix.SYS_RT_SIGQUEUEINFO, []any{1, int(unix.SIGTERM)}, 0},
	{"pidfd_open", unix.SYS_PIDFD_OPEN, []any{1}, 0},
	{"pidfd_getfd", unix.SYS_PIDFD_GETFD, []any{3, 0}, 0},
	{"mount", unix.SYS_MOUNT, []any{"/", "/mnt", 0, unix.MS_BIND}, 0},
	{"umount", unix.SYS_UMOUNT2, []any{"/proc", unix.MNT_DETACH}, 0},
	{"open_tree", unix.SYS_OPEN_TREE, []any{cwd, "/", unix.OPEN_TREE_CLONE}, 0},
	{"chroot", unix.SYS_CHROOT, []any{"other"}, 0},
	{"pivot_root", unix.SYS_PIVOT_ROOT, []any{"/", "/"}, 0},
	{"new namespaces", unix.SYS_UNSHARE, []any{unix.CLONE_NEWUSER | unix.CLONE_NEWNS}, 0},
	{"another's namespace", unix.SYS_SETNS, []any{0}, 0},
	{"a process in a namespace", unix.SYS_CLONE, []any{unix.CLONE_NEWUSER | int(unix.SIGCHLD)}, 0},
	{"io_uring", unix.SYS_IO_URING_SETUP, []any{8}, 0},
	{"userfaultfd", unix.SYS_USERFAULTFD, nil, 0},
	{"bpf", unix.SYS_BPF, nil, 0},
	{"perf_event_open", unix.SYS_PERF_EVENT_OPEN, nil, 0},
	{"load a module", unix.SYS_FINIT_MODULE, []any{0, "/", 0}, 0},
	{"remove a module", unix.SYS_DELETE_MODULE, []any{"/kvm"}, 0},
	{"kexec", unix.SYS_KEXEC_FILE_LOAD, nil, 0},
	{"reboot", unix.SYS_REBOOT, nil, 0},
	{"keyctl", unix.SYS_KEYCTL, nil, 0},
	{"add_key", unix.SYS_ADD_KEY, nil, 0},
	{"open by handle", unix.SYS_OPEN_BY_HANDLE_AT, []any{cwd}, 0},
	{"change a file's mode", unix.SYS_FCHMODAT, []any{cwd, "other/file", 0o777}, 0},
	{"change a file's owner", unix.SYS_FCHOWNAT, []any{cwd, "other/file", 0, 0}, 0},
	{"link a file", unix.SYS_LINKAT, []any{cwd, "other/file", cwd, "write/link"}, 0},
	{"make a device", unix.SYS_MKNODAT, []any{cwd, "write/dev", unix.S_IFCHR | 0o600, 0x101}, 0},
	{"become another user", unix.SYS_SETUID, []any{0}, 0},
	{"take capabilities", unix.SYS_CAPSET, nil, 0},
	{"become dumpable", unix.SYS_PRCTL, []any{unix.PR_SET_DUMPABLE, 1}, 0},
	{"another filter", unix.SYS_SECCOMP, []any{unix.SECCOMP_SET_MODE_FILTER}, 0},
	{"let refused calls through", unix.SYS_IOCTL, []any{3, unix.SECCOMP_IOCTL_NOTIF_SEND}, 0},
	{"executable memory", unix.SYS_MMAP,
		[]any{0, 4096, unix.PROT_WRITE | unix.PROT_EXEC, unix.MAP_ANON | unix.MAP_PRIVATE, -1}, 0},
	{"make memory executable", unix.SYS_MPROTECT, []any{0, 4096, unix.PROT_EXEC}, 0},
	{"type on the terminal", unix.SYS_IOCTL, []any{0, unix.TIOCSTI, "/"}, 0},
	{"signals by fcntl", unix.SYS_FCNTL, []any{0, unix.F_SETOWN, 1}, 0},
	{"raise a limit", unix.SYS_PRLIMIT64, []any{0, unix.RLIMIT_NOFILE, "/"}, 0},
	{"shared memory", unix.SYS_SHMGET, nil, 0},
	{"I/O ports", unix.SYS_IOPL, []any{3}, 0},
	{"set the clock", unix.SYS_CLOCK_SETTIME, nil, 0},
	{"x32's getpid", 1<<30 | unix.SYS_GETPID, nil, 0},
}

// start returns the test binary as a process that enters a sandbox in a new directory.
func start(t *testing.T, what string, env ...string) (*exec.Cmd, *bytes.Buffer) {
	t.Helper()
	dir := t.TempDir()
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "read"), 0o755), os.Mkdir(filepath.Join(dir, "other"), 0o777),
		os.Mkdir(filepath.Join(dir, "write"), 0o777), os.MkdirAll(filepath.Join(dir, "run/own"), 0o777),
		os.Mkdir(filepath.Join(dir, "run/neighbour"), 0o777),
		os.WriteFile(filepath.Join(dir, "run/neighbour/sock"), nil, 0o666),
		os.Mkdir(filepath.Join(dir, "gdb"), 0o777), os.WriteFile(filepath.Join(dir, "gdb/sock"), nil, 0o666),
		os.WriteFile(filepath.Join(dir, "gdb/neighbour"), nil, 0o666),
		os.MkdirAll(filepath.Join(dir, "crashes/other"), 0o777),
		os.WriteFile(filepath.Join(dir, "crashes/other/end"), nil, 0o666),
		os.MkdirAll(filepath.Join(dir, "lio/core"), 0o777), os.WriteFile(filepath.Join(dir, "lio/dbroot"), nil, 0o666),
		os.WriteFile(filepath.Join(dir, "read/file"), []byte("text"), 0o644),
		os.WriteFile(filepath.Join(dir, "other/file"), []byte("text"), 0o644)); err != nil {
		t.Fatal(err)
	}
	for path := dir; path != "/" && path != os.TempDir(); path = filepath.Dir(path) {
		if err := os.Chmod(path, 0o755); err != nil { // for another user
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Chmod(filepath.Join(dir, "write"), 0o777), os.Chmod(filepath.Join(dir, "other"), 0o777),
		os.Chmod(filepath.Join(dir, "other/file"), 0o666), os.Chmod(filepath.Join(dir, "run"), 0o777),
		os.Chmod(filepath.Join(dir, "run/neighbour"), 0o777), os.Chmod(filepath.Join(dir, "lio"), 0o777),
		os.Chmod(filepath.Join(dir, "gdb"), 0o777), os.Chmod(filepath.Join(dir, "crashes"), 0o777),
		os.Chmod(filepath.Join(dir, "crashes/other"), 0o777),
		os.Chmod(filepath.Join(dir, "crashes/other/end"), 0o666)); err != nil {
		t.Fatal(err)
	}
	exe, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { exe.Close() })
	// Another user may not reach the program by its path.
	c := exec.Command("/proc/self/fd/3")
	c.ExtraFiles = []*os.File{exe}
	c.Env = append(append(os.Environ(), childEnv+"="+what, dirEnv+"="+dir), env...)
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	return c, &out
}

func status(err error) int {
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.ExitCode()
	}
	return -1
}

// needsLandlock skips a test on a kernel without Landlock, which Debian's has, and in a build with
// cgo, as with the race detector, which does not confine its threads.
func needsLandlock(t *testing.T) {
	t.Helper()
	if _, _, errno := syscall.AllThreadsSyscall(unix.SYS_GETPPID, 0, 0, 0); landlockVersion() == 0 || errno != 0 {
		t.Skipf("version %d of Landlock; a call in all threads: %v", landlockVersion(), errno)
	}
}

// TestAttacks tries each attack in a process of its own, as root and as an ordinary user, and
// expects the end or the error that a user sees.
func TestAttacks(t *testing.T) {
	needsLandlock(t)
	if len(attacks) < 40 {
		t.Errorf("%d attacks", len(attacks))
	}
	for _, user := range users() {
		for _, a := range attacks {
			t.Run(user+"/"+a.what, func(t *testing.T) {
				t.Parallel()
				c, out := start(t, a.what)
				as(c, user)
				got := status(c.Run())
				want, text := statusRefused, fmt.Sprintf("the sandbox refused the system call %s (%d), arguments ",
					callName(int(a.nr)), a.nr)
				if a.err != 0 {
					want, text = 0, fmt.Sprintf("the system call returned %d\n", int(a.err))
				}
				if got != want || !strings.Contains(out.String(), text) {
					t.Errorf("status %d, want %d with %q:\n%s", got, want, text, out)
				}
			})
		}
	}
}

// TestHeldRuntime: a refused call that holds up Go's runtime, of which that does not know that it
// may wait, ends the process as others do.
func TestHeldRuntime(t *testing.T) {
	for _, procs := range []string{"1", "2"} {
		t.Run(procs, func(t *testing.T) {
			t.Parallel()
			c, out := start(t, "hold", "GOMAXPROCS="+procs)
			if got := status(c.Run()); got != statusRefused || !strings.Contains(out.String(), "the system call socket (41)") {
				t.Errorf("status %d:\n%s", got, out)
			}
		})
	}
}

// users are the users that tests run as.
func users() []string {
	if os.Geteuid() == 0 {
		return []string{"root", "nobody"}
	}
	return []string{"self"}
}

func as(c *exec.Cmd, user string) {
	if user == "nobody" {
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	}
}

// TestWorks: in the sandbox a process goes on, with new threads and with the files that it may
// have.
func TestWorks(t *testing.T) {
	for _, user := range users() {
		for _, kernel := range []string{"", "old"} {
			t.Run(user+kernel, func(t *testing.T) {
				c, out := start(t, "work", kernelEnv+"="+kernel)
				as(c, user)
				if err := c.Run(); err != nil || !strings.Contains(out.String(), "works") {
					t.Errorf("%v\n%s", err, out)
				}
			})
		}
	}
}

// TestThreads: the sandbox has all threads, and no descriptor of the parent's is left.
func TestThreads(t *testing.T) {
	needsLandlock(t)
	c, _ := start(t, "wait")
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	c.Stdout = w
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if _, err := r.Read(make([]byte, 1)); err != nil { // its report
		t.Fatal(err)
	}
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", c.Process.Pid))
	if err != nil || len(files) < 4 {
		t.Errorf("%v, %v", files, err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range []string{`NoNewPrivs:\s1`, `Seccomp:\s2`, `CapPrm:\s000000000000000[02]`,
			`CapEff:\s000000000000000[02]`, `CapInh:\s0+\n`} {
			if !regexp.MustCompile(line).Match(b) {
				t.Errorf("%s: no %s", f, line)
			}
		}
	}
	if _, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/3", c.Process.Pid)); err == nil {
		if target, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/3", c.Process.Pid)); strings.HasSuffix(target, ".test") {
			t.Errorf("the parent's descriptor %s is open", target)
		}
	}
	in.Close()
	if err := c.Wait(); err != nil {
		t.Error(err)
	}
}

// TestOldKernel: without Landlock and notices the rest is there, and the report says so; strict
// fails.
func TestOldKernel(t *testing.T) {
	for _, test := range []struct {
		what, mode string
		status     int
		text       string
	}{
		{"read another file", "on", 0, "no Landlock"},
		{"read another file", "on", 0, "the system call returned 0"},
		{"execve", "on", 2, "SIGSYS: bad system call"}, // by Go's runtime
		{"execve", "strict", 1, "--sandbox=strict: this kernel has no Landlock"},
	} {
		c, out := start(t, test.what, modeEnv+"="+test.mode, kernelEnv+"=old")
		if got := status(c.Run()); got != test.status || !strings.Contains(out.String(), test.text) {
			t.Errorf("%s, %s: status %d, want %d with %q:\n%s", test.what, test.mode, got, test.status, test.text, out)
		}
	}
}

// TestStrict: on a kernel with everything, strict is as on.
func TestStrict(t *testing.T) {
	needsLandlock(t)
	c, out := start(t, "work", modeEnv+"=strict")
	if err := c.Run(); err != nil || !strings.Contains(out.String(), "works") {
		t.Errorf("%v\n%s", err, out)
	}
}
