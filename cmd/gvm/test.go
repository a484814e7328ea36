package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"time"

	"github.com/urfave/cli/v2"

	"gvm/guest/kernel"
	"gvm/kvmapi/nowait"
	"gvm/testrun"
	"gvm/text"
	"gvm/verdict"
	"gvm/vmm/boot"
)

// exitUntested is the status of gvm test for a run that could not test. Every fault of the host and
// of the command line has it, as git bisect run takes others for the verdict of a commit.
const exitUntested = testrun.ExitNotTested

func testCommand() *cli.Command {
	return &cli.Command{
		Name:      "test",
		Usage:     "run a command in a guest with a kernel to test",
		ArgsUsage: "[-- COMMAND [ARG]...]",
		Description: `Boots a kernel and runs COMMAND in it, with the standard input, output and
error of gvm. COMMAND is a program of this host; it and its libraries are the
guest's files, with those of --file. Without COMMAND it is a shell, on a
terminal a job-controlled one. The kernel's log goes into --klog, and its end
to standard error after a fault. See docs/test.md.

Several kernels or numbers of CPUs, and each of --backend, --repeat, --jobs,
--retry, --output, --junit, --results and --cell, make a matrix: COMMAND runs
in a machine for each combination, without an input. Standard output has a
table of the verdicts; the end of a failed command's output goes to standard
error, and all output into --output. With --emit the machines are pods of
Kubernetes: see docs/ci.md.

EXAMPLES
   gvm test -- uname -r            the kernel of this tree, else the host's
   gvm test -k linux -- ./prog a   that of another tree or O= directory
   gvm test -k 6.1.0-13-amd64 --file /usr/bin/stress -- sh -c 'stress -t 5'
   go test -exec 'gvm test -k bzImage --' ./...
   git bisect run sh -c 'make bzImage || exit 125; gvm test --bisect -- ./t'
   gvm test -k bzImage --root / --rw . -- make check
   gvm test -k bzImage --repeat 100 --cpus 1,4 --junit j.xml -- ./flaky
   gvm test --scratch 5x5G --root / --rw . -- ./check -g quick
   gvm test -k bzImage             a shell

The exit status is that of COMMAND, 128 and the number of a signal that ended
it, 127 if it is missing and 126 if it is no program; else:
   120  the guest's kernel panicked or reported a fault, such as an oops
   121  the guest crashed (triple fault), or ended before COMMAND did
   122  the guest hangs: see --hang
   124  --timeout elapsed
   125  nothing was tested: a bad flag, no KVM, a missing or broken kernel
A signal to gvm goes to COMMAND. At a second one, or after --grace, the guest
is stopped: 128 and the number of the signal. A matrix stops at once. It ends
with 0 if every machine's test passed, else with the gravest status: that of
a stop, 120, 121, 122, 124, of a signal, of COMMAND, 127 or 126, 125.`,
		Flags: append([]cli.Flag{
			&cli.GenericFlag{Name: "kernel", Aliases: []string{"k"}, Value: new(words), TakesFile: true,
				Usage: "boot `KERNEL`, or each of several: a bzImage or vmlinux, a kernel tree or its O= directory, " +
					"a .deb or RPM package, the release of an installed kernel, or host, the one that runs here"},
			&cli.StringFlag{Name: "cmdline", Aliases: []string{"a"}, Usage: "more words of the kernel command `LINE`"},
			&cli.StringFlag{Name: "cpus", Aliases: []string{"c"}, Value: "1",
				Usage: "`N[,N]...` virtual CPUs: each number in a machine of its own"},
			&cli.StringFlag{Name: "memory", Aliases: []string{"m"}, Value: "1G",
				Usage: "`SIZE` of guest RAM, in MiB without a suffix"},
			&cli.GenericFlag{Name: "disk", Aliases: []string{"d"}, Value: new(words),
				Usage: "`PATH[,OPTION]...` of a raw image or block device; see gvm help disk"},
			&cli.StringFlag{Name: "scratch",
				Usage: "give the guest `[Nx]SIZE`, N empty disks, named in the command's environment: TEST_DEV and so on"},
			&cli.GenericFlag{Name: "module", Value: new(words),
				Usage: "load `NAME`, a module of the kernel or an alias of one, before the command, with those it depends on"},
			&cli.GenericFlag{Name: "file", Aliases: []string{"f"}, Value: new(words), TakesFile: true,
				Usage: "give the guest `PATH` of this host too: a file, a program with its libraries, or a directory"},
			&cli.StringFlag{Name: "root", TakesFile: true,
				Usage: "make `DIR` of this host, such as /, the guest's root: the guest changes it in its memory alone"},
			&cli.GenericFlag{Name: "rw", Value: new(words), TakesFile: true,
				Usage: "share `DIR` of this host at its path, so that the guest changes it"},
			&cli.GenericFlag{Name: "ro", Value: new(words), TakesFile: true,
				Usage: "share `DIR` of this host at its path, read-only"},
			&cli.GenericFlag{Name: "env", Aliases: []string{"e"}, Value: new(words),
				Usage: "`NAME[=VALUE]` for the command's environment, which has TERM, LANG, LC_* and TZ of this one"},
			&cli.StringFlag{Name: "cwd", Usage: "the command's `DIRECTORY` (default: that of gvm, empty in the guest)"},
			&cli.StringFlag{Name: "user", Aliases: []string{"u"}, Value: "root",
				Usage: "run the command as `NAME|UID[:GID]` of this host"},
			&cli.BoolFlag{Name: "tty", Aliases: []string{"t"}, Usage: "give the command a terminal, which this one must be"},
			&cli.StringFlag{Name: "klog", TakesFile: true, Usage: "write the kernel's log into `FILE`"},
			&cli.DurationFlag{Name: "timeout", Usage: "stop the guest after `DURATION`, with status 124"},
			&cli.DurationFlag{Name: "grace", Value: 800 * time.Millisecond,
				Usage: "at SIGINT, SIGTERM and SIGHUP stop the guest `DURATION` after the command got the signal"},
			&cli.DurationFlag{Name: "hang", Value: time.Minute,
				Usage: "stop a guest that makes no progress for `DURATION`, with status 122; 0 is never"},
			&cli.BoolFlag{Name: "bisect", Usage: "make statuses of 128 and more 1, and 126 and 127 125, for git bisect run"},
			&cli.StringFlag{Name: "verdict", TakesFile: true, Usage: "write the verdict as JSON into `FILE`"},
			&cli.StringFlag{Name: "rung", Value: "auto",
				Usage: "reach the guest's agent by `NAME` vsock, console, com2 or status alone; auto is the best of the kernel's"},
			&cli.BoolFlag{Name: "verbose", Aliases: []string{"v"}, Usage: "tell of each step on standard error"},
			&cli.BoolFlag{Name: "timing", Usage: "print at the end how long each phase took"},
			sandboxFlag("guest's first instruction"),
		}, slices.Concat(crashFlags(), matrixFlags(), policyFlags("fail", exitGuestFault))...),
		OnUsageError: func(c *cli.Context, err error, sub bool) error {
			return endError{exitUntested, flagError(c, err, sub)}
		},
		Action: func(c *cli.Context) error {
			if c.IsSet("collect") {
				return collectPods(c)
			}
			timeout := c.Duration("timeout")
			if ordered != nil { // the first process counts the time
				timeout = 0
			}
			t, err := within(timeout, endOfTest(timeout), func() (*testConfig, error) { return parseTest(c) })
			if err == nil && c.IsSet("emit") {
				if err = t.emit(c); err == nil {
					return nil
				}
			}
			if err != nil {
				return notTested(err)
			}
			if ordered != nil {
				return t.runCell(ordered)
			}
			if t.matrix != nil {
				return t.testMatrix(c.App.Writer)
			}
			return t.test()
		},
	}
}

// notTested gives an error of a test that has not begun its exit status, unless it has one.
func notTested(err error) error {
	if end := (endError{}); errors.As(err, &end) {
		return err
	}
	return endError{exitUntested, err}
}

// endOfTest is the end by --timeout.
func endOfTest(d time.Duration) error { return endError{exitTimeout, testrun.TimeoutError(d)} }

// exitGuestFault is the status of gvm test for a panic or a fault of the guest's kernel.
const exitGuestFault = 120

// say tells of a step with --verbose.
func (t *testConfig) say(format string, args ...any) {
	if t.verbose {
		t.note(fmt.Sprintf(format, args...))
	}
}

// test runs the test, prints the reason of its verdict, and writes the verdict file.
func (t *testConfig) test() error {
	file := outputFile{flag: "--verdict", path: t.verdict}
	_, err := within(t.timeout, endOfTest(t.timeout), func() (struct{}, error) { return struct{}{}, openOutputs(&file) })
	if err != nil {
		return notTested(err)
	}
	res := t.run()
	if t.bisect {
		res.Bisect()
	}
	soon := res.Kind == testrun.Stopped || res.Kind == testrun.Timeout
	err = saveOutputs(soon, []*outputFile{&file}, func() error { return errors.Join(file.fill(res.JSON), file.close()) })
	if s := explain("gvm: ", res); s != "" {
		stderr.say(s)
	}
	t.timing.print()
	if err != nil {
		if res.Text != "" {
			note(res.Text)
		}
		return endError{exitUntested, err}
	}
	if res.Status == 0 {
		return nil
	}
	return endError{res.Status, errors.New(res.Text)}
}

// shownLog is the number of lines of the kernel's log on standard error after a fault.
const shownLog = 40

// explain returns text that helps to understand a verdict, for before its reason. Its headings
// begin with prefix.
func explain(prefix string, res *testrun.Result) string {
	switch res.Kind {
	case testrun.Fault:
		s := ""
		for _, r := range res.Reports {
			if r.Fails {
				s += section(prefix, fmt.Sprintf("the kernel's report (fingerprint %s):", r.Fingerprint), r.Text)
			}
		}
		return s
	case testrun.Panic, testrun.Crash, testrun.Ended, testrun.Hang, testrun.Timeout, testrun.NotTested:
		return section(prefix, "the end of the kernel's log:", res.Log[max(0, len(res.Log)-shownLog):]) +
			section(prefix, "the machine:", res.Detail) +
			section(prefix, "the kernel's configuration:", res.Missing)
	}
	return ""
}

// section returns lines below a heading, or "" if there are none.
func section(prefix, heading string, lines []string) string {
	if len(lines) == 0 {
		return ""
	}
	s := text.Printable(prefix+heading) + "\n"
	for _, line := range lines {
		s += "  " + text.Printable(line) + "\n"
	}
	return s
}

// run runs the test to its verdict.
func (t *testConfig) run() *testrun.Result {
	collect := debug.SetGCPercent(startGC)
	defer debug.SetGCPercent(collect)
	t.spec.Begin(takeBegun()) // first, so that KVM works during the rest of the start
	ctx, stop := context.WithCancelCause(context.Background())
	defer stop(nil)
	signals := &testSignals{stop: stop, grace: t.grace}
	defer catchSignals(ctx, signals.take)()
	t.hostNotes(t.note)
	return t.runMachine(ctx, stop, signals.begin)
}

// hostNotes prints the notes about the host's limits.
func (t *testConfig) hostNotes(note func(string)) {
	for _, s := range []string{t.memoryNote, t.threadNote} {
		if s != "" {
			note(s)
		}
	}
}

// timed returns a context that ends with ctx, and margin after --timeout.
func (t *testConfig) timed(ctx context.Context, margin time.Duration) (context.Context, func()) {
	if t.timeout <= 0 {
		return ctx, func() {}
	}
	return context.WithTimeoutCause(ctx, t.timeout+margin, endOfTest(t.timeout))
}

// runMachine runs the test in a machine that Begin has begun, and closes it. begun takes the
// run, and nil at its end.
func (t *testConfig) runMachine(ctx context.Context, stop func(error), begun func(*testrun.Run)) *testrun.Result {
	timed, over := t.timed(ctx, -sinceStart())
	defer over()
	l := newLife[*testrun.Result](timed)
	res := l.run(func() *testrun.Result { return t.live(l, stop, begun) },
		func(err error) *testrun.Result { return t.untested(timed, err) })
	if err := t.spec.Close(); err != nil && res.Kind == testrun.Exited && res.Status == 0 {
		return untested(err)
	}
	return res
}

// untested is the result for an error of the start, which the end of ctx may have caused.
func (t *testConfig) untested(ctx context.Context, err error) *testrun.Result {
	res, cause := untested(err), context.Cause(ctx)
	switch {
	case errors.As(cause, new(testrun.TimeoutError)):
		return testrun.TimedOut(err)
	case cause != nil: // a signal ended the start
		res.Kind, res.Cause = testrun.Stopped, cause
		if !errors.Is(err, cause) {
			res.Text = cause.Error()
		}
		return t.stopped(res)
	}
	return res
}

// live is the life of the machine.
func (t *testConfig) live(l *life[*testrun.Result], stop func(error), begun func(*testrun.Run)) *testrun.Result {
	ctx, spec := l.ctx, &t.spec
	untested := func(err error) *testrun.Result { return t.untested(ctx, err) }
	t.startBroker(func(s string) { t.say("%s", s) })
	defer t.endBroker()
	allow, err := t.allow.read(ctx)
	if err != nil {
		return untested(err)
	}
	t.policy.Allow = allow
	k, err := t.findTestKernel(ctx)
	if err != nil {
		return untested(err)
	}
	defer k.Close()
	spec.Kernel = k.Image
	t.say("the kernel is %s, release %s", k.Image.Name, cmp.Or(k.Release, "unknown"))
	missing := t.missing(k.Config)
	for _, s := range missing {
		t.note(s)
	}
	l.at("the command was looked up")
	cmd, res := t.command()
	if res != nil {
		return res
	}
	l.at("gvm-agent was read")
	agent, build, err := agentProgram()
	if err != nil {
		return untested(err)
	}
	l.at("the guest's files were read")
	initrd, err := t.initramfs(ctx, k, cmd, agent)
	if err != nil {
		return untested(err)
	}
	defer initrd.Close()
	spec.Initrds = []*boot.File{initrd}
	spec.Words = []string{"printk.time=1", "sysrq_always_enabled"}
	spec.Note, spec.Phase, spec.Stamp = t.note, t.timing.phase, t.timing.stamp
	spec.KernelCache, spec.Version = boot.CacheDir(), version
	cfg := testrun.Config{
		Spec: *spec, Build: build, Rungs: t.rungs, Command: string(cmd.Args[0]),
		Policy: t.policy, Hang: t.hang,
		Say: func(line string) { t.note("the agent: " + line) },
	}
	if !t.verbose {
		cfg.Say = nil
	}
	cfg.Chosen = func(r testrun.Rung) {
		switch {
		case r == testrun.Status:
			t.note("the kernel has no way for the command's streams (vsock, virtio console, second serial port): " +
				"only its exit status will be known")
		default:
			t.say("the agent said hello by %s", r)
		}
	}
	if t.klog != "" {
		l.at(t.klog + " was opened")
		f, made, err := openLog(t.klog)
		if err == nil {
			err = fillOutput(f, made, nil)
		}
		if err != nil {
			return untested(fmt.Errorf("--klog: %w", err))
		}
		defer f.Close()
		cfg.Log = f
	}
	l.at("the command's output was opened")
	closeStreams, err := t.streams(ctx, stop, &cfg)
	if err != nil {
		return untested(err)
	}
	defer closeStreams()
	l.at("the control socket was made")
	socket, err := t.claimName(func(s string) { t.say("%s", s) })
	if err != nil {
		return untested(err)
	}
	defer func() {
		if err := t.closeSocket(socket); err != nil {
			t.note(err.Error())
		}
	}()
	l.at("the machine was started")
	t.seal(exitUntested, t.note)
	cfg.Spec.Name, cfg.Spec.Files, cfg.Spec.Sandbox = spec.Name, spec.Files, spec.Sandbox
	t.record.beginTest(ctx, &cfg, k)
	t.timing.phase("kernel, command, agent")
	run, err := testrun.Start(ctx, cfg)
	if err != nil {
		return untested(err)
	}
	l.begins()
	begun(run)
	if socket != nil {
		socket.Serve(&testRemote{remote: remote{info: t.info(), Machine: run.Machine(), pausePatience: pausePatience,
			memory: cfg.Spec.Memory}, run: run, matrix: t.matrix != nil})
	}
	if t.tty {
		defer followSize(run.Winsize)()
	}
	res = t.stopped(run.Wait())
	if res.Kind == testrun.NotTested && res.Err != nil {
		res.Text += mend(res.Err)
	}
	t.record.finishTest(res, t.note)
	if s := verdict.LostText(res.Lost); s != "" {
		t.note(s)
	}
	res.Kernel, res.Release = text.Name(k.Image.Name), k.Release
	res.Missing = missing
	if res.Rung == "" && res.Kind != testrun.Stopped && k.Config.Text == nil { // no file had it
		c, err := nowait.Until(ctx, func() string { return k.Image.Name + " was read" },
			func() (kernel.Config, error) { return k.Embedded(boot.CacheDir()) }, func(kernel.Config) {})
		if err == nil {
			res.Missing = t.missing(c)
		}
	}
	begun(nil) // there is nothing that signals would go to
	l.ends(res, res.Kind == testrun.Stopped || res.Kind == testrun.Timeout)
	return res
}

// stopped sets the status of a run that a signal, Ctrl-a x or a failed terminal stopped.
func (t *testConfig) stopped(res *testrun.Result) *testrun.Result {
	var end endError
	switch {
	case res.Kind != testrun.Stopped:
	case errors.As(res.Cause, &end):
		res.Status = end.status
	case errors.Is(res.Cause, errQuit):
		res.Status = exitQuit
	default:
		return untested(res.Cause)
	}
	return res
}

// findTestKernel finds the kernel of the current directory's tree, unless --kernel names one, or
// else the one that runs on this host.
func (t *testConfig) findTestKernel(ctx context.Context) (*kernel.Kernel, error) {
	if err := t.chooseKernel(); err != nil {
		return nil, err
	}
	return kernel.Finder{Cache: boot.CacheDir()}.Find(ctx, t.kernel)
}

// chooseKernel names the kernel, if --kernel does not.
func (t *testConfig) chooseKernel() error {
	if t.kernel != "" {
		return nil
	}
	image, found, err := kernel.InTree(".")
	if err != nil {
		return fmt.Errorf("%w with --kernel", err)
	}
	if t.kernel = cmp.Or(image, kernel.Host); found != "" {
		t.note(found)
	}
	return nil
}

// missing describes the options that a configuration lacks for the test.
func (t *testConfig) missing(c kernel.Config) []string {
	features := []string{"boot", "console", "test"}
	if len(t.spec.Disks) > 0 {
		features = append(features, "disk")
	}
	var lacks []string
	if s := c.Missing(features, false); s != "" {
		lacks = append(lacks, s)
	}
	if c.Text != nil && c.Value("BLK_DEV_INITRD") != "y" {
		lacks = append(lacks, "lacks CONFIG_BLK_DEV_INITRD (the agent's initramfs)")
	}
	for i, s := range lacks {
		lacks[i] = fmt.Sprintf("the kernel %s; by %s; see gvm help kernel", s, c.From)
	}
	return lacks
}
