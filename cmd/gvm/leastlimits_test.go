package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestFewFiles: a limit of open files that is too low gives a line with the way on.
func TestFewFiles(t *testing.T) {
	const full = ": too many open files; raise RLIMIT_NOFILE (ulimit -n)"
	kernel, many := exitKernel(t, 0), strings.Repeat(" --disk temp:1M", 40)
	for _, tt := range []struct {
		limit  int
		args   []string
		status int
		want   string
	}{
		{8, []string{"run"}, exitHost, "gvm: RLIMIT_NOFILE (ulimit -n) is 8: raise it to 64 at least"},
		{8, []string{"test", "-k", "none", "--", "true"}, exitUntested,
			"gvm: RLIMIT_NOFILE (ulimit -n) is 8: raise it to 64 at least"},
		{leastFiles, []string{"run", "--timeout", "100ms"}, exitTimeout, ""},
		{leastFiles, strings.Fields("run" + many), exitHost, full},
		{leastFiles, strings.Fields("test -k " + kernel + many + " -- sh"), exitUntested, full},
		{leastFiles, strings.Fields("test -k " + kernel + many + " --results /dev/null -- sh"), exitUntested, full},
	} {
		c := command(t, tt.args...)
		line := fmt.Sprintf(`ulimit -n %d && exec "$0" "$@"`, tt.limit)
		c.Path, c.Args = "/bin/sh", append([]string{"sh", "-c", line, c.Path}, c.Args[1:]...)
		r := gvmRuns(t, c)
		first, rest, _ := strings.Cut(r.errs, "\n")
		more := rest != "" && !strings.HasPrefix(rest, "gvm: not all cells ") // of a matrix
		if r.status != tt.status || !strings.HasSuffix(first, tt.want) ||
			tt.want != "" && (!strings.HasPrefix(first, "gvm: ") || more) {
			t.Errorf("%d files, %s: status %d: %s", tt.limit, tt.args[0], r.status, r.errs)
		}
	}
}

// fewThreads returns a command of gvm whose user, with no other process, may have so many threads.
func fewThreads(t *testing.T, limit int, args string) *exec.Cmd {
	t.Helper()
	const otherUser = 65532
	c := command(t)
	line := fmt.Sprintf(`ulimit -p %d 2>/dev/null || ulimit -u %[1]d; exec "$0" %s`, limit, args)
	c.Path, c.Args = "/bin/sh", []string{"sh", "-c", line, c.Path}
	if os.Getuid() == 0 {
		c.Dir = "/" // the test's files are root's
		c.SysProcAttr.Credential = &syscall.Credential{Uid: otherUser}
		c.SysProcAttr.AmbientCaps = []uintptr{unix.CAP_DAC_OVERRIDE}
	}
	return c
}

// TestFewThreads: so does one of threads, also if the user's other processes take the most.
func TestFewThreads(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, to be a user with no other process")
	}
	for _, tt := range []struct {
		command string
		status  int
	}{{"run", exitHost}, {"list", exitHost}, {"test -k none -- true", exitUntested}} {
		for limit := 6; limit <= 9; limit++ { // with less it may end before main
			r := gvmRuns(t, fewThreads(t, limit, tt.command))
			want := fmt.Sprintf("gvm: RLIMIT_NPROC (ulimit -u) is %d, and this user's processes have ", limit)
			if r.status != tt.status || strings.Count(r.errs, "\n") != 1 || !strings.HasPrefix(r.errs, want) {
				t.Errorf("%d threads, %s: status %d, %q; want %q", limit, tt.command, r.status, r.errs, want)
			}
		}
	}
}

// TestEnoughLimits: limits that leave no room for a message get a line with the need of gvm.
func TestEnoughLimits(t *testing.T) {
	const (
		user = "Uid:\t1000\t1000\t1000\t1000\nCapEff:\t0000000000000000"
		root = "Uid:\t0\t0\t0\t0\nCapEff:\t0000000000000000"
	)
	for _, tt := range []struct {
		resource int
		limit    uint64
		self     string
		want     string
	}{
		{unix.RLIMIT_AS, 800<<20 - 1024, user, "RLIMIT_AS (ulimit -v) is 819199 KiB: raise it to 2 GiB at least"},
		{unix.RLIMIT_AS, 800 << 20, user, ""},
		{unix.RLIMIT_DATA, 90 << 20, root, "RLIMIT_DATA (ulimit -d) is 90 MiB: raise it to 1 GiB at least"},
		{unix.RLIMIT_NOFILE, 63, root, "RLIMIT_NOFILE (ulimit -n) is 63: raise it to 64 at least"},
		{unix.RLIMIT_NPROC, 107, user,
			"RLIMIT_NPROC (ulimit -u) is 107, and this user's processes have 100 threads: raise it to 132 at least"},
		{unix.RLIMIT_NPROC, 108, user, ""},
		{unix.RLIMIT_NPROC, 107, root, ""},
	} {
		h := fakeHost(t, map[int]uint64{tt.resource: tt.limit}, map[string]string{"proc/self/status": tt.self,
			"proc/self/uid_map": "0 0 4294967295", "proc/loadavg": "0.1 0.1 0.1 1/3000 70",
			"proc/1/status": "Uid:\t0\t0\t0\t0\nThreads:\t2900", "proc/70/status": user + "\nThreads:\t100"})
		got := ""
		if err := enoughLimits(h); err != nil {
			got = err.Error()
		}
		if got != tt.want {
			t.Errorf("%q; want %q", got, tt.want)
		}
	}
}

// TestAddDisksUntilFull: a machine that has no more open files for disks can still be reached.
func TestAddDisksUntilFull(t *testing.T) {
	t.Parallel()
	name := fmt.Sprintf("full-%d", os.Getpid())
	p := startGVMAs(t, "", func(p *proc) {
		line := fmt.Sprintf(`ulimit -n %d && exec "$0" "$@"`, leastFiles)
		p.cmd.Path, p.cmd.Args = "/bin/sh", append([]string{"sh", "-c", line, p.cmd.Path}, p.cmd.Args[1:]...)
	}, guestRun("--name="+name, "hang")...)
	p.expect("hanging")
	var r result
	for r.status == 0 {
		r = ask(t, "", "disk", "add", name, "temp:1M")
	}
	const want = "RLIMIT_NOFILE (ulimit -n), which is 64, leaves the machine fewer than 16 open files: " +
		"start it with a higher limit"
	if !strings.Contains(r.errs, want) {
		t.Errorf("status %d, %s; want %s", r.status, r.errs, want)
	}
	if r := ask(t, "", "stop", name); r.status != 0 {
		t.Errorf("status %d, %s", r.status, r.errs)
	}
	if r := p.wait(); r.status != exitTerminated {
		t.Errorf("status %d, %s", r.status, r.errs)
	}
}

// TestFileLimit: a limit of the sizes of files that cuts a file off is named, once.
func TestFileLimit(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for name, size := range map[string]int64{"disk.img": 1 << 20, "small.img": 4 << 10} {
		if err := errors.Join(os.WriteFile(filepath.Join(dir, name), nil, 0o600),
			os.Truncate(filepath.Join(dir, name), size)); err != nil {
			t.Fatal(err)
		}
	}
	const mend = "; raise RLIMIT_FSIZE (ulimit -f)"
	for _, tt := range []struct {
		args   string
		status int
		want   string
	}{
		{"image create new.img 1M", exitUsage, "gvm: new.img: file too large"},
		{"image create --prealloc new.img 1M", exitUsage, "gvm: new.img: file too large"},
		{"image resize small.img 1M", exitUsage, "gvm: small.img: file too large"},
		{"run --disk new.img,size=1M", exitUsage, "gvm: new.img: file too large"},
		{"run --disk disk.img,overlay=new.ovl", exitUsage, "gvm: overlay: new.ovl: file too large"},
		{"run --disk temp:1M", exitUsage, "gvm: temp:1M: temporary file in "},
		{"run --disk mem:1M", exitUsage, "gvm: mem:1M: memory disk: "},
		{"run --disk disk.img --guest-arg write", exitPanic, "gvm: disk.img: the guest gets an error: write at byte "},
	} {
		c := command(t, strings.Fields(tt.args)...)
		c.Dir = dir
		c.Path, c.Args = "/bin/sh", append([]string{"sh", "-c", `ulimit -f 16 && exec "$0" "$@"`, c.Path}, c.Args[1:]...)
		r := gvmRuns(t, c)
		first, _, _ := strings.Cut(r.errs, "\n")
		if r.status != tt.status || !strings.HasPrefix(first, tt.want) || !strings.HasSuffix(first, mend) ||
			strings.Count(r.errs, mend) != 1 {
			t.Errorf("%s: status %d: %s", tt.args, r.status, r.errs)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 2 {
		t.Errorf("left %v, %v", left, err)
	}
}
