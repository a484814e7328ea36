package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"gvm/guest/bootinit"
	"gvm/guest/embedded"
	"gvm/panics"
	"gvm/sandbox"
)

func benchBootCommand() *cli.Command {
	return &cli.Command{
		Name:      "boot",
		Usage:     "measure how long a boot takes, beside QEMU",
		ArgsUsage: " ",
		Description: `A kernel boots until a line on its console has the text of --until: under
gvm, and in turns under microvm, pc and q35 of each QEMU of --qemu, if they
boot it here. Without --kernel it is the embedded guest, until it waits
for input. Without --initrd a kernel gets one whose init says "init runs" and
waits. The guest has one CPU and no disk.

   instruction  from exec to the guest's first instruction, in ms; of QEMU to
                its firmware's first word
   kernel       to the kernel's first instruction; of QEMU until the firmware
                is done
   first        to the first line on the console
   until        to the line of --until
   CPU          that all threads have used until then

gvm takes its first instruction's time itself (gvm run --timing, which also
tells where the time before it goes). The firmware's is taken at its debug
port (0x402), in a boot of its own, as its words take it time; that of
microvm says nothing there.

A kernel boots once under gvm before that, which leaves it decompressed in
gvm's cache.

Figures are medians of the rounds, with the lowest and the highest in
brackets. The last column is the median of gvm's time divided by that VMM's
in the same round.

EXAMPLES
   gvm bench boot
   gvm bench boot --kernel bzImage --cmdline quiet
   gvm bench boot --kernel bzImage --initrd i.img --until "Run /init as init"`,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "kernel", Usage: "bzImage or ELF vmlinux `FILE`", TakesFile: true},
			&cli.StringFlag{Name: "initrd", Usage: "initramfs `FILE`", TakesFile: true},
			&cli.StringFlag{Name: "cmdline", Usage: "kernel command `LINE`, added to console=ttyS0 panic=-1"},
			&cli.StringFlag{Name: "until", Value: bootinit.Line, Usage: "`TEXT` that ends a boot"},
			&cli.DurationFlag{Name: "timeout", Value: 2 * time.Minute, Usage: "give up on a boot after `DURATION`"},
			&cli.IntFlag{Name: "rounds", Value: 10, Usage: "measure everything `N` times, in turns"},
			qemuFlag(),
			&cli.StringFlag{Name: "json", Usage: "write every measurement to `FILE`", TakesFile: true},
			sandboxFlag("guest's first instruction"),
		},
		Action: benchAction(parseBootBench),
	}
}

// bootBench is the command line of `gvm bench boot`.
type bootBench struct {
	kernel, initrd, cmdline, until string
	timeout                        time.Duration
	rounds                         int
	qemu                           []string
	json                           string
	sandbox                        sandbox.Mode
}

func parseBootBench(c *cli.Context) (b bootBench, err error) {
	b = bootBench{
		kernel: c.String("kernel"), initrd: c.String("initrd"), cmdline: c.String("cmdline"), until: c.String("until"),
		timeout: c.Duration("timeout"), rounds: c.Int("rounds"), qemu: wordsOf(c, "qemu"), json: c.String("json"),
	}
	if b.sandbox, err = parseSandbox(c); err != nil {
		return b, err
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
	if b.initrd != "" && !c.IsSet("until") {
		return b, errors.New("--initrd: name a text that its boot ends with, too: --until TEXT")
	}
	return b, nil
}

// bootSample is one boot, as in the JSON file.
type bootSample struct {
	VMM         string  `json:"vmm"`
	Round       int     `json:"round"`
	Instruction float64 `json:"instruction_ms,omitempty"`
	Kernel      float64 `json:"kernel_ms,omitempty"`
	First       float64 `json:"first_ms"`
	Until       float64 `json:"until_ms"`
	CPU         float64 `json:"cpu_ms"`
}

func (b bootBench) run(ctx context.Context, w io.Writer) (err error) {
	record, err := openBenchRecord(b.json)
	if err != nil {
		return err
	}
	defer func() { err = record.close(err) }()
	gvm, err := os.Executable() // not package machine: a user's boot begins with exec
	if err != nil {
		return err
	}
	dir := ""
	if b.initrd == "" {
		var remove func() error
		if dir, remove, err = benchDir(); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, remove()) }()
	}
	run := []string{gvm, "run", "--timing", "--sandbox=" + b.sandbox.String()}
	kernel, initrd, line := b.kernel, b.initrd, "console=ttyS0 panic=-1 "+b.cmdline
	if kernel == "" {
		kernel, line, b.until = filepath.Join(dir, "guest.elf"), "echo", "ready"
		if err := writeNew(kernel, embedded.Image); err != nil {
			return err
		}
		run = append(run, "--guest-arg", line)
	} else {
		if initrd == "" {
			archive, err := bootinit.Initramfs()
			if err != nil {
				return err
			}
			initrd = filepath.Join(dir, "initrd")
			if err := writeNew(initrd, archive); err != nil {
				return err
			}
		}
		run = append(run, "--kernel", kernel, "--cmdline", b.cmdline, "--initrd", initrd)
	}
	vmms := []contender{{"gvm", run}}
	for _, q := range qemus(ctx, b.qemu) {
		for _, machine := range []string{"microvm", "pc", "q35"} {
			args := append(q.machine(machine), "-kernel", kernel, "-append", line)
			if initrd != "" {
				args = append(args, "-initrd", initrd)
			}
			vmms = append(vmms, contender{q.name + " " + machine, args})
		}
	}
	boot := func(name string, args []string, files ...*os.File) (m *waiting, cpu time.Duration, err error) {
		ctx, stop := context.WithTimeoutCause(ctx, b.timeout,
			fmt.Errorf("%s: no line with %q within %s", name, b.until, b.timeout))
		defer stop()
		if m, err = startWaiting(ctx, args, b.until, files...); err != nil {
			return nil, 0, err
		}
		cpu, err = cpuOf(m.c.Process.Pid)
		return m, cpu, errors.Join(err, m.stop())
	}
	if b.kernel != "" { // its first boot would include decompression
		if _, _, err := boot("gvm", run); err != nil {
			return err
		}
	}
	var all []bootSample
	vmms, err = inTurns(ctx, b.rounds, vmms, func(round int, v contender) error {
		m, cpu, err := boot(v.name, v.args)
		if err != nil {
			return err
		}
		s := bootSample{VMM: v.name, Round: round, First: ms(m.first), Until: ms(m.ready), CPU: ms(cpu)}
		if v.name == "gvm" {
			found := firstInstruction().FindStringSubmatch(m.errs.String())
			if found == nil {
				return errors.New("gvm run --timing did not tell when the first instruction ran")
			}
			s.Instruction, err = strconv.ParseFloat(found[1], 64)
			s.Kernel = s.Instruction
		} else {
			s.Instruction, s.Kernel, err = firmware(func(args []string, debug *os.File) error {
				_, _, err := boot(v.name, append(slices.Clip(v.args), args...), debug)
				return err
			})
		}
		if err == nil {
			all = append(all, s)
		}
		return err
	})
	if err != nil {
		return err
	}
	if err := record.write(all); err != nil {
		return err
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "VMM\tinstruction, ms\tkernel, ms\tfirst, ms\tuntil, ms\t\tCPU, ms\tgvm of it\t")
	for _, v := range vmms {
		var instruction, kernel, first, until, cpu, ratio []float64
		for _, s := range all {
			if s.VMM != v.name {
				continue
			}
			instruction, kernel = append(instruction, s.Instruction), append(kernel, s.Kernel)
			first, until, cpu = append(first, s.First), append(until, s.Until), append(cpu, s.CPU)
			i := slices.IndexFunc(all, func(o bootSample) bool { return o.VMM == "gvm" && o.Round == s.Round })
			ratio = append(ratio, all[i].Until/s.Until)
		}
		of := ""
		if v.name != "gvm" {
			of = strconv.FormatFloat(median(ratio), 'f', 3, 64)
		}
		m := median(until)
		fmt.Fprintf(t, "%s\t%s\t%s\t%.1f\t%.1f\t(%.1f–%.1f)\t%.1f\t%s\t\n",
			v.name, known(median(instruction)), known(median(kernel)), median(first),
			m, until[0], until[len(until)-1], median(cpu), of)
	}
	return t.Flush()
}

// firstInstruction matches the line of gvm run --timing for the first instruction.
var firstInstruction = pattern(`timing +\S+ +(\S+)  first instruction\n`)

// firmware calls boot with QEMU arguments for a firmware debug port, which writes to debug, QEMU's
// descriptor 3. It returns the times of the firmware's first output and of the end of its work, in
// ms. Both are 0 if the firmware prints nothing.
func firmware(boot func(args []string, debug *os.File) error) (begun, done float64, err error) {
	r, w, err := os.Pipe()
	if err != nil {
		return 0, 0, err
	}
	defer r.Close()
	start, read := time.Now(), make(chan struct{})
	panics.Go(func() {
		defer close(read)
		for lines := bufio.NewReader(r); ; {
			_, _ = lines.Peek(1)
			at := ms(time.Since(start))
			line, err := lines.ReadString('\n')
			if begun == 0 && line != "" && line != bootinit.Line+"\n" {
				begun = at
			}
			if done == 0 && strings.HasPrefix(line, "Booting from ") {
				done = at
			}
			if err != nil {
				return
			}
		}
	})
	err = boot([]string{"-chardev", "file,id=debug,path=/proc/self/fd/3",
		"-device", "isa-debugcon,iobase=0x402,chardev=debug"}, w)
	w.Close()
	<-read
	return begun, done, err
}

// known formats a figure, or a dash for 0.
func known(v float64) string {
	if v == 0 {
		return "–"
	}
	return strconv.FormatFloat(v, 'f', 1, 64)
}
