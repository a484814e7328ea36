package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"gvm/devices/scsi/lio"
)

// needsJail skips a test without root's rights, and in a build with cgo, whose libraries a jail
// lacks.
func needsJail(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("a jail needs root")
	}
	if _, _, errno := syscall.AllThreadsSyscall(syscall.SYS_GETPPID, 0, 0, 0); errno != 0 {
		t.Skip("a jail has no libraries for a program with cgo: ", errno)
	}
}

// TestJail: a guest with a disk runs in a jail on a terminal. The user's gvm reaches it, a second
// machine in the jail does not start, and every end passes its status and leaves nothing.
func TestJail(t *testing.T) {
	needsJail(t)
	dir, data := filepath.Join(t.TempDir(), "jail"), filepath.Join(t.TempDir(), "disk.img")
	const user = 41234
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(data, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(data, user, user); err != nil {
		t.Fatal(err)
	}
	jailed := []string{"--jail", dir, fmt.Sprint("--uid=", user), fmt.Sprint("--gid=", user), "--disk", data,
		"--name", "j", "--jail-limit=nofile=900"}
	isEmpty := func() {
		t.Helper()
		var left []os.DirEntry
		for range 1000 {
			if left, _ = os.ReadDir(dir); len(left) == 0 {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Errorf("left in %s: %v", dir, left)
	}
	if r := gvmRuns(t, command(t, append([]string{"run"}, jailed...)...)); r.status != 0 ||
		!strings.Contains(r.out, "PASS") {
		t.Fatalf("status %d: %s%s", r.status, r.out, r.errs)
	}
	isEmpty()
	for _, tt := range []struct {
		signal syscall.Signal
		status int
	}{{syscall.SIGTERM, exitTerminated}, {syscall.SIGKILL, -1}, {0, exitQuit}} {
		p := startOnTerminal(t, append(guestRun("hang"), jailed...)...)
		p.expect("hanging")
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
		if err != nil || !strings.Contains(string(status), fmt.Sprintf("Uid:\t%d\t%[1]d\t%[1]d\t%[1]d\n", user)) ||
			!strings.Contains(string(status), "Seccomp:\t2") {
			t.Errorf("%v: not user %d in a sandbox:\n%s", err, user, status)
		}
		if r := gvmRuns(t, jailUser(t, dir, "list")); r.status != 0 || !strings.Contains(r.out, "\nj ") {
			t.Errorf("list: status %d: %s%s", r.status, r.out, r.errs)
		}
		r := gvmRuns(t, jailUser(t, dir, "inspect", "j", "sandbox/jail"))
		for _, want := range []string{"directory " + dir, fmt.Sprint("uid ", user), fmt.Sprint("gid ", user),
			"limits nofile=900"} {
			if !strings.Contains(strings.Join(strings.Fields(r.out), " ")+" ", want+" ") {
				t.Errorf("inspect: status %d: %s%s, want %q", r.status, r.out, r.errs, want)
			}
		}
		if r := gvmRuns(t, command(t, append([]string{"run"}, jailed...)...)); r.status != exitUsage ||
			!strings.Contains(r.errs, "another machine is in this jail") {
			t.Errorf("a second machine: status %d: %s%s", r.status, r.out, r.errs)
		}
		if tt.signal != 0 {
			p.signal(tt.signal)
		} else {
			p.typeIn("\x01x")
		}
		if tt.signal == syscall.SIGKILL { // the terminal stays as it is
			_ = p.cmd.Wait()
		} else if r := p.wait(); r.status != tt.status {
			t.Errorf("%v: status %d, want %d: %q", tt.signal, r.status, tt.status, r.out)
		}
		if tt.signal != syscall.SIGKILL {
			isEmpty()
		}
	}
	if mounts, err := os.ReadFile("/proc/self/mounts"); err != nil || strings.Contains(string(mounts), dir) {
		t.Errorf("%v, mounts: %s", err, mounts)
	}
}

const groups = "/sys/fs/cgroup"

// lacksGroups returns an error if the control groups lack a controller that the tests limit.
func lacksGroups() error {
	all, err := os.ReadFile(filepath.Join(groups, "cgroup.controllers"))
	for _, name := range []string{"cpu", "memory", "pids"} {
		if err == nil && !slices.Contains(strings.Fields(string(all)), name) {
			err = fmt.Errorf("%s has no controller %s", groups, name)
		}
	}
	return err
}

// needsGroups mounts the control groups, unless they are mounted, as in the lab. It skips a test
// that was chosen by name on a machine that lacks a controller: Main runs it in the lab otherwise.
func needsGroups(t *testing.T) {
	t.Helper()
	err := lacksGroups()
	if errors.Is(err, os.ErrNotExist) {
		if err := syscall.Mount("cgroup2", groups, "cgroup2", 0, ""); err != nil {
			t.Fatal(err)
		}
		err = lacksGroups()
	}
	if err != nil {
		t.Skip(err)
	}
}

// TestJailLimits: limits of control groups hold for a machine, and its group goes with it.
func TestJailLimits(t *testing.T) {
	needsJail(t)
	needsGroups(t)
	dir := filepath.Join(t.TempDir(), "jail")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	args := []string{"--jail", dir, "--uid=41234", "--gid=41234", "--memory=64M", "--jail-limit=pids=300,cpus=1.5"}
	p := startOnTerminal(t, append(guestRun("hang"), append(args, "--jail-limit=memory=512M")...)...)
	p.expect("hanging")
	all, err := filepath.Glob(groups + "/gvm/*jail")
	if err != nil || len(all) != 1 {
		t.Fatalf("groups %q, %v", all, err)
	}
	for file, want := range map[string]string{"memory.max": "536870912\n", "pids.max": "300\n",
		"cpu.max": "150000 100000\n"} {
		if b, err := os.ReadFile(filepath.Join(all[0], file)); err != nil || string(b) != want {
			t.Errorf("%s is %q, %v", file, b, err)
		}
	}
	if b, err := os.ReadFile(filepath.Join(all[0], "cgroup.procs")); err != nil ||
		!strings.Contains(string(b), fmt.Sprintln(p.cmd.Process.Pid)) {
		t.Errorf("processes %q, %v", b, err)
	}
	p.signal(syscall.SIGKILL)
	_ = p.cmd.Wait()
	for range 1000 {
		if _, err = os.Stat(filepath.Dir(all[0])); err != nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err == nil {
		t.Errorf("%s is left", all[0])
	}
	r := gvmRuns(t, command(t, append([]string{"run", "--jail-limit=memory=40M"}, args...)...))
	if r.status != exitUsage || !strings.Contains(r.errs, "memory.max of cgroup / is 40 MiB") {
		t.Errorf("too little memory: status %d: %s%s", r.status, r.out, r.errs)
	}
}

// TestJailOutputs: the results of a machine in a jail are outside of it, and are the user's. A
// second run writes over those of the first, and leaves other files alone.
func TestJailOutputs(t *testing.T) {
	needsJail(t)
	const user = 41234
	dir, out := filepath.Join(t.TempDir(), "jail"), t.TempDir()
	crashes := filepath.Join(out, "crashes")
	if err := errors.Join(os.Mkdir(dir, 0o755), os.Mkdir(crashes, 0o755), os.Chown(crashes, user, user)); err != nil {
		t.Fatal(err)
	}
	args := []string{"run", "--guest-arg=crash=panic", "--jail", dir, fmt.Sprint("--uid=", user),
		fmt.Sprint("--gid=", user), "--name=j", "--crash-dir", crashes, "--crash-core", "--memory=64M"}
	files := []string{"junit", "results", "trace"}
	for _, name := range files {
		args = append(args, "--"+name, filepath.Join(out, name))
	}
	for i := range 2 {
		if r := gvmRuns(t, command(t, args...)); r.status != exitPanic {
			t.Fatalf("status %d: %s%s", r.status, r.out, r.errs)
		}
		core, err := filepath.Glob(crashes + "/*Z-j*/vmcore")
		if err != nil || len(core) != i+1 {
			t.Errorf("cores %q, %v", core, err)
		}
		for _, name := range files {
			fi, err := os.Stat(filepath.Join(out, name))
			if err != nil || fi.Size() == 0 || fi.Sys().(*syscall.Stat_t).Uid != user {
				t.Errorf("%s: %+v, %v", name, fi, err)
			}
		}
		b, err := os.ReadFile(filepath.Join(out, "results"))
		if err != nil || !strings.Contains(string(b), "guest panic") {
			t.Errorf("results %s, %v", b, err)
		}
	}
	junit := filepath.Join(out, "junit")
	if err := os.WriteFile(junit, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := gvmRuns(t, command(t, args...))
	if b, _ := os.ReadFile(junit); r.status != exitUsage || string(b) != "mine" {
		t.Errorf("status %d: %s%s, and the file has %q", r.status, r.out, r.errs, b)
	}
}

// TestJailTerminal: a machine in a jail stops and goes on as a job of a shell, serves a debugger
// and vsock at sockets in DIR/run, and takes a disk from there.
func TestJailTerminal(t *testing.T) {
	needsJail(t)
	dir := filepath.Join(t.TempDir(), "jail")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	run := filepath.Join(dir, "run")
	j := startJob(t, 0, append(guestRun("echo"), "--jail", dir, "--uid=41234", "--gid=41234", "--name=j",
		"--gdb=unix:"+run+"/gdb", "--vsock=path="+run+"/vsock")...)
	j.expect("target remote "+run+"/gdb", "ready")
	j.do("give")
	j.settle("raw", isRaw)
	j.do("TSTP", "stopped", "take")
	if s := j.termios(); s != j.settings {
		t.Errorf("stopped, and the terminal is not as it was: %+v", s)
	}
	j.do("continue", "give")
	j.settle("raw", isRaw)
	j.typeIn("abc")
	j.expect("abc")
	d := dialGDB(t, run+"/gdb") // as root
	d.send("D")
	d.want("OK")
	if fi, err := os.Lstat(run + "/vsock"); err != nil || fi.Mode().Type() != os.ModeSocket {
		t.Errorf("vsock: %v, %v", fi, err)
	}
	for disk, want := range map[string]string{"mem:1M": "", "/run/new,size=1M": "", run + "/new2,size=1M": "",
		"/none": "; the machine is in a jail: put it in " + run + ", and add it as /run/NAME"} {
		r := gvmRuns(t, jailUser(t, dir, "disk", "add", "j", disk))
		if (r.status == 0) != (want == "") || !strings.Contains(r.errs, want) {
			t.Errorf("add %s: status %d: %s%s", disk, r.status, r.out, r.errs)
		}
	}
	j.typeIn("q")
	j.end(0)
	if err := errors.Join(os.Remove(run+"/new"), os.Remove(run+"/new2")); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(run); err == nil && len(left) > 0 {
		t.Errorf("left in %s: %v", run, left)
	}
}

// TestJailVhost: root makes the kernel's target of a machine in a jail. The user adds disks of the
// kernel's and removes them, and a janitor removes the rest after every end, also if any other
// process is killed.
func TestJailVhost(t *testing.T) {
	needsJail(t)
	needsVhost(t)
	dir, data := filepath.Join(t.TempDir(), "jail"), filepath.Join(t.TempDir(), "disk.img")
	if err := errors.Join(os.Mkdir(dir, 0o755), os.WriteFile(data, make([]byte, 1<<20), 0o600),
		os.Chown(data, 41234, 41234)); err != nil {
		t.Fatal(err)
	}
	jailed := []string{"--jail", dir, "--uid=41234", "--gid=41234", "--disk", data + ",backend=vhost", "--name=j"}
	added := filepath.Join(dir, "run", "new")
	objects := func() (list []lio.Object) {
		t.Helper()
		list, err := lio.List("")
		if err != nil {
			t.Fatal(err)
		}
		return slices.DeleteFunc(list, func(o lio.Object) bool { return o.Owner == nil })
	}
	isEmpty := func() {
		t.Helper()
		for range 1000 {
			if left, _ := os.ReadDir(dir); len(objects()) == 0 && len(left) == 0 {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Errorf("left in LIO: %+v, or in %s", objects(), dir)
	}
	disk := func(words, want string) {
		t.Helper()
		r := gvmRuns(t, jailUser(t, dir, append([]string{"disk"}, strings.Fields(words)...)...))
		if text := r.out + r.errs; !strings.Contains(text, want) || strings.Count(text, "\n") != 1 ||
			(r.status == 0) != (r.errs == "") {
			t.Errorf("disk %s: status %d: %s%s", words, r.status, r.out, r.errs)
		}
	}
	serves := func(pid int, images ...string) {
		t.Helper()
		list := objects()
		for _, o := range list {
			if i := slices.Index(images, string(o.Image)); i >= 0 && o.Owner.PID == pid && o.Owner.Alive {
				images = slices.Delete(images, i, i+1)
			}
		}
		if len(images) > 0 {
			t.Errorf("objects of process %d lack %q: %+v", pid, images, list)
		}
	}
	const second = "gvm-janitor\x00\x00/" // and the jail
	for _, tt := range []struct {
		word    string
		killed  string // before the signal
		options string
		signal  syscall.Signal
		status  int
	}{
		{"write", "", "", 0, 0},
		{"hang", "gvm-broker", "", syscall.SIGTERM, exitTerminated},
		{"hang", "gvm-broker", "", syscall.SIGKILL, -1}, // only the janitors are left
		{"hang", "gvm-janitor", "", syscall.SIGKILL, -1},
		{"hang", second, "", syscall.SIGKILL, -1},
		{"hang", "gvm-janitor", "--sandbox=off", syscall.SIGTERM, exitTerminated},
		{"write", "", "", 0, 0},
	} {
		p := startOnTerminal(t, append(append(guestRun(tt.word), jailed...), strings.Fields(tt.options)...)...)
		if tt.word == "write" {
			r := p.wait()
			if strings.Contains(r.out, "older than Linux 5.11") { // then it is refused, and leaves nothing either
				isEmpty()
				if r.status != exitHost {
					t.Errorf("status %d: %q", r.status, r.out)
				}
				t.Skip(r.out)
			}
			if r.status != tt.status || !strings.Contains(r.out, "PASS") {
				t.Errorf("status %d: %q", r.status, r.out)
			}
			isEmpty()
			continue
		}
		p.expect("hanging")
		pid := p.cmd.Process.Pid
		serves(pid, data)
		disk("add j /none", "--disk /none: the machine was started with backend=vhost disks only")
		if tt.options != "" {
			disk("add j "+added+",size=1M,backend=vhost", "--sandbox=off the kernel serves the disks of the command line alone")
			disk("remove j 0", "in a jail with --sandbox=off the kernel serves a disk until the machine's end")
		} else {
			disk("add j "+added+",size=1M,backend=vhost,serial=new", "added LUN 1, /run/new")
			serves(pid, data, added)
			disk("remove j new", "removed LUN 1, /run/new")
			disk("remove j 0", "removed LUN 0, "+data)
			if list := objects(); slices.ContainsFunc(list, func(o lio.Object) bool { return o.Image != "" }) {
				t.Errorf("objects of process %d: %+v", pid, list)
			}
			disk("add j /etc/passwd,backend=vhost", "in a jail: put it in "+filepath.Dir(added)+", and add it as /run/NAME")
			disk("add j "+data+",backend=vhost", "added LUN 0, "+data)
			disk("add j /run/new,backend=vhost", "added LUN 1, /run/new")
			serves(pid, data, added)
			if err := os.Remove(added); err != nil { // which the janitor leaves alone
				t.Error(err)
			}
		}
		if err := syscall.Kill(childOf(t, pid, tt.killed), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if tt.killed == second {
			disk("add j /run/newer,size=1M,backend=vhost", "the janitor that changes the kernel's disks has ended")
		}
		p.signal(tt.signal)
		if tt.signal == syscall.SIGKILL { // the terminal stays as it is
			_ = p.cmd.Wait()
		} else if r := p.wait(); r.status != tt.status {
			t.Errorf("%v: status %d: %q", tt.signal, r.status, r.out)
		}
		isEmpty()
	}
	r := gvmRuns(t, command(t, append([]string{"run", "--jail-limit=nofile=1"}, jailed...)...))
	if r.status == 0 {
		t.Error("a machine without descriptors runs")
	}
	isEmpty()
}

// jailUser returns the command gvm of the user of a machine in a jail.
func jailUser(t *testing.T, dir string, args ...string) *exec.Cmd {
	t.Helper()
	for _, above := range []string{filepath.Dir(dir), filepath.Dir(filepath.Dir(dir))} {
		if err := os.Chmod(above, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	c := command(t, args...)
	c.Path, c.Dir = copyOfSelf(t, filepath.Dir(dir)), "/"
	c.Env = append(c.Env, "XDG_RUNTIME_DIR="+filepath.Join(dir, "run"))
	c.SysProcAttr.Credential = &syscall.Credential{Uid: 41234, Gid: 41234}
	return c
}

// childOf returns the PID of a process's child whose command line begins with words, separated by
// zeros.
func childOf(t *testing.T, parent int, words string) int {
	t.Helper()
	files, _ := filepath.Glob("/proc/[0-9]*/status")
	for _, f := range files {
		status, _ := os.ReadFile(f)
		line, _ := os.ReadFile(filepath.Join(filepath.Dir(f), "cmdline"))
		if strings.Contains(string(status), fmt.Sprintf("\nPPid:\t%d\n", parent)) &&
			strings.HasPrefix(string(line), words) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(f)))
			return pid
		}
	}
	t.Fatalf("process %d has no %q", parent, words)
	return 0
}
