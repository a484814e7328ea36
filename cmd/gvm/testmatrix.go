package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"gvm/kvmapi/nowait"
	"gvm/machine/disk"
	"gvm/panics"
	"gvm/testrun"
	"gvm/testrun/kubernetes"
	"gvm/testrun/matrix"
	"gvm/text"
)

// matrixFlags are the flags of gvm test that make a matrix, besides several kernels or numbers of
// CPUs.
func matrixFlags() []cli.Flag {
	return append(kubernetesFlags(),
		&cli.StringFlag{Name: "backend", Usage: "serve each --disk by `BACKEND[,BACKEND]...` process, vhost or auto, " +
			"each in a machine of its own"},
		&cli.IntFlag{Name: "repeat", Usage: "run each machine's test `N` times"},
		&cli.IntFlag{Name: "jobs", Aliases: []string{"j"},
			Usage: "run `N` machines at a time (default: by the host's CPUs and free memory)"},
		&cli.IntFlag{Name: "retry", Usage: "run a test whose guest crashed, or was lost before the command, again in a " +
			"fresh machine, `N` times at most"},
		&cli.StringFlag{Name: "output", TakesFile: true,
			Usage: "keep all output, logs and verdicts in the new or empty `DIR`"},
		&cli.StringFlag{Name: "junit", TakesFile: true, Usage: "write all verdicts as JUnit into `FILE`"},
		&cli.StringFlag{Name: "results", TakesFile: true, Usage: "write all verdicts as JSON into `FILE`"},
	)
}

// matrixConfig describes the matrix of gvm test.
type matrixConfig struct {
	axes           matrix.Axes
	disks          []string // as given
	jobs, retry    int
	dir            string // --output
	junit, results outputFile
	cell           int // --cell; -1: all
	message        outputFile
	begun          atomic.Int64 // machines
}

// parseCPUs reads --cpus.
func parseCPUs(s string) (list []int, err error) {
	for word := range strings.SplitSeq(s, ",") {
		n, err := strconv.Atoi(word)
		if err != nil {
			return nil, fmt.Errorf("--cpus %q: want a number, or several apart by commas", s)
		}
		if n < 1 {
			return nil, fmt.Errorf("--cpus %d: want 1 or more", n)
		}
		if slices.Contains(list, n) {
			return nil, fmt.Errorf("--cpus %s: has %d twice", s, n)
		}
		list = append(list, n)
	}
	return list, nil
}

// parseMatrix reads the flags of a matrix; nil without any, and with one kernel and number of CPUs
// at most.
func (t *testConfig) parseMatrix(c *cli.Context, kernels []string, cpus []int, host hostLimits) (*matrixConfig, error) {
	given := func(flag string) bool { return slices.Contains(c.LocalFlagNames(), flag) }
	if len(kernels) < 2 && len(cpus) < 2 && !slices.ContainsFunc(matrixFlags(), func(f cli.Flag) bool {
		return given(f.Names()[0])
	}) {
		return nil, nil
	}
	m := &matrixConfig{
		axes:    matrix.Axes{Kernels: text.Names(kernels), CPUs: cpus, Backends: []string{""}, Rounds: 1},
		disks:   wordsOf(c, "disk"),
		jobs:    c.Int("jobs"),
		retry:   c.Int("retry"),
		dir:     c.String("output"),
		junit:   outputFile{flag: "--junit", path: c.String("junit")},
		results: outputFile{flag: "--results", path: c.String("results")},
		cell:    -1,
		message: outputFile{flag: "--message", path: c.String("message")},
	}
	if given("cell") {
		m.cell = c.Int("cell")
	}
	if given("repeat") {
		m.axes.Rounds = c.Int("repeat")
	}
	switch {
	case m.axes.Rounds < 1:
		return nil, fmt.Errorf("--repeat %d: want 1 or more", m.axes.Rounds)
	case given("jobs") && m.jobs < 1:
		return nil, fmt.Errorf("--jobs %d: want 1 or more", m.jobs)
	case given("cell") && m.cell < 0:
		return nil, fmt.Errorf("--cell %d: want 0 or more", m.cell)
	case given("message") && !given("cell"):
		return nil, errors.New("--message has the verdict of one cell: choose it with --cell")
	case m.retry < 0:
		return nil, fmt.Errorf("--retry %d: want 0 or more", m.retry)
	case len(t.args) == 0:
		return nil, errors.New("several machines have no terminal for a shell: give a COMMAND")
	}
	for _, o := range []struct{ flag, instead string }{
		{"tty", "its machines have no terminal"},
		{"timing", "--results has the times of each machine"},
		{"verdict", "--results FILE has all verdicts, and --output DIR each in a file"},
		{"klog", "--output DIR has the log of each machine"},
	} {
		if given(o.flag) {
			return nil, fmt.Errorf("--%s is for one machine without --repeat and the like: %s", o.flag, o.instead)
		}
	}
	if given("backend") {
		if len(m.disks) == 0 {
			return nil, errors.New("--backend needs a --disk")
		}
		m.axes.Backends = strings.Split(c.String("backend"), ",")
		if slices.Contains(m.axes.Backends, "") {
			return nil, fmt.Errorf("--backend %s: want process, vhost or auto, or several apart by commas",
				text.Word(c.String("backend")))
		}
	}
	if given("emit") {
		for _, flag := range []string{"cell", "message", "output", "junit", "results"} {
			if given(flag) {
				return nil, fmt.Errorf("--emit runs nothing: give --%s where a cell runs, or --junit and --results with --collect",
					flag)
			}
		}
	}
	for i, b := range m.axes.Backends {
		if slices.Contains(m.axes.Backends[:i], b) {
			return nil, fmt.Errorf("--backend %s: has %s twice", c.String("backend"), b)
		}
		if _, err := m.parseDisks(b); err != nil {
			return nil, err
		}
	}
	if given("emit") { // each pod runs one machine
		return m, nil
	}
	return m, m.setJobs(t, host)
}

// parseDisks reads the disks of a cell with a backend.
func (m *matrixConfig) parseDisks(backend string) (all []disk.Spec, _ error) {
	for _, s := range m.disks {
		if backend != "" {
			s += ",backend=" + backend
		}
		d, err := disk.Parse(s)
		if err != nil {
			return nil, err
		}
		all = append(all, d)
	}
	return all, nil
}

// setJobs checks the number of machines that run at a time, and sets it if it is 0: a guest's CPUs
// and memory must be free for each.
func (m *matrixConfig) setJobs(t *testConfig, h hostLimits) error {
	alone := ""
	for _, d := range t.spec.Disks {
		if d.Storage == disk.Image && !d.ReadOnly && d.Overlay != disk.OverlayOn {
			alone = d.Name()
		}
	}
	if alone != "" && m.jobs > 1 {
		return fmt.Errorf("--disk %s: machines at the same time cannot share it; give it overlay=on or readonly, or --jobs 1",
			text.Printable(alone))
	}
	if m.jobs == 0 && alone == "" {
		free := h.kibibytes("proc/meminfo", "MemAvailable:")
		if limits := h.memoryLimits(t.spec.Memory); len(limits) > 0 {
			free = min(free, limits[0].bytes)
		}
		m.jobs = min(runtime.NumCPU()/t.spec.CPUs, int(free/t.spec.Memory.Size))
	}
	m.jobs = min(max(1, m.jobs), matrix.MaxCells)
	var err error
	t.threadNote, err = checkThreads(&t.spec, m.jobs, h)
	return err
}

// testMatrix runs the matrix and prints its table.
func (t *testConfig) testMatrix(w io.Writer) error {
	m := t.matrix
	fail := func(err error) error { return endError{exitUntested, err} }
	if len(m.axes.Kernels) == 0 {
		if err := t.chooseKernel(); err != nil {
			return fail(err)
		}
		m.axes.Kernels = []text.Name{text.Name(t.kernel)}
	}
	cells, err := m.axes.Cells()
	if err == nil && m.cell >= len(cells) {
		err = fmt.Errorf("--cell %d: the matrix has %s, from 0", m.cell, text.Count(len(cells), "cell"))
	}
	if err != nil {
		return fail(err)
	}
	if m.cell >= 0 {
		cells = cells[m.cell : m.cell+1]
	}
	t.hostNotes(note)
	_, err = within(t.timeout, endOfTest(t.timeout), func() (struct{}, error) { return struct{}{}, m.open() })
	if err != nil {
		return notTested(err)
	}
	defer m.junit.close()
	defer m.results.close()
	defer m.message.close()
	ctx, stop := context.WithCancelCause(context.Background())
	defer stop(nil)
	ctx = nowait.WithOneEnd(ctx)
	defer catchSignals(ctx, stop)()
	if err := t.readAllow(ctx); err != nil {
		end := endError{status: exitUntested}
		errors.As(err, &end)
		return endError{end.status, err}
	}
	p := newProgress(len(cells))
	all := matrix.Run(ctx, matrix.Config{
		Cells: cells, Jobs: m.jobs, Retry: m.retry, Began: p.began, Ended: p.ended,
		Run: func(ctx context.Context, c matrix.Cell, attempt int) matrix.Attempt {
			return t.attempt(ctx, c, attempt, p)
		},
	})
	p.close()
	end := endError{status: matrix.Status(all)}
	errors.As(context.Cause(ctx), &end)
	if m.message.path != "" {
		end.status = podStatus(&all[0], end.status)
	}
	return m.report(ctx, w, all, end)
}

// readAllow reads the file of --allow for all cells.
func (t *testConfig) readAllow(ctx context.Context) error {
	ctx, stop := t.timed(ctx, 0)
	defer stop()
	_, err := t.allow.read(ctx)
	return err
}

// report writes the files and the table of all cells. It returns end, or without an error in it
// that of cells that did not pass. From the end of ctx on it does not wait for readers.
func (m *matrixConfig) report(ctx context.Context, w io.Writer, all []matrix.Done, end endError) error {
	defer endWithin(ctx, hostPatience, func() {})()
	hurried := context.AfterFunc(ctx, panics.Func(func() {
		for _, o := range []*outputFile{&m.junit, &m.results, &m.message} {
			o.endSoon(nowait.Left(ctx, patience))
		}
	}))
	err := errors.Join(
		m.junit.fill(func(w io.Writer) error { return matrix.JUnit(w, all) }),
		m.results.fill(func(w io.Writer) error { return matrix.JSON(w, all, end.status) }),
		m.message.fill(func(w io.Writer) error { return kubernetes.Message(w, all[0]) }))
	hurried()
	defer endWithin(ctx, patience, func() {})()
	if err = errors.Join(err, matrix.Table(w, all)); err != nil {
		return endError{exitUntested, err}
	}
	if end.status == 0 {
		return nil
	}
	if end.error == nil {
		end.error = fmt.Errorf("not all cells passed: %s", matrix.Count(all))
	}
	return end
}

// open makes the directory and opens the files for the results.
func (m *matrixConfig) open() error {
	made, err := m.makeDir()
	if err != nil {
		return err
	}
	err = openOutputs(&m.junit, &m.results, &m.message)
	if err != nil && made {
		err = errors.Join(err, os.Remove(m.dir))
	}
	return err
}

// makeDir makes the directory of --output, and reports whether it did. Files of an earlier run must
// not be taken for those of this one.
func (m *matrixConfig) makeDir() (made bool, err error) {
	if m.dir == "" {
		return false, nil
	}
	if err = os.Mkdir(m.dir, 0o777); err == nil {
		return true, nil
	}
	if errors.Is(err, os.ErrExist) {
		if err = checkDir(m.dir, unix.R_OK|unix.W_OK|unix.X_OK); err == nil {
			var list []os.DirEntry
			if list, err = os.ReadDir(m.dir); err == nil && len(list) > 0 {
				err = fmt.Errorf("%s: is not empty; name a new directory", m.dir)
			}
		}
	} else {
		err = nowait.CreateError(m.dir, err)
	}
	if err != nil {
		err = fmt.Errorf("--output: %w", err)
	}
	return false, err
}

// attempt runs a cell in a fresh machine.
func (t *testConfig) attempt(ctx context.Context, c matrix.Cell, n int, p *progress) matrix.Attempt {
	name := c.Name
	if n > 0 {
		name += fmt.Sprintf("-retry%d", n)
	}
	order := &cellOrder{Cell: c, Name: name, Machine: fmt.Sprintf("gvm-%d-%d", os.Getpid(), t.matrix.begun.Add(1)),
		Allow: t.allow.text}
	for _, d := range t.spec.Disks {
		order.Waiting = append(order.Waiting, d.Waiting)
	}
	for _, s := range t.spec.Shares {
		order.Requests = append(order.Requests, s.Requests)
	}
	end := t.runProcess(ctx, order, func(s string) { p.note(name, s) })
	res := end.Result
	if t.bisect {
		res.Bisect()
	}
	if t.matrix.dir != "" {
		path, written := filepath.Join(t.matrix.dir, name+".verdict.json"), res // the write may outlast this call
		_, err := nowait.Until(ctx, func() string { return path + " was written" },
			func() (struct{}, error) { return struct{}{}, writeVerdict(path, written) }, func(struct{}) {})
		if err != nil {
			res = untested(fmt.Errorf("--output: %w", err))
		}
	}
	a := matrix.Attempt{Result: res}
	if !a.Passed() && res.Kind != testrun.Stopped {
		p.say(section("gvm: "+name+": ", "the end of standard output:", end.Out) +
			section("gvm: "+name+": ", "the end of standard error:", end.Errs) +
			explain("gvm: "+name+": ", res))
		a.Output = slices.Concat(end.Out, end.Errs)
	}
	return a
}

func writeVerdict(path string, res *testrun.Result) error {
	o := outputFile{flag: "--output", path: path}
	if err := openOutputs(&o); err != nil {
		return err
	}
	return errors.Join(o.fill(res.JSON), o.close())
}

// cellOutput is the output of a cell: its ends in memory, and all of it in files.
type cellOutput struct {
	path      string // of the files without their suffixes; "": none
	out, errs tail
}

// connect gives a run the streams, without an input, and the files. The returned function closes
// them.
func (o *cellOutput) connect(cfg *testrun.Config) (func(), error) {
	cfg.Stdout, cfg.Stderr = &o.out, &o.errs
	if o.path == "" {
		return func() {}, nil
	}
	var files []*os.File
	closeAll := func() {
		for _, f := range files {
			f.Close()
		}
	}
	for _, suffix := range []string{".out", ".err", ".klog"} {
		f, err := nowait.Open(o.path+suffix, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666, nowait.Regular)
		if err != nil {
			closeAll()
			return nil, fmt.Errorf("--output: %w", err)
		}
		files = append(files, f)
	}
	cfg.Stdout, cfg.Stderr, cfg.Log = io.MultiWriter(&o.out, files[0]), io.MultiWriter(&o.errs, files[1]), files[2]
	return closeAll, nil
}

// Bounds of the end of an output.
const (
	tailBytes = 8 << 10
	tailLines = 20
)

// tail is the end of an output.
type tail struct {
	mu sync.Mutex
	b  []byte
}

// Write keeps the end of the output; it does not fail.
func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, p[max(0, len(p)-tailBytes):]...)
	if n := len(t.b) - tailBytes; n > tailBytes {
		t.b = append(t.b[:0], t.b[n:]...)
	}
	return len(p), nil
}

// lines returns the last lines.
func (t *tail) lines() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := strings.TrimRight(string(t.b[max(0, len(t.b)-tailBytes):]), "\n")
	if s == "" {
		return nil
	}
	all := strings.Split(s, "\n")
	return all[max(0, len(all)-tailLines):]
}

// progress tells of the cells on standard error: a line for each that ended, and on a terminal a
// last line, rewritten, with those that run.
type progress struct {
	terminal bool
	total    int

	mu      sync.Mutex
	done    int
	failed  int
	running []string
	noted   map[string]bool
}

func newProgress(total int) *progress {
	return &progress{total: total, noted: map[string]bool{}, terminal: term.IsTerminal(int(os.Stderr.Fd()))}
}

// clearLine empties the terminal's line.
const clearLine = "\r\x1b[K"

// say prints whole lines above the last one.
func (p *progress) say(lines string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sayLocked(lines)
}

func (p *progress) sayLocked(lines string) {
	if p.terminal {
		columns, _, err := term.GetSize(int(os.Stderr.Fd()))
		if err != nil || columns < 2 {
			columns = 80
		}
		line := fmt.Sprintf("%d/%d done, %d not passed; running: %s", p.done, p.total, p.failed, strings.Join(p.running, " "))
		lines = clearLine + lines + line[:min(len(line), columns-1)]
	}
	if lines != "" {
		stderr.say(lines)
	}
}

// maxNoted bounds the notes that are remembered.
const maxNoted = 256

// note tells of a cell, once for all cells with the same note.
func (p *progress) note(name, s string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.noted[s] {
		return
	}
	if len(p.noted) < maxNoted {
		p.noted[s] = true
	}
	p.sayLocked("gvm: " + text.Printable(name+": "+s) + "\n")
}

func (p *progress) began(c matrix.Cell) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.running = append(p.running, c.Name)
	p.sayLocked("")
}

func (p *progress) ended(d *matrix.Done) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.done++
	if !d.Passed() {
		p.failed++
	}
	p.running = slices.DeleteFunc(p.running, func(name string) bool { return name == d.Name })
	line := fmt.Sprintf("gvm: %d/%d %s: %s in %.1f s", p.done, p.total, d.Name, d.Verdict(), d.Took.Seconds())
	if reason := d.Reason(); reason != "" {
		line += ": " + reason
	}
	p.sayLocked(line + "\n")
}

// close removes the last line. Standard output may be the same terminal.
func (p *progress) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.terminal {
		stderr.say(clearLine)
		stderr.flush(patience)
	}
}
