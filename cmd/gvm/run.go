package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"gvm/broker"
	"gvm/control"
	"gvm/devices/virtio/fs"
	"gvm/guest/embedded"
	"gvm/guest/kernel"
	"gvm/inspect"
	"gvm/jail"
	"gvm/machine"
	"gvm/machine/disk"
	"gvm/panics"
	"gvm/sandbox"
	"gvm/text"
	"gvm/vmm"
	"gvm/vmm/boot"
	"gvm/vmm/x86"
)

// runConfig is the parsed command line of `gvm run`.
type runConfig struct {
	spec        machine.Spec
	kernel      string // as kernel.Finder takes it; "": the embedded guest
	initrds     []string
	memoryNote  string // a note about the memory
	threadNote  string // a note about the threads
	kernelNote  string // a note about a kernel found in a tree
	timeout     time.Duration
	grace       time.Duration // the guest's time to power off when gvm is asked to end
	timing      *timing       // nil: none
	watch       *watch        // nil: none
	record      *crashRecord  // nil: none
	hidden      bool          // only watch gets the console
	machineName string        // without --name; "": gvm-PID
	gdb         *gdbAddress   // nil: none
	vsock       *vsockConfig  // nil: none
	user        *userConfig   // --net user; nil: none
	sandbox     sandbox.Mode
	jail        *jail.Config // nil: none

	broker *broker.Client // of the machine in the sandbox; nil: none
}

var entries = map[string]boot.Protocol{"auto": 0, "pvh": boot.PVH32, "64": boot.Linux64}

var watchdogs = map[string]vmm.WatchdogAction{"reset": vmm.WatchdogReset, "pause": vmm.WatchdogPause,
	"exit": vmm.WatchdogExit, "nmi": vmm.WatchdogNMI}

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
   gvm run --kernel 6.1.0-13-amd64 --initrd /boot/initrd.img-6.1.0-13-amd64
   gvm run --disk a.img,serial=one --disk b.img,readonly,lun=4
   gvm run --disk a.img,backend=vhost               served by the kernel
   gvm run -k bzImage --disk debian.img --share src=. --share ref=/usr,ro
   gvm run --cpus 4 --memory 2G --cmdline "ro quiet" --timeout 60s
   sudo gvm run --jail /srv/jail/1 --uid 2001 --gid 2001 --disk /srv/a.img
   gvm help exit-status                             the exit statuses

` + guestWords(),
		Flags: append([]cli.Flag{
			&cli.StringFlag{Name: "kernel", Aliases: []string{"k"},
				Usage: "boot `KERNEL`: a bzImage or vmlinux, a kernel tree or its O= directory, a .deb or RPM package, " +
					"the release of an installed kernel, or host, the one that runs here", TakesFile: true},
			&cli.GenericFlag{Name: "initrd", Aliases: []string{"i"}, Value: new(words),
				Usage: "initramfs `FILE`; several are concatenated", TakesFile: true},
			&cli.GenericFlag{Name: "disk", Aliases: []string{"d"}, Value: new(words),
				Usage: "`PATH[,OPTION]...` of a raw image or block device; see gvm help disk"},
			&cli.GenericFlag{Name: "share", Value: new(words),
				Usage: "`TAG=DIR[,ro]`: a directory of this host that the guest mounts, read-only with ro: " +
					"mount -t virtiofs TAG /mnt"},
			&cli.StringFlag{Name: "vsock",
				Usage: "give the guest sockets (AF_VSOCK): `unix[,cid=N][,path=FILE]` connects them with unix sockets " +
					"NAME/vsock, or FILE, of this host; vhost,cid=N with AF_VSOCK here, by the kernel (vhost-vsock)"},
			&cli.GenericFlag{Name: "net", Value: new(words),
				Usage: "`BACKEND` of a network device: none (default); user[,mac=MAC][,host=off], addresses, names " +
					"and connections by gvm-net; or tap=NAME[,mac=MAC][,queues=N][,vhost=on|off], a TAP interface of this host"},
			&cli.GenericFlag{Name: "publish", Value: new(words),
				Usage: "with --net user, a port of this host that leads to one of the guest: " +
					"`[ADDR:]HOSTPORT:GUESTPORT[/udp]`; ADDR is 127.0.0.1"},
			&cli.StringFlag{Name: "cmdline", Aliases: []string{"a"},
				Usage: "kernel command `LINE`, added to console=ttyS0 panic=-1 and, without an initrd, " +
					"root= for the first disk where that is sure"},
			&cli.BoolFlag{Name: "bare-cmdline", Usage: "give the kernel --cmdline as it is"},
			&cli.GenericFlag{Name: "guest-arg", Value: new(words),
				Usage: "`WORD` for the embedded guest: write lets it write to the disks of --disk"},
			&cli.IntFlag{Name: "cpus", Aliases: []string{"c"}, Value: 1, Usage: "`N` virtual CPUs"},
			&cli.StringFlag{Name: "apic-ids",
				Usage: "`LIST` of the CPUs' local APIC IDs, ascending, such as 0,2,300; default 0,1,2 and so on"},
			&cli.StringFlag{Name: "cpu-features",
				Usage: "`LIST` such as -x2apic,+avx2: names of /proc/cpuinfo to hide, " +
					"with those that depend on them, or to demand"},
			&cli.StringFlag{Name: "memory", Aliases: []string{"m"}, Value: "512M",
				Usage: "`SIZE` of guest RAM, in MiB without a suffix; pages are taken as the guest touches them"},
			&cli.BoolFlag{Name: "overcommit",
				Usage: "let --memory be more than this host or a cgroup has, for a guest that touches less"},
			&cli.BoolFlag{Name: "hugepages", Usage: "guest RAM from the host's pool of 2 MiB pages"},
			&cli.BoolFlag{Name: "balloon",
				Usage: "give the guest a balloon: memory that it frees is the host's again, and gvm balloon takes more"},
			&cli.BoolFlag{Name: "hvc",
				Usage: "give the guest a virtio console (hvc0) beside the serial port, for gvm console --hvc"},
			&cli.BoolFlag{Name: "shared-memory", Usage: "guest RAM in a memfd"},
			&cli.StringFlag{Name: "boot", Value: "auto",
				Usage: "`MODE` for a bzImage: auto decompresses it on the host if it can, elf does or fails, " +
					"bzimage lets the guest do it: slower, and with KASLR, which the others lack"},
			&cli.StringFlag{Name: "entry", Value: "auto",
				Usage: "enter an ELF kernel by `WAY` pvh or 64 (the 64-bit boot protocol); " +
					"auto is pvh where the kernel has it and the initrds fit below 4 GiB"},
			&cli.StringFlag{Name: "on-reset", Value: "exit",
				Usage: "when the guest asks for a reset: `ACTION` exit (status 6) or reboot"},
			&cli.StringFlag{Name: "watchdog",
				Usage: "give the guest a watchdog (6300ESB), and when it expires: `ACTION` reset, pause, exit (status 8) or nmi"},
			&cli.DurationFlag{Name: "timeout", Usage: "stop the guest after `DURATION`, such as 90s, with status 124"},
			&cli.DurationFlag{Name: "grace",
				Usage: "at SIGINT, SIGTERM and SIGHUP press the guest's power button, and stop it `DURATION` later; " +
					"a second signal stops it at once (default: stop it at once)"},
			&cli.StringFlag{Name: "name", Usage: "`NAME` of the machine for gvm list and gvm disk (default: gvm-PID)"},
			&cli.StringFlag{Name: "trace", Usage: "record every SCSI request in `FILE`, for gvm trace",
				TakesFile: true},
			&cli.BoolFlag{Name: "timing",
				Usage: "print at the end how long each phase took, with the guest's writes to port 0x80"},
			&cli.StringFlag{Name: "vhost-abi",
				Usage: "accept version `N|any` of the kernel's vhost-scsi interface, although gvm is written for another"},
			&cli.IntFlag{Name: "queues",
				Usage: "`N` virtio-scsi request queues (default: one per CPU); " +
					"with backend=vhost each takes some 21 MiB of the kernel's memory"},
			pollFlag(),
			&cli.StringFlag{Name: "gdb",
				Usage: "let gdb debug the guest's kernel, at `ADDR` :PORT of this host, HOST:PORT, unix:PATH or stdio, " +
					"and print the command that starts it"},
			&cli.BoolFlag{Name: "start-stopped", Aliases: []string{"S"},
				Usage: "with --gdb: wait for gdb before the guest's first instruction"},
			sandboxFlag("guest's first instruction"),
		}, slices.Concat(jailFlags(), crashFlags(), verdictFlags())...),
		// The library searches all flags for each flag with an action, which takes 0.2 ms. No flag
		// has one, and values are read from the parsed command line.
		Before: func(c *cli.Context) error { c.Command.Flags = nil; return nil },
		Action: func(c *cli.Context) error {
			timeout := c.Duration("timeout")
			rc, err := within(timeout, endOfTimeout(timeout), func() (runConfig, error) {
				rc, err := parseRun(c)
				if err != nil {
					return rc, usageError{err}
				}
				if rc.jail == nil {
					err = rc.openRecords(c)
				}
				return rc, err
			})
			if err != nil {
				return err
			}
			if rc.jail != nil {
				return rc.enterJail()
			}
			_, err = rc.watch.finish(run(&rc))
			return rc.record.finish(err)
		},
	}
}

// openRecords opens the files and the directory for the records of a run.
func (rc *runConfig) openRecords(c *cli.Context) (err error) {
	if rc.record, err = parseCrashRecord(c); err != nil {
		return err
	}
	return rc.watch.open()
}

func parseRun(c *cli.Context) (rc runConfig, err error) {
	if c.Args().Present() {
		return rc, fmt.Errorf("unexpected argument %q; a kernel is named with --kernel, a disk with --disk",
			c.Args().First())
	}
	rc = runConfig{
		spec: machine.Spec{
			Name:        c.String("name"),
			CPUs:        c.Int("cpus"),
			CmdLine:     c.String("cmdline"),
			BareCmdLine: c.Bool("bare-cmdline"),
			GuestArgs:   wordsOf(c, "guest-arg"),
			Queues:      c.Int("queues"),
			Trace:       c.String("trace"),
			HVC:         c.Bool("hvc"),
		},
		kernel:  c.String("kernel"),
		initrds: wordsOf(c, "initrd"),
		timeout: c.Duration("timeout"),
		grace:   c.Duration("grace"),
	}
	spec := &rc.spec
	set := c.LocalFlagNames() // c.IsSet searches all flags at each call
	given := func(flag string) bool { return slices.Contains(set, flag) }
	if c.Bool("timing") {
		rc.timing = newTiming()
	}
	if given("name") {
		if err := control.CheckName(spec.Name); err != nil {
			return rc, fmt.Errorf("--name: %w", err)
		}
	}
	if spec.CPUs < 1 {
		return rc, fmt.Errorf("--cpus %d: want 1 or more", spec.CPUs)
	}
	if given("apic-ids") {
		if spec.APICIDs, err = parseAPICIDs(c.String("apic-ids")); err != nil {
			return rc, fmt.Errorf("--apic-ids: %w", err)
		}
		if given("cpus") && spec.CPUs != len(spec.APICIDs) {
			return rc, fmt.Errorf("--apic-ids has %d IDs for --cpus %d: give each CPU one, or leave --cpus out",
				len(spec.APICIDs), spec.CPUs)
		}
		spec.CPUs = len(spec.APICIDs)
	}
	if given("gdb") {
		if rc.gdb, err = parseGDB(c.String("gdb")); err != nil {
			return rc, fmt.Errorf("--gdb %s: %w", text.Word(c.String("gdb")), err)
		}
	}
	if spec.Debug, spec.StartStopped = rc.gdb != nil, c.Bool("start-stopped"); spec.StartStopped && !spec.Debug {
		return rc, errors.New("-S needs --gdb, such as --gdb :1234: nothing else could start the guest")
	}
	if rc.sandbox, err = parseSandbox(c); err != nil {
		return rc, err
	}
	if given("queues") && (spec.Queues < 1 || spec.Queues > disk.MaxQueues) {
		return rc, fmt.Errorf("--queues %d: want 1 to %d", spec.Queues, disk.MaxQueues)
	}
	if spec.Poll, err = parsePoll(c); err != nil {
		return rc, err
	}
	if rc.grace < 0 || rc.grace > control.MaxGrace {
		return rc, fmt.Errorf("--grace %s: want 0 to %s", rc.grace, control.MaxGrace)
	}
	if given("timeout") && rc.timeout <= 0 {
		return rc, fmt.Errorf("--timeout %s: want a positive duration, such as 90s", rc.timeout)
	}
	if spec.Memory.Size, err = text.ParseSize(c.String("memory"), 1<<20); err != nil {
		return rc, fmt.Errorf("--memory: %w", err)
	}
	host := thisHost()
	spec.Memory.Hugepages, spec.Memory.Shared = c.Bool("hugepages"), c.Bool("shared-memory")
	if spec.Balloon = c.Bool("balloon"); spec.Balloon && spec.Memory.Hugepages {
		return rc, errors.New("--balloon and --hugepages: the host takes back no page of its pool; leave one of them out")
	}
	if rc.memoryNote, err = checkMemory(spec.Memory, c.Bool("overcommit"), host); err != nil {
		return rc, fmt.Errorf("--memory %s: %w", c.String("memory"), err)
	}
	if spec.CPUFeatures, err = x86.ParseFeatures(c.String("cpu-features")); err != nil {
		return rc, fmt.Errorf("--cpu-features: %w", err)
	}
	if spec.BootMode, err = boot.ParseMode(c.String("boot")); err != nil {
		return rc, fmt.Errorf("--boot: %w", err)
	}
	var ok bool
	if spec.Protocol, ok = entries[c.String("entry")]; !ok {
		return rc, text.OneOf("--entry ", c.String("entry"), entries)
	}
	switch v := c.String("on-reset"); v {
	case "exit", "reboot":
		spec.Rebooting = v == "reboot"
	default:
		return rc, text.OneOfNames("--on-reset ", v, []string{"exit", "reboot"})
	}
	if given("watchdog") {
		if spec.Watchdog, ok = watchdogs[c.String("watchdog")]; !ok {
			return rc, text.OneOf("--watchdog ", c.String("watchdog"), watchdogs)
		}
	}
	if spec.VhostABI, err = parseABI(c.String("vhost-abi")); err != nil {
		return rc, fmt.Errorf("--vhost-abi: %w", err)
	}
	inRAM := uint64(0)
	for _, s := range wordsOf(c, "disk") {
		d, err := disk.Parse(s)
		if err != nil {
			return rc, err
		}
		spec.Disks = append(spec.Disks, d)
		if d.Storage == disk.Memory {
			if inRAM += uint64(d.Size); inRAM > text.MaxSize {
				return rc, fmt.Errorf("--disk %s: the disks in memory have more than %s", d.Path,
					text.SizeWord(text.MaxSize))
			}
		}
	}
	if diskNote, err := checkDiskMemory(spec.Memory, inRAM, host); err != nil {
		return rc, fmt.Errorf("--disk mem: %w", err)
	} else if rc.memoryNote == "" {
		rc.memoryNote = diskNote
	}
	for _, s := range wordsOf(c, "share") {
		share, err := parseShare(s)
		if err != nil {
			return rc, fmt.Errorf("--share %s: %w", text.Word(s), err)
		}
		spec.Shares = append(spec.Shares, share)
	}
	if given("vsock") {
		if rc.vsock, err = parseVsock(c.String("vsock")); err != nil {
			return rc, err
		}
	}
	if spec.Nets, rc.user, err = parseNets(wordsOf(c, "net")); err != nil {
		return rc, err
	}
	if err := rc.user.parsePublishes(wordsOf(c, "publish")); err != nil {
		return rc, err
	}
	if rc.threadNote, err = checkThreads(spec, 1, host); err != nil {
		return rc, err
	}
	if rc.kernel == "" {
		if rc.kernel, rc.kernelNote, err = kernel.InTree("."); err != nil {
			return rc, fmt.Errorf("%w with --kernel", err)
		}
	}
	if rc.kernel == "" {
		var unfit []string
		for _, f := range []struct {
			name string
			set  bool
		}{{"--initrd", len(rc.initrds) > 0}, {"--share", len(spec.Shares) > 0}, {"--net", len(spec.Nets) > 0},
			{"--cmdline", given("cmdline")}, {"--bare-cmdline", spec.BareCmdLine},
			{"--entry 64", spec.Protocol == boot.Linux64}} {
			if f.set {
				unfit = append(unfit, f.name)
			}
		}
		if len(unfit) > 0 {
			return rc, fmt.Errorf("%s: not for the embedded guest, which takes --guest-arg; name a kernel with --kernel",
				strings.Join(unfit, ", "))
		}
	}
	if rc.kernel != "" && len(spec.GuestArgs) > 0 {
		return rc, errors.New("--guest-arg is for the embedded guest; a kernel takes --cmdline")
	}
	if rc.watch, err = parseWatch(c, nil); err != nil {
		return rc, err
	}
	if in := jail.Here(); in != nil {
		spec.Jail = []inspect.Node{inspect.Text("directory", in.Dir), inspect.Int("uid", os.Getuid()),
			inspect.Int("gid", os.Getgid()), inspect.Text("limits", in.Limits)}
	}
	if rc.jail, err = parseJail(c, &rc, given); err != nil {
		return rc, err
	}
	for word := range strings.SplitSeq(strings.Join(spec.GuestArgs, " "), " ") {
		if word != "" && !embedded.Known(word) {
			return rc, unknownWord(word)
		}
	}
	return rc, nil
}

// parseShare reads TAG=DIR[,ro].
func parseShare(s string) (share fs.Share, err error) {
	var ok bool
	share.Tag, share.Dir, ok = strings.Cut(s, "=")
	share.Dir, share.ReadOnly = strings.CutSuffix(share.Dir, ",ro")
	if !ok || share.Dir == "" {
		return share, errors.New("want TAG=DIR, or TAG=DIR,ro")
	}
	return share, fs.CheckTag(share.Tag)
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

// pollFlag returns --poll of the commands that have request queues. The default gives a third more
// requests on a host with slow wake-ups. It keeps a core awake only while requests come at 15,000 a
// second: see docs/performance.md.
func pollFlag() cli.Flag {
	return &cli.DurationFlag{Name: "poll", Value: 64 * time.Microsecond,
		Usage: "before it sleeps, a request queue's thread looks for more requests for `TIME` at most, " +
			"while they come that fast; 0 is never"}
}

func parsePoll(c *cli.Context) (time.Duration, error) {
	d := c.Duration("poll")
	if d < 0 || d > 10*time.Millisecond {
		return 0, fmt.Errorf("--poll %s: want 0 to 10ms", d)
	}
	return d, nil
}

// startGC is GOGC until the start has settled: the first garbage collection comes with 64 MiB in
// use rather than 4 MiB, which the embedded guest's disk would exceed at every start.
const startGC = 1600

// begun is the virtual machine of gvm run, which begins while the command line is parsed, as both
// take about the same time. takeBegun takes it, or begins another if it is nil.
var begun *vmm.Begun

// takeBegun returns a virtual machine, for the caller to close.
func takeBegun() (b *vmm.Begun) {
	if b, begun = begun, nil; b == nil {
		b = vmm.Begin()
	}
	return b
}

// run boots the guest and returns the end as an error, which gvm maps to an exit status. All open
// files are closed when run returns.
func run(rc *runConfig) (err error) {
	collect := debug.SetGCPercent(startGC)
	note := rc.record.notes(note)
	spec := &rc.spec
	spec.Begin(takeBegun()) // first, so that KVM works during the rest of the start
	defer func() { err = errors.Join(err, spec.Close()) }()
	// Signals and --timeout must end the run in order even while it opens files, which may take
	// long.
	ctx, stop := context.WithCancelCause(context.Background())
	defer stop(nil)
	end := &ending{stop: stop, grace: rc.grace}
	defer catchSignals(ctx, end.signal)()
	if rc.timeout > 0 {
		timer := time.AfterFunc(rc.timeout-sinceStart(), panics.Func(func() { stop(endOfTimeout(rc.timeout)) }))
		defer timer.Stop()
	}
	for _, s := range []string{rc.kernelNote, rc.memoryNote, rc.threadNote} {
		if s != "" {
			note(s)
		}
	}
	l := newLife[error](ctx)
	return l.run(func() error { return rc.live(l, stop, end, collect, note) }, func(err error) error { return err })
}

// live is the life of the machine of gvm run. stop ends it, and end gets the machine for signals.
// It sets the garbage collector to collect when the start has settled.
func (rc *runConfig) live(l *life[error], stop context.CancelCauseFunc, end *ending, collect int,
	note func(string)) (err error) {
	ctx, spec := l.ctx, &rc.spec
	rc.startBroker(note)
	defer rc.endBroker()
	if err := rc.watch.readAllow(ctx); err != nil {
		return err
	}
	for _, path := range rc.initrds {
		f, err := boot.OpenFile(ctx, path)
		if err != nil {
			return err
		}
		defer f.Close()
		spec.Initrds = append(spec.Initrds, f)
	}
	var found *kernel.Kernel
	if rc.kernel != "" {
		k, err := kernel.Finder{}.Find(ctx, rc.kernel)
		if err != nil {
			return err
		}
		defer k.Close()
		found, spec.Kernel = k, k.Image
		if lacks := rc.lacks(k); lacks != "" {
			note(lacks)
		}
		if rc.watch != nil {
			rc.watch.kernel = k.Image.Name
		}
	}
	l.at("the control socket was made")
	socket, err := rc.claimName(note)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rc.closeSocket(socket)) }()
	defer func() { rc.record.prepare(err, rc.watch) }() // while the broker is there
	l.at("the socket of --vsock was made")
	bridge, err := rc.listenVsock(socket != nil)
	if err != nil {
		return err
	}
	if bridge != nil {
		defer func() { err = errors.Join(err, bridge.Close()) }()
	}
	l.at("gvm-net was started")
	user, err := rc.startUserNet(note)
	if err != nil {
		return err
	}
	defer user.close()
	var gdb *gdbServer
	if rc.gdb != nil {
		l.at("the socket of --gdb was made")
		if gdb, err = rc.gdb.listen(ctx, rc.broker); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, gdb.close()) }()
		if gdb.listener != nil {
			note("to debug the guest: " + gdb.command(found, spec))
		}
	}
	l.at("the kernel's vmlinux was opened")
	t := newTerminal(stop)
	var console vmm.Console = t
	switch {
	case rc.hidden:
		console = machine.Output(io.Discard)
	case rc.gdb.isStdio():
		console = machine.Output(os.Stderr)
	}
	spec.Console = rc.watch.console(console)
	spec.Console = rc.record.console(spec.Console)
	defer func() { err = errors.Join(err, t.close()) }()
	spec.Note, spec.Stamp, spec.Words = note, rc.timing.stamp, terminalSize()
	spec.Phase = rc.timing.phase
	rc.record.begin(ctx, spec, found)
	spec.KernelCache, spec.Version = boot.CacheDir(), version
	spec.Ready = func(ending context.Context) error {
		context.AfterFunc(ending, panics.Func(func() { stop(context.Cause(ending)) }))
		if console == t {
			if err := t.open(ending); err != nil {
				return err
			}
		}
		rc.timing.phase("files, disks, control socket")
		return nil
	}
	l.at("the machine was started")
	rc.seal(exitBug, note)
	trimmer := newTrimmer()
	defer trimmer.close()
	m, err := machine.Start(ctx, *spec)
	if err != nil {
		return err
	}
	l.begins()
	addProcs() // not before: it stops the process for some 20 µs
	end.begin(m.Stop)
	if gdb != nil {
		gdb.serve(m)
	}
	if bridge != nil {
		bridge.Serve(m.DialVsock)
	}
	if socket != nil {
		socket.Serve(&remote{info: rc.info(), Machine: m, pausePatience: pausePatience, memory: rc.spec.Memory})
	}
	settle := time.AfterFunc(settled, panics.Func(func() {
		debug.SetGCPercent(collect)
		if err := trimmer.trim(); err != nil {
			note(fmt.Sprintf("the memory that the start took is kept: %v%s", err, mend(err)))
		}
	}))
	<-m.Ended()
	settle.Stop()
	rc.timing.phase("the guest's run")
	err = t.close()
	out, err2 := m.Wait()
	if err = errors.Join(err2, err); err == nil || out.Ending != 0 {
		rc.timing.print()
		err = errors.Join(ended(out), err)
	}
	l.ends(err, exitStatus(err) >= exitTimeout)
	return err
}
