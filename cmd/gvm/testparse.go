package main

import (
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"gvm/control"
	"gvm/devices/virtio/fs"
	"gvm/guest/agent/wire"
	"gvm/machine"
	"gvm/machine/disk"
	"gvm/testrun"
	"gvm/text"
	"gvm/verdict"
)

// testConfig is the parsed command line of gvm test.
type testConfig struct {
	runConfig
	args    []string    // the command; nil: a shell
	files   []string    // --file
	modules []string    // --module
	scratch []disk.Spec // --scratch
	root    string      // --root; "": the initramfs
	mounts  []wire.Mount
	env     []string // --env
	cwd     string
	uid     uint32
	gid     uint32
	groups  []uint32
	tty     bool
	klog    string
	hang    time.Duration
	bisect  bool
	verdict string
	rungs   []testrun.Rung // nil: all
	verbose bool
	policy  verdict.Policy
	allow   allowFile
	note    func(string)

	matrix *matrixConfig // nil: one machine with the streams of gvm
	output *cellOutput   // of a cell; nil: the streams of gvm
}

func parseTest(c *cli.Context) (t *testConfig, err error) {
	kernels := wordsOf(c, "kernel")
	cpus, err := parseCPUs(c.String("cpus"))
	if err != nil {
		return nil, err
	}
	t = &testConfig{
		runConfig: runConfig{
			spec:    machine.Spec{CPUs: slices.Max(cpus), CmdLine: c.String("cmdline")},
			timeout: c.Duration("timeout"),
			grace:   c.Duration("grace"),
		},
		args:    c.Args().Slice(),
		files:   wordsOf(c, "file"),
		modules: wordsOf(c, "module"),
		env:     wordsOf(c, "env"),
		cwd:     c.String("cwd"),
		tty:     c.Bool("tty"),
		klog:    c.String("klog"),
		hang:    c.Duration("hang"),
		bisect:  c.Bool("bisect"),
		verdict: c.String("verdict"),
		verbose: c.Bool("verbose"),
		allow:   allowFile{path: c.String("allow")},
		note:    note,
	}
	if len(kernels) > 0 {
		t.kernel = kernels[0]
	}
	given := func(flag string) bool { return slices.Contains(c.LocalFlagNames(), flag) }
	spec := &t.spec
	if c.Bool("timing") {
		t.timing = newTiming()
	}
	if given("timeout") && t.timeout <= 0 {
		return nil, fmt.Errorf("--timeout %s: want a positive duration, such as 90s", t.timeout)
	}
	if t.grace < 0 || t.grace > control.MaxGrace {
		return nil, fmt.Errorf("--grace %s: want 0 to %s", t.grace, control.MaxGrace)
	}
	if t.hang != 0 && t.hang < leastHang {
		return nil, fmt.Errorf("--hang %s: want %s or more, as the agent gives a sign of life each second, or 0", t.hang,
			leastHang)
	}
	if spec.Memory.Size, err = text.ParseSize(c.String("memory"), 1<<20); err != nil {
		return nil, fmt.Errorf("--memory: %w", err)
	}
	host := thisHost()
	if given("emit") || ordered != nil { // for which the first process has looked
		host = anyHost()
	}
	if t.memoryNote, err = checkMemory(spec.Memory, true, host); err != nil {
		return nil, fmt.Errorf("--memory %s: %w", c.String("memory"), err)
	}
	for _, s := range wordsOf(c, "disk") {
		d, err := disk.Parse(s)
		if err != nil {
			return nil, err
		}
		spec.Disks = append(spec.Disks, d)
	}
	if given("scratch") {
		if err := t.parseScratch(c.String("scratch")); err != nil {
			return nil, err
		}
		spec.Disks = append(spec.Disks, t.scratch...)
	}
	if slices.Contains(t.modules, "") {
		return nil, errors.New("--module: the name is empty: want that of a module of the kernel")
	}
	for _, e := range t.env {
		if name, _, _ := strings.Cut(e, "="); name == "" {
			return nil, fmt.Errorf("--env %q: want NAME or NAME=VALUE", e)
		}
	}
	if t.cwd == "" {
		if t.cwd, err = os.Getwd(); err != nil {
			t.cwd = "/"
		}
	} else if !filepath.IsAbs(t.cwd) {
		return nil, fmt.Errorf("--cwd %s: want an absolute path, of a directory in the guest", t.cwd)
	}
	if err := t.parseShares(c.String("root"), wordsOf(c, "rw"), wordsOf(c, "ro")); err != nil {
		return nil, err
	}
	if t.threadNote, err = checkThreads(spec, 1, host); err != nil {
		return nil, err
	}
	if t.sandbox, err = parseSandbox(c); err != nil {
		return nil, err
	}
	if t.record, err = parseCrashRecord(c); err != nil && !given("emit") {
		return nil, err
	}
	if t.root != "" && t.root != "/" && !given("cwd") {
		t.cwd = "/"
	}
	if err := t.parseUser(c.String("user")); err != nil {
		return nil, fmt.Errorf("--user %s: %w", text.Word(c.String("user")), err)
	}
	for i := range spec.Shares {
		spec.Shares[i].Root = t.uid == 0
	}
	if s := c.String("rung"); s != "auto" {
		for _, r := range testrun.Rungs {
			if r.String() == s {
				t.rungs = []testrun.Rung{r}
			}
		}
		if t.rungs == nil {
			names := []string{"auto"}
			for _, r := range testrun.Rungs {
				names = append(names, r.String())
			}
			return nil, text.OneOfNames("--rung ", s, names)
		}
	}
	terminals := term.IsTerminal(int(os.Stdin.Fd())) && term.IsTerminal(int(os.Stdout.Fd()))
	if t.tty && !terminals {
		return nil, errors.New("--tty: standard input and output are no terminal")
	}
	t.tty = t.tty || len(t.args) == 0 && terminals
	if t.policy, err = parsePolicy(c); err != nil {
		return nil, err
	}
	t.matrix, err = t.parseMatrix(c, kernels, cpus, host)
	return t, err
}

// leastHang is the least --hang: some signs of life of the agent.
const leastHang = 3 * wire.AlivePeriod

// maxScratch is the largest number of disks of --scratch.
const maxScratch = 64

// parseScratch reads --scratch.
func (t *testConfig) parseScratch(s string) error {
	n, size := 1, s
	if count, each, ok := strings.Cut(s, "x"); ok {
		var err error
		if n, err = strconv.Atoi(count); err != nil || n < 1 || n > maxScratch {
			return fmt.Errorf("--scratch %s: want 1 to %d disks, such as 5x5G", text.Word(s), maxScratch)
		}
		size = each
	}
	switch bytes, err := disk.ParseSize("--scratch "+text.Word(s), size); {
	case err != nil:
		return err
	case bytes%scratchUnit != 0:
		return fmt.Errorf("--scratch %s: want a multiple of %s", s, text.FormatSize(scratchUnit))
	}
	for i := range n {
		// The files end with the machine, so a flush has nothing to keep.
		d, err := disk.Parse(fmt.Sprintf("temp:%s,cache=unsafe,serial=gvm-scratch-%d", size, i+1))
		if err != nil {
			return err
		}
		t.scratch = append(t.scratch, d)
	}
	return nil
}

// scratchUnit is the unit of the size of a disk of --scratch: the largest logical block.
const scratchUnit = 4096

// parseShares reads --root, --rw and --ro.
func (t *testConfig) parseShares(root string, rw, ro []string) error {
	add := func(flag, dir string, share fs.Share, m wire.Mount) error {
		path, err := filepath.Abs(dir)
		if err == nil {
			err = checkDir(dir, unix.R_OK|unix.X_OK)
		}
		if err != nil {
			return fmt.Errorf("--%s: %w", flag, err)
		}
		share.Dir, share.Tag = path, fmt.Sprint("gvm", len(t.mounts))
		m.Tag, m.Dir, m.ReadOnly = share.Tag, text.Name(path), share.ReadOnly
		t.spec.Shares, t.mounts = append(t.spec.Shares, share), append(t.mounts, m)
		return nil
	}
	if root != "" {
		if len(t.files) > 0 {
			return errors.New("--file is for a guest without --root, which has all files of DIR")
		}
		if err := add("root", root, fs.Share{ReadOnly: true, Valid: time.Hour}, wire.Mount{Root: true}); err != nil {
			return err
		}
		t.root = string(t.mounts[0].Dir)
	}
	for _, dir := range rw {
		if err := add("rw", dir, fs.Share{}, wire.Mount{}); err != nil {
			return err
		}
	}
	for _, dir := range ro {
		if err := add("ro", dir, fs.Share{ReadOnly: true}, wire.Mount{}); err != nil {
			return err
		}
	}
	return nil
}

// parseUser reads --user.
func (t *testConfig) parseUser(s string) error {
	name, group, hasGroup := strings.Cut(s, ":")
	id := func(s string) (uint32, error) {
		n, err := strconv.ParseUint(s, 10, 32)
		if err != nil {
			return 0, fmt.Errorf("%q: want a number", s)
		}
		return uint32(n), nil
	}
	u, err := user.Lookup(name)
	if err != nil {
		if t.uid, err = id(name); err != nil {
			return errors.New("is no user of this host; give one, or numbers UID[:GID]")
		}
		t.gid = t.uid
	} else {
		groups, err := u.GroupIds()
		if err != nil {
			return err
		}
		for _, s := range groups {
			g, err := id(s)
			if err != nil {
				return err
			}
			t.groups = append(t.groups, g)
		}
		if t.uid, err = id(u.Uid); err != nil {
			return err
		}
		if t.gid, err = id(u.Gid); err != nil {
			return err
		}
	}
	if hasGroup {
		t.groups = nil
		t.gid, err = id(group)
		return err
	}
	return nil
}
