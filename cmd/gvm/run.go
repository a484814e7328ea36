package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"gvm/control"
	"gvm/devices/scsi/backend"
	"gvm/devices/scsi/trace"
	"gvm/devices/virtio/vhostscsi"
	"gvm/guest/embedded"
	"gvm/guestmem"
	"gvm/machine/disk"
	"gvm/text"
	"gvm/vmm"
	"gvm/vmm/boot"
	"gvm/vmm/x86"
)

// runConfig is `gvm run`'s command line, checked as far as words go.
type runConfig struct {
	kernel      string // "": the embedded guest
	initrds     []string
	cmdline     string
	bareCmdline bool
	guestArgs   []string
	disks       []disk.Spec
	cpus        int
	apicIDs     []uint32 // nil: 0 to cpus-1
	features    []x86.FeatureChange
	memory      guestmem.Config
	memoryNote  string // what to tell of it
	kernelNote  string // what to tell of a kernel that was found
	mode        boot.Mode
	protocol    boot.Protocol
	reboot      bool
	timeout     time.Duration
	grace       time.Duration // that the guest has to power off when gvm is asked to end
	queues      int
	poll        time.Duration
	vhostABI    vhostscsi.ABIPolicy
	traceFile   string
	name        string      // "": one made of the PID
	trace       *trace.File // nil: none
	timing      *timing     // nil: none
}

// requestQueues is how many request queues the SCSI device has.
func (rc *runConfig) requestQueues() int {
	if rc.queues > 0 {
		return rc.queues
	}
	return min(rc.cpus, disk.MaxQueues)
}

// embeddedDisk is the size of the disk that the embedded guest gets when the
// user names none. It is in memory, so that the guest may write to it.
const embeddedDisk = 16 << 20

var entries = map[string]boot.Protocol{"auto": 0, "pvh": boot.PVH32, "64": boot.Linux64}

func runCommand() *cli.Command {
	return &cli.Command{
		Name:      "run",
		Usage:     "boot a guest on this terminal",
		ArgsUsage: " ",
		Description: `Without --kernel, in a kernel tree or the O= directory of one, or below, its
own kernel is booted (arch/x86/boot/bzImage, else vmlinux); elsewhere the
embedded guest, which tests the virtual hardware and needs no files.

The guest's serial port is standard input and output. On a terminal, Ctrl-a x
stops the guest and Ctrl-a h shows the other keys.

EXAMPLES
   gvm run                                          the embedded guest
   gvm run --kernel bzImage --initrd initramfs.img
   gvm run --kernel bzImage --disk debian.img       root= is added
   gvm run --disk a.img,serial=one --disk b.img,readonly,lun=4
   gvm run --disk a.img,backend=vhost               served by the kernel
   gvm run --cpus 4 --memory 2G --cmdline "ro quiet" --timeout 60s
   gvm help exit-status                             what the exit status says

` + guestWords(),
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "kernel", Aliases: []string{"k"}, Usage: "bzImage or ELF vmlinux `FILE`", TakesFile: true},
			&cli.GenericFlag{Name: "initrd", Aliases: []string{"i"}, Value: new(words), Usage: "initramfs `FILE`; several are concatenated", TakesFile: true},
			&cli.GenericFlag{Name: "disk", Aliases: []string{"d"}, Value: new(words), Usage: "`PATH[,OPTION]...` of a raw image or block device; see gvm help disk"},
			&cli.StringFlag{Name: "cmdline", Aliases: []string{"a"}, Usage: "kernel command `LINE`, added to console=ttyS0 panic=-1 and, without an initrd, root= for the first disk where that is sure"},
			&cli.BoolFlag{Name: "bare-cmdline", Usage: "give the kernel --cmdline as it is"},
			&cli.GenericFlag{Name: "guest-arg", Value: new(words), Usage: "`WORD` for the embedded guest: write lets it write to the disks of --disk"},
			&cli.IntFlag{Name: "cpus", Aliases: []string{"c"}, Value: 1, Usage: "`N` virtual CPUs"},
			&cli.StringFlag{Name: "apic-ids", Usage: "`LIST` of the CPUs' local APIC IDs, ascending, such as 0,2,300; default 0,1,2 and so on"},
			&cli.StringFlag{Name: "cpu-features", Usage: "`LIST` such as -x2apic,+avx2: names of /proc/cpuinfo to hide, with what depends on them, or to demand"},
			&cli.StringFlag{Name: "memory", Aliases: []string{"m"}, Value: "512M", Usage: "`SIZE` of guest RAM, in MiB without a suffix; pages are taken as the guest touches them"},
			&cli.BoolFlag{Name: "overcommit", Usage: "let --memory be more than this host or a cgroup has, for a guest that touches less"},
			&cli.BoolFlag{Name: "hugepages", Usage: "guest RAM from the host's pool of 2 MiB pages"},
			&cli.BoolFlag{Name: "shared-memory", Usage: "guest RAM in a memfd"},
			&cli.StringFlag{Name: "boot", Value: "auto", Usage: "`MODE` for a bzImage: auto decompresses it on the host if it can, elf does or fails, bzimage lets the guest do it: slower, and with KASLR, which the others lack"},
			&cli.StringFlag{Name: "entry", Value: "auto", Usage: "enter an ELF kernel by `WAY` pvh or 64 (the 64-bit boot protocol); auto is pvh where the kernel has it and the initrds fit below 4 GiB"},
			&cli.StringFlag{Name: "on-reset", Value: "exit", Usage: "when the guest asks for a reset: `ACTION` exit (status 6) or reboot"},
			&cli.DurationFlag{Name: "timeout", Usage: "stop the guest after `DURATION`, such as 90s, with status 124"},
			&cli.DurationFlag{Name: "grace", Usage: "at SIGINT, SIGTERM and SIGHUP press the guest's power button, and stop it `DURATION` later; a second signal stops it at once (default: stop it at once)"},
			&cli.StringFlag{Name: "name", Usage: "`NAME` of the machine for gvm list and gvm disk (default: gvm-PID)"},
			&cli.StringFlag{Name: "trace", Usage: "record every SCSI request in `FILE`, for gvm trace", TakesFile: true},
			&cli.BoolFlag{Name: "timing", Usage: "print at the end what took how long, with what the guest wrote to port 0x80"},
			&cli.StringFlag{Name: "vhost-abi", Usage: "accept version `N|any` of the kernel's vhost-scsi interface, whatever gvm is written for"},
			&cli.IntFlag{Name: "queues", Usage: "`N` virtio-scsi request queues (default: one per CPU); with backend=vhost each takes some 21 MiB of the kernel's memory"},
			pollFlag(),
		},
		// The library looks for each flag that may have an action among all of them, which takes a fifth
		// of a millisecond; none has one, and values are read from the parsed command line.
		Before: func(c *cli.Context) error { c.Command.Flags = nil; return nil },
		Action: func(c *cli.Context) error {
			rc, err := parseRun(c)
			if err != nil {
				return usageError{err}
			}
			return run(rc)
		},
	}
}

func parseRun(c *cli.Context) (rc runConfig, err error) {
	if c.Args().Present() {
		return rc, fmt.Errorf("unexpected argument %q; a kernel is named with --kernel, a disk with --disk", c.Args().First())
	}
	rc = runConfig{
		kernel:      c.String("kernel"),
		initrds:     wordsOf(c, "initrd"),
		cmdline:     c.String("cmdline"),
		bareCmdline: c.Bool("bare-cmdline"),
		guestArgs:   wordsOf(c, "guest-arg"),
		cpus:        c.Int("cpus"),
		timeout:     c.Duration("timeout"),
		grace:       c.Duration("grace"),
		queues:      c.Int("queues"),
		traceFile:   c.String("trace"),
		name:        c.String("name"),
	}
	set := c.LocalFlagNames() // c.IsSet looks at all flags each time
	given := func(flag string) bool { return slices.Contains(set, flag) }
	if c.Bool("timing") {
		rc.timing = newTiming()
	}
	if given("kernel") && rc.kernel == "" {
		return rc, errors.New("--kernel: the path is empty")
	}
	if given("name") {
		if err := control.CheckName(rc.name); err != nil {
			return rc, fmt.Errorf("--name: %w", err)
		}
	}
	if rc.cpus < 1 {
		return rc, fmt.Errorf("--cpus %d: want 1 or more", rc.cpus)
	}
	if given("apic-ids") {
		if rc.apicIDs, err = parseAPICIDs(c.String("apic-ids")); err != nil {
			return rc, fmt.Errorf("--apic-ids: %w", err)
		}
		if given("cpus") && rc.cpus != len(rc.apicIDs) {
			return rc, fmt.Errorf("--apic-ids has %d IDs for --cpus %d: give each CPU one, or leave --cpus out", len(rc.apicIDs), rc.cpus)
		}
		rc.cpus = len(rc.apicIDs)
	}
	if given("queues") && (rc.queues < 1 || rc.queues > disk.MaxQueues) {
		return rc, fmt.Errorf("--queues %d: want 1 to %d", rc.queues, disk.MaxQueues)
	}
	if rc.poll, err = parsePoll(c); err != nil {
		return rc, err
	}
	if rc.grace < 0 || rc.grace > control.MaxGrace {
		return rc, fmt.Errorf("--grace %s: want 0 to %s", rc.grace, control.MaxGrace)
	}
	if given("timeout") && rc.timeout <= 0 {
		return rc, fmt.Errorf("--timeout %s: want a positive duration, such as 90s", rc.timeout)
	}
	if rc.memory.Size, err = text.ParseSize(c.String("memory"), 1<<20); err != nil {
		return rc, fmt.Errorf("--memory: %w", err)
	}
	host := thisHost()
	rc.memory.Hugepages, rc.memory.Shared = c.Bool("hugepages"), c.Bool("shared-memory")
	if rc.memoryNote, err = checkMemory(rc.memory, c.Bool("overcommit"), host); err != nil {
		return rc, fmt.Errorf("--memory %s: %w", c.String("memory"), err)
	}
	if rc.features, err = x86.ParseFeatures(c.String("cpu-features")); err != nil {
		return rc, fmt.Errorf("--cpu-features: %w", err)
	}
	if rc.mode, err = boot.ParseMode(c.String("boot")); err != nil {
		return rc, fmt.Errorf("--boot: %w", err)
	}
	var ok bool
	if rc.protocol, ok = entries[c.String("entry")]; !ok {
		return rc, text.OneOf("--entry ", c.String("entry"), entries)
	}
	switch v := c.String("on-reset"); v {
	case "exit", "reboot":
		rc.reboot = v == "reboot"
	default:
		return rc, text.OneOfNames("--on-reset ", v, []string{"exit", "reboot"})
	}
	if rc.vhostABI, err = parseABI(c.String("vhost-abi")); err != nil {
		return rc, fmt.Errorf("--vhost-abi: %w", err)
	}
	inRAM := uint64(0)
	for _, s := range wordsOf(c, "disk") {
		d, err := disk.Parse(s)
		if err != nil {
			return rc, err
		}
		rc.disks = append(rc.disks, d)
		if d.Storage == disk.Memory {
			if inRAM += uint64(d.Size); inRAM > text.MaxSize {
				return rc, fmt.Errorf("--disk %s: the disks in memory have more than %s", d.Path, text.SizeWord(text.MaxSize))
			}
		}
	}
	if diskNote, err := checkDiskMemory(rc.memory, inRAM, host); err != nil {
		return rc, fmt.Errorf("--disk mem: %w", err)
	} else if rc.memoryNote == "" {
		rc.memoryNote = diskNote
	}
	if err := checkThreads(rc.cpus, rc.requestQueues(), host); err != nil {
		return rc, err
	}
	if rc.kernel == "" {
		if rc.kernel, rc.kernelNote, err = treeKernel("."); err != nil {
			return rc, err
		}
	}
	if rc.kernel == "" && (len(rc.initrds) > 0 || given("cmdline") || rc.bareCmdline || rc.protocol == boot.Linux64) {
		return rc, errors.New("--initrd, --cmdline, --bare-cmdline and --entry 64 need a --kernel; the embedded guest takes --guest-arg")
	}
	if rc.kernel != "" && len(rc.guestArgs) > 0 {
		return rc, errors.New("--guest-arg is for the embedded guest; a kernel takes --cmdline")
	}
	for word := range strings.SplitSeq(strings.Join(rc.guestArgs, " "), " ") {
		if word != "" && !embedded.Known(word) {
			return rc, unknownWord(word)
		}
	}
	return rc, nil
}

// parseAPICIDs reads a list such as "0,2,300".
func parseAPICIDs(list string) (ids []uint32, err error) {
	for word := range strings.SplitSeq(list, ",") {
		id, err := strconv.ParseUint(word, 10, 15)
		if err != nil {
			return nil, fmt.Errorf("%q: want a number up to %d", word, 1<<15-1)
		}
		if n := len(ids); n > 0 && uint32(id) <= ids[n-1] {
			return nil, fmt.Errorf("%d after %d: give them in ascending order", id, ids[n-1])
		}
		ids = append(ids, uint32(id))
	}
	return ids, nil
}

// pollFlag is --poll of the commands that have request queues. At its default a host
// whose wake-ups are slow gives a third more, and a core is kept from sleeping only while
// requests come 15,000 times a second: see docs/performance.md.
func pollFlag() cli.Flag {
	return &cli.DurationFlag{Name: "poll", Value: 64 * time.Microsecond, Usage: "before it sleeps, a request queue's thread looks for more requests for `TIME` at most, while they come that fast; 0 is never"}
}

func parsePoll(c *cli.Context) (time.Duration, error) {
	d := c.Duration("poll")
	if d < 0 || d > 10*time.Millisecond {
		return 0, fmt.Errorf("--poll %s: want 0 to 10ms", d)
	}
	return d, nil
}

// kernelCmdLine is what a Linux guest with the disks is booted with.
func (rc *runConfig) kernelCmdLine(findRoot func() (word, why string), note func(string)) string {
	if rc.bareCmdline {
		return rc.cmdline
	}
	words := append([]string{"console=ttyS0", "panic=-1"}, terminalSize()...)
	if len(rc.disks) > 0 && len(rc.initrds) == 0 && !strings.Contains(" "+rc.cmdline, " root=") {
		if root, why := findRoot(); root == "" {
			note(why)
		} else if rc.disks[0].ReadOnly {
			words = append(words, "root="+root, "ro")
		} else {
			words = append(words, "root="+root, "rw")
		}
	}
	if rc.cmdline != "" {
		words = append(words, rc.cmdline)
	}
	return strings.Join(words, " ")
}

// startGC is GOGC until a start has settled: the first garbage collection comes with 64 MiB in use and not with
// 4, of which the embedded guest's disk would have one run beside every start.
const startGC = 1600

// begun is a virtual machine that KVM makes beside the reading of gvm run's command line, which takes as long.
// The run takes it; else gvm closes it.
var begun *vmm.Begun

// run boots the guest and returns how it ended, as an error that exit makes a
// status of. Whatever was opened is closed when it returns.
func run(rc runConfig) (err error) {
	notes := &guestNotes{say: note}
	defer notes.close()
	cfg := vmm.Config{
		Memory:      rc.memory,
		CPUs:        rc.cpus,
		APICIDs:     rc.apicIDs,
		CPUFeatures: rc.features,
		BootMode:    rc.mode,
		Protocol:    rc.protocol,
		KernelCache: boot.CacheDir(),
		Rebooting:   rc.reboot,
		Note:        notes.note,
		Stamp:       rc.timing.stamp,
	}
	collect := debug.SetGCPercent(startGC)
	vm := begun
	begun = nil
	if vm == nil {
		vm = vmm.Begin()
	}
	defer func() { err = errors.Join(err, vm.Close()) }()
	sys, sysErr := vm.System() // an error waits for those of what the user named
	if sysErr == nil {
		cfg.Prepared = vm.Prepare(cfg) // and then all else: KVM takes its time
		defer func() { err = errors.Join(err, cfg.Prepared.Close()) }()
	}
	// Signals and --timeout end the run in order from its beginning: what it opens may take its time.
	ctx, stop := context.WithCancelCause(context.Background())
	defer stop(nil)
	cfg.Pauser = new(vmm.Pauser)
	end := &stopper{pauser: cfg.Pauser, stop: stop, note: note}
	defer end.close()
	defer catchSignals(ctx, func(cause error) { end.signal(cause, rc.grace) })()
	if rc.timeout > 0 {
		timer := time.AfterFunc(rc.timeout, func() { stop(endError{exitTimeout, fmt.Errorf("--timeout %s elapsed", rc.timeout)}) })
		defer timer.Stop()
	}
	for _, s := range []string{rc.kernelNote, rc.memoryNote} {
		if s != "" {
			note(s)
		}
	}
	for _, path := range rc.initrds {
		f, err := boot.OpenFile(ctx, path)
		if err != nil {
			return err
		}
		defer f.Close()
		cfg.Initrds = append(cfg.Initrds, f)
	}
	if rc.kernel != "" {
		cfg.PanicText = true
		if cfg.Kernel, err = boot.Open(ctx, rc.kernel); err != nil {
			return err
		}
		defer cfg.Kernel.Close()
	} else if cfg.Kernel, err = boot.NewImage(&boot.File{Name: "the embedded guest", ReaderAt: bytes.NewReader(embedded.Image), Size: int64(len(embedded.Image))}); err != nil {
		return err
	}
	socket, err := rc.claimName()
	if err != nil {
		return err
	}
	if socket != nil {
		defer func() { err = errors.Join(err, socket.Close()) }()
	}
	shared := disk.Config{Queues: rc.requestQueues(), QueuesChosen: rc.queues > 0, ABI: rc.vhostABI, Machine: rc.name, Note: notes.note, Paused: note}
	if socket != nil {
		shared.Hold = cfg.Pauser.Hold
	}
	ds, err := disk.Open(rc.disks, shared)
	if err != nil {
		return err
	}
	var started atomic.Bool // the guest has run, whatever became of a reboot
	cfg.Phase = func(name string) {
		if name == vmm.Entered {
			started.Store(true)
		}
		rc.timing.phase(name)
	}
	defer func() { err = errors.Join(err, ds.Close(started.Load())) }()
	if rc.kernel == "" {
		if len(rc.disks) == 0 {
			if err := ds.Attach(disk.Spec{Serial: "gvm-memory-disk"}, backend.NewMem(embeddedDisk)); err != nil {
				return err
			}
			rc.guestArgs = append(rc.guestArgs, "write")
		}
		cfg.CmdLine = strings.Join(rc.guestArgs, " ")
	} else {
		cfg.CmdLine = rc.kernelCmdLine(ds.Root, note)
	}
	if rc.traceFile != "" {
		if rc.trace, err = createTrace(rc.traceFile, ds.TraceHeader(version, rc.requestQueues())); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, rc.trace.Close()) }()
		stop, err2 := ds.TraceKernels(rc.trace)
		if err2 != nil {
			return err2
		}
		defer func() { err = errors.Join(err, stop()) }()
	}
	for _, row := range deviceTable {
		made, err := row.make(rc, ds)
		if err != nil {
			return fmt.Errorf("%s: %w", row.name, err)
		}
		cfg.Devices = append(cfg.Devices, made...)
	}
	if sysErr != nil {
		return sysErr
	}
	if socket != nil {
		socket.Serve(&machine{rc.info(), cfg.Pauser, end, ds})
	}
	t, err := openTerminal(ctx, stop)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, t.close()) }()
	cfg.Console = t
	rc.timing.phase("files, disks, control socket")
	defer time.AfterFunc(settled, func() {
		debug.SetGCPercent(collect)
		if err := trim(); err != nil {
			note(fmt.Sprintf("the memory that the start took is kept: %v", err))
		}
	}).Stop()
	out, err := vmm.Run(ctx, sys, cfg)
	if err != nil {
		return err
	}
	rc.timing.phase("the guest's run")
	rc.timing.print()
	return ended(out)
}

// endError is a run that ended with a status of its own.
type endError struct {
	status int
	error
}

func (e endError) Unwrap() error { return e.error }

// ended makes an error of an outcome; nil is the guest's power-off.
func ended(out vmm.Outcome) error {
	switch out.Ending {
	case vmm.PoweredOff, vmm.Halted:
		return nil
	case vmm.GuestReset:
		return endError{exitReset, errors.New("the guest asked for a reset (--on-reset=reboot starts it again)")}
	case vmm.GuestPanic:
		err := fmt.Errorf("guest panic: %w", out.Err)
		if out.Report != "" {
			err = fmt.Errorf("%w\n%s", err, strings.TrimRight(out.Report, "\n"))
		}
		return endError{exitPanic, err}
	case vmm.GuestCrashed:
		return endError{exitCrash, fmt.Errorf("the guest crashed: %w\n%s", out.Err, strings.TrimRight(out.Report, "\n"))}
	case vmm.Bug:
		return endError{exitBug, fmt.Errorf("a bug in gvm, please report it: %w\n%s", out.Err, out.Report)}
	case vmm.Stopped:
		if errors.Is(out.Err, errQuit) {
			return endError{exitQuit, out.Err}
		}
		return out.Err
	}
	return out.Err
}

// fatalSignals are those of which the Go runtime dumps the goroutines and exits, with the terminal as it
// is. Faults of the process itself do not come through a channel, and stay the runtime's.
var fatalSignals = []os.Signal{syscall.SIGQUIT, syscall.SIGILL, syscall.SIGTRAP, syscall.SIGABRT, syscall.SIGBUS,
	syscall.SIGFPE, syscall.SIGSEGV, syscall.SIGSTKFLT, syscall.SIGSYS}

// catchSignals makes the signals that ask a process to end stop the run in good
// order, and at once if it ends already. Fatal ones end it at once with a dump of the goroutines; others
// do nothing, as the runtime has it. The function that it returns undoes it.
func catchSignals(ctx context.Context, stop func(error)) func() {
	ch := make(chan os.Signal, 2)
	signal.Notify(ch, append([]os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP}, fatalSignals...)...)
	signal.Ignore(syscall.SIGPIPE) // a closed output is a write error
	// In the background of a terminal gvm writes to it, reads from it fail, and neither stops gvm.
	signal.Ignore(syscall.SIGTTOU, syscall.SIGTTIN)
	ignoreRealTime()
	go func() {
		for s := range ch {
			status, name := 128+int(s.(syscall.Signal)), unix.SignalName(s.(syscall.Signal))
			switch {
			case slices.Contains(fatalSignals, s):
				exitNow(status, dumpPatience, func() {
					stderr.say(fmt.Sprintf("%s: %s\n\n", name, s))
					stderr.say(string(stacks()))
				})
			case ctx.Err() != nil:
				endNow(status, "stopped at once by "+name)
			}
			stop(endError{status, fmt.Errorf("stopped by %s", name)})
		}
	}()
	return func() {
		signal.Stop(ch)
		close(ch)
	}
}

// stacks returns the stacks of all goroutines.
func stacks() []byte {
	for n := 1 << 20; ; n *= 2 {
		b := make([]byte, n)
		if m := runtime.Stack(b, true); m < n || n > 64<<20 {
			return b[:m]
		}
	}
}

// urgent has what an end at once still does.
var urgent struct {
	sync.Mutex
	restore func() error // the terminal
	release func() error // the name and its socket
}

// endNow ends the process while its end in order waits: gvm lio gc removes the objects of the kernel that
// are left.
func endNow(status int, why string) {
	exitNow(status, patience, func() { stderr.say(fmt.Sprintf("gvm: %s, before the end in order was over\n", why)) })
}

// dumpPatience is how long the reader of a dump has.
const dumpPatience = 10 * time.Second

// exitNow ends the process with what urgent has and what say says, or without it after a while.
func exitNow(status int, patience time.Duration, say func()) {
	go func() { // restoring may wait too
		urgent.Lock() // for good
		if urgent.restore != nil {
			_ = urgent.restore()
		}
		say()
		if urgent.release != nil {
			_ = urgent.release() // else the next gvm removes them
		}
		stderr.flush(-1)
		os.Exit(status)
	}()
	time.Sleep(patience)
	os.Exit(status)
}

// note tells the user one line on standard error, whose terminal may be raw.
func note(s string) {
	end := "\n"
	if term.IsTerminal(int(os.Stderr.Fd())) {
		end = "\r\n"
	}
	stderr.say("gvm: " + text.Printable(s) + end)
}
