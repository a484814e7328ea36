package main

import (
	"errors"
	"fmt"
	iofs "io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"gvm/broker"
	"gvm/devices/scsi/lio"
	"gvm/devices/virtio/fs"
	"gvm/guest/kernel"
	"gvm/jail"
	"gvm/kvmapi"
	"gvm/kvmapi/vhost"
	"gvm/machine"
	"gvm/machine/disk"
	"gvm/panics"
)

// jailFlagNames are removed from the command line of the program in the jail.
var jailFlagNames = []string{"jail", "uid", "gid", "jail-limit"}

// jailEnvironment has the variables of root's environment that the program in a jail keeps.
var jailEnvironment = []string{"GOMAXPROCS", "TERM"}

func jailFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "jail",
			Usage: "as root: run as user --uid and group --gid in a root directory with only the files that the command " +
				"line names, and with the control socket in `DIR`/run; see docs/security.md"},
		&cli.Int64Flag{Name: "uid", Usage: "with --jail: the `NUMBER` of the user, one for each machine"},
		&cli.Int64Flag{Name: "gid", Usage: "with --jail: the `NUMBER` of the group"},
		&cli.GenericFlag{Name: "jail-limit", Value: new(words),
			Usage: "with --jail: `NAME=VALUE[,...]` of a control group, memory=SIZE, cpus=N and pids=N (threads), " +
				"and of the process, nofile=N and fsize=SIZE"},
	}
}

// asksForJail reports whether a word of the command line may be --jail. The program in the jail
// opens KVM.
func asksForJail(args []string) bool {
	return slices.ContainsFunc(args, func(s string) bool {
		return strings.HasPrefix(s, "--jail") || strings.HasPrefix(s, "-jail")
	})
}

// parseJail returns nil without --jail.
func parseJail(c *cli.Context, rc *runConfig, given func(string) bool) (*jail.Config, error) {
	if !given("jail") {
		for _, name := range jailFlagNames {
			if given(name) {
				return nil, fmt.Errorf("--%s is for --jail DIR", name)
			}
		}
		return nil, nil
	}
	if !given("uid") || !given("gid") {
		return nil, errors.New("--jail needs --uid and --gid, the user and group that gvm becomes")
	}
	j := &jail.Config{Dir: c.String("jail"), UID: int(c.Int64("uid")), GID: int(c.Int64("gid")),
		Devices: []string{kvmapi.Device}}
	for _, s := range wordsOf(c, "jail-limit") {
		if err := j.Limits.Add(s); err != nil {
			return nil, fmt.Errorf("--jail-limit %w", err)
		}
	}
	if rc.kernel != "" && !given("kernel") {
		path, err := filepath.Abs(rc.kernel)
		if err != nil {
			return nil, fmt.Errorf("--jail: %w", err)
		}
		return nil, fmt.Errorf("--jail in a kernel tree: name the kernel, --kernel %s", path)
	}
	if err := checkKernelPath(kernel.Finder{}, rc.kernel); err != nil {
		return nil, err
	}
	add := func(flag, path string, write bool) {
		j.Files = append(j.Files, jail.File{Flag: flag, Path: path, Write: write})
	}
	if rc.kernel != "" {
		add("--kernel", rc.kernel, false)
	}
	for _, path := range rc.initrds {
		add("--initrd", path, false)
	}
	if given("allow") {
		add("--allow", c.String("allow"), false)
	}
	for _, d := range rc.spec.Disks {
		switch {
		case d.Backend == disk.Vhost && (d.Path == "" || d.Size > 0 || given("trace")):
			return nil, fmt.Errorf("--disk %s: backend=vhost with --jail works for images without size=, "+
				"and without --trace: leave one of them out", d.Name())
		case d.Storage != disk.Image:
			continue
		}
		if d.Backend == disk.Vhost && j.Prepare == nil {
			j.Devices = append(j.Devices, vhost.SCSIPath)
			j.Prepare = func() error { return disk.Provision(rc.spec.Disks, note) }
		}
		add("--disk", d.Path, !d.ReadOnly && d.Overlay == "")
		j.Images = append(j.Images, filepath.Clean(d.Path))
		if d.Overlay != "" && d.Overlay != disk.OverlayOn {
			add("--disk overlay", d.Overlay, true)
		}
	}
	for _, s := range rc.spec.Shares {
		add("--share", s.Dir, slices.ContainsFunc(rc.spec.Shares, func(o fs.Share) bool { // the directory has one mount
			return !o.ReadOnly && filepath.Clean(o.Dir) == filepath.Clean(s.Dir)
		}))
	}
	for _, name := range []string{"trace", "crash-dir", "junit", "results"} {
		if path := c.String(name); path != "" {
			j.Files = append(j.Files, jail.File{Flag: "--" + name, Path: path, Write: true, Make: name != "crash-dir"})
		}
	}
	if err := jailNetwork(j, rc); err != nil {
		return nil, err
	}
	return j, nil
}

// checkKernelPath refuses the release of an installed kernel, for which no file is in a jail.
func checkKernelPath(f kernel.Finder, name string) error {
	if name == "" || filepath.IsAbs(name) {
		return nil
	}
	if _, err := os.Lstat(name); !errors.Is(err, iofs.ErrNotExist) {
		return nil
	}
	path, err := f.Installed(name)
	if err != nil {
		return err
	}
	return fmt.Errorf("--kernel %s: a jail has the files that are named by their paths: give --kernel %s", name, path)
}

// jailNetwork decides which parts of the host's network and sockets a jail has.
func jailNetwork(j *jail.Config, rc *runConfig) error {
	if rc.user != nil {
		path, err := netProgram()
		if err != nil {
			return err
		}
		j.Network, j.Program = true, jail.File{Flag: "--net user", Path: path}
		const resolvers = "/etc/resolv.conf" // often a link
		if from, err := filepath.EvalSymlinks(resolvers); err == nil {
			j.Files = append(j.Files, jail.File{Flag: "--net user", Path: resolvers, From: from})
		}
	}
	const tun = "/dev/net/tun"
	for i, n := range rc.spec.Nets {
		if rc.user != nil && i == rc.user.index {
			continue
		}
		if !slices.Contains(j.Devices, tun) {
			const id = "/etc/machine-id" // of which, with the interface's name, the device's address is made
			if _, err := os.Stat(id); err == nil {
				j.Files = append(j.Files, jail.File{Flag: "--net", Path: id})
			}
		}
		j.Network = true
		j.Devices = append(j.Devices, tun)
		if n.Vhost != machine.VhostOff {
			j.Devices = append(j.Devices, vhost.NetPath)
		}
	}
	if rc.gdb != nil {
		if rc.gdb.network == "unix" && !inRun(j, rc.gdb.address) {
			return fmt.Errorf("--gdb unix:%s: %s, or use a port, such as --gdb :1234", rc.gdb.address, wantInRun(j, "gdb"))
		}
		j.Network = j.Network || rc.gdb.network == "tcp"
	}
	if rc.vsock != nil {
		if rc.vsock.path != "" && !inRun(j, rc.vsock.path) {
			return fmt.Errorf("--vsock path=%s: %s, or leave it out: the socket is then DIR/run/gvm/NAME/vsock",
				rc.vsock.path, wantInRun(j, "vsock"))
		}
		if rc.vsock.kind == vsockVhost {
			j.Network = true
			j.Devices = append(j.Devices, vhost.VsockPath)
		}
	}
	return nil
}

// inRun reports whether a socket can be made at a path: in the jail's run directory, which has no
// others yet.
func inRun(j *jail.Config, path string) bool {
	return j.LinksRun() && filepath.Dir(path) == filepath.Join(j.Dir, "run")
}

func wantInRun(j *jail.Config, name string) string {
	if !j.LinksRun() {
		return fmt.Sprintf("--jail %s has no place for it; give a --jail directory such as /srv/jail/1", j.Dir)
	}
	return "a socket of a machine in a jail is in DIR/run: give " + filepath.Join(j.Dir, "run", name)
}

// enterJail starts gvm run in its jail, and returns only errors.
func (rc *runConfig) enterJail() error {
	j := rc.jail
	j.Args = append(slices.Clone(os.Args[:2]), withoutFlags(runCommand(), os.Args[2:], jailFlagNames)...)
	j.Env = []string{"XDG_RUNTIME_DIR=/run", "TMPDIR=/run",
		fmt.Sprintf("%s=%d", startedEnv, monotonic()-sinceStart())}
	for _, name := range jailEnvironment {
		if value, ok := os.LookupEnv(name); ok {
			j.Env = append(j.Env, name+"="+value)
		}
	}
	j.Parents = lineage(os.Getppid()) // for job control, as sudo is of gvm's process group
	if rc.timeout > 0 {
		late := time.AfterFunc(rc.timeout-sinceStart(), panics.Func(func() {
			exitNow(exitTimeout, patience, func() {
				stderr.say(fmt.Sprintf("gvm: %v while the jail was made\n", endOfTimeout(rc.timeout)))
			})
		}))
		defer late.Stop()
	}
	entered := make(chan error, 1)
	onMainThread <- panics.Func(func() { entered <- jail.Enter(*j) })
	err := <-entered
	var user *jail.UserError
	if errors.As(err, &user) {
		return configError{err}
	}
	return err
}

// withoutFlags returns the words of a command line, those behind the command, without the flags of
// names.
func withoutFlags(command *cli.Command, args, names []string) (kept []string) {
	for len(args) > 0 {
		word, n := args[0], 1
		if word == "--" {
			return append(kept, args...)
		}
		if len(word) > 1 && word[0] == '-' && takesNext(command, word) {
			n = min(2, len(args))
		}
		if name, _, _ := strings.Cut(strings.TrimLeft(word, "-"), "="); word[:min(1, len(word))] != "-" ||
			!slices.Contains(names, name) {
			kept = append(kept, args[:n]...)
		}
		args = args[n:]
	}
	return kept
}

// runJanitor is the janitor's program. It returns the exit status.
func runJanitor(args []string) int {
	defer stderr.flush(patience)
	err := jail.Main(args, func(r jail.Requests) {
		j := broker.Janitor{Machine: r.Program, Jail: r.Jail, Images: r.Images}
		if err := j.Serve(r.Pair); err != nil {
			note("the janitor of --jail: " + err.Error())
		}
	})
	if _, missing := os.Stat(lio.DefaultRoot); missing == nil { // disks with backend=vhost, also of dead janitors
		_, e := lio.Collect("")
		err = errors.Join(err, e)
	}
	if err != nil {
		note("the janitor of --jail: " + err.Error())
		return exitHost
	}
	return 0
}
