package jail

import (
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"gvm/text"
)

// Limits bound the host's resources of the program and its children.
type Limits struct {
	words    []string
	controls []control
	rlimits  []rlimit
}

// control is a setting of a control group.
type control struct{ controller, file, value string }

type rlimit struct {
	name     string
	resource int
	value    uint64
}

// LimitNames are the names of limits.
var LimitNames = []string{"memory", "cpus", "pids", "nofile", "fsize"}

// Add reads NAME=VALUE[,NAME=VALUE]...
func (l *Limits) Add(s string) error {
	for word := range strings.SplitSeq(s, ",") {
		name, value, ok := strings.Cut(word, "=")
		if !slices.Contains(LimitNames, name) {
			return text.OneOfNames("", name, LimitNames)
		}
		if !ok {
			return fmt.Errorf("%s: want a value, such as %s=4G", name, "memory")
		}
		if err := l.add(name, value); err != nil {
			return fmt.Errorf("%s=%s: %w", name, value, err)
		}
		l.words = append(l.words, word)
	}
	return nil
}

func (l *Limits) add(name, value string) error {
	number := func(most uint64) (uint64, error) {
		n, err := strconv.ParseUint(value, 10, 64)
		if err != nil || n < 1 || n > most {
			return 0, fmt.Errorf("want a number from 1 to %d", most)
		}
		return n, nil
	}
	size := func() (uint64, error) { return text.ParseSize(value, 1<<20) }
	var n uint64
	var err error
	switch name {
	case "memory":
		n, err = size()
		l.controls = append(l.controls, control{"memory", "memory.max", strconv.FormatUint(n, 10)})
	case "cpus":
		const period, least, most = 100_000, 0.01, 1 << 14 // microseconds
		f, failed := strconv.ParseFloat(value, 64)
		if failed != nil || !(f >= least && f <= most) {
			return fmt.Errorf("want a number of CPUs such as 1.5, from %v to %d", least, most)
		}
		l.controls = append(l.controls, control{"cpu", "cpu.max", fmt.Sprintf("%d %d", int64(f*period), period)})
	case "pids":
		n, err = number(1 << 22)
		l.controls = append(l.controls, control{"pids", "pids.max", strconv.FormatUint(n, 10)})
	case "nofile":
		n, err = number(1 << 30)
		l.rlimits = append(l.rlimits, rlimit{name, unix.RLIMIT_NOFILE, n})
	case "fsize":
		n, err = size()
		l.rlimits = append(l.rlimits, rlimit{name, unix.RLIMIT_FSIZE, n})
	}
	return err
}

// setrlimits sets the limits of the process. There are no core files, which would have the guest's
// memory.
func (l *Limits) setrlimits() error {
	for _, r := range append(l.rlimits, rlimit{"core", unix.RLIMIT_CORE, 0}) {
		if err := unix.Setrlimit(r.resource, &unix.Rlimit{Cur: r.value, Max: r.value}); err != nil {
			return fmt.Errorf("--jail-limit %s=%d: %w", r.name, r.value, err)
		}
	}
	return nil
}

// cgroupRoot is where control groups are mounted.
var cgroupRoot = "/sys/fs/cgroup"

// group is a control group; without a path none is needed.
type group struct {
	path     string
	controls []control
}

// cgroup returns the control group for the machine in a directory, whose name is that of the
// directory, and removes that of a machine that was killed together with its janitor.
func (l *Limits) cgroup(dir string) (g group, err error) {
	if len(l.controls) == 0 {
		return g, nil
	}
	if err := l.checkControllers(); err != nil {
		return g, err
	}
	g = group{filepath.Join(cgroupRoot, "gvm", url.PathEscape(dir[1:])), l.controls}
	if err := unix.Rmdir(g.path); err == unix.EBUSY {
		return g, userError("--jail %s: another machine is in this jail: its control group %s has processes",
			dir, g.path)
	}
	return g, nil
}

// checkControllers looks whether this host has the controllers for the limits.
func (l *Limits) checkControllers() error {
	have, err := os.ReadFile(filepath.Join(cgroupRoot, "cgroup.controllers"))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("--jail-limit %s: this host has no cgroup v2 in %s, which memory, cpus and pids need: "+
			"boot it with systemd.unified_cgroup_hierarchy=1, or mount -t cgroup2 cgroup2 %[2]s",
			l.controls[0].controller, cgroupRoot)
	}
	if err != nil {
		return fmt.Errorf("--jail-limit: %w", err)
	}
	for _, c := range l.controls {
		if !slices.Contains(strings.Fields(string(have)), c.controller) {
			return fmt.Errorf("--jail-limit: cgroup v2 in %s has no controller %s: is it in a mount of cgroup v1, "+
				"or in cgroup_disable= of the host's kernel?", cgroupRoot, c.controller)
		}
	}
	return nil
}

// enter makes the group, and moves this process into it.
func (g *group) enter() error {
	if g.path == "" {
		return nil
	}
	fail := func(err error) error { return fmt.Errorf("--jail-limit: control group %s: %w", g.path, err) }
	var enable []string
	for _, c := range g.controls {
		enable = append(enable, "+"+c.controller)
	}
	above := filepath.Dir(g.path)
	const tries = 10 // a janitor may remove the directory above between two steps
	var err error
	for range tries {
		if err = os.Mkdir(above, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return fail(err)
		}
		for _, dir := range []string{cgroupRoot, above} {
			if err = write(dir, "cgroup.subtree_control", strings.Join(enable, " ")); err != nil {
				break
			}
		}
		if err == nil {
			err = os.Mkdir(g.path, 0o755)
		}
		if !errors.Is(err, fs.ErrNotExist) {
			break
		}
	}
	if err != nil {
		return fail(err)
	}
	for _, c := range append(g.controls, control{file: "cgroup.procs", value: "0"}) {
		if err := write(g.path, c.file, c.value); err != nil {
			return fail(err)
		}
	}
	return nil
}

func write(dir, file, value string) error {
	f, err := os.OpenFile(filepath.Join(dir, file), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}
