package lab

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Options says how Main runs a package's tests.
type Options struct {
	// Direct reports whether this machine can run the tests itself, and the reason. It is not
	// called in a lab. Nil means never.
	Direct func() (direct bool, why string)
	// Kernel names L1's kernel, as in Lab.Kernel. The default is that of the environment,
	// KernelEnv, or else debian.
	Kernel string
	// Modules, Memory and CPUs are as in Command.
	Modules      []string
	Memory, CPUs int
	// Build are Go packages of main programs that the tests run, such as ./cmd/gvm's import path.
	// They are built on this machine, static; Program returns their paths.
	Build []string
	// Lost matches the output of a failed test whose guest was lost by the emulated processor: see
	// Main. Nil means never.
	Lost *regexp.Regexp
	// Labs is how many labs run the tests at the same time, each a part of them; 0 is 1. It is 1 on a
	// machine that has fewer processors, or less memory than half of Memory for each.
	Labs int
	// Needs are of tests that need more than Direct finds. On a machine that runs the tests itself,
	// those whose need it lacks run in a lab beside the others.
	Needs []Need
	// Here matches the names of tests that need nothing of the lab. They run on this machine, beside
	// the labs, which would take many times as long. Nil means none.
	Here *regexp.Regexp
	// Writable and Visible are as in Command. The directories of profiles that the go command asks
	// for are always writable.
	Writable, Visible []string

	user int // of UserEnv
}

// Need is what some tests of a package need of a machine.
type Need struct {
	// Tests matches the names of the tests.
	Tests *regexp.Regexp
	// Lacks returns why this machine cannot run them; nil: it can.
	Lacks func() error
}

// lacking returns the needs that this machine does not meet. Each is reported in one line.
func (o Options) lacking() (all []*regexp.Regexp) {
	for _, n := range o.Needs {
		if err := n.Lacks(); err != nil {
			fmt.Fprintf(os.Stderr, "lab: tests %s run in the lab: %v\n", n.Tests, err)
			all = append(all, n.Tests)
		}
	}
	return all
}

// tries is the number of labs in which Main tries to run tests.
const tries = 6

// defaultMemory is that of L1, in MiB.
const defaultMemory = 4 << 10

// atOnce returns the number of labs for this machine. Guests use less memory than L1 has.
func (o Options) atOnce() int {
	if o.Labs <= 1 || runtime.NumCPU() < o.Labs || available() < o.Labs*cmp.Or(o.Memory, defaultMemory)/2 {
		return 1
	}
	return o.Labs
}

var availableLine = regexp.MustCompile(`(?m)^MemAvailable: *(\d+) kB$`)

// available returns this machine's available memory, in MiB, or 0.
func available() int {
	info, _ := os.ReadFile("/proc/meminfo")
	m := availableLine.FindSubmatch(info)
	if m == nil {
		return 0
	}
	kib, _ := strconv.Atoi(string(m[1]))
	return kib >> 10
}

// exitInfrastructure is Main's status if the tests could not be run at all. The testing package
// ends with 0, 1 or 2.
const exitInfrastructure = 3

// programsEnv names the directory of the programs of Options.Build.
const programsEnv = "GVM_LAB_PROGRAMS"

// hereEnv, set to 1, runs tests on this machine.
const hereEnv = "GVM_LAB_HERE"

// KernelEnv names the environment variable that selects another kernel of L1 for tests.
const KernelEnv = "GVM_TEST_L1"

// UserEnv names the environment variable with the UID of an ordinary user, as whom all tests of a
// package then run, in the lab.
const UserEnv = "GVM_TEST_USER"

// fastEnv, set to 0, runs tests without Command.Fast.
const fastEnv = "GVM_LAB_FAST"

// Program returns the path of a program of Options.Build, by its last name.
func Program(name string) string { return filepath.Join(os.Getenv(programsEnv), name) }

// tags are the Makefile's: the programs are those that users get, and start as fast.
const tags = "-tags=urfave_cli_no_docs,nethttpomithttp2"

// build makes the programs in a directory of their own, which remove removes. They are static by
// CGO_ENABLED=0, or as set in the environment: the race detector needs 1.
func build(packages []string) (dir string, remove func(), err error) {
	if dir, remove, err = TempDir("lab-programs"); err != nil {
		return "", nil, err
	}
	cmd := exec.Command("go", append([]string{"build", tags, "-o", dir + "/"}, packages...)...)
	cmd.Env = append([]string{"CGO_ENABLED=0"}, os.Environ()...)
	out, err := cmd.CombinedOutput()
	if err == nil {
		err = os.Chmod(dir, 0o755) // for UserEnv
	}
	if err == nil && slices.Contains(packages, "gvm/cmd/gvm-agent") {
		out, err = buildForAgent(dir)
	}
	if err != nil {
		remove()
		return "", nil, fmt.Errorf("lab: build %s: %w\n%s", strings.Join(packages, " "), err, out)
	}
	return dir, remove, os.Setenv(programsEnv, dir)
}

// buildForAgent builds gvm again, for the gvm-agent in dir, as the Makefile does. The linker takes
// one -ldflags: with those of the environment gvm is its own agent.
func buildForAgent(dir string) (output []byte, err error) {
	agent := filepath.Join(dir, "gvm-agent")
	if strings.Contains(os.Getenv("GOFLAGS"), "-ldflags") {
		return nil, os.Remove(agent)
	}
	id, err := exec.Command("go", "tool", "buildid", agent).Output()
	if err != nil {
		return nil, err
	}
	flags := "-ldflags=-X main.agentID=" + strings.TrimSpace(string(id))
	cmd := exec.Command("go", "build", tags, flags, "-o", dir+"/", "gvm/cmd/gvm")
	cmd.Env = append([]string{"CGO_ENABLED=0"}, os.Environ()...)
	return cmd.CombinedOutput()
}

// Main is the body of a TestMain: os.Exit(lab.Main(m, lab.Options{…})). It runs the tests here if
// possible. Otherwise it runs this same test binary, with the same flags and in the same directory,
// in a lab. It returns the exit status, and one line reports the choice and its reason.
//
// The lab's processor is software, and loses a guest now and then (of those with a busy console one
// in ten ends in a triple fault, including QEMU's own guests). If tests failed and Options.Lost
// matches their output, the failed ones run again, in a new lab, and the result of that counts, or
// after one more loss, that of the next. If the lab itself crashes or wedges, the tests that have
// not passed go on in a new one. The log says so.
func Main(m interface{ Run() int }, o Options) int {
	a := parseTestArgs(os.Args[1:])
	if os.Getenv(InLabEnv) == "1" || os.Getenv(hereEnv) == "1" || a.list {
		return m.Run()
	}
	if a.fuzz && a.run == "^$" { // of parsers, which need no machine
		return m.Run()
	}
	if user := os.Getenv(UserEnv); user != "" {
		uid, err := strconv.ParseUint(user, 10, 31)
		if err != nil || uid == 0 {
			fmt.Fprintf(os.Stderr, "lab: %s=%s: want the UID of an ordinary user, such as 65534\n", UserEnv, user)
			return exitInfrastructure
		}
		o.user, o.Here = int(uid), nil
		o.Direct = func() (bool, string) { return false, UserEnv + " is set" }
	}
	if len(o.Build) > 0 {
		dir, remove, err := build(o.Build)
		if err != nil {
			fmt.Fprintf(os.Stderr, "%v\n", err)
			return exitInfrastructure
		}
		defer remove()
		o.Visible = append(slices.Clone(o.Visible), dir)
	}
	direct, why := false, "this package's tests always do"
	if o.Direct != nil {
		direct, why = o.Direct()
	}
	here := func(name string) bool { return o.Here != nil && o.Here.MatchString(name) }
	if direct {
		fmt.Fprintf(os.Stderr, "lab: tests run on this machine: %s\n", why)
		lacking := o.lacking()
		if len(lacking) == 0 || a.undivided() {
			return m.Run()
		}
		here = func(name string) bool {
			return !slices.ContainsFunc(lacking, func(r *regexp.Regexp) bool { return r.MatchString(name) })
		}
	} else {
		fmt.Fprintf(os.Stderr, "lab: tests run in the lab: %s\n", why)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	labs := o.atOnce()
	parts, err := a.divide(ctx, labs, here)
	if err != nil {
		fmt.Fprintf(os.Stderr, "lab: list the tests: %v\n", err)
		return exitInfrastructure
	}
	start := time.Now()
	prepared := sync.OnceValues(func() (*Lab, error) {
		l, err := Setup(ctx, os.Stderr)
		if err == nil {
			err = l.fillKernelCache(ctx)
		}
		if err == nil && o.user != 0 {
			err = l.openKernelCache()
		}
		return l, err
	})
	keepers := make([]keeper, labs)
	defer func() {
		for i := range keepers {
			keepers[i].end()
		}
	}()
	return runParts(parts, labs, func(a testArgs, lab int, out io.Writer) int {
		if a.here {
			return mainHere(ctx, a, start, out)
		}
		l, err := prepared()
		if err != nil {
			fmt.Fprintf(os.Stderr, "%v\n", err)
			return exitInfrastructure
		}
		return l.mainInLabs(ctx, a, o, &keepers[lab], start, out)
	})
}

// mainInLabs runs tests in the lab of k, and in new ones those that it lost. It returns the exit
// status. The tests' time has begun at start.
func (l *Lab) mainInLabs(ctx context.Context, a testArgs, o Options, k *keeper, start time.Time, to io.Writer) (
	code int) {
	var err error
run:
	for n := range tries {
		out := &transcript{to: to}
		code, err = l.mainInLab(ctx, a, o, k, start, out)
		if n == tries-1 {
			break
		}
		switch {
		case errors.Is(err, ErrCrashed), errors.Is(err, ErrWedged):
			// A lab that crashed or wedged does not judge the tests.
			fmt.Fprintf(os.Stderr, "lab: %v; the tests that have not passed start again in a new lab\n", err)
			a = a.skip(out.passed())
		case err == nil && code == 1 && o.Lost != nil && o.Lost.Match(out.b):
			failed := out.failed()
			if len(failed) == 0 {
				break run
			}
			fmt.Fprintf(os.Stderr, "lab: a guest was lost; in a new lab run again: %s\n", strings.Join(failed, ", "))
			a.args = append(slices.Clone(a.args), "-test.run=^("+strings.Join(failed, "|")+")$")
			k.end()
		default:
			break run
		}
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%v\nFAIL: the tests did not run to their end\n", err)
		return exitInfrastructure
	}
	return code
}

// transcript passes on the tests' output and keeps it.
type transcript struct {
	to io.Writer
	b  []byte
}

func (t *transcript) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	return t.to.Write(p)
}

// endLine is a test that ended, also in the form that go test -json reads.
var endLine = regexp.MustCompile(`(?m)^\x16?--- (FAIL|PASS): (\w+) `)

// failed returns the names of the tests that failed, without subtests.
func (t *transcript) failed() []string { return t.ended("FAIL") }

// passed returns the names of the tests that passed, without subtests.
func (t *transcript) passed() []string { return t.ended("PASS") }

func (t *transcript) ended(result string) (names []string) {
	for _, m := range endLine.FindAllSubmatch(t.b, -1) {
		if string(m[1]) == result {
			names = append(names, string(m[2]))
		}
	}
	return names
}

func (l *Lab) mainInLab(ctx context.Context, a testArgs, o Options, k *keeper, start time.Time, out *transcript) (
	int, error) {
	exe, err := os.Executable()
	if err != nil {
		return 0, err
	}
	cwd, err := os.Getwd()
	if err != nil {
		return 0, err
	}
	c := Command{
		User:     o.user,
		Dir:      cwd,
		Env:      os.Environ(),
		Writable: slices.Concat(a.writable(cwd), o.Writable),
		Visible:  append([]string{moduleRoot(cwd)}, o.Visible...),
		Modules:  o.Modules,
		Memory:   o.Memory,
		CPUs:     o.CPUs,
		Stdout:   out,

		Fast:   os.Getenv(fastEnv) != "0",
		Stderr: os.Stderr,
	}
	if same(os.Stdout, os.Stderr) {
		c.Stderr = c.Stdout
	}
	if c.Kernel, err = l.Kernel(cmp.Or(o.Kernel, os.Getenv(KernelEnv), "debian")); err != nil {
		return 0, err
	}
	args := a.args
	if a.timeout > 0 {
		// The tests' own limit must come first: it names the test that hangs.
		left := max(a.timeout-time.Since(start)-bootTime, time.Second)
		args = append(slices.Clone(args), "-test.timeout="+left.String())
		c.Timeout = left + 2*bootTime
	}
	c.Args = slices.Concat([]string{exe}, args, a.rest)
	return l.run(ctx, c, k)
}

// moduleRoot is the directory of the Go module that dir is in, or dir.
func moduleRoot(dir string) string {
	for d := dir; d != "/"; d = filepath.Dir(d) {
		if _, err := os.Stat(filepath.Join(d, "go.mod")); err == nil {
			return d
		}
	}
	return dir
}

// bootTime is the part of a test's time that Main reserves for L1's start and end.
const bootTime = 15 * time.Second

func same(a, b *os.File) bool {
	sa, errA := a.Stat()
	sb, errB := b.Stat()
	return errA == nil && errB == nil && os.SameFile(sa, sb)
}

// testArgs is a parsed command line of a test binary.
type testArgs struct {
	args      []string          // flags for the binary in the lab, without a timeout
	rest      []string          // the arguments after the flags
	values    map[string]string // of the flags in args that name files
	timeout   time.Duration
	list      bool // tests are to be listed, not run
	fuzz      bool
	whole     bool   // the tests cannot be divided among labs
	here      bool   // they run on this machine
	run, left string // the patterns of the tests to run and to leave out
	outputDir string
}

// fileFlags are the flags of package testing that name a file to write, and dirFlags those that
// name a directory.
var (
	fileFlags = []string{"blockprofile", "coverprofile", "cpuprofile", "memprofile", "mutexprofile", "trace"}
	dirFlags  = []string{"gocoverdir", "fuzzcachedir", "outputdir"}
)

// parseTestArgs reads a test binary's arguments. It drops testlogfile: the go command caches a
// result by the files listed there, and the lab's kernels, which also determine the result, would
// not be among them.
func parseTestArgs(args []string) testArgs {
	a := testArgs{values: make(map[string]string)}
	for i := 0; i < len(args); i++ {
		arg := args[i]
		if len(arg) < 2 || arg[0] != '-' || arg == "--" {
			a.rest = args[i:]
			break
		}
		name, value, hasValue := strings.Cut(strings.TrimLeft(arg, "-"), "=")
		name, isTest := strings.CutPrefix(name, "test.")
		if isTest && !hasValue && takesValue(name) && i+1 < len(args) {
			i++
			value = args[i]
			arg += "=" + value
		}
		switch {
		case !isTest:
		case name == "testlogfile":
			continue
		case name == "timeout":
			if d, err := time.ParseDuration(value); err == nil {
				a.timeout = d
				continue
			}
		case name == "list":
			a.list = value != ""
		case name == "fuzz":
			a.fuzz = value != ""
			a.whole = a.whole || a.fuzz
		case name == "bench":
			a.whole = a.whole || value != ""
		case name == "run":
			a.run = value
		case name == "skip":
			a.left = value
		case name == "outputdir":
			a.outputDir = value
			a.values[name] = value
		case slices.Contains(fileFlags, name), slices.Contains(dirFlags, name):
			a.values[name] = value
		}
		a.args = append(a.args, arg)
	}
	return a
}

// skip returns a that leaves out more tests, by their names.
func (a testArgs) skip(names []string) testArgs {
	if len(names) == 0 {
		return a
	}
	const flag = "-test.skip="
	passed := "^(" + strings.Join(names, "|") + ")$"
	pattern := passed
	for _, arg := range a.args { // the last one counts
		if before, ok := strings.CutPrefix(strings.Replace(arg, "--", "-", 1), flag); ok && before != "" {
			pattern = before + "|" + passed
		}
	}
	a.args = append(slices.Clone(a.args), flag+pattern)
	return a
}

// takesValue reports whether a flag of package testing must have a value, unlike a switch.
func takesValue(name string) bool {
	return !slices.Contains([]string{"v", "short", "failfast", "fullpath", "benchmem", "paniconexit0", "fuzzworker",
		"artifacts"}, name)
}

// writable returns the directories that the tests write to because of their own flags.
func (a testArgs) writable(cwd string) []string {
	abs := func(dir, p string) string {
		if filepath.IsAbs(p) {
			return p
		}
		return filepath.Join(dir, p)
	}
	var dirs []string
	if a.fuzz {
		dirs = append(dirs, cwd) // failing inputs go to testdata/fuzz
	}
	for name, v := range a.values {
		switch {
		case v == "":
		case slices.Contains(dirFlags, name):
			dirs = append(dirs, abs(cwd, v))
		default:
			dirs = append(dirs, filepath.Dir(abs(abs(cwd, a.outputDir), v)))
		}
	}
	slices.Sort(dirs)
	return slices.Compact(dirs)
}

// Log returns testing.TB's Log method as a writer, for tests that call Run or Setup.
func Log(t interface{ Logf(string, ...any) }) io.Writer {
	return writerFunc(func(p []byte) (int, error) {
		t.Logf("%s", strings.TrimRight(string(p), "\n"))
		return len(p), nil
	})
}

// KVM is an Options.Direct for tests that need a /dev/kvm, with or without hardware virtualization.
func KVM() (bool, string) {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return false, err.Error()
	}
	f.Close()
	return true, "/dev/kvm is there"
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }
