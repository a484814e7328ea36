package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"gvm/guest/embedded"
	"gvm/panics"
)

func benchFootprintCommand() *cli.Command {
	return &cli.Command{
		Name:      "footprint",
		Usage:     "measure a machine's use of the host, beside QEMU's",
		ArgsUsage: " ",
		Description: `The embedded guest boots and waits for input that does not come, with 512 MiB
of RAM and one disk: under gvm, and in turns under q35 of each QEMU of
--qemu. Some seconds later:

   ready     from exec to the guest's first word after its checks
   CPU       that all threads have used until then
   RSS, PSS  resident memory without the guest's RAM, and without the part
             that others share
   threads, and the program's size

The last three columns are gvm's time, CPU and PSS, each divided by that
VMM's in the same round.

Then --guests machines of gvm's wait at the same time, and the last line says
which part of this host's CPUs they use in all.

EXAMPLES
   gvm bench footprint
   gvm bench footprint --guests 1000 --time 1m`,
		Flags: []cli.Flag{
			&cli.IntFlag{Name: "guests", Value: 100, Usage: "`N` guests that wait at the same time, 0 for none"},
			&cli.DurationFlag{Name: "time", Value: 10 * time.Second, Usage: "watch them for `DURATION`"},
			&cli.IntFlag{Name: "rounds", Value: 5, Usage: "measure one machine of each kind `N` times, in turns"},
			qemuFlag(),
			&cli.StringFlag{Name: "json", Usage: "write every measurement to `FILE`", TakesFile: true},
		},
		Action: benchAction(parseFootprint),
	}
}

// footprintBench is the command line of `gvm bench footprint`.
type footprintBench struct {
	guests, rounds int
	time           time.Duration
	qemu           []string
	json           string
}

func parseFootprint(c *cli.Context) (b footprintBench, err error) {
	b = footprintBench{guests: c.Int("guests"), rounds: c.Int("rounds"), time: c.Duration("time"),
		qemu: wordsOf(c, "qemu"), json: c.String("json")}
	switch {
	case b.guests < 0 || b.guests > 10000:
		return b, fmt.Errorf("--guests %d: want 0 to 10000", b.guests)
	case b.time < 10*time.Millisecond || b.time > time.Hour:
		return b, fmt.Errorf("--time %s: want 10ms to 1h", b.time)
	}
	return b, nil
}

// footprint is one machine, as in the JSON file.
type footprint struct {
	VMM     string  `json:"vmm"`
	Round   int     `json:"round"`
	Ready   float64 `json:"ready_ms"` // since exec
	CPU     float64 `json:"cpu_ms"`   // until ready
	RSS     float64 `json:"rss_mib"`  // without the guest's RAM
	PSS     float64 `json:"pss_mib"`
	Threads int     `json:"threads"`
	Program float64 `json:"program_mib"`
}

// idle describes many waiting machines, as in the JSON file.
type idle struct {
	Guests  int     `json:"guests"`
	Seconds float64 `json:"seconds"`
	CPU     float64 `json:"cpu_percent"` // of all of this host's CPUs
}

const (
	footprintRAM = 512 << 20
	footprintSet = 2 * time.Second // wait before measuring a machine: longer than gvm takes to settle
)

func (b footprintBench) run(ctx context.Context, w io.Writer) (err error) {
	record, err := openBenchRecord(b.json)
	if err != nil {
		return err
	}
	defer func() { err = record.close(err) }()
	dir, remove, err := benchDir()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, remove()) }()
	kernel, disk := filepath.Join(dir, "guest.elf"), filepath.Join(dir, "disk.img")
	if err := errors.Join(writeNew(kernel, embedded.Image), fillImage(disk, 16<<20)); err != nil {
		return err
	}
	gvm, err := os.Executable() // not package machine: the measure is of a process
	if err != nil {
		return err
	}
	// The sandbox keeps the user from reading smaps, and its broker is another process.
	vmms := []contender{{"gvm", []string{gvm, "run", "--sandbox=off", "--guest-arg", "echo", "--disk", disk}}}
	for _, q := range qemus(ctx, b.qemu) {
		vmms = append(vmms, contender{q.name, q.withDisk(kernel, disk, "echo", "io_uring", "writeback", false)})
	}
	var all []footprint
	vmms, err = inTurns(ctx, b.rounds, vmms, func(round int, v contender) error {
		f, err := measureFootprint(ctx, v)
		if err != nil {
			return err
		}
		f.Round = round
		all = append(all, f)
		return nil
	})
	if err != nil {
		return err
	}
	var many *idle
	if b.guests > 0 {
		if many, err = b.idle(ctx, gvm); err != nil {
			return err
		}
	}
	if err := record.write(struct {
		Machines []footprint `json:"machines"`
		Idle     *idle       `json:"idle,omitempty"`
	}{all, many}); err != nil {
		return err
	}
	return footprintTable(w, vmms, all, many)
}

// waiting is a machine whose guest waits for input.
type waiting struct {
	c            *exec.Cmd
	stdin        io.Closer
	errs         bytes.Buffer
	first, ready time.Duration // since exec: the first line on the console, and the line with the text
}

// startWaiting starts a machine and returns once a line on its console has the text. The machine
// inherits files from descriptor 3 on.
func startWaiting(ctx context.Context, args []string, text string, files ...*os.File) (_ *waiting, err error) {
	m := &waiting{c: benchMachine(ctx, args)}
	m.c.Stderr = &m.errs
	m.c.ExtraFiles = files
	if m.stdin, err = m.c.StdinPipe(); err != nil {
		return nil, err
	}
	console, err := m.c.StdoutPipe()
	if err != nil {
		return nil, err
	}
	start := time.Now()
	if err := m.c.Start(); err != nil {
		return nil, err
	}
	for lines := bufio.NewReader(console); ; {
		line, err := lines.ReadString('\n')
		if err != nil {
			break
		}
		if m.ready = time.Since(start); m.first == 0 {
			m.first = m.ready
		}
		if strings.Contains(line, text) {
			panics.Go(func() { io.Copy(io.Discard, lines) }) // drains the rest of the output until it ends
			return m, nil
		}
	}
	err = said(m.c.Wait(), m.errs.String())
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return nil, err
}

// stop ends the machine. Its death by stop's signal is not an error.
func (m *waiting) stop() error {
	err := m.c.Process.Signal(syscall.SIGTERM)
	_ = m.stdin.Close()
	var exit *exec.ExitError
	if err2 := m.c.Wait(); err2 != nil && !errors.As(err2, &exit) {
		err = errors.Join(err, err2)
	}
	return err
}

func measureFootprint(ctx context.Context, v contender) (f footprint, err error) {
	m, err := startWaiting(ctx, v.args, "ready")
	if err != nil {
		return f, err
	}
	defer func() { err = errors.Join(err, m.stop()) }()
	pid := m.c.Process.Pid
	f = footprint{VMM: v.name, Ready: float64(m.ready.Microseconds()) / 1e3}
	cpu, err := cpuOf(pid)
	if err != nil {
		return f, err
	}
	f.CPU = float64(cpu.Microseconds()) / 1e3
	select {
	case <-ctx.Done():
		return f, context.Cause(ctx)
	case <-time.After(footprintSet):
	}
	tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		return f, err
	}
	f.Threads = len(tasks)
	smaps, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		return f, err
	}
	rss, pss := besideRAM(smaps)
	f.RSS, f.PSS = float64(rss)/(1<<20), float64(pss)/(1<<20)
	size, err := programSize(smaps)
	f.Program = float64(size) / (1 << 20)
	return f, err
}

// programSize returns the size in bytes of the largest file of a process's code. The file that exec
// got may be a script or the dynamic linker.
func programSize(smaps []byte) (size int64, err error) {
	for line := range strings.Lines(string(smaps)) {
		if m := mappedCode().FindStringSubmatch(line); m != nil {
			fi, err := os.Stat(m[1])
			if err != nil {
				return 0, err
			}
			size = max(size, fi.Size())
		}
	}
	return size, nil
}

var mappedCode = pattern(`^[0-9a-f]+-[0-9a-f]+ ..x. \S+ \S+ \d+ +(/.*)\n`)

// besideRAM sums smaps (proc_pid_smaps(5)) in bytes, without mappings as large as the guest's RAM.
func besideRAM(smaps []byte) (rss, pss int64) {
	counts := false
	for line := range strings.Lines(string(smaps)) {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		if from, to, ok := strings.Cut(fields[0], "-"); ok {
			a, err := strconv.ParseUint(from, 16, 64)
			b, err2 := strconv.ParseUint(to, 16, 64)
			counts = err == nil && err2 == nil && b-a < footprintRAM
			continue
		}
		n, err := strconv.ParseInt(fields[1], 10, 64)
		if err != nil || !counts {
			continue
		}
		switch fields[0] {
		case "Rss:":
			rss += n << 10
		case "Pss:":
			pss += n << 10
		}
	}
	return rss, pss
}

// cpuOf sums the CPU time of a process's present threads.
func cpuOf(pid int) (sum time.Duration, err error) {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err != nil {
		return 0, err
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			continue // the thread has ended
		}
		if err != nil {
			return 0, err
		}
		word, _, _ := strings.Cut(string(b), " ")
		n, err := strconv.ParseInt(word, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", f, err)
		}
		sum += time.Duration(n)
	}
	if len(files) == 0 {
		return 0, fmt.Errorf("process %d has ended", pid)
	}
	return sum, nil
}

// idle measures many machines that wait at the same time.
func (b footprintBench) idle(ctx context.Context, gvm string) (_ *idle, err error) {
	var all []*waiting
	defer func() {
		for _, m := range all {
			err = errors.Join(err, m.stop())
		}
	}()
	for range b.guests {
		m, err := startWaiting(ctx, []string{gvm, "run", "--memory", "64M", "--disk", "mem:16M",
			"--guest-arg", "echo"}, "ready")
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if err != nil {
			return nil, fmt.Errorf("machine %d of %d: %w", len(all)+1, b.guests, err)
		}
		all = append(all, m)
	}
	sleep := func(d time.Duration) bool {
		select {
		case <-ctx.Done():
			return false
		case <-time.After(d):
			return true
		}
	}
	used := func() (sum time.Duration, err error) {
		for _, m := range all {
			d, err := cpuOf(m.c.Process.Pid)
			if err != nil {
				return 0, err
			}
			sum += d
		}
		return sum, nil
	}
	if !sleep(footprintSet) {
		return nil, context.Cause(ctx)
	}
	before, err := used()
	if err != nil {
		return nil, err
	}
	start := time.Now()
	if !sleep(b.time) {
		return nil, context.Cause(ctx)
	}
	took := time.Since(start)
	after, err := used()
	if err != nil {
		return nil, err
	}
	return &idle{Guests: b.guests, Seconds: took.Seconds(),
		CPU: 100 * (after - before).Seconds() / took.Seconds() / float64(runtime.NumCPU())}, nil
}

func footprintTable(w io.Writer, vmms []contender, all []footprint, many *idle) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "VMM\tready, ms\t\tCPU, ms\tRSS, MiB\tPSS, MiB\tthreads\tprogram, MiB\t"+
		"gvm's time of it\tCPU\tPSS\t")
	for _, v := range vmms {
		pick := func(f func(footprint) float64) []float64 {
			var list []float64
			for _, s := range all {
				if s.VMM == v.name {
					list = append(list, f(s))
				}
			}
			slices.Sort(list)
			return list
		}
		median := func(f func(footprint) float64) float64 { return median(pick(f)) }
		of := "\t\t\t"
		if v.name != "gvm" {
			ratio := func(f func(footprint) float64) float64 {
				return median(func(s footprint) float64 {
					i := slices.IndexFunc(all, func(o footprint) bool { return o.VMM == "gvm" && o.Round == s.Round })
					return f(all[i]) / f(s)
				})
			}
			of = fmt.Sprintf("%.3f\t%.3f\t%.3f\t", ratio(func(f footprint) float64 { return f.Ready }),
				ratio(func(f footprint) float64 { return f.CPU }), ratio(func(f footprint) float64 { return f.PSS }))
		}
		ready := pick(func(f footprint) float64 { return f.Ready })
		fmt.Fprintf(t, "%s\t%.1f\t(%.1f–%.1f)\t%.1f\t%.1f\t%.1f\t%.0f\t%.1f\t%s\n",
			v.name, ready[len(ready)/2], ready[0], ready[len(ready)-1],
			median(func(f footprint) float64 { return f.CPU }), median(func(f footprint) float64 { return f.RSS }),
			median(func(f footprint) float64 { return f.PSS }),
			median(func(f footprint) float64 { return float64(f.Threads) }),
			median(func(f footprint) float64 { return f.Program }), of)
	}
	if err := t.Flush(); err != nil || many == nil {
		return err
	}
	_, err := fmt.Fprintf(w, "%d waiting guests use %.3f %% of this host's CPUs\n", many.Guests, many.CPU)
	return err
}
