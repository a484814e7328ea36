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
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"gvm/guest/embedded"
)

func benchGuestCommand() *cli.Command {
	return &cli.Command{
		Name:      "guest",
		Usage:     "measure a disk from inside a guest, beside QEMU",
		ArgsUsage: " ",
		Description: `The embedded guest reads 4 KiB at random places of a disk, with a fixed
number of requests in flight, and learns of completed ones by polling or by
interrupt. The same image does the same work under QEMU, if that is
installed: on the same KVM, with an iothread, with io_uring and with threads,
and with the host's page cache (writeback) and past it (none). They take
turns, in every round.

Where this host's KVM emulates kernel mode, because there is no hardware
virtualization, the guest runs in user mode, at the processor's speed. Its
interrupts are emulated all the same.

All figures are medians of the rounds, with the lowest and the highest in
brackets; latencies are the guest's own, by its TSC. The last two columns are
gvm's requests per second and median latency, each divided by the best one of
QEMU in the same round.

EXAMPLES
   gvm bench guest
   gvm bench guest --disk /dev/nvme0n1 --rounds 11 --json guest.json
   gvm bench guest --write         writes too, to an image under $TMPDIR`,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "disk",
				Usage: "raw image or block device as `PATH`, which is only read; default: an image under $TMPDIR, " +
					"in the page cache", TakesFile: true},
			&cli.BoolFlag{Name: "write", Usage: "measure writes too, without --disk"},
			&cli.DurationFlag{Name: "time", Value: 300 * time.Millisecond, Usage: "`DURATION` of each measurement"},
			&cli.IntFlag{Name: "rounds", Value: 5, Usage: "measure everything `N` times, in turns"},
			&cli.StringFlag{Name: "qemu", Value: "qemu-system-x86_64",
				Usage: "`PROGRAM` to compare with", TakesFile: true},
			&cli.StringFlag{Name: "json", Usage: "write every measurement to `FILE`", TakesFile: true},
			plotFlag(),
			pollFlag(),
		},
		Action: benchAction(parseGuestBench),
	}
}

// guestBench is the command line of `gvm bench guest`.
type guestBench struct {
	disk, qemu, json, plot string
	write                  bool
	time, poll             time.Duration
	rounds                 int
}

func parseGuestBench(c *cli.Context) (b guestBench, err error) {
	b = guestBench{disk: c.String("disk"), qemu: c.String("qemu"), json: c.String("json"), plot: c.String("plot"),
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
	return b, checkPlot(b.plot)
}

// contender is a VMM to measure: its name, its program and arguments.
type contender struct {
	name string
	args []string
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
	kernel, err := os.CreateTemp("", "gvm-bench-*.elf")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, kernel.Close(), os.Remove(kernel.Name())) }()
	if _, err := kernel.Write(embedded.Image); err != nil {
		return err
	}
	gvm, err := os.Executable()
	if err != nil {
		return err
	}
	words := []string{"bench", fmt.Sprintf("bench-ms=%d", b.time.Milliseconds())}
	mode := ",readonly"
	if b.write {
		words, mode = append(words, "write"), ""
	}
	run := []string{gvm, "run", "--disk", strings.ReplaceAll(path, ",", ",,") + mode, "--poll", b.poll.String()}
	for _, word := range words {
		run = append(run, "--guest-arg", word)
	}
	vmms := []contender{{"gvm", run}}
	if qemu, err := exec.LookPath(b.qemu); err != nil {
		noQEMU(b.qemu)
	} else {
		for _, cache := range []string{"writeback", "none"} {
			for _, aio := range []string{"io_uring", "threads"} {
				vmms = append(vmms, contender{"qemu " + aio + " " + cache,
					qemuArgs(qemu, kernel.Name(), path, strings.Join(words, " "), aio, cache, b.write)})
			}
		}
	}
	var all []guestSample
	_, err = inTurns(ctx, b.rounds, vmms, func(round int, v contender) error {
		console, err := console(ctx, v.args)
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

// console runs a machine and returns its console output. The error has the first line of the
// program's standard error and its exit status.
func console(ctx context.Context, args []string) ([]byte, error) {
	c := exec.CommandContext(ctx, args[0], args[1:]...)
	c.Cancel = func() error { return c.Process.Signal(syscall.SIGTERM) } // lets the program clean up
	c.WaitDelay = 10 * time.Second
	var errs bytes.Buffer
	c.Stderr = &errs
	out, err := c.Output()
	if err != nil {
		return nil, said(err, errs.String())
	}
	return out, nil
}

var timingPrint = pattern(`(?m)^gvm: timing .*\n`)

// said adds the first line of text, a program's error output without --timing lines, to err, with
// the exit status.
func said(err error, text string) error {
	var exit *exec.ExitError
	text, _, _ = strings.Cut(strings.TrimSpace(timingPrint().ReplaceAllString(text, "")), "\n")
	switch {
	case errors.As(err, &exit) && text != "":
		return endError{exit.ExitCode(), errors.New(strings.TrimPrefix(text, "gvm: "))}
	case err == nil:
		return errors.New("the machine ended before its guest was ready")
	}
	return err
}

// qemuArgs returns the command line of a QEMU machine with the same guest and disk, in QEMU's
// fastest configuration.
func qemuArgs(qemu, kernel, path, words, aio, cache string, write bool) []string {
	escape := func(s string) string { return strings.ReplaceAll(s, ",", ",,") }
	onOff := map[bool]string{false: "off", true: "on"}
	if abs, err := filepath.Abs(path); err == nil {
		path = abs // QEMU takes text before a colon for a protocol
	}
	file := fmt.Sprintf("driver=file,filename=%s,node-name=f,read-only=%s,aio=%s,cache.direct=%s",
		escape(path), onOff[!write], aio, onOff[cache == "none"])
	if fi, err := os.Stat(path); err == nil && fi.Mode()&os.ModeDevice != 0 {
		file = strings.Replace(file, "driver=file", "driver=host_device", 1)
	}
	return append(qemuMachine(qemu, "q35"), "-kernel", kernel, "-append", words,
		"-object", "iothread,id=t", "-device", "virtio-scsi-pci,id=scsi,disable-legacy=on,iothread=t",
		"-blockdev", file, "-blockdev", "driver=raw,file=f,node-name=d,read-only="+onOff[!write],
		"-device", "scsi-hd,bus=scsi.0,drive=d")
}

// qemuMachine returns the command line of a QEMU machine with as few devices as gvm's.
func qemuMachine(qemu, machine string) []string {
	// Use the host's CPU without arch-capabilities, whose MSR not every KVM allows to set.
	return []string{
		qemu, "-M", machine, "-accel", "kvm", "-cpu", "max,-arch-capabilities", "-m", "512",
		"-nodefaults", "-no-user-config",
		"-display", "none", "-serial", "stdio", "-monitor", "none", "-no-reboot",
	}
}

// guestTable prints the medians of the rounds.
func guestTable(w io.Writer, all []guestSample) error {
	type key struct {
		operation, driver string
		depth             int
	}
	at := map[key]map[string][]guestSample{} // by VMM, one sample per round
	var order []key
	var vmms []string
	for _, s := range all {
		k := key{s.Operation, s.Driver, s.Depth}
		if at[k] == nil {
			at[k] = map[string][]guestSample{}
			order = append(order, k)
		}
		at[k][s.VMM] = append(at[k][s.VMM], s)
		if !slices.Contains(vmms, s.VMM) {
			vmms = append(vmms, s.VMM)
		}
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "operation\tdriver\tdepth\tVMM\tkIOPS\t\tp50, µs\tp99, µs\tIOPS of best\tp50 of best\t")
	for _, k := range order {
		for _, vmm := range vmms {
			var iops, p50, p99, more, less []float64
			for _, s := range at[k][vmm] {
				iops, p50, p99 = append(iops, s.IOPS/1e3), append(p50, s.P50/1e3), append(p99, s.P99/1e3)
				best, quickest := 0.0, 0.0
				for _, o := range all {
					if o.VMM == "gvm" || o.Round != s.Round || o.Operation != s.Operation ||
						o.Driver != s.Driver || o.Depth != s.Depth {
						continue
					}
					if best = max(best, o.IOPS); quickest == 0 || o.P50 < quickest {
						quickest = o.P50
					}
				}
				more, less = append(more, s.IOPS/best), append(less, s.P50/quickest)
			}
			ratios := "\t\t"
			if vmm == "gvm" && len(vmms) > 1 {
				ratios = fmt.Sprintf("%.2f\t%.2f\t", median(more), median(less))
			}
			m := median(iops)
			fmt.Fprintf(t, "%s\t%s\t%d\t%s\t%.1f\t(%.1f–%.1f)\t%.1f\t%.1f\t%s\n", k.operation, k.driver, k.depth, vmm,
				m, iops[0], iops[len(iops)-1], median(p50), median(p99), ratios)
		}
	}
	return t.Flush()
}
