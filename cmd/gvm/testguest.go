package main

import (
	"context"
	"errors"
	"fmt"
	iofs "io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"gvm/guest/agent/wire"
	"gvm/guest/initramfs"
	"gvm/guest/kernel"
	"gvm/kvmapi/nowait"
	"gvm/machine/disk"
	"gvm/panics"
	"gvm/testrun"
	"gvm/text"
	"gvm/vmm/boot"
)

// passedEnv are the variables of gvm's environment that the command gets; a name that ends with *
// is a prefix.
var passedEnv = []string{"TERM", "COLORTERM", "LANG", "LANGUAGE", "LC_*", "TZ", "LD_LIBRARY_PATH"}

// environment returns the command's environment.
func (t *testConfig) environment(home, name string) (env []string) {
	at := map[string]int{} // in env, of each name
	set := func(s string) {
		name, _, _ := strings.Cut(s, "=")
		if i, ok := at[name]; ok {
			env[i] = s
			return
		}
		at[name] = len(env)
		env = append(env, s)
	}
	set("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	set("HOME=" + home)
	set("USER=" + name)
	set("LOGNAME=" + name)
	set("SHELL=/bin/sh")
	for _, e := range os.Environ() {
		name, _, _ := strings.Cut(e, "=")
		if slices.ContainsFunc(passedEnv, func(p string) bool {
			prefix, ok := strings.CutSuffix(p, "*")
			return name == p || ok && strings.HasPrefix(name, prefix)
		}) {
			set(e)
		}
	}
	for _, e := range t.env {
		if strings.Contains(e, "=") {
			set(e)
		} else if v, ok := os.LookupEnv(e); ok {
			set(e + "=" + v)
		}
	}
	return env
}

// passedLimits are the resource limits of gvm that the command gets. Go changes the one on open
// files, and others are shared by all processes of a user.
var passedLimits = []int{unix.RLIMIT_AS, unix.RLIMIT_CORE, unix.RLIMIT_CPU, unix.RLIMIT_DATA, unix.RLIMIT_FSIZE,
	unix.RLIMIT_STACK}

// limits returns the command's resource limits.
func limits() (all []wire.Rlimit, _ error) {
	for _, resource := range passedLimits {
		var l unix.Rlimit
		if err := unix.Getrlimit(resource, &l); err != nil {
			return nil, fmt.Errorf("read resource limit %d: %w", resource, err)
		}
		all = append(all, wire.Rlimit{Resource: resource, Soft: l.Cur, Hard: l.Max})
	}
	return all, nil
}

// command returns the command file, or the result of a command that this host does not have.
func (t *testConfig) command() (*wire.Command, *testrun.Result) {
	args := t.args
	if len(args) == 0 {
		args = []string{"sh"}
		if path, err := exec.LookPath("busybox"); err == nil && t.root == "" { // with programs besides the shell's own
			args = []string{path, "sh"}
		}
	}
	path, err := args[0], error(nil)
	if t.root == "" || t.root == "/" { // in another root the agent finds it
		path, err = exec.LookPath(path)
		if err == nil || errors.Is(err, exec.ErrDot) {
			path, err = filepath.Abs(path)
		}
	}
	if err != nil {
		errno := unix.ENOENT // also of a name that PATH does not have
		if errors.Is(err, os.ErrPermission) {
			errno = unix.EACCES
		}
		errors.As(err, &errno)
		return nil, testrun.NoCommand(args[0], errno)
	}
	home, name := "/", "user"
	if t.uid == 0 {
		home, name = "/root", "root"
	}
	cmd := &wire.Command{Dir: text.Name(t.cwd), UID: t.uid, GID: t.gid, Groups: t.groups, Hostname: "gvm",
		Mounts: t.mounts}
	if cmd.Rlimits, err = limits(); err != nil {
		return nil, untested(err)
	}
	cmd.Args = []text.Name{text.Name(path)}
	for _, a := range args[1:] {
		cmd.Args = append(cmd.Args, text.Name(a))
	}
	for _, e := range t.environment(home, name) {
		cmd.Env = append(cmd.Env, text.Name(e))
	}
	cmd.Disks = scratchVariables(t.scratch)
	if t.tty {
		cmd.Terminal = &wire.Terminal{Rows: 24, Columns: 80}
		if columns, rows, err := term.GetSize(int(os.Stdout.Fd())); err == nil && columns > 0 && rows > 0 {
			cmd.Terminal = &wire.Terminal{Rows: uint16(rows), Columns: uint16(columns)}
		}
	}
	return cmd, nil
}

// scratchVariables returns the variables by which blktests (TEST_DEVS) and xfstests find their
// disks. xfstests takes SCRATCH_DEV or SCRATCH_DEV_POOL, not both.
func scratchVariables(disks []disk.Spec) []wire.DiskVariable {
	if len(disks) == 0 {
		return nil
	}
	var serials []string
	for _, d := range disks {
		serials = append(serials, d.Serial)
	}
	all := []wire.DiskVariable{{Name: "TEST_DEVS", Serials: serials}, {Name: "TEST_DEV", Serials: serials[:1]}}
	rest := serials[1:]
	if last := len(rest) - 1; last > 0 {
		all = append(all, wire.DiskVariable{Name: "LOGWRITES_DEV", Serials: rest[last:]})
		rest = rest[:last]
	}
	switch len(rest) {
	case 0:
	case 1:
		all = append(all, wire.DiskVariable{Name: "SCRATCH_DEV", Serials: rest})
	default:
		all = append(all, wire.DiskVariable{Name: "SCRATCH_DEV_POOL", Serials: rest})
	}
	return all
}

// initramfs makes the guest's files: the agent, the command and the files of --file.
func (t *testConfig) initramfs(ctx context.Context, k *kernel.Kernel, cmd *wire.Command, agent string) (
	_ *boot.File, err error) {
	b := initramfs.New()
	defer b.Close()
	for _, dir := range []string{"/dev", "/proc", "/sys", "/run", "/root", "/etc"} {
		b.Dir(dir, 0o755)
	}
	b.Dir("/tmp", 0o777|os.ModeSticky)
	b.Dir(t.cwd, 0o755)
	if err := b.HostFile(ctx, "/init", agent); err != nil {
		return nil, err
	}
	files := t.files
	if t.root == "" {
		files = append([]string{string(cmd.Args[0])}, files...)
	}
	for _, path := range files {
		if err := t.addFile(ctx, b, path); err != nil {
			return nil, err
		}
	}
	if cmd.Modules, err = t.addModules(ctx, b, k); err != nil {
		return nil, err
	}
	// With --module it may be one that the command needs.
	if last := len(cmd.Modules) - 1; last >= 0 && len(t.modules) == 0 &&
		path.Base(string(cmd.Modules[last])) == laterModule+".ko" {
		cmd.Modules, cmd.Later = cmd.Modules[:last], cmd.Modules[last:]
	}
	file, err := cmd.Encode()
	if err != nil {
		return nil, err
	}
	b.File(wire.CommandFile, 0o644, file)
	return b.Image()
}

// laterModule is of use only to an agent that does not reach the host by vsock.
const laterModule = "virtio_console"

// Modules for disks, the first of which all devices need, and others that a guest can do without:
// for the way to the agent, and to tell of a panic.
var (
	diskModules    = []string{"virtio_pci", "virtio_scsi", "sd_mod"}
	helpfulModules = []string{"vmw_vsock_virtio_transport", "pvpanic_mmio", laterModule}
)

// addModules gives the guest the modules that it needs and the kernel does not have built in, and
// returns their names in the order to load. A kernel of which neither modules nor configuration are
// known may have all built in.
func (t *testConfig) addModules(ctx context.Context, b *initramfs.Builder, k *kernel.Kernel) ([]text.Name, error) {
	needed := slices.Clone(t.modules)
	if len(t.spec.Disks) > 0 {
		needed = append(needed, diskModules...)
	}
	if len(t.mounts) > 0 {
		needed = append(needed, "virtiofs")
	}
	if t.root != "" {
		needed = append(needed, "overlay")
	}
	slow := time.AfterFunc(time.Second, panics.Func(func() {
		t.note("reading the modules of " + k.Modules.Path + ", which takes a while the first time")
	}))
	modules, err := initramfs.Modules(ctx, k, slices.Concat(diskModules[:1], needed, helpfulModules)...)
	slow.Stop()
	if missing := (*initramfs.MissingError)(nil); errors.As(err, &missing) {
		t.say("%v", err)
		known := k.Modules.Path != "" || k.Config.Text != nil
		if known && slices.ContainsFunc(missing.Modules, func(m initramfs.Missing) bool {
			return slices.Contains(needed, m.Name)
		}) {
			for _, m := range missing.Modules {
				if slices.Contains(t.modules, m.Name) {
					return nil, fmt.Errorf("--module %s: check the name: %w", m.Name, err)
				}
			}
			return nil, err
		}
	} else if err != nil {
		return nil, err
	}
	var names []text.Name
	for _, name := range b.AddModules(modules) {
		names = append(names, text.Name(name))
	}
	return names, nil
}

// addFile gives the guest a file of the host at its own path: a program with its libraries, or a
// directory with all that is in it.
func (t *testConfig) addFile(ctx context.Context, b *initramfs.Builder, path string) error {
	path, err := filepath.Abs(path)
	if err != nil {
		return err
	}
	st, err := os.Stat(path)
	switch {
	case err == nil && st.IsDir():
		return addDirectory(ctx, b, path)
	case err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0:
		host := initramfs.Host{Path: os.Getenv("PATH"), LibraryPath: os.Getenv("LD_LIBRARY_PATH")}
		entries, err := host.Closure(ctx, path)
		b.Add(entries...)
		return err
	}
	return b.HostFile(ctx, path, path)
}

// addDirectory gives the guest a directory with all directories, regular files and symbolic links
// in it.
func addDirectory(ctx context.Context, b *initramfs.Builder, dir string) error {
	// The slash leads to the directory that a symbolic link names.
	return filepath.WalkDir(dir+"/", func(path string, d iofs.DirEntry, err error) error {
		switch {
		case err != nil:
			err = nowait.OpenError(path, err)
		case ctx.Err() != nil:
			err = context.Cause(ctx)
		case d.IsDir():
			b.Dir(path, 0o755)
		case d.Type() == iofs.ModeSymlink:
			var target string
			if target, err = os.Readlink(path); err != nil {
				return nowait.OpenError(path, err)
			}
			b.Symlink(path, target)
		case d.Type().IsRegular():
			err = b.HostFile(ctx, path, path)
		}
		return err
	})
}
