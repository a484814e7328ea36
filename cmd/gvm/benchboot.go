package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"gvm/guest-tests/embedded"
)

func benchBootCommand() *cli.Command {
	return &cli.Command{
		Name:      "boot",
		Usage:     "measure how long a boot takes, beside QEMU",
		ArgsUsage: " ",
		Description: `A kernel boots until a line on its console has the text of --until: under gvm, and in turns under
QEMU's microvm, pc and q35 if QEMU is installed and they boot it here. Without --kernel it is the embedded
guest, until it waits for input. The guest has one CPU and no disk.

   first     from exec to the first line on the console, in ms
   until     from exec to the line of --until
   CPU       that all threads have used until then

Figures are medians of the rounds, with the lowest and the highest in brackets. The last column is the
median of gvm's time divided by that VMM's in the same round. gvm run --timing tells what gvm's own time
goes to.

EXAMPLES
   gvm bench boot
   gvm bench boot --kernel bzImage --initrd initramfs.img --until "Run /init as init process"`,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "kernel", Usage: "bzImage or ELF vmlinux `FILE`", TakesFile: true},
			&cli.StringFlag{Name: "initrd", Usage: "initramfs `FILE`", TakesFile: true},
			&cli.StringFlag{Name: "cmdline", Usage: "kernel command `LINE`, added to console=ttyS0 panic=-1"},
			&cli.StringFlag{Name: "until", Value: "Run /init as init process", Usage: "`TEXT` that ends a boot"},
			&cli.DurationFlag{Name: "timeout", Value: 2 * time.Minute, Usage: "give up on a boot after `DURATION`"},
			&cli.IntFlag{Name: "rounds", Value: 10, Usage: "measure everything `N` times, in turns"},
			&cli.StringFlag{Name: "qemu", Value: "qemu-system-x86_64", Usage: "`PROGRAM` to compare with", TakesFile: true},
			&cli.StringFlag{Name: "json", Usage: "write every measurement to `FILE`", TakesFile: true},
		},
		Action: benchAction(parseBootBench),
	}
}

// bootBench is `gvm bench boot`'s command line.
type bootBench struct {
	kernel, initrd, cmdline, until string
	timeout                        time.Duration
	rounds                         int
	qemu, json                     string
}

func parseBootBench(c *cli.Context) (b bootBench, err error) {
	b = bootBench{
		kernel: c.String("kernel"), initrd: c.String("initrd"), cmdline: c.String("cmdline"), until: c.String("until"),
		timeout: c.Duration("timeout"), rounds: c.Int("rounds"), qemu: c.String("qemu"), json: c.String("json"),
	}
	switch {
	case b.timeout <= 0:
		return b, fmt.Errorf("--timeout %s: want a positive duration, such as 90s", b.timeout)
	case b.until == "":
		return b, errors.New("--until: the text is empty")
	}
	for _, flag := range []string{"initrd", "cmdline", "until"} {
		if b.kernel == "" && c.IsSet(flag) {
			return b, fmt.Errorf("--%s is for the kernel of --kernel", flag)
		}
	}
	return b, nil
}

// bootSample is one boot, as in the JSON file.
type bootSample struct {
	VMM   string  `json:"vmm"`
	Round int     `json:"round"`
	First float64 `json:"first_ms"`
	Until float64 `json:"until_ms"`
	CPU   float64 `json:"cpu_ms"`
}

func (b bootBench) run(ctx context.Context, w io.Writer) (err error) {
	record, err := openBenchRecord(b.json)
	if err != nil {
		return err
	}
	defer func() { err = record.close(err) }()
	gvm, err := os.Executable()
	if err != nil {
		return err
	}
	run := []string{gvm, "run"}
	kernel, line := b.kernel, "console=ttyS0 panic=-1 "+b.cmdline
	if kernel == "" {
		dir, err2 := os.MkdirTemp("", "gvm-bench-")
		if err2 != nil {
			return err2
		}
		defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
		kernel, line, b.until = filepath.Join(dir, "guest.elf"), "echo", "ready"
		if err := os.WriteFile(kernel, embedded.Image, 0o600); err != nil {
			return err
		}
		run = append(run, "--guest-arg", line)
	} else {
		run = append(run, "--kernel", kernel, "--cmdline", b.cmdline)
		if b.initrd != "" {
			run = append(run, "--initrd", b.initrd)
		}
	}
	vmms := []contender{{"gvm", run}}
	if qemu, err := exec.LookPath(b.qemu); err != nil {
		noQEMU(b.qemu)
	} else {
		for _, machine := range []string{"microvm", "pc", "q35"} {
			args := append(qemuMachine(qemu, machine), "-kernel", kernel, "-append", line)
			if b.initrd != "" {
				args = append(args, "-initrd", b.initrd)
			}
			vmms = append(vmms, contender{"qemu " + machine, args})
		}
	}
	var all []bootSample
	vmms, err = inTurns(ctx, b.rounds, vmms, func(round int, v contender) error {
		ctx, stop := context.WithTimeoutCause(ctx, b.timeout, fmt.Errorf("%s: no line with %q within %s", v.name, b.until, b.timeout))
		defer stop()
		m, err := startWaiting(ctx, v.args, b.until)
		if err != nil {
			return err
		}
		cpu, err := cpuOf(m.c.Process.Pid)
		if err := errors.Join(err, m.stop()); err != nil {
			return err
		}
		ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1e3 }
		all = append(all, bootSample{v.name, round, ms(m.first), ms(m.ready), ms(cpu)})
		return nil
	})
	if err != nil {
		return err
	}
	if err := record.write(all); err != nil {
		return err
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "VMM\tfirst, ms\tuntil, ms\t\tCPU, ms\tgvm of it\t")
	for _, v := range vmms {
		var first, until, cpu, ratio []float64
		for _, s := range all {
			if s.VMM != v.name {
				continue
			}
			first, until, cpu = append(first, s.First), append(until, s.Until), append(cpu, s.CPU)
			i := slices.IndexFunc(all, func(o bootSample) bool { return o.VMM == "gvm" && o.Round == s.Round })
			ratio = append(ratio, all[i].Until/s.Until)
		}
		of := ""
		if v.name != "gvm" {
			of = strconv.FormatFloat(median(ratio), 'f', 2, 64)
		}
		m := median(until)
		fmt.Fprintf(t, "%s\t%.1f\t%.1f\t(%.1f–%.1f)\t%.1f\t%s\t\n", v.name, median(first), m, until[0], until[len(until)-1], median(cpu), of)
	}
	return t.Flush()
}

// median sorts v, which is not empty, and returns its middle.
func median(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}

// noQEMU says that there is nothing to compare with.
func noQEMU(program string) {
	note(program + " is not installed (Debian: apt install qemu-system-x86): nothing to compare with")
}

// inTurns measures each VMM once in every round. One that fails in the first round is left
// out of what it returns, and said to be, but for the first VMM, which is gvm.
func inTurns(ctx context.Context, rounds int, vmms []contender, measure func(round int, v contender) error) ([]contender, error) {
	for round := range rounds {
		for i := 0; i < len(vmms); {
			err := measure(round, vmms[i])
			switch {
			case ctx.Err() != nil:
				return nil, context.Cause(ctx)
			case err != nil && i > 0 && round == 0:
				note(fmt.Sprintf("%s does not run here and is left out: %v", vmms[i].name, err))
				vmms = slices.Delete(vmms, i, i+1)
			case err != nil:
				return nil, err
			default:
				i++
			}
		}
	}
	return vmms, nil
}
