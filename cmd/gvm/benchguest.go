package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"gvm/devices/block"
	"gvm/guest/embedded"
	"gvm/machine/disk"
	"gvm/sandbox"
)

func benchGuestCommand() *cli.Command {
	return &cli.Command{
		Name:      "guest",
		Usage:     "measure a disk from inside a guest, beside QEMU",
		ArgsUsage: " ",
		Description: `The embedded guest reads 4 KiB at random places of a disk, with a fixed
number of requests in flight, and learns of completed ones by polling or by
interrupt. The same image does the same work under each QEMU of --qemu: on
the same KVM, with an iothread (from QEMU 10 on by iothread-vq-mapping), with
io_uring and with threads, and with the host's page cache (writeback) and
past it (none). They take turns, in every round. gvm's machine is a gvm run.

Where this host's KVM emulates kernel mode, because there is no hardware
virtualization, the guest runs in user mode, at the processor's speed. Its
interrupts are emulated all the same.

All figures are medians of the rounds, with the lowest and the highest in
brackets; latencies are the guest's own, by its TSC. The last two columns are
gvm's requests per second and median latency, each divided by that VMM's in
the same round; in gvm's own row by the best one of all others.

EXAMPLES
   gvm bench guest
   gvm bench guest --disk /dev/nvme0n1 --rounds 11 --json guest.json
   gvm bench guest --qemu qemu-system-x86_64 --qemu /opt/qemu/bin/qemu
   gvm bench guest --write         writes too, to an image under $TMPDIR`,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "disk",
				Usage: "raw image or block device as `PATH`, which is only read; default: an image under $TMPDIR, " +
					"in the page cache", TakesFile: true},
			&cli.BoolFlag{Name: "write", Usage: "measure writes too, without --disk"},
			&cli.DurationFlag{Name: "time", Value: 300 * time.Millisecond, Usage: "`DURATION` of each measurement"},
			&cli.IntFlag{Name: "rounds", Value: 5, Usage: "measure everything `N` times, in turns"},
			qemuFlag(),
			&cli.StringFlag{Name: "json", Usage: "write every measurement to `FILE`", TakesFile: true},
			plotFlag(),
			pollFlag(),
			sandboxFlag("guest's first instruction"),
		},
		Action: benchAction(parseGuestBench),
	}
}

// guestBench is the command line of `gvm bench guest`.
type guestBench struct {
	disk, json, plot string
	qemu             []string
	write            bool
	time, poll       time.Duration
	rounds           int
	sandbox          sandbox.Mode
}

func parseGuestBench(c *cli.Context) (b guestBench, err error) {
	b = guestBench{disk: c.String("disk"), qemu: wordsOf(c, "qemu"), json: c.String("json"), plot: c.String("plot"),
		write: c.Bool("write"), time: c.Duration("time"), rounds: c.Int("rounds")}
	switch {
	case b.time < time.Millisecond || b.time > time.Minute:
		return b, fmt.Errorf("--time %s: want 1ms to 1m", b.time)
	case b.write && b.disk != "":
		return b, errors.New("--write: would overwrite the disk of --disk; leave one of them out")
	}
	if b.poll, err = parsePoll(c); err != nil {
		return b, err
	}
	if b.sandbox, err = parseSandbox(c); err != nil {
		return b, err
	}
	return b, checkPlot(b.plot)
}

// guestSample is one of the guest's measurements, as in the JSON file.
type guestSample struct {
	VMM           string  `json:"vmm"`       // gvm, or qemu with its I/O mode
	Operation     string  `json:"operation"` // read or write
	Depth         int     `json:"depth"`
	Driver        string  `json:"driver"` // poll or interrupt
	Round         int     `json:"round"`
	IOPS          float64 `json:"iops"`
	P50           float64 `json:"p50_ns"`
	P99           float64 `json:"p99_ns"`
	P999          float64 `json:"p999_ns"`
	Max           float64 `json:"max_ns"`
	Notifications int     `json:"notifications"` // doorbells that the guest rang
	Interrupts    int     `json:"interrupts"`
}

var guestLine = pattern(`(?m)^bench: (read|write) depth (\d+) (poll|interrupt): (\d+) requests in (\d+) us; ` +
	`ns p50 (\d+) p99 (\d+) p999 (\d+) max (\d+); (\d+) notifications, (\d+) interrupts\r?$`)

// guestSamples parses a guest's console, which must contain the whole report.
func guestSamples(vmm string, round int, console []byte) (all []guestSample, err error) {
	if !regexp.MustCompile(`(?m)^PASS\r?$`).Match(console) {
		lines := strings.Split(strings.TrimSpace(string(console)), "\n")
		return nil, fmt.Errorf("bench: the guest of %s did not end well: %s", vmm,
			strings.TrimSpace(lines[len(lines)-1]))
	}
	for _, m := range guestLine().FindAllSubmatch(console, -1) {
		n := func(i int) float64 { v, _ := strconv.ParseFloat(string(m[i]), 64); return v }
		all = append(all, guestSample{
			VMM: vmm, Round: round, Operation: string(m[1]), Depth: int(n(2)), Driver: string(m[3]),
			IOPS: n(4) / n(5) * 1e6, P50: n(6), P99: n(7), P999: n(8), Max: n(9),
			Notifications: int(n(10)), Interrupts: int(n(11)),
		})
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("bench: the guest of %s measured nothing", vmm)
	}
	return all, nil
}

func (b guestBench) run(ctx context.Context, w io.Writer) (err error) {
	record, err := openBenchRecord(b.json)
	if err != nil {
		return err
	}
	defer func() { err = record.close(err) }()
	path, remove, err := benchFile(b.disk)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, remove()) }()
	dir, removeDir, err := benchDir()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, removeDir()) }()
	kernel := filepath.Join(dir, "guest.elf")
	if err := writeNew(kernel, embedded.Image); err != nil {
		return err
	}
	words := fmt.Sprintf("bench bench-ms=%d", b.time.Milliseconds())
	if b.write {
		words += " write"
	}
	gvm, err := b.gvm(kernel, path, words)
	if err != nil {
		return err
	}
	vmms := []contender{{"gvm", gvm}}
	for _, q := range qemus(ctx, b.qemu) {
		for _, cache := range []string{"writeback", "none"} {
			for _, aio := range []string{"io_uring", "threads"} {
				vmms = append(vmms, contender{q.name + " " + aio + " " + cache,
					q.withDisk(kernel, path, words, aio, cache, b.write)})
			}
		}
	}
	var all []guestSample
	_, err = inTurns(ctx, b.rounds, vmms, func(round int, v contender) error {
		console, err := consoleOf(ctx, v.args)
		if err != nil {
			return err
		}
		some, err := guestSamples(v.name, round, console)
		all = append(all, some...)
		return err
	})
	if err != nil {
		return err
	}
	if err := record.write(all); err != nil {
		return err
	}
	if b.plot != "" {
		var panels []benchPanel
		for _, s := range all {
			title := fmt.Sprintf("%s 4 KiB, driver: %s", s.Operation, s.Driver)
			i := slices.IndexFunc(panels, func(p benchPanel) bool { return p.title == title })
			if i < 0 {
				i = len(panels)
				panels = append(panels, benchPanel{title: title})
			}
			panels[i].add(s.VMM, s.Depth, s.IOPS/1e3)
		}
		if err := writeBenchPlot(b.plot, panels); err != nil {
			return err
		}
	}
	return guestTable(w, all)
}

// gvm returns the command line of gvm run with the guest and the disk. It is another process, as a
// sandbox is for one machine.
func (b guestBench) gvm(kernel, path, words string) ([]string, error) {
	option := ",lock=off" // the image is gvm's own, on a file system that may have no locks
	if !b.write {
		option = ",readonly"
	}
	word := strings.ReplaceAll(path, ",", ",,") + option
	d, err := disk.Parse(word)
	if err != nil {
		return nil, usageError{err}
	}
	if d.Storage == disk.Image { // gvm run may print a note before its error
		f, err := block.Open(path, d.ImageOptions())
		if err != nil {
			return nil, disk.ImageError{Err: err}
		}
		if err := f.Close(); err != nil {
			return nil, err
		}
	}
	gvm, err := os.Executable()
	return []string{gvm, "run", "--sandbox=" + b.sandbox.String(), "--memory=512M", "--poll=" + b.poll.String(),
		"--disk", word, "--kernel", kernel, "--bare-cmdline", "--cmdline", words}, err
}

// machinePatience bounds the end of a benchmark's machine by SIGTERM. A benchmark that ends within
// hostPatience leaves none, also if that machine's process is stopped.
const machinePatience = hostPatience / 2

// benchMachine returns the command of a machine that ends with ctx, and with this process if that
// is killed: the thread that starts it is the calling goroutine's from here on.
func benchMachine(ctx context.Context, args []string) *exec.Cmd {
	c := exec.CommandContext(ctx, args[0], args[1:]...)
	c.Cancel = func() error { return c.Process.Signal(syscall.SIGTERM) } // lets the program clean up
	c.WaitDelay = machinePatience
	runtime.LockOSThread()
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return c
}

// consoleOf runs a program that is a machine and returns its console output. The error has the
// first line of the program's standard error and its exit status.
func consoleOf(ctx context.Context, args []string) ([]byte, error) {
	c := benchMachine(ctx, args)
	var errs bytes.Buffer
	c.Stderr = &errs
	out, err := c.Output()
	if err != nil {
		return nil, said(err, errs.String())
	}
	return out, nil
}

// guestTable prints the medians of the rounds.
func guestTable(w io.Writer, all []guestSample) error {
	type load struct {
		operation, driver string
		depth             int
	}
	type turn struct {
		load
		round int
	}
	type row struct {
		load
		vmm string
	}
	turns, rows := map[turn][]guestSample{}, map[row][]guestSample{}
	var loads []load
	var vmms []string
	for _, s := range all {
		l := load{s.Operation, s.Driver, s.Depth}
		t, r := turn{l, s.Round}, row{l, s.VMM}
		turns[t], rows[r] = append(turns[t], s), append(rows[r], s)
		if !slices.Contains(loads, l) {
			loads = append(loads, l)
		}
		if !slices.Contains(vmms, s.VMM) {
			vmms = append(vmms, s.VMM)
		}
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "operation\tdriver\tdepth\tVMM\tkIOPS\t\tp50, µs\tp99, µs\tgvm's IOPS of it\tgvm's p50 of it\t")
	for _, l := range loads {
		for _, vmm := range vmms {
			var iops, p50, p99, more, less []float64
			for _, s := range rows[row{l, vmm}] {
				iops, p50, p99 = append(iops, s.IOPS/1e3), append(p50, s.P50/1e3), append(p99, s.P99/1e3)
				gvm, peer := ratioOf(turns[turn{l, s.Round}], vmm)
				more, less = append(more, gvm.IOPS/peer.IOPS), append(less, gvm.P50/peer.P50)
			}
			ratios := "\t\t"
			if len(vmms) > 1 {
				ratios = fmt.Sprintf("%.2f\t%.2f\t", median(more), median(less))
			}
			m := median(iops)
			fmt.Fprintf(t, "%s\t%s\t%d\t%s\t%.1f\t(%.1f–%.1f)\t%.1f\t%.1f\t%s\n", l.operation, l.driver, l.depth, vmm,
				m, iops[0], iops[len(iops)-1], median(p50), median(p99), ratios)
		}
	}
	return t.Flush()
}

// ratioOf returns gvm's sample of a turn, and the one to divide it by in the row of vmm: its own,
// or in gvm's row the best figures of all others.
func ratioOf(turn []guestSample, vmm string) (gvm, peer guestSample) {
	for _, s := range turn {
		switch {
		case s.VMM == "gvm":
			gvm = s
		case vmm == "gvm":
			peer.IOPS = max(peer.IOPS, s.IOPS)
			if peer.P50 == 0 || s.P50 < peer.P50 {
				peer.P50 = s.P50
			}
		}
		if s.VMM == vmm && vmm != "gvm" {
			peer = s
		}
	}
	return gvm, peer
}
