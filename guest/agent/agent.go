// Package agent is the first program of a test guest. It mounts the kernel's file systems, loads
// modules, connects to the host by the best transport that the kernel has, runs one command, sends
// its output and its end, and powers the machine off. The command comes in wire.CommandFile.
//
// Main takes its program over where that runs as the /init of an initramfs: gvm-agent, or gvm.
package agent

import (
	"fmt"
	"os"
	"path"
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"

	"gvm/guest/agent/wire"
	"gvm/panics"
	"gvm/text"
)

// byePatience bounds the wait for the host, which may be printing the command's last output.
const byePatience = 10 * time.Second

// exitNoTest is the status of a command that the agent could not try to start.
const exitNoTest = 125

// Main takes the program over if it is the first one of a guest, or was started by that one to
// become the command. It does not return then.
func Main(args []string) {
	switch {
	case len(args) == 0:
	case args[0] == stageName:
		os.Exit(stage())
	case os.Getpid() == 1 && path.Base(args[0]) == "init":
		boot()
	}
}

// boot is the whole life of the guest's user space.
func boot() {
	g := &guest{}
	defer powerOff()
	defer func() {
		if r := recover(); r != nil {
			g.panicked(&panics.Panic{Value: r, Stack: string(debug.Stack())})
		}
	}()
	panics.Handle(func(p *panics.Panic) {
		g.panicked(p)
		powerOff()
	})
	mountAll(mounts)
	openConsole()
	cmd, err := readCommand(wire.CommandFile)
	if err == nil {
		g.prepare(cmd)
		err = mountShares(cmd)
	}
	end := g.connect()
	for _, line := range g.lines {
		end.log(line)
	}
	if err == nil { // the host sees signs of life meanwhile
		err = theDisks.environment(cmd)
	}
	if err != nil {
		end.exit(wire.Exit{Status: exitNoTest, Err: err.Error()})
		return
	}
	if g.sessions {
		if err := g.serve(cmd); err != nil {
			end.log(fmt.Sprintf("no sessions by vsock: %v", err))
		}
	}
	end.exit(g.job.run(cmd, end.streams))
}

// guest is the agent as the first program.
type guest struct {
	job   job
	lines []string // to log when the host listens
	wire  *wire.Agent
	build string      // of this program
	later []text.Name // modules to load if the host is not reached by vsock

	sessions bool // the host is reached by vsock
}

func (g *guest) logf(format string, args ...any) {
	g.lines = append(g.lines, fmt.Sprintf(format, args...))
}

// panicked reports a bug of the agent on the console and to the host.
func (g *guest) panicked(p *panics.Panic) {
	fmt.Fprintf(os.Stderr, "gvm-agent: a bug in gvm, please report it: %v\n%s\n", p.Value, p.Stack)
	if g.wire != nil {
		g.wire.Exit(wire.Exit{Status: exitNoTest, Err: fmt.Sprintf("a bug in gvm's agent: %v", p)}, byePatience)
	}
}

// openConsole replaces the descriptors that the kernel opened before there was a /dev/console in
// /dev.
func openConsole() {
	fd, err := unix.Open("/dev/console", unix.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return // a kernel may have no console
	}
	for own := range 3 {
		unix.Dup2(fd, own)
	}
	if fd > 2 {
		unix.Close(fd)
	}
}

func readCommand(name string) (*wire.Command, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return wire.ReadCommand(f)
}

// prepare does for the system as a whole as cmd says.
func (g *guest) prepare(cmd *wire.Command) {
	if cmd.Hostname != "" {
		if err := unix.Sethostname([]byte(cmd.Hostname)); err != nil {
			g.logf("set the host name: %v", err)
		}
	}
	// The initramfs has the directory, but not a file system that is mounted over it, such as
	// /dev/shm.
	os.MkdirAll(string(cmd.Dir), 0o755)
	loopbackUp() // a kernel without a network has none
	g.load(cmd.Modules)
	g.later = cmd.Later
}

// load loads modules.
func (g *guest) load(modules []text.Name) {
	for _, m := range modules {
		if err := loadModule(string(m)); err != nil {
			g.logf("load the module %s: %v", m, err)
		}
	}
}

func loadModule(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && err != unix.EEXIST {
		return err
	}
	return nil
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
}

// powerOff ends the machine. Without ACPI the kernel would only halt the CPUs, so it resets them.
func powerOff() {
	unix.Sync()
	if _, err := os.Stat("/sys/firmware/acpi"); err == nil || !mounted("/sys", unix.SYSFS_MAGIC) {
		unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	}
	unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	for { // the end of the first program is a panic of the kernel
		time.Sleep(time.Hour)
	}
}
