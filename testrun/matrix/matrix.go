// Package matrix runs a test in many machines: a cell for each kernel, number of CPUs, backend of
// the disks and round, some at a time. It retries cells whose guest was lost, and makes a table,
// JUnit and JSON of the verdicts.
//
// The package prints nothing and reads no flags.
package matrix

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"gvm/panics"
	"gvm/testrun"
	"gvm/text"
)

// Axes are the dimensions of a matrix. Each has a value at least.
type Axes struct {
	Kernels  []text.Name `json:"kernels"`
	CPUs     []int       `json:"cpus"`
	Backends []string    `json:"backends"` // of the disks; "": each disk's own
	Rounds   int         `json:"rounds"`
}

// Cell is a test in one machine.
type Cell struct {
	Name    string    `json:"name"` // unique, also as the name of a file
	Kernel  text.Name `json:"kernel"`
	CPUs    int       `json:"cpus"`
	Backend string    `json:"backend,omitempty"`
	Round   int       `json:"round"` // from 1
}

// MaxCells bounds the cells of a matrix.
const MaxCells = 10000

// Cells returns the cells. Their names have the kernel, and each axis that has several values.
func (a Axes) Cells() ([]Cell, error) {
	perRound := len(a.Kernels) * len(a.CPUs) * len(a.Backends)
	if perRound == 0 || a.Rounds < 1 {
		return nil, errors.New("no cells: want a value or more of each axis")
	}
	if perRound > MaxCells || a.Rounds > MaxCells/perRound {
		return nil, fmt.Errorf("--repeat %d of %s: want %d cells at most", a.Rounds, text.Count(perRound, "cell"),
			MaxCells)
	}
	cells := make([]Cell, 0, perRound*a.Rounds)
	labels := kernelLabels(a.Kernels)
	for k, kernel := range a.Kernels {
		for _, cpus := range a.CPUs {
			for _, backend := range a.Backends {
				for round := 1; round <= a.Rounds; round++ {
					name := labels[k]
					if len(a.CPUs) > 1 {
						name += fmt.Sprintf("-cpus%d", cpus)
					}
					if len(a.Backends) > 1 {
						name += "-" + backend
					}
					if a.Rounds > 1 { // in the order of names
						name += fmt.Sprintf("-run%0*d", len(strconv.Itoa(a.Rounds)), round)
					}
					cells = append(cells, Cell{name, kernel, cpus, backend, round})
				}
			}
		}
	}
	return cells, nil
}

// maxLabel bounds a kernel's part of a cell's name, which is also that of a file.
const maxLabel = 150

// kernelLabels returns unique names for kernels: the last elements of their paths, or all of them
// if two are equal.
func kernelLabels(kernels []text.Name) []string {
	label := func(s string) string {
		s = regexp.MustCompile(`[^A-Za-z0-9._+]+`).ReplaceAllString(s, "-")
		return strings.TrimLeft(s[max(0, len(s)-maxLabel):], "-.")
	}
	labels := make([]string, len(kernels))
	for i, k := range kernels {
		labels[i] = label(filepath.Base(string(k)))
	}
	if sorted := slices.Sorted(slices.Values(labels)); len(slices.Compact(sorted)) < len(labels) {
		for i, k := range kernels {
			labels[i] = label(string(k))
		}
	}
	taken, next := map[string]bool{"": true}, map[string]int{} // the same kernel may be given MaxCells times
	for i, name := range labels {
		for taken[labels[i]] {
			next[name]++
			labels[i] = fmt.Sprintf("%s-k%d", name, next[name]+1)
		}
		taken[labels[i]] = true
	}
	return labels
}

// Attempt is a run of a cell in one machine.
type Attempt struct {
	Result *testrun.Result `json:"verdict"`
	Output []string        `json:"output,omitempty"` // the end of the command's output, of an attempt that did not pass
}

// Passed reports whether the command ended with status 0.
func (a Attempt) Passed() bool { return a.Result.Kind == testrun.Exited && a.Result.Status == 0 }

// Done is a cell that has ended, or was not run.
type Done struct {
	Cell
	Attempts []Attempt     `json:"attempts"` // the last one counts; none: the cell was not run
	Took     time.Duration `json:"took_ns"`
}

// Result returns the cell's verdict, or nil if it was not run.
func (d *Done) Result() *testrun.Result {
	if len(d.Attempts) == 0 {
		return nil
	}
	return d.Attempts[d.Retries()].Result
}

// Passed reports whether the last attempt passed.
func (d *Done) Passed() bool { return len(d.Attempts) > 0 && d.Attempts[d.Retries()].Passed() }

// Retries returns the number of attempts before the one that counts.
func (d *Done) Retries() int { return max(0, len(d.Attempts)-1) }

// Config describes the run of a matrix.
type Config struct {
	Cells []Cell
	Jobs  int // cells that run at a time
	Retry int // the most retries of a cell whose guest was lost

	// Run runs a cell in a fresh machine; attempt counts from 0. It ends soon when ctx is done.
	Run func(ctx context.Context, c Cell, attempt int) Attempt
	// Began and Ended take the cells that begin and end, one at a time.
	Began func(Cell)
	Ended func(*Done)
}

// Run runs the cells in their order, until ctx is done, and returns all of them in the same order.
func Run(ctx context.Context, cfg Config) []Done {
	all := make([]Done, len(cfg.Cells))
	for i, c := range cfg.Cells {
		all[i].Cell = c
	}
	var mu sync.Mutex // for next, Began and Ended
	next := 0
	take := func() *Done {
		mu.Lock()
		defer mu.Unlock()
		if next == len(all) || ctx.Err() != nil {
			return nil
		}
		next++
		cfg.Began(all[next-1].Cell)
		return &all[next-1]
	}
	var workers sync.WaitGroup
	for range min(cfg.Jobs, len(all)) {
		workers.Go(panics.Func(func() {
			for d := take(); d != nil; d = take() {
				start := time.Now()
				for more := true; more; {
					a := cfg.Run(ctx, d.Cell, len(d.Attempts))
					d.Attempts = append(d.Attempts, a)
					more = lost(a.Result) && len(d.Attempts) <= cfg.Retry && ctx.Err() == nil
				}
				d.Took = time.Since(start)
				mu.Lock()
				cfg.Ended(d)
				mu.Unlock()
			}
		}))
	}
	workers.Wait()
	return all
}

// lost reports whether the guest crashed, or ran and ended without a word of its agent, so that
// another try may tell of the command. A panic is a verdict on the kernel.
func lost(r *testrun.Result) bool {
	switch r.Kind {
	case testrun.Crash:
		return true
	case testrun.NotTested, testrun.Hang, testrun.Timeout:
		return r.Rung == "" && r.Times.Entered > 0
	}
	return false
}
