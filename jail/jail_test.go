package jail

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Environment of the test binary: the Config with which it enters a jail, and its task there.
const (
	configEnv = "GVM_TEST_JAIL_CONFIG"
	taskEnv   = "GVM_TEST_JAIL_TASK"
)

func TestMain(m *testing.M) {
	if os.Args[0] == Arg0 {
		if err := Main(os.Args, answer); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if what := os.Getenv(taskEnv); what != "" {
		os.Exit(inside(what))
	}
	if s := os.Getenv(configEnv); s != "" {
		var c Config
		err := json.Unmarshal([]byte(s), &c)
		if limits := os.Getenv("GVM_TEST_JAIL_LIMITS"); limits != "" && err == nil {
			err = c.Limits.Add(limits)
		}
		if len(c.Images) > 0 {
			c.Prepare = func() error { return os.WriteFile(c.Images[0], []byte("prepared"), 0o600) }
		}
		if err == nil {
			err = Enter(c)
		}
		fmt.Fprintln(os.Stderr, err)
		var user *UserError
		if errors.As(err, &user) {
			os.Exit(2)
		}
		os.Exit(3)
	}
	os.Exit(m.Run())
}

// inside is the program in the jail. It prints its view of the system, and ends with the status of
// its first argument.
func inside(what string) int {
	if what == "wait" { // with sockets, which it does not remove
		run := filepath.Join(Here().Dir, runDir)
		err := os.MkdirAll(run+"/gvm/name", 0o700)
		for _, name := range []string{"/socket", "/gvm/name/socket"} {
			_, err2 := net.Listen("unix", run+name)
			err = errors.Join(err, err2)
		}
		if dir, err2 := os.Open(run); err2 != nil || unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
			err = errors.Join(err, errors.New("no lock of the directory for its sockets"))
		}
		if err != nil {
			fmt.Println(err)
			return 1
		}
		fmt.Println("waits")
		c := make(chan os.Signal, 1)
		signal.Notify(c, syscall.SIGTERM)
		<-c
		return 43
	}
	if what == "ask" {
		c, err := net.FileConn(os.NewFile(uintptr(Here().Janitor), "pair"))
		if err == nil {
			_, err = c.Write([]byte("who?"))
		}
		b := make([]byte, 1000)
		if err == nil {
			var n int
			n, err = c.Read(b)
			b = b[:n]
		}
		fmt.Printf("%d: %s %v\n", os.Getpid(), b, err)
		return 42
	}
	if what == "start" {
		b, err := os.ReadFile("/etc/other")
		fmt.Println(string(b), err)
		c := exec.Cmd{Path: "/proc/self/fd/3", Args: []string{Arg0}, Stdout: os.Stdout, Stderr: os.Stdout,
			ExtraFiles: []*os.File{os.NewFile(uintptr(Here().Program), "program")}}
		fmt.Println(c.Run())
		return 42
	}
	if what == "write" {
		for _, path := range os.Args[2:] {
			f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o666)
			if err == nil {
				_, err = f.WriteString("results")
			}
			if err == nil && f.Close() == nil {
				continue
			}
			fmt.Println(err)
			return 1
		}
	}
	if what == "here" {
		return 42
	}
	_ = filepath.WalkDir("/", func(path string, d fs.DirEntry, err error) error {
		fmt.Println("path", path, err)
		if err == nil && (path == "/proc" || path == "/sys") {
			return fs.SkipDir
		}
		return nil
	})
	status, _ := os.ReadFile("/proc/self/status")
	for line := range strings.Lines(string(status)) {
		fmt.Print("status ", strings.Join(strings.Fields(line), " "), "\n")
	}
	limits, _ := os.ReadFile("/proc/self/limits")
	for line := range strings.Lines(string(limits)) {
		fmt.Print("limit ", strings.Join(strings.Fields(line), " "), "\n")
	}
	mounts, _ := os.ReadFile("/proc/self/mounts")
	fmt.Printf("mounts %s", bytes.ReplaceAll(mounts, []byte("\n"), []byte("\nmounts ")))
	groups, err := os.Getgroups()
	fmt.Println("\ngroups", groups, err)
	_, err = os.ReadDir("/proc/1")
	fmt.Println("init", errors.Is(err, fs.ErrNotExist))
	here := Here()
	fds, _ := os.ReadDir("/proc/self/fd")
	for _, f := range fds {
		if fd, _ := strconv.Atoi(f.Name()); slices.Contains(here.Lives, fd) {
			continue // a pipe to a janitor, which does not read it
		}
		if target, err := os.Readlink("/proc/self/fd/" + f.Name()); err == nil && !strings.HasPrefix(target, "/proc/") &&
			!strings.HasPrefix(target, "anon_inode:") {
			fmt.Println("fd", f.Name(), target)
		}
	}
	for _, path := range []string{"/new", "/run/new", "/etc/new", "/sys/new", here.Dir + "/run/new", here.Dir + "/new"} {
		fmt.Println("write", path, os.WriteFile(path, nil, 0o600) == nil)
	}
	_ = os.Remove("/run/new")
	fmt.Println("jail", here.Dir, here.Limits, here.Parents)
	fmt.Println("environment", strings.ReplaceAll(fmt.Sprint(os.Environ()), "="+os.Getenv("GVM_JAIL"), ""))
	if links, err := os.ReadDir("/sys/class/net"); err == nil {
		fmt.Println("interfaces", len(links))
	}
	n, _ := strconv.Atoi(os.Args[1])
	return n
}

// answer answers the requests of a program in the jail.
func answer(r Requests) {
	c, err := net.FileConn(r.Pair)
	b := make([]byte, 1000)
	for err == nil {
		var n int
		if n, err = c.Read(b); err == nil {
			image, _ := os.ReadFile(r.Images[0])
			_, err = fmt.Fprintf(c, "%s %d %s %q %s %d", b[:n], r.Program, r.Jail.Name(), r.Images, image, os.Geteuid())
		}
	}
}

const testUser, testGroup = 41234, 41235

// start returns the test binary as a process that enters a jail.
func start(t *testing.T, what string, c Config, env ...string) (*exec.Cmd, *bytes.Buffer) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("a jail needs root")
	}
	if _, _, errno := syscall.AllThreadsSyscall(unix.SYS_GETPPID, 0, 0, 0); errno != 0 {
		t.Skip("a jail has no libraries for a program with cgo: ", errno)
	}
	if c.Dir == "" {
		c.Dir = jailDir(t)
	}
	if c.UID == 0 {
		c.UID, c.GID = testUser, testGroup
	}
	c.Args = []string{"test", "42"}
	for _, f := range c.Files {
		c.Args = append(c.Args, f.Path)
	}
	c.Env = []string{taskEnv + "=" + what}
	b, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(append(os.Environ(), configEnv+"="+string(b), "GVM_TEST_SECRET=1"), env...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	return cmd, &out
}

// jailDir makes a directory for a jail. Its parents let no other user in.
func jailDir(t *testing.T) string {
	dir := filepath.Join(t.TempDir(), "jail")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// files makes files with the modes of a list such as "a 0644".
func files(t *testing.T, list ...string) string {
	t.Helper()
	dir := t.TempDir()
	for _, s := range list {
		name, word, _ := strings.Cut(s, " ")
		mode, err := strconv.ParseUint(word, 8, 32)
		path := filepath.Join(dir, name)
		if err = errors.Join(err, os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(name), 0o600),
			os.Chmod(path, fs.FileMode(mode))); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// isEmpty checks that a jail has left nothing in its directory, for which it has some time.
func isEmpty(t *testing.T, dir string) {
	t.Helper()
	var left []os.DirEntry
	for range 500 {
		if left, _ = os.ReadDir(dir); len(left) == 0 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("left in %s: %v", dir, left)
}

// TestInside: the program in a jail has its files, an ordinary user's rights and nothing else, and
// its exit status is that of the process which entered.
func TestInside(t *testing.T) {
	dir, data := jailDir(t), files(t, "read 0644", "write 0666", "secret 0644", "share/below 0644",
		"share/mount/hidden 0644")
	if os.Geteuid() == 0 {
		if err := unix.Mount("tmpfs", data+"/share/mount", "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = unix.Unmount(data+"/share/mount", 0) }()
	}
	if err := os.Chmod(data, 0o700); err != nil { // of the files' parents no right is needed
		t.Fatal(err)
	}
	cmd, out := start(t, "look", Config{Dir: dir, Parents: map[int]int{5: 6},
		Devices: []string{"/dev/zero", "/dev/missing"}, Files: []File{
			{Flag: "--disk", Path: data + "/write", Write: true}, {Flag: "--kernel", Path: data + "/read"},
			{Flag: "--share", Path: data + "/share"},
		}}, "GVM_TEST_JAIL_LIMITS=nofile=99,fsize=3M")
	if err := cmd.Run(); cmd.ProcessState.ExitCode() != 42 {
		t.Fatalf("%v, want status 42\n%s", err, out)
	}
	var paths []string
	for line := range strings.Lines(out.String()) {
		if path, ok := strings.CutPrefix(strings.TrimSuffix(line, " <nil>\n"), "path "); ok {
			paths = append(paths, path)
		}
	}
	want := []string{"/", "/dev", "/dev/null", "/dev/zero", "/proc", "/run", "/sys"}
	for dir := data; dir != "/"; dir = filepath.Dir(dir) {
		want = append(want, dir)
	}
	want = append(want, data+"/read", data+"/write", data+"/share", data+"/share/below", data+"/share/mount",
		filepath.Dir(dir), dir, dir+"/run")
	slices.Sort(want)
	slices.Sort(paths)
	if !slices.Equal(paths, want) {
		t.Errorf("files %q\nwant %q", paths, want)
	}
	for _, line := range []string{
		"status Uid: 41234 41234 41234 41234", "status Gid: 41235 41235 41235 41235", "status NoNewPrivs: 1",
		"status CapPrm: 0000000000000000", "status CapEff: 0000000000000000", "status CapBnd: 0000000000000000",
		"status CapInh: 0000000000000000", "status CapAmb: 0000000000000000",
		"groups [] <nil>", "init true",
		"limit Max core file size 0 0 bytes", "limit Max open files 99 99 files",
		"limit Max file size 3145728 3145728 bytes",
		"write /new false", "write /run/new true", "write /etc/new false", "write /sys/new false",
		"write " + dir + "/run/new true", "write " + dir + "/new false",
		"environment [" + taskEnv + "=look GVM_JAIL]", "jail " + dir + " nofile=99,fsize=3M map[5:6]", "interfaces 1",
	} {
		if !strings.Contains(out.String(), line+"\n") {
			t.Errorf("no line %q", line)
		}
	}
	for line := range strings.Lines(out.String()) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "fd" && f[1] > "2" && f[2] != "/run" {
			t.Errorf("an open file of the host: %s", line)
		}
		f := strings.Fields(line)
		if len(f) < 5 || f[0] != "mounts" {
			continue
		}
		options := strings.Split(f[4], ",")
		if !slices.Contains(options, "nosuid") || !slices.Contains(options, "noexec") {
			t.Errorf("a program runs in %s", line)
		}
		if writable := f[2] == "/run" || f[2] == data+"/write"; slices.Contains(options, "rw") != writable {
			t.Errorf("writable is not %v: %s", writable, line)
		}
	}
	isEmpty(t, dir)
	if t.Failed() {
		t.Log(out)
	}
}

// TestRefuses: wrong values and files are refused with their mend, and nothing is left.
func TestRefuses(t *testing.T) {
	data := files(t, "image 0644", "private 0600", "share/x 0644")
	if err := os.Mkdir(data+"/crashes", 0o744); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(data+"/image", data+"/link"); err != nil {
		t.Fatal(err)
	}
	open, foreign := jailDir(t), jailDir(t)
	if os.Geteuid() == 0 {
		if err := errors.Join(os.Chmod(open, 0o777), os.Chown(foreign, 7, 7)); err != nil {
			t.Fatal(err)
		}
	}
	disk := func(path string, write bool) Config {
		return Config{Files: []File{{Flag: "--disk", Path: path, Write: write}}}
	}
	inJail := jailDir(t)
	for _, tt := range []struct {
		c      Config
		status int
		text   string
	}{
		{Config{UID: -1, GID: 1}, 2, "--uid -1: want a user from 1 to"},
		{Config{UID: 1, GID: 0}, 2, "--gid 0: want a group from 1 to"},
		{Config{Dir: "jail"}, 2, "--jail jail: want an absolute path"},
		{Config{Dir: "/nowhere/jail"}, 2, "--jail /nowhere/jail: there is no such directory: mkdir -p -m 755 /nowhere/jail"},
		{Config{Dir: data + "/link"}, 2, "a path in a jail has no symbolic links: give " + data + "/image"},
		{Config{Dir: open}, 2, "others may write to the directory: chmod 755 "},
		{Config{Dir: foreign}, 2, "the directory is user 7's: chown root "},
		{disk("image", false), 2, "--disk image: want an absolute path in a jail, such as /"},
		{disk("/proc/cpuinfo", false), 2, "a jail has a /proc of its own"},
		{disk("/", false), 2, "--disk /: the jail's own directory "},
		{Config{Dir: inJail, Files: []File{{Flag: "--share", Path: filepath.Dir(inJail)}}}, 2, "is below it"},
		{disk(data+"/link", false), 2, "no symbolic links: give " + data + "/image"},
		{Config{Program: File{Flag: "--net user", Path: data + "/image"}}, 2,
			"--net user: user 41234 may not run " + data + "/image: chmod 755 " + data + "/image"},
		{Config{Program: File{Flag: "--net user", Path: data + "/missing"}}, 2, "/missing: no such file"},
		{disk(data+"/missing", false), 2, "--disk " + data + "/missing: no such file or directory; check the path, or make " +
			"it first: a jail makes files for results alone"},
		{disk(data+"/private", false), 2, "user 41234 may not read it: chown 41234 "},
		{disk(data+"/crashes", false), 2, "user 41234 may not enter and read it: chown 41234 "},
		{disk(data+"/image", true), 2, "user 41234 may not read and write it: chown 41234 "},
	} {
		if tt.c.Dir == "" {
			tt.c.Dir = jailDir(t)
		}
		cmd, out := start(t, "look", tt.c)
		err := cmd.Run()
		if got := cmd.ProcessState.ExitCode(); got != tt.status || !strings.Contains(out.String(), tt.text) ||
			strings.Count(out.String(), "\n") != 1 {
			t.Errorf("%+v: %v\n%s\nwant status %d and the line %q", tt.c, err, out, tt.status, tt.text)
		}
		if filepath.Base(tt.c.Dir) == "jail" && filepath.IsAbs(tt.c.Dir) {
			isEmpty(t, tt.c.Dir)
		}
	}
}

// TestProgram: the program in the jail starts another one of the host, which has no path there, and
// reads a file that has another path on the host.
func TestProgram(t *testing.T) {
	data := files(t, "file 0644")
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd, out := start(t, "start", Config{Program: File{Flag: "--net user", Path: program},
		Files: []File{{Flag: "--net user", Path: "/etc/other", From: data + "/file"}}})
	const want = "file <nil>\ngvm-janitor is a part of gvm run --jail\nexit status 1\n"
	if err := cmd.Run(); cmd.ProcessState.ExitCode() != 42 || out.String() != want {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestRequests: the second janitor, which is root outside of the jail, answers the program in it,
// and ends with it as the first one does.
func TestRequests(t *testing.T) {
	c := Config{Dir: jailDir(t), Images: []string{filepath.Join(t.TempDir(), "image")}}
	cmd, out := start(t, "ask", c)
	err := cmd.Run()
	want := fmt.Sprintf("%d: who? %[1]d %s %q prepared 0 <nil>\n", cmd.Process.Pid, c.Dir, c.Images)
	if cmd.ProcessState.ExitCode() != 42 || out.String() != want {
		t.Errorf("%v\n%s\nwant %s", err, out, want)
	}
	isEmpty(t, c.Dir)
}

// copyOf makes a copy of a file, with a mode.
func copyOf(t *testing.T, path string, mode fs.FileMode) string {
	t.Helper()
	b, err := os.ReadFile(path)
	to := filepath.Join(t.TempDir(), "copy")
	if err = errors.Join(err, os.WriteFile(to, b, mode)); err != nil {
		t.Fatal(err)
	}
	return to
}

// TestOutputs: a program writes into files that root makes for its user, and into those of before.
// The one of a machine that does not start is removed, and the others stay as they are.
func TestOutputs(t *testing.T) {
	dir := files(t, "old 0666", "private 0600")
	if err := unix.Mkfifo(dir+"/pipe", 0o666); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Chmod(dir+"/pipe", 0o666), os.Symlink(dir+"/nowhere", dir+"/link")); err != nil {
		t.Fatal(err)
	}
	output := func(name string) File { return File{Flag: "--junit", Path: dir + "/" + name, Write: true, Make: true} }
	for _, tt := range []struct {
		bad, text string
	}{
		{"private", "--junit " + dir + "/private: user 41234 may not read and write it: chown 41234 "},
		{"link", "it is a symbolic link, and leads to no file"},
		{"none/new", "--junit " + dir + "/none/new: no such file or directory"},
	} {
		cmd, out := start(t, "look", Config{Files: []File{output("a"), output(tt.bad), output("z")}})
		if err := cmd.Run(); cmd.ProcessState.ExitCode() != 2 || !strings.Contains(out.String(), tt.text) {
			t.Errorf("%s: %v\n%s", tt.bad, err, out)
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) != 4 {
			t.Errorf("%s: left %v, %v", tt.bad, left, err)
		}
	}
	cmd, out := start(t, "look", Config{Files: []File{output("a")}})
	if cmd.Path = copyOf(t, "/proc/self/exe", 0o700); cmd.Run() == nil || cmd.ProcessState.ExitCode() != 2 ||
		!strings.HasPrefix(out.String(), "--uid 41234: this user may not run gvm: chmod 755 its program\n") {
		t.Errorf("a program that the user may not run: status %d\n%s", cmd.ProcessState.ExitCode(), out)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 4 {
		t.Errorf("left %v, %v", left, err)
	}
	c := Config{Dir: jailDir(t), Files: []File{output("new"), output("old"), output("pipe")}}
	cmd, out = start(t, "write", c)
	defer unix.Umask(unix.Umask(0o027))
	reader, err := os.OpenFile(dir+"/pipe", os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	if err := cmd.Run(); cmd.ProcessState.ExitCode() != 42 {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, f := range []string{"new", "old"} {
		b, err := os.ReadFile(dir + "/" + f)
		var st unix.Stat_t
		if err := errors.Join(err, unix.Stat(dir+"/"+f, &st)); err != nil || string(b) != "results" ||
			(st.Uid == 0) != (f == "old") || f == "new" && (st.Gid != testGroup || st.Mode != unix.S_IFREG|0o640) {
			t.Errorf("%s has %q, %v, and is user %d's with mode %#o", f, b, err, st.Uid, st.Mode)
		}
	}
	b := make([]byte, 99)
	if n, err := reader.Read(b); string(b[:n]) != "results" {
		t.Errorf("the pipe has %q, %v", b[:n], err)
	}
}

// waiting starts a process in a jail, which ends by a signal, and waits until it is there.
func waiting(t *testing.T, dir string) (*exec.Cmd, fmt.Stringer) {
	t.Helper()
	cmd, out := start(t, "wait", Config{Dir: dir})
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	cmd.Stdout = w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if _, err := r.Read(make([]byte, 8)); err != nil {
		t.Fatal(err, out)
	}
	return cmd, out
}

// TestEnds: after every end of the program its jail is free and empty, and until then there is no
// second one in it, also if the janitor was killed or stopped. The next program removes the rest
// then, or the janitor goes on.
func TestEnds(t *testing.T) {
	for _, tt := range []struct {
		signal  syscall.Signal
		janitor syscall.Signal // comes to the janitor before; 0: none
	}{{syscall.SIGTERM, 0}, {syscall.SIGKILL, 0}, {syscall.SIGKILL, syscall.SIGKILL}, {syscall.SIGTERM, syscall.SIGKILL},
		{syscall.SIGKILL, syscall.SIGSTOP}, {syscall.SIGTERM, syscall.SIGSTOP}} {
		s := tt.signal
		dir := jailDir(t)
		cmd, out := waiting(t, dir)
		if root, err := os.Readlink(fmt.Sprintf("/proc/%d/root", cmd.Process.Pid)); err != nil || root != "/" {
			t.Errorf("root %s, %v", root, err) // of its own namespace
		}
		if tt.janitor != 0 {
			if err := syscall.Kill(janitorOf(t, cmd.Process.Pid), tt.janitor); err != nil {
				t.Fatal(err)
			}
		}
		second, errs := start(t, "look", Config{Dir: dir})
		if err := second.Run(); second.ProcessState.ExitCode() != 2 || !strings.Contains(errs.String(),
			"another machine is in this jail; stop it, or give another directory") {
			t.Errorf("a second one: %v\n%s", err, errs)
		}
		if err := cmd.Process.Signal(s); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		status := cmd.ProcessState.Sys().(syscall.WaitStatus)
		if ok := s == syscall.SIGTERM && status.ExitStatus() == 43 || s == syscall.SIGKILL && status.Signal() == s; !ok {
			t.Errorf("%s: status %#x\n%s", s, status, out)
		}
		next, out := start(t, "look", Config{Dir: dir}) // waits for the janitor
		if err := next.Run(); next.ProcessState.ExitCode() != 42 {
			t.Errorf("the next one: %v\n%s", err, out)
		}
		isEmpty(t, dir)
		if b, err := os.ReadFile("/proc/self/mounts"); err != nil || bytes.Contains(b, []byte(dir)) {
			t.Errorf("%v, mounts:\n%s", err, b)
		}
	}
}

// TestEndsFull kills a program that has filled a directory of its jail with sockets: its janitor
// removes some, and the next program gets the jail.
func TestEndsFull(t *testing.T) {
	for full, most := range map[string]int{"": 3 * mostFiles, "gvm": 3 * mostFiles, "gvm/name": 20 * mostFiles} {
		dir := jailDir(t)
		cmd, _ := waiting(t, dir)
		run := filepath.Join(dir, runDir, full)
		for i := range most {
			if err := unix.Mknod(filepath.Join(run, strconv.Itoa(i)), unix.S_IFSOCK|0o600, 0); err != nil {
				t.Fatal(err)
			}
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		next, errs := start(t, "here", Config{Dir: dir}) // waits for the janitor
		if err := next.Run(); next.ProcessState.ExitCode() != 42 {
			t.Errorf("%q is full, the next one: %v\n%s", full, err, errs)
		}
		left, err := os.ReadDir(run)
		if removed := most - len(left); err != nil || removed < mostFiles/2 || removed > 2*mostFiles { // by two janitors
			t.Errorf("%q: %d files of %d are removed, %v", full, removed, most, err)
		}
	}
}

// TestTidy leaves a run directory as a killed machine does: with a process in the control group
// that makes a new socket for each that is removed, until it is killed.
func TestTidy(t *testing.T) {
	run, group := filepath.Join(t.TempDir(), "run"), filepath.Join(t.TempDir(), "group")
	kill, machine := filepath.Join(group, "cgroup.kill"), filepath.Join(run, "gvm", "vm")
	if err := errors.Join(os.Mkdir(group, 0o700), os.WriteFile(kill, nil, 0o600), os.MkdirAll(machine, 0o700),
		os.WriteFile(filepath.Join(machine, "lock"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			_ = unix.Mknod(filepath.Join(run, "new"), unix.S_IFSOCK|0o600, 0)
			_ = unix.Mknod(filepath.Join(machine, "new"), unix.S_IFSOCK|0o600, 0)
			if b, err := os.ReadFile(kill); err == nil && string(b) == "1" {
				_ = os.Remove(kill)
				return
			}
		}
	}()
	if err := tidy(run, group); err != nil {
		t.Error(err)
	}
	<-done
	if _, err := os.Lstat(run); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the directory of sockets stays: %v", err)
	}
}

// TestTidyIsBounded fills the directories of a killed machine. The janitor, which has the lock of
// the jail, leaves all but some of the files.
func TestTidyIsBounded(t *testing.T) {
	for _, dir := range []string{".", "gvm", "gvm/vm", "gvm/vm/deep"} {
		t.Run(dir, func(t *testing.T) {
			run := t.TempDir()
			full := filepath.Join(run, dir)
			if err := os.MkdirAll(full, 0o700); err != nil {
				t.Fatal(err)
			}
			const most = 3 * mostFiles
			for i := range most {
				if err := unix.Mknod(filepath.Join(full, strconv.Itoa(i)), unix.S_IFSOCK|0o600, 0); err != nil {
					t.Fatal(err)
				}
			}
			_ = removeSockets(run)
			if left, err := os.ReadDir(full); err != nil || len(left) < most-mostFiles {
				t.Errorf("%d files are left, %v", len(left), err)
			}
		})
	}
}

// janitorOf returns the PID of a program's janitor.
func janitorOf(t *testing.T, program int) int {
	t.Helper()
	files, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, f := range files {
		stat, _ := os.ReadFile(f)
		words, _ := os.ReadFile(filepath.Join(filepath.Dir(f), "cmdline"))
		_, fields, _ := bytes.Cut(stat, []byte(") ")) // the state and the parent
		if p := bytes.Fields(fields); len(p) > 1 && string(p[1]) == strconv.Itoa(program) &&
			bytes.HasPrefix(words, []byte(Arg0+"\x00")) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(f)))
			return pid
		}
	}
	t.Fatalf("process %d has no janitor", program)
	return 0
}

// TestCheck: a host that lacks the needs of a jail has a line for each, and root on another one has
// none.
func TestCheck(t *testing.T) {
	defer func(before string) { cgroupRoot = before }(cgroupRoot)
	cgroupRoot = t.TempDir()
	for controllers, want := range map[string]string{"": "no controller memory", "memory cpu": "no controller pids",
		"cpu memory pids": ""} {
		if err := os.WriteFile(filepath.Join(cgroupRoot, "cgroup.controllers"), []byte(controllers), 0o600); err != nil {
			t.Fatal(err)
		}
		got := strings.Join(slices.DeleteFunc(Check(), func(s string) bool {
			return strings.HasPrefix(s, "only root")
		}), "\n")
		if want == "" && got != "" || !strings.Contains(got, want) || strings.Contains(got, "\n") {
			t.Errorf("controllers %q: %q, want %q", controllers, got, want)
		}
	}
}

// TestLimits reads limits.
func TestLimits(t *testing.T) {
	for _, tt := range []struct{ words, want string }{
		{"memory=4G,cpus=1.5", "[{memory memory.max 4294967296} {cpu cpu.max 150000 100000}] []"},
		{"pids=300", "[{pids pids.max 300}] []"},
		{"nofile=99,fsize=1M", fmt.Sprintf("[] [{nofile %d 99} {fsize %d 1048576}]", unix.RLIMIT_NOFILE, unix.RLIMIT_FSIZE)},
		{"cpu=1", `cpu: want memory, cpus, pids, nofile or fsize; did you mean cpus?`},
		{"memory", "memory: want a value, such as memory=4G"},
		{"cpus=0", "cpus=0: want a number of CPUs such as 1.5, from 0.01 to 16384"},
		{"cpus=NaN", "cpus=NaN: want a number of CPUs"},
		{"pids=0", "pids=0: want a number from 1 to"},
		{"memory=x", "memory=x: "},
	} {
		var l Limits
		got := fmt.Sprint(l.Add(tt.words))
		if got == "<nil>" {
			got = fmt.Sprint(l.controls, l.rlimits)
		}
		if !strings.HasPrefix(got, tt.want) {
			t.Errorf("%s: %s\nwant %s", tt.words, got, tt.want)
		}
	}
}
