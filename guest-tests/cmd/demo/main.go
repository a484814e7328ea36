// Demo boots a stock Debian kernel by package machine, gives it an empty disk, and puts a file
// system on it. It uses this host's KVM if that runs Linux, else the test lab. On a terminal it
// ends in a shell of the guest; otherwise it prints a report.
package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/term"

	"gvm/guest-tests/lab"
	"gvm/guestmem"
	"gvm/machine"
	"gvm/machine/disk"
	"gvm/vmm"
	"gvm/vmm/boot"
)

//go:embed init.sh
var initScript string

// inLab is the first argument of the demo that runs in the lab. The kernel and the directory with
// the initrd follow.
const inLab = "machine"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	tty := term.IsTerminal(int(os.Stdin.Fd())) && term.IsTerminal(int(os.Stdout.Fd()))
	var status int
	var err error
	if len(os.Args) == 4 && os.Args[1] == inLab {
		err = run(ctx, os.Args[2], os.Args[3], tty)
	} else {
		status, err = demo(ctx, tty)
	}
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "demo: %v\n", err)
		status = 3
	}
	os.Exit(status)
}

func demo(ctx context.Context, tty bool) (status int, err error) {
	l, err := lab.Setup(ctx, os.Stderr)
	if err != nil {
		return 0, err
	}
	dir, err := os.MkdirTemp("", "gvm-demo-")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	err = lab.Initramfs{
		Kernel:   l.Cloud,
		Modules:  []string{"virtio_pci", "virtio_scsi", "sd_mod", "ext4"},
		Binaries: []string{filepath.Join(l.Tree, "sbin/mke2fs")},
		Root:     l.Tree,
		Init:     initScript,
	}.Build(filepath.Join(dir, "initrd"))
	if err != nil {
		return 0, err
	}
	direct, why := vmm.RunsLinux()
	if direct {
		fmt.Fprintf(os.Stderr, "demo: on this host: %s\n", why)
		return 0, run(ctx, l.Cloud.BZImage, dir, tty)
	}
	fmt.Fprintf(os.Stderr, "demo: in the lab: %s\n", why)
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	c := lab.Command{Args: []string{self, inLab, l.Cloud.BZImage, dir}, Dir: dir, Writable: []string{dir},
		Stdout: os.Stdout, Stderr: os.Stderr, TTY: tty}
	if tty {
		c.Stdin = os.Stdin
	}
	return l.Run(ctx, c)
}

// run boots the kernel with the initrd of dir and a new disk there. A guest that does not power
// itself off is an error.
func run(ctx context.Context, kernel, dir string, tty bool) (err error) {
	k, err := boot.Open(ctx, kernel)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, k.Close()) }()
	initrd, err := boot.OpenFile(ctx, filepath.Join(dir, "initrd"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, initrd.Close()) }()
	root, err := disk.Parse(strings.ReplaceAll(filepath.Join(dir, "disk.img"), ",", ",,") + ",size=256M")
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	spec := machine.Spec{
		Name:    "demo",
		Memory:  guestmem.Config{Size: 512 << 20},
		Kernel:  k,
		Initrds: []*boot.File{initrd},
		CmdLine: "quiet mode=report",
		Disks:   []disk.Spec{root},
		Console: machine.Output(os.Stdout),
		Note:    func(s string) { fmt.Fprintf(os.Stderr, "demo: %s\n", s) },
	}
	if tty {
		t, e := openTerminal(stop)
		if e != nil {
			return e
		}
		defer func() { err = errors.Join(err, t.close()) }()
		spec.CmdLine, spec.Console = "quiet mode=shell", t
		spec.Note = func(s string) { fmt.Fprintf(os.Stderr, "\r\ndemo: %s\r\n", s) }
	}
	m, err := machine.Start(ctx, spec)
	if err != nil {
		return err
	}
	out, err := m.Wait()
	if out.Ending != vmm.PoweredOff && err == nil {
		err = errors.Join(fmt.Errorf("the guest has not powered itself off: %v", out.Ending), out.Err)
	}
	return err
}
