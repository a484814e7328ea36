package lab

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"sync"
)

// testName is the name of a test, an example or a fuzz target in a list of them.
var testName = regexp.MustCompile(`(?m)^(?:Test|Example|Fuzz)\w*$`)

// divide returns the arguments for runs of parts of the tests, for n labs. A run that writes files, such
// as profiles, and one of benchmarks, of fuzzing, or of chosen subtests is not divided.
func (a testArgs) divide(ctx context.Context, n int) ([]testArgs, error) {
	if n == 1 || a.whole || len(a.values) > 0 || len(a.rest) > 0 || strings.Contains(a.run, "/") {
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
	return a.share(names, n), nil
}

// share gives each run a part of the tests, for n labs that take a new part when they have run one. The
// parts become smaller, so that the labs end at about the same time: each is one of 2n of the remaining
// tests, at least 2, and at least one of 8n of all, as the start of a lab takes seconds. A part has tests
// from everywhere, as neighbours take about the same time.
func (a testArgs) share(names []string, n int) (parts []testArgs) {
	least := max(2, len(names)/(8*n))
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
		p := a
		p.args = append(slices.Clone(a.args), "-test.run=^("+strings.Join(part, "|")+")$")
		parts = append(parts, p)
		if names = rest; len(names) == 0 {
			return parts
		}
	}
}

// runParts runs the parts in their order, n at the same time, and returns the worst exit status. The output
// of a part comes when it has ended, or if it is the only one, at once.
func runParts(parts []testArgs, n int, run func(testArgs, io.Writer) int) int {
	if len(parts) == 1 {
		return run(parts[0], os.Stdout)
	}
	next := make(chan testArgs)
	var mu sync.Mutex // of worst and standard output
	worst := 0
	var workers sync.WaitGroup
	for range n {
		workers.Go(func() {
			for a := range next {
				var out bytes.Buffer
				code := run(a, &out)
				mu.Lock()
				worst = max(worst, code)
				_, _ = out.WriteTo(os.Stdout)
				mu.Unlock()
			}
		})
	}
	for _, a := range parts {
		next <- a
	}
	close(next)
	workers.Wait()
	return worst
}
