package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/urfave/cli/v2"

	"gvm/guest/kernel"
	"gvm/machine"
	"gvm/text"
	"gvm/verdict"
	"gvm/verdict/ktap"
)

func kunitCommand() *cli.Command {
	return &cli.Command{
		Name:      "kunit",
		Usage:     "run the KUnit tests of a kernel",
		ArgsUsage: "[GLOB]",
		Description: `Boots a kernel with CONFIG_KUNIT=y, which runs its built-in tests and powers
off, and prints their results. GLOB selects suites, or suite.test, as in
kunit.filter_glob. Nothing but the kernel is needed: see docs/kunit.md.

EXAMPLES
   gvm kunit                             the kernel of the tree here
   gvm kunit -k linux 'list*'            that of another tree or O= directory
   gvm kunit -k bzImage --junit results.xml

The exit status is 0 if every test passed or was skipped, and 1 if one did
not or none ran. Other ends are those of gvm help exit-status.`,
		Flags: append([]cli.Flag{
			&cli.StringFlag{Name: "kernel", Aliases: []string{"k"}, TakesFile: true,
				Usage: "bzImage or ELF vmlinux `FILE`, or the directory of a kernel tree"},
			&cli.StringFlag{Name: "cmdline", Aliases: []string{"a"}, Usage: "more words of the kernel command `LINE`"},
			&cli.IntFlag{Name: "cpus", Aliases: []string{"c"}, Value: 1, Usage: "`N` virtual CPUs"},
			&cli.StringFlag{Name: "memory", Aliases: []string{"m"}, Value: "1G",
				Usage: "`SIZE` of guest RAM, in MiB without a suffix"},
			&cli.DurationFlag{Name: "timeout", Value: 5 * time.Minute,
				Usage: "stop the guest after `DURATION`, with status 124"},
			&cli.BoolFlag{Name: "raw", Usage: "print the guest's console, instead of the results"},
			sandboxFlag("guest's first instruction"),
		}, verdictFlags()...),
		Action: func(c *cli.Context) error {
			timeout := c.Duration("timeout")
			rc, err := within(timeout, endOfTimeout(timeout), func() (runConfig, error) {
				rc, err := parseKunit(c)
				if err != nil {
					return rc, usageError{err}
				}
				return rc, rc.watch.open()
			})
			if err != nil {
				return err
			}
			r, err := rc.watch.finish(run(&rc))
			switch status := exitStatus(err); {
			case status == exitUsage, status == exitHost: // no guest ran, or its results are not to be trusted
				return err
			case status >= exitTimeout && !rc.watch.began.Load(): // perhaps before the guest
			case r.Status == ktap.None:
				note("no test ran; a kernel for gvm kunit has CONFIG_KUNIT=y and tests built in (docs/kunit.md)")
			case rc.hidden:
				ctx, stop := context.WithCancelCause(context.Background())
				defer stop(nil)
				defer endWithin(ctx, left(patience), func() {})()
				if status >= exitTimeout {
					stop(err)
				}
				err = errors.Join(err, printResults(c.App.Writer, r))
			}
			return err
		},
	}
}

func parseKunit(c *cli.Context) (rc runConfig, err error) {
	rc = runConfig{
		spec:    machine.Spec{CPUs: c.Int("cpus")},
		kernel:  c.String("kernel"),
		timeout: c.Duration("timeout"),
		hidden:  !c.Bool("raw"),
	}
	spec := &rc.spec
	words := []string{"kunit.enable=1", "kunit_shutdown=poweroff"}
	switch glob := c.Args().First(); {
	case c.NArg() > 1:
		return rc, fmt.Errorf("unexpected argument %q; one GLOB selects the tests", c.Args().Get(1))
	case strings.ContainsAny(glob, " \t\n\""):
		return rc, fmt.Errorf("%q: a GLOB for the kernel's command line has no spaces and quotes", glob)
	case glob == "" && c.NArg() == 1:
		return rc, errors.New("kunit: the GLOB is empty: want one, or leave it out for all tests")
	case glob != "":
		words = append(words, "kunit.filter_glob="+glob)
	}
	if line := c.String("cmdline"); line != "" {
		words = append(words, line)
	}
	spec.CmdLine = strings.Join(words, " ")
	if spec.CPUs < 1 {
		return rc, fmt.Errorf("--cpus %d: want 1 or more", spec.CPUs)
	}
	if rc.timeout <= 0 {
		return rc, fmt.Errorf("--timeout %s: want a positive duration, such as 90s", rc.timeout)
	}
	if spec.Memory.Size, err = text.ParseSize(c.String("memory"), 1<<20); err != nil {
		return rc, fmt.Errorf("--memory: %w", err)
	}
	if rc.sandbox, err = parseSandbox(c); err != nil {
		return rc, err
	}
	host := thisHost()
	if rc.memoryNote, err = checkMemory(spec.Memory, true, host); err != nil {
		return rc, fmt.Errorf("--memory %s: %w", c.String("memory"), err)
	}
	if rc.threadNote, err = checkThreads(spec, 1, host); err != nil {
		return rc, err
	}
	if err := rc.findKernel(); err != nil {
		return rc, err
	}
	var ended func(*ktap.Test, int)
	if rc.hidden {
		ended = printProgress
	}
	rc.watch, err = parseWatch(c, ended)
	if err == nil && rc.watch == nil {
		rc.watch = &watch{reader: verdict.NewReader(verdict.Policy{}, ended)}
	}
	if err == nil {
		rc.watch.tests = true
	}
	return rc, err
}

// findKernel finds the kernel of the current directory's tree, unless --kernel names one.
func (rc *runConfig) findKernel() (err error) {
	if rc.kernel != "" {
		return nil
	}
	if rc.kernel, rc.kernelNote, err = kernel.InTree("."); err == nil && rc.kernel == "" {
		err = errors.New("the current directory is no kernel tree; name a kernel or its tree with --kernel")
	}
	return err
}

// printProgress prints a suite that ended, or a test that did not pass. It does not wait for the
// reader, as the guest would.
func printProgress(t *ktap.Test, depth int) {
	if depth == 0 || len(t.Tests) == 0 && t.Status != ktap.Pass && t.Status != ktap.Skip {
		line := fmt.Sprintf("%-6s%s", t.Status, t.Name)
		if n := t.Counts().Total(); n > 0 && len(t.Tests) > 0 {
			line += fmt.Sprintf(" (%d)", n)
		}
		stderr.say(text.Printable(line) + "\n")
	}
}

// printResults prints the tests that did not pass, with their logs, and a table of the suites.
func printResults(w io.Writer, r *verdict.Results) error {
	var b strings.Builder
	printFailed(&b, "", r.Tests)
	width := len("total")
	for _, t := range r.Tests {
		width = max(width, utf8.RuneCountInString(text.Printable(t.Name)))
	}
	row := func(name string, words ...any) {
		fmt.Fprintf(&b, "%-*s%8v%8v%9v%9v\n", append([]any{width, text.Printable(name)}, words...)...)
	}
	row("suite", "passed", "failed", "crashed", "skipped")
	for _, t := range r.Tests {
		n := t.Counts()
		row(t.Name, n.Passed, n.Failed, n.Crashed, n.Skipped)
	}
	row("total", r.Counts.Passed, r.Counts.Failed, r.Counts.Crashed, r.Counts.Skipped)
	_, err := io.WriteString(w, b.String())
	return err
}

func printFailed(b *strings.Builder, path string, tests []*ktap.Test) {
	for _, t := range tests {
		name := strings.TrimPrefix(path+"."+t.Name, ".")
		printFailed(b, name, t.Tests)
		if t.Status == ktap.Pass || t.Status == ktap.Skip || !t.Own() {
			continue
		}
		b.WriteString(text.Printable(fmt.Sprintf("%s: %s", name, strings.TrimSpace(string(t.Status)+" "+t.Reason))) + "\n")
		for _, line := range t.Log {
			fmt.Fprintf(b, "    %s\n", strings.TrimSpace(line))
		}
		b.WriteString("\n")
	}
}
