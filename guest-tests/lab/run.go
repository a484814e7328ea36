package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"gvm/guest/initramfs"
)

// Command is a program to run in L1. Every path means the same there as here: L1's root is this
// machine's root, read-only. Only /tmp, /run, /dev, /proc and /sys are L1's own.
type Command struct {
	// Args is the program, found by PATH in Env, and its arguments.
	Args []string
	// Env is the whole environment. If nil, it is a small one: PATH, HOME=/tmp, LC_ALL=C, TERM.
	// GVM_IN_LAB=1, GVM_LAB_CACHE and TMPDIR=/tmp are set in either case.
	Env []string
	// User is the UID and GID of the command; 0 is root. The user may use KVM, and the devices of
	// vhost but for vhost-scsi. HOME is /tmp, and no XDG_ variable is set.
	User int
	// Dir is the working directory. The default is Writable[0], or else /tmp.
	Dir string
	// Writable are directories of this machine that the command may write to.
	Writable []string
	// Visible are paths under /tmp that the command may read, or, by User, under a directory that
	// User cannot enter, such as /root. Args[0], Dir and the lab's cache are always visible.
	Visible []string

	// Kernel is L1's kernel; the default is Lab.Debian. Each of Lab.Kernel works except cloud,
	// which lacks 9p.
	Kernel *Kernel
	// Modules of Kernel that L1 loads besides its usual ones.
	Modules []string
	Memory  int // of L1, in MiB; the default is 4096
	CPUs    int // the default is 2
	// Fast makes L1 use transparent huge pages, as most machines do, and copy memory in a way that
	// is fast to emulate: guests boot in half the time.
	Fast bool

	// Stdin is the command's input; nil is /dev/null. Run may read more from it than the command
	// does, and may leave a Read in progress when it returns. A command with input is not tried
	// again if its lab wedges.
	Stdin io.Reader
	// Stdout and Stderr receive the command's output as it comes. If they are the same, the command
	// has one pipe for both, which keeps the order.
	Stdout, Stderr io.Writer
	// TTY gives the command a terminal, whose output goes to Stdout. If Stdin is a terminal, it is
	// in raw mode meanwhile, and its size is passed on.
	TTY bool

	// Timeout bounds the whole run, including the start of L1; 0 is none.
	Timeout time.Duration
	// Silence is the time without a sign of life after which the lab counts as wedged; the default
	// is 40 s. It does not limit the command's silence.
	Silence time.Duration
	// Console receives the output of L1's kernel. Log receives the lab's own lines, and the end of
	// the console if a run fails; the default is os.Stderr.
	Console, Log io.Writer
}

var (
	// ErrWedged means that L1 gave no sign of life for Command.Silence. It says nothing about the
	// command.
	ErrWedged = errors.New("lab wedged")
	// ErrCrashed means that L1 ended before the command: its kernel panicked, or QEMU failed.
	ErrCrashed = errors.New("lab crashed")
)

// bootSilence is the limit until the agent's first sign of life: before it the kernel boots.
const bootSilence = 2 * time.Minute

// Run starts an L1, runs the command in it, and returns its exit status, which is 128+n for a
// command killed by signal n. An error means that there is no status: ErrWedged, ErrCrashed, the
// context's end, or an invalid set-up. A wedged lab is started once more, and Log says so; the
// command's earlier output stays. Run leaves no process or file behind.
func (l *Lab) Run(ctx context.Context, c Command) (exit int, err error) { return l.run(ctx, c, nil) }

// A keeper keeps a lab running after its command. The next one runs in it, with the Command of the
// first but for Args and Timeout, and sees the files that the last one left in /tmp; processes are
// killed.
type keeper struct{ m *machine }

// end ends the lab, if there is one.
func (k *keeper) end() {
	if k.m != nil {
		k.m.stop()
		k.m = nil
	}
}

// run is Run in the lab that k keeps, or in a new one, which k keeps after that. A nil k keeps
// none.
func (l *Lab) run(ctx context.Context, c Command, k *keeper) (exit int, err error) {
	if c.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, c.Timeout, fmt.Errorf("timeout of %v: %w",
			c.Timeout, context.DeadlineExceeded))
		defer cancel()
	}
	if c.Log == nil {
		c.Log = os.Stderr
	}
	exit, err = l.try(ctx, c, k)
	if errors.Is(err, ErrWedged) && c.Stdin == nil {
		fmt.Fprintf(c.Log, "lab: %v; trying once more\n", err)
		exit, err = l.try(ctx, c, k)
	}
	return exit, err
}

func (l *Lab) try(ctx context.Context, c Command, k *keeper) (exit int, err error) {
	if c.Kernel == nil {
		c.Kernel = l.Debian
	}
	if k == nil {
		k = &keeper{}
		defer k.end()
	}
	if k.m == nil {
		restore, err := l.begin(ctx, &c, k)
		if err != nil {
			return 0, fmt.Errorf("lab: %w", err)
		}
		defer restore()
	} else if err := k.m.next(c.Args); err != nil {
		return 0, err
	}
	exit, err = k.m.serve(ctx, &c)
	if err == nil {
		return exit, nil
	}
	console := &k.m.console
	k.end()
	err = fmt.Errorf("%w (L1 kernel %s)", err, c.Kernel.Release)
	if t := strings.TrimSpace(console.String()); t != "" {
		t = strings.ReplaceAll(t, "\n", "\nlab:   ") // each line with the mark of the lab's own
		fmt.Fprintf(c.Log, "lab: the end of L1's console:\nlab:   %s\n", t)
	}
	return exit, err
}

// begin starts a lab for the command. After it the command's terminal is to be restored.
func (l *Lab) begin(ctx context.Context, c *Command, k *keeper) (restore func(), err error) {
	j, err := l.job(c)
	if err != nil {
		return nil, err
	}
	if restore, err = rawTerminal(c, j); err != nil {
		return nil, err
	}
	initrd, err := l.initrd(ctx, c, j)
	if err == nil {
		k.m, err = startMachine(l.qemu, c, j, initrd)
		initrd.Close()
	}
	if err != nil {
		restore()
	}
	return restore, err
}

// job makes the agent's instructions.
func (l *Lab) job(c *Command) (*job, error) {
	if len(c.Args) == 0 {
		return nil, errors.New("no command")
	}
	j := &job{
		Args:  c.Args,
		Env:   c.Env,
		Dir:   c.Dir,
		User:  c.User,
		Stdin: c.Stdin != nil,
		TTY:   c.TTY,
		Merge: c.Stdout == c.Stderr,
		Huge:  c.Fast,
	}
	if j.Env == nil {
		j.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/tmp", "LC_ALL=C",
			"TERM=" + os.Getenv("TERM")}
	}
	set := map[string]string{InLabEnv: "1", CacheEnv: l.Cache, "TMPDIR": "/tmp"}
	if c.User != 0 { // without rights to the directories of this machine's user
		set["HOME"] = "/tmp"
		j.Env = slices.DeleteFunc(slices.Clone(j.Env), func(s string) bool { return strings.HasPrefix(s, "XDG_") })
	}
	for key, value := range set {
		// A second definition would be ignored.
		j.Env = slices.DeleteFunc(slices.Clone(j.Env), func(s string) bool { return strings.HasPrefix(s, key+"=") })
		j.Env = append(j.Env, key+"="+value)
	}
	for i, d := range c.Writable {
		d, err := filepath.Abs(d)
		if err != nil {
			return nil, err
		}
		if st, err := os.Stat(d); err != nil {
			return nil, err
		} else if !st.IsDir() {
			return nil, fmt.Errorf("%s is not a directory", d)
		}
		j.Mounts = append(j.Mounts, share{fmt.Sprintf("w%d", i), d})
		if j.Dir == "" {
			j.Dir = d
		}
	}
	var err error
	if j.Dir == "" {
		j.Dir = "/tmp"
	}
	if j.Dir, err = filepath.Abs(j.Dir); err != nil {
		return nil, err
	}
	// An outer directory is mounted first.
	slices.SortFunc(j.Mounts, func(a, b share) int { return strings.Compare(a.Path, b.Path) })
	j.Mounts = slices.CompactFunc(j.Mounts, func(a, b share) bool { return a.Path == b.Path })
	visible := append([]string{l.Cache, j.Dir}, c.Visible...)
	if filepath.IsAbs(c.Args[0]) {
		visible = append(visible, c.Args[0])
	}
	for _, p := range visible {
		if p, err = filepath.Abs(p); err != nil {
			return nil, err
		}
		covered := p != "/tmp" && within(p, "/tmp")
		if c.User != 0 && !within(p, "/tmp") {
			if d := closed(p); d != "" {
				covered, j.Closed = true, append(j.Closed, d)
			}
		}
		if covered && !slices.ContainsFunc(j.Mounts, func(s share) bool { return within(p, s.Path) }) {
			j.Visible = append(j.Visible, p)
		}
	}
	slices.Sort(j.Closed)
	j.Closed = slices.Compact(j.Closed)
	slices.Sort(j.Visible)
	// Paths inside a visible directory are visible with it.
	j.Visible = slices.CompactFunc(j.Visible, func(a, b string) bool { return within(a, b) || within(b, a) })
	return j, nil
}

// closed returns the uppermost directory above p that only its owner and group may enter, or "".
func closed(p string) (dir string) {
	for d := filepath.Dir(p); d != "/"; d = filepath.Dir(d) {
		if st, err := os.Stat(d); err == nil && st.Mode()&0o001 == 0 {
			dir = d
		}
	}
	return dir
}

// within reports whether path p is dir or below it.
func within(p, dir string) bool {
	rel, err := filepath.Rel(dir, p)
	return err == nil && filepath.IsLocal(rel)
}

// initrd returns L1's initramfs as an unnamed file: an archive of modules from the cache, and one
// with the agent and its job.
func (l *Lab) initrd(ctx context.Context, c *Command, j *job) (*os.File, error) {
	text, err := json.Marshal(j)
	if err != nil {
		return nil, err
	}
	b := initramfs.New()
	defer b.Close()
	b.File("lab.json", 0o644, text)
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	if err := program(ctx, b, "/", self, "/init"); err != nil { // the race detector needs libraries
		return nil, err
	}
	mods, err := l.moduleArchive(ctx, c.Kernel, slices.Concat(l1Modules, c.Modules))
	if err != nil {
		return nil, err
	}
	defer mods.Close()
	f, err := memfile("lab-initrd")
	if err != nil {
		return nil, err
	}
	if _, err = io.Copy(f, mods); err == nil {
		err = copyImage(f, b)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// moduleArchive opens the archive of these modules in the cache, and makes it if it is missing.
func (l *Lab) moduleArchive(ctx context.Context, k *Kernel, names []string) (*os.File, error) {
	name := filepath.Join(l.Cache, fmt.Sprintf("l1-%s-%s.cpio", k.Release, hash(fmt.Sprint(k.VMLinux, names))))
	if f, err := os.Open(name); err == nil {
		return f, nil
	}
	b := initramfs.New()
	if err := k.modules(ctx, b, names); err != nil {
		return nil, err
	}
	if err := writeImage(b, name); err != nil {
		return nil, err
	}
	return os.Open(name)
}
