package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"
)

// testName is the name of a test, an example or a fuzz target in a list of them.
var testName = regexp.MustCompile(`(?m)^(?:Test|Example|Fuzz)\w*$`)

// undivided reports whether the tests run as one: a run that writes files, such as profiles, and
// one of benchmarks, of fuzzing, or of chosen subtests.
func (a testArgs) undivided() bool {
	return a.whole || len(a.values) > 0 || len(a.rest) > 0 || strings.Contains(a.run, "/")
}

// divide returns the arguments for runs of parts of the tests, for n labs, and first for one of the
// tests that are to run on this machine, if there are any.
func (a testArgs) divide(ctx context.Context, n int, here func(name string) bool) ([]testArgs, error) {
	if a.undivided() {
		return []testArgs{a}, nil
	}
	pattern := a.run
	if pattern == "" {
		pattern = "."
	}
	list := exec.CommandContext(ctx, os.Args[0], "-test.list="+pattern)
	list.Stderr = os.Stderr
	out, err := list.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", list, err)
	}
	names := testName.FindAllString(string(out), -1)
	if a.left != "" && !strings.Contains(a.left, "/") {
		left, err := regexp.Compile(a.left)
		if err != nil {
			return nil, fmt.Errorf("-test.skip: %w", err)
		}
		names = slices.DeleteFunc(names, left.MatchString)
	}
	var parts []testArgs
	labs := func(name string) bool { return !here(name) }
	if direct := slices.DeleteFunc(slices.Clone(names), labs); len(direct) > 0 {
		names = slices.DeleteFunc(names, here)
		p := a.only(direct)
		p.here = true
		parts = append(parts, p)
	}
	if len(names) > 0 || len(parts) == 0 {
		parts = append(parts, a.share(names, n)...)
	}
	return parts, nil
}

// only returns a that runs the tests of these names alone.
func (a testArgs) only(names []string) testArgs {
	a.args = append(slices.Clone(a.args), "-test.run=^("+strings.Join(names, "|")+")$")
	return a
}

// share gives each run a part of the tests, for n labs that take a new part when they have run one.
// The parts become smaller, so that the labs end at about the same time: each is one of 2n of the
// remaining tests, and at least one of 16n of all. A part has tests from everywhere, as neighbours
// take about the same time.
func (a testArgs) share(names []string, n int) (parts []testArgs) {
	if n == 1 {
		return []testArgs{a.only(names)}
	}
	least := max(1, len(names)/(16*n))
	for {
		var part, rest []string
		step := max(1, min(2*n, len(names)/least))
		for i, name := range names {
			if i%step == 0 {
				part = append(part, name)
			} else {
				rest = append(rest, name)
			}
		}
		parts = append(parts, a.only(part))
		if names = rest; len(names) == 0 {
			return parts
		}
	}
}

// runParts runs the parts in their order, n at the same time and that of this machine beside them,
// and returns the worst exit status. The output of a part comes when it has ended, or if it is the
// only one, at once. It gives run the number of the lab, from 0 to n-1, that the part has for
// itself.
func runParts(parts []testArgs, n int, run func(a testArgs, lab int, out io.Writer) int) int {
	if len(parts) == 1 {
		return run(parts[0], 0, os.Stdout)
	}
	next := make(chan testArgs)
	var mu sync.Mutex // of worst and standard output
	worst := 0
	var workers sync.WaitGroup
	one := func(a testArgs, lab int) {
		var out bytes.Buffer
		code := run(a, lab, &out)
		mu.Lock()
		defer mu.Unlock()
		worst = max(worst, code)
		_, _ = out.WriteTo(os.Stdout)
	}
	for lab := range n {
		workers.Go(func() {
			for a := range next {
				one(a, lab)
			}
		})
	}
	for _, a := range parts {
		if a.here {
			workers.Go(func() { one(a, 0) })
		} else {
			next <- a
		}
	}
	close(next)
	workers.Wait()
	return worst
}

// mainHere runs tests on this machine, in a process of their own.
func mainHere(ctx context.Context, a testArgs, start time.Time, out io.Writer) int {
	args := a.args
	if a.timeout > 0 {
		args = append(slices.Clone(args), "-test.timeout="+max(a.timeout-time.Since(start), time.Second).String())
	}
	cmd := exec.CommandContext(ctx, os.Args[0], args...)
	cmd.Env = append(os.Environ(), hereEnv+"=1")
	cmd.Stdout, cmd.Stderr = out, out
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit) && exit.ExitCode() > 0:
		return exit.ExitCode()
	}
	fmt.Fprintf(out, "lab: tests on this machine: %v\n", err)
	return exitInfrastructure
}
