package agent

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvm/guest/agent/wire"
	"gvm/panics"
	"gvm/text"
)

// testInit is the name of the test program as the first one of a guest. It panics instead of
// running testPanic.
const (
	testInit  = "gvm-agent-test-init"
	testPanic = "gvm-agent-test-panic"
)

func TestMain(m *testing.M) {
	Main(os.Args)
	if os.Args[0] == testInit {
		if err := initMain(os.Args[1]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// initMain runs the command of a file, with the host at descriptor 3.
func initMain(command string) error {
	unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC) // the kernel gives a true one none
	mountAll([]mount{{"proc", "/proc", "", plain}})
	cmd, err := readCommand(command)
	if err != nil {
		return err
	}
	g := &guest{}
	w, err := dial(&descriptor{fd: 3, socket: true}, wire.AgentConfig{
		Hello: wire.Hello{Rung: "socketpair"}, Signal: g.job.signal, Winsize: g.job.winsize})
	if err != nil {
		return err
	}
	g.wire = w
	if cmd.Args[0] == testPanic {
		panics.Handle(func(p *panics.Panic) {
			g.panicked(p)
			os.Exit(0)
		})
		panics.Go(func() { panic("broken") })
		select {}
	}
	for fd := range sessionsOf(os.Getenv("SESSIONS")) {
		panics.Go(func() { g.session(os.NewFile(uintptr(4+fd), "session"), cmd) })
	}
	e := g.streamEnd()
	e.exit(g.job.run(cmd, e.streams))
	return nil
}

func sessionsOf(s string) int {
	n, _ := strconv.Atoi(s)
	return n
}

// noBuild has the build ID of the agents of tests, which have none.
var noBuild = []string{""}

// command is a run of a command by an agent that is process 1 of a namespace.
type command struct {
	*wire.Host
	started chan int
	ended   chan error // of the agent
	console strings.Builder
}

func run(t *testing.T, cmd wire.Command, sessions ...*os.File) *command {
	t.Helper()
	if cmd.Dir == "" {
		cmd.Dir = text.Name(t.TempDir())
	}
	b, err := cmd.Encode()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "command.json")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	own, theirs := os.NewFile(uintptr(pair[0]), "host"), os.NewFile(uintptr(pair[1]), "agent")
	conn, err := net.FileConn(own)
	if err != nil {
		t.Fatal(err)
	}
	own.Close()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	c := exec.CommandContext(ctx, exe, file)
	c.Args[0] = testInit
	c.ExtraFiles = append([]*os.File{theirs}, sessions...)
	r := &command{started: make(chan int, 1), ended: make(chan error, 1)}
	c.Stderr = io.MultiWriter(os.Stderr, &r.console)
	if cmd.Args[0] == testPanic {
		c.Stderr = &r.console
	}
	c.Env = []string{"ENVIRONMENT=of the agent", fmt.Sprintf("SESSIONS=%d", len(sessions))}
	if os.Getuid() == 0 {
		c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID,
			Unshareflags: syscall.CLONE_NEWNS} // makes mounts private
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	go func() { r.ended <- c.Wait() }()
	t.Cleanup(func() { cancel(); <-r.ended })
	r.Host, err = wire.Accept(conn, wire.HostConfig{Builds: noBuild, Started: func(pid int) { r.started <- pid }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// own returns a command as this user, with the environment of the agent.
func own(args ...text.Name) wire.Command {
	c := wire.Command{Args: args, UID: uint32(os.Getuid()), GID: uint32(os.Getgid())}
	if groups, err := os.Getgroups(); err == nil && c.UID != 0 { // who cannot set others
		for _, g := range groups {
			c.Groups = append(c.Groups, uint32(g))
		}
	}
	return c
}

// with returns the command after a change.
func with(c wire.Command, change func(*wire.Command)) wire.Command {
	change(&c)
	return c
}

// sh returns a command of the shell.
func sh(script string) wire.Command {
	c := own("/bin/sh", "-c", text.Name(script))
	c.Env = []text.Name{"PATH=/usr/bin:/bin"}
	return c
}

// end returns all output and the end of the command, whose stdin it closes.
func (c *command) end(t *testing.T) (stdout, stderr string, _ wire.Exit) {
	t.Helper()
	c.Stdin.Close()
	errs := make(chan string)
	go func() {
		b, _ := io.ReadAll(c.Stderr)
		errs <- string(b)
	}()
	out, err := io.ReadAll(c.Stdout)
	if err != nil {
		t.Fatal(err)
	}
	stderr = <-errs
	exit, err := c.Wait()
	if err != nil {
		t.Fatal(err)
	}
	c.Bye()
	err = <-c.ended
	c.ended <- err
	if err != nil {
		t.Errorf("the agent: %v", err)
	}
	return string(out), stderr, exit
}

func TestCommands(t *testing.T) {
	script := func(mode os.FileMode, lines string) text.Name {
		name := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(name, []byte(lines), mode); err != nil {
			t.Fatal(err)
		}
		return text.Name(name)
	}
	args := func(a ...text.Name) wire.Command {
		return own(a...)
	}
	for _, tt := range []struct {
		name   string
		cmd    wire.Command
		stdout string
		stderr string
		exit   wire.Exit
	}{
		{"two streams", sh("echo out; echo err >&2"), "out\n", "err\n", wire.Exit{}},
		{"a status", sh("exit 7"), "", "", wire.Exit{Status: 7}},
		{"a signal", sh("kill -9 $$"), "", "", wire.Exit{Signal: 9}},
		{"the end of stdin", sh("cat; echo end"), "end\n", "", wire.Exit{}},
		{"the environment", with(own("env"), func(c *wire.Command) {
			c.Env = []text.Name{"PATH=/usr/bin", "X=\xff a\nb"}
		}),
			"PATH=/usr/bin\nX=\xff a\nb\n", "", wire.Exit{}},
		{"arguments", args("/usr/bin/printf", "[%s]", "", "a b", "\xfe", "'\n"), "[][a b][\xfe]['\n]", "", wire.Exit{}},
		{"a default PATH", args("true"), "", "", wire.Exit{}},
		{"an orphan", sh("(setsid sleep 1000 >/dev/null 2>&1 &) ; echo it"), "it\n", "", wire.Exit{}},
		{"late output", sh("(sleep 0.1; echo late) & echo early"), "early\nlate\n", "", wire.Exit{}},
		{"an orphan that keeps stdout", sh("setsid sleep 1000 & sleep 0.05; echo it"), "it\n", "", wire.Exit{}},
		{"the agent's children", sh("sleep 0.1 & (sleep 0.01 &); wait; exit 3"), "", "", wire.Exit{Status: 3}},
		{"no other files", sh("exec /bin/ls /proc/self/fd | tr '\\n' ' '"), "0 1 2 3 ", "", wire.Exit{}},
		{"no such file", args("/no/such"), "", "",
			wire.Exit{Status: 127, Err: "run /no/such: no such file or directory"}},
		{"no such name", args("gvm-none"), "", "",
			wire.Exit{Status: 127, Err: "run gvm-none: there is no such command in PATH"}},
		{"an empty name", args(""), "", "", wire.Exit{Status: 127, Err: "run : there is no such command in PATH"}},
		{"no program", args("/etc/passwd"), "", "",
			wire.Exit{Status: 126, Err: "run /etc/passwd: permission denied"}},
		{"a directory", args("/etc"), "", "", wire.Exit{Status: 126, Err: "run /etc: permission denied"}},
		{"no format", args(script(0o755, "")), "", "",
			wire.Exit{Status: 126, Err: "exec format error"}},
		{"no interpreter", args(script(0o755, "#!/no/such\n")), "", "",
			wire.Exit{Status: 127, Err: "its interpreter, or the loader of its libraries, is not in the guest"}},
		{"no directory", with(own("true"), func(c *wire.Command) { c.Dir = "/no/such" }), "", "",
			wire.Exit{Status: 125, Err: "chdir /no/such: no such file or directory"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			stdout, stderr, exit := run(t, tt.cmd).end(t)
			if stdout != tt.stdout || stderr != tt.stderr {
				t.Errorf("stdout %q, stderr %q", stdout, stderr)
			}
			if got := exit; got.Status != tt.exit.Status || got.Signal != tt.exit.Signal ||
				!strings.HasSuffix(got.Err, tt.exit.Err) || (got.Err == "") != (tt.exit.Err == "") {
				t.Errorf("%+v, want %+v", got, tt.exit)
			}
		})
	}
}

// TestAttributes: user, groups, limits, directory are as the command file says.
func TestAttributes(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("root sets users and limits")
	}
	cmd := sh("id -u; id -g; id -G; ulimit -Sn; ulimit -Hn; ulimit -c; ulimit -v; pwd; " +
		"ps -o sid= -p $$ | tr -d ' '; echo $$; echo again > /dev/stderr; grep SigBlk: /proc/self/status >&2")
	cmd.UID, cmd.GID, cmd.Groups, cmd.Dir = 12345, 2345, []uint32{5, 6}, "/usr"
	cmd.Rlimits = []wire.Rlimit{{Resource: unix.RLIMIT_NOFILE, Soft: 20, Hard: 1000},
		{Resource: unix.RLIMIT_CORE, Soft: 512, Hard: 512}, {Resource: unix.RLIMIT_AS, Soft: 64 << 20, Hard: 64 << 20}}
	want := "12345 2345 2345 5 6 20 1000 1 65536 /usr"
	if raceDetector { // the limit on memory would be its own too
		cmd.Rlimits = cmd.Rlimits[:2]
		want = strings.Replace(want, "65536", "unlimited", 1)
	}
	stdout, stderr, exit := run(t, cmd).end(t)
	lines := strings.Fields(stdout)
	if len(lines) != 12 || lines[10] != lines[11] {
		t.Errorf("%q: want the command to lead a session", lines)
	}
	if got := strings.Join(lines[:min(10, len(lines))], " "); got != want || exit != (wire.Exit{}) ||
		stderr != "again\nSigBlk:\t0000000000000000\n" {
		t.Errorf("%q, %q, %+v; want %q", got, stderr, exit, want)
	}
}

// TestBytes: 64 MiB of any bytes go through the command and back unchanged.
func TestBytes(t *testing.T) {
	c := run(t, sh("cat"))
	data := make([]byte, 64<<20)
	rand.Read(data)
	go func() {
		c.Stdin.Write(data)
		c.Stdin.Close()
	}()
	got, err := io.ReadAll(c.Stdout)
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d of %d bytes, equal: %t, %v", len(got), len(data), bytes.Equal(got, data), err)
	}
	if _, _, exit := c.end(t); exit != (wire.Exit{}) {
		t.Errorf("%+v", exit)
	}
}

// TestClosedOutput: a host that takes no more ends the command as a closed pipe does.
func TestClosedOutput(t *testing.T) {
	c := run(t, own("yes"))
	io.ReadFull(c.Stdout, make([]byte, 10000))
	c.Stdout.Close()
	if exit, err := c.Wait(); err != nil || exit.Signal != int(unix.SIGPIPE) {
		t.Errorf("%+v, %v", exit, err)
	}
	c.Bye()
}

// TestClosedInput: a command that reads no more makes the host's writes fail.
func TestClosedInput(t *testing.T) {
	c := run(t, sh("exec <&-; echo closed; sleep 1000"))
	var err error
	for err == nil {
		_, err = c.Stdin.Write(make([]byte, 1000))
	}
	c.expect(t, "closed\n")
	c.Signal(int(unix.SIGTERM))
	if _, _, exit := c.end(t); err != wire.ErrClosed || exit.Signal != int(unix.SIGTERM) {
		t.Errorf("%v, %+v", err, exit)
	}
}

// TestSlowHost: all output arrives, however late the host reads it.
func TestSlowHost(t *testing.T) {
	c := run(t, sh("head -c 1000000 /dev/zero; (setsid sleep 1000 &); head -c 64000 /dev/zero"))
	time.Sleep(2 * lateOutput)
	if out, _, exit := c.end(t); len(out) != 1064000 || exit != (wire.Exit{}) {
		t.Errorf("%d bytes, %+v", len(out), exit)
	}
}

// refill is a host that has taken output when the pipe is full again.
type refill struct {
	pipe  int
	bytes int
}

func (r *refill) Write(p []byte) (int, error) {
	r.bytes += len(p)
	b := make([]byte, 4096)
	for err := error(nil); err == nil; {
		_, err = unix.Write(r.pipe, b)
	}
	return len(p), nil
}

func (*refill) Close() error { return nil }

// TestEndlessOrphan: a program that the command leaves behind, and that never stops to write, does
// not hold up the end.
func TestEndlessOrphan(t *testing.T) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(p[1])
	host := &refill{pipe: p[1]}
	host.Write(nil)
	from := os.NewFile(uintptr(p[0]), "stdout")
	from.SetReadDeadline(time.Now())
	output{from, host}.copy()
	if host.bytes != 64<<10 {
		t.Errorf("%d bytes of the %d that were there", host.bytes, 64<<10)
	}
}

// raceDetector is set in a build with the race detector, which takes memory by itself at any time.
var raceDetector bool

// TestSmallLimit: limits below the size of the agent hold for the command alone.
func TestSmallLimit(t *testing.T) {
	if raceDetector {
		t.Skip("the race detector ends without memory")
	}
	cmd := sh("echo $#; ulimit -v")
	for range 18 {
		cmd.Args = append(cmd.Args, text.Name(strings.Repeat("x", 100_000)))
	}
	cmd.Rlimits = []wire.Rlimit{{Resource: unix.RLIMIT_AS, Soft: 64 << 20, Hard: 64 << 20},
		{Resource: unix.RLIMIT_DATA, Soft: 32 << 20, Hard: 32 << 20}}
	if out, errs, exit := run(t, cmd).end(t); out != "17\n65536\n" || exit != (wire.Exit{}) {
		t.Errorf("%q, %.300q, %+v", out, errs, exit)
	}
}

// TestLimitNothing: a stage that may get no more memory still reports its failure.
func TestLimitNothing(t *testing.T) {
	cmd := own("gvm-none")
	cmd.Rlimits = []wire.Rlimit{{Resource: unix.RLIMIT_AS, Soft: 0, Hard: 0}}
	want := wire.Exit{Status: 127, Err: "run gvm-none: there is no such command in PATH"}
	if out, errs, exit := run(t, cmd).end(t); exit != want {
		t.Errorf("%q, %.300q, %+v; want %+v", out, errs, exit, want)
	}
}

// TestOpenFiles: the command has the limit on open files that the agent was started with.
func TestOpenFiles(t *testing.T) {
	want, err := exec.Command("sh", "-c", "ulimit -Sn; ulimit -Hn").Output()
	if err != nil {
		t.Fatal(err)
	}
	if out, errs, exit := run(t, own("sh", "-c", "ulimit -Sn; ulimit -Hn")).end(t); out != string(want) {
		t.Errorf("%q, %q, %+v; want %q", out, errs, exit, want)
	}
}

// TestDirectory: the agent makes the command's directory.
func TestDirectory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a/b")
	(&guest{}).prepare(&wire.Command{Dir: text.Name(dir)})
	if st, err := os.Stat(dir); err != nil || !st.IsDir() {
		t.Error(err)
	}
}

// TestAlike: a command is started without a stage if it needs nothing that the agent does not have.
func TestAlike(t *testing.T) {
	var core unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_CORE, &core); err != nil {
		t.Fatal(err)
	}
	limit := func(soft uint64) []wire.Rlimit {
		return []wire.Rlimit{{Resource: unix.RLIMIT_CORE, Soft: soft, Hard: core.Max}}
	}
	for _, tt := range []struct {
		name   string
		change func(*wire.Command)
		want   bool
	}{
		{"a path", func(*wire.Command) {}, true},
		{"the agent's limits", func(c *wire.Command) { c.Rlimits = limit(core.Cur) }, true},
		{"another limit", func(c *wire.Command) { c.Rlimits = limit(core.Cur ^ 1) }, false},
		{"a name to find", func(c *wire.Command) { c.Args[0] = "sh" }, false},
		{"a user", func(c *wire.Command) { c.UID = 1 }, false},
		{"a group", func(c *wire.Command) { c.GID = 1 }, false},
		{"groups", func(c *wire.Command) { c.Groups = []uint32{0} }, false},
		{"a copy", func(c *wire.Command) { c.Copy = &wire.Copy{} }, false},
	} {
		cmd := wire.Command{Args: []text.Name{"/bin/sh"}}
		tt.change(&cmd)
		if got := alike(&cmd); got != tt.want {
			t.Errorf("%s: %v", tt.name, got)
		}
	}
}

// TestStageReport: a stage that dies is no command that ends.
func TestStageReport(t *testing.T) {
	cmd := sh("true")
	for report, want := range map[string]wire.Exit{
		"":                                     {Status: 125, Err: "the agent's process ended before it became the command"},
		"\n\n":                                 {},
		"\n\n{\"Status\":127,\"Err\":\"x\"}\n": {Status: 127, Err: "x"},
		"{\"Status\":125,\"Err\":\"y\"}\n":     {Status: 125, Err: "y"},
		"\n{\"Errno\":7,\"File\":0}":           {Status: 126, Err: "run /bin/sh: argument list too long"},
		"{\"Errno\":1,\"File\":1}":             {Status: 125, Err: "set the resource limits: operation not permitted"},
		"\n{\"Sta":                             {Status: 125, Err: "the agent's process ended before it became the command"},
	} {
		got := readExit(strings.NewReader(report), &cmd)
		if (got == nil) != (want == wire.Exit{}) || got != nil && *got != want {
			t.Errorf("%q: %+v, want %+v", report, got, want)
		}
	}
}

// TestSignal: a signal reaches all of the command's group, even if it comes before the start.
func TestSignal(t *testing.T) {
	c := run(t, sh("trap 'echo caught; exit 4' INT; echo ready; while :; do sleep 0.05; done"))
	ready := make([]byte, 6)
	io.ReadFull(c.Stdout, ready)
	c.Signal(int(unix.SIGINT))
	if out, _, exit := c.end(t); out != "caught\n" || exit.Status != 4 {
		t.Errorf("%q, %+v", out, exit)
	}
	c = run(t, sh("sleep 1000"))
	c.Signal(int(unix.SIGKILL))
	if _, _, exit := c.end(t); exit.Signal != 9 {
		t.Errorf("%+v", exit)
	}
}

// TestLostHost: the agent ends when the host is gone.
func TestLostHost(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("the agent would power this machine off")
	}
	c := run(t, sh("sleep 1000"))
	<-c.started
	c.Close()
	err := <-c.ended
	c.ended <- err
}

// TestPanic: a bug of the agent is an error for the host, and the goroutine is on the console.
func TestPanic(t *testing.T) {
	c := run(t, wire.Command{Args: []text.Name{testPanic}})
	_, _, exit := c.end(t)
	if exit != (wire.Exit{Status: exitNoTest, Err: "a bug in gvm's agent: panic: broken"}) {
		t.Errorf("%+v", exit)
	}
	if out := c.console.String(); !strings.Contains(out, "please report it: broken") ||
		!strings.Contains(out, "agent_test.go") {
		t.Errorf("the console has %q", out)
	}
}

// expect reads output up to a text.
func (c *command) expect(t *testing.T, want string) string {
	t.Helper()
	var all []byte
	b := make([]byte, 1)
	for !strings.Contains(string(all), want) {
		if _, err := c.Stdout.Read(b); err != nil {
			t.Fatalf("%q, then %v; want %q", all, err, want)
		}
		all = append(all, b...)
	}
	return string(all)
}

// TestTerminal: the command has a terminal of its own: its size is live, Ctrl-C interrupts the
// group in the foreground, and a shell has job control.
func TestTerminal(t *testing.T) {
	cmd := wire.Command{
		Args: []text.Name{"/bin/bash", "--norc", "-i"}, Env: []text.Name{"PS1=$ ", "PATH=/usr/bin:/bin", "HOME=/"},
		UID: uint32(os.Getuid()), GID: uint32(os.Getgid()), Terminal: &wire.Terminal{Rows: 33, Columns: 101},
	}
	c := run(t, cmd)
	say := func(line string) { io.WriteString(c.Stdin, line) }
	c.expect(t, "$ ")
	say("stty -echo; stty size\n")
	c.expect(t, "33 101\r\n$ ")
	say("(trap 'stty size; exit' WINCH; echo trapped; while :; do :; done)\n")
	c.expect(t, "trapped")
	c.Winsize(50, 132)
	c.expect(t, "50 132")
	c.expect(t, "$ ")
	foreground := func(then string) {
		say(`sh -c "trap 'echo go on' CONT; echo up; while :; do :; done"` + "\n")
		c.expect(t, "up\r\n")
		say(then)
	}
	foreground("\x03")
	say("echo interrupted=$?\n")
	c.expect(t, "interrupted=130")
	foreground("\x1a")
	c.expect(t, "Stopped")
	say("fg\n")
	c.expect(t, "go on\r\n")
	say("\x03")
	say("echo continued=$?\n")
	c.expect(t, "continued=130")
	say("tty; test -t 0 -a -t 1 -a -t 2; echo all=$?; echo > /dev/tty; echo tty=$?\n")
	c.expect(t, "/dev/pts/")
	c.expect(t, "all=0")
	c.expect(t, "tty=0")
	foreground("")
	c.Signal(int(unix.SIGTERM)) // goes to the foreground: bash would ignore it
	c.expect(t, "Terminated")
	say("exit 6\n")
	if _, stderr, exit := c.end(t); exit.Status != 6 || stderr != "" {
		t.Errorf("%+v, %q", exit, stderr)
	}
	c = run(t, cmd)
	if _, _, exit := c.end(t); exit.Status != 0 { // the end of stdin is Ctrl-D
		t.Errorf("%+v", exit)
	}
}
