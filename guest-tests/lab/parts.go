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

// divide returns the arguments for up to n runs at the same time, each of a part of the tests. A run that
// writes files, such as profiles, and one of benchmarks, of fuzzing, or of chosen subtests is not divided.
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
	return a.share(testName.FindAllString(string(out), -1), n), nil
}

// share gives each of n runs a part of the tests: each n-th one, as neighbours take about the same time.
func (a testArgs) share(names []string, n int) (parts []testArgs) {
	for i := range min(n, max(len(names), 1)) {
		var part []string
		for j := i; j < len(names); j += n {
			part = append(part, names[j])
		}
		p := a
		p.args = append(slices.Clone(a.args), "-test.run=^("+strings.Join(part, "|")+")$")
		parts = append(parts, p)
	}
	return parts
}

// runParts runs the parts at the same time, and returns the worst exit status. The output of the first
// one comes at once, and that of the others when it has ended.
func runParts(parts []testArgs, run func(testArgs, io.Writer) int) (worst int) {
	codes, outs := make([]int, len(parts)), make([]bytes.Buffer, len(parts))
	var runs sync.WaitGroup
	for i, a := range parts {
		var to io.Writer = os.Stdout
		if i > 0 {
			to = &outs[i]
		}
		runs.Go(func() { codes[i] = run(a, to) })
	}
	runs.Wait()
	for i := range outs {
		_, _ = outs[i].WriteTo(os.Stdout)
	}
	return slices.Max(codes)
}
