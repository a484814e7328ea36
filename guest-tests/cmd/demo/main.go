// Demo boots a stock Debian kernel with gvm, gives it an empty disk, and puts a file system on it.
// It uses this host's KVM if that runs Linux, else the test lab. On a terminal it ends in a shell
// of the guest; otherwise it prints a report.
package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"

	"golang.org/x/term"

	"gvm/guest-tests/lab"
	"gvm/vmm"
)

//go:embed init.sh
var initScript string

func main() {
	status, err := demo()
	if err != nil {
		fmt.Fprintf(os.Stderr, "demo: %v\n", err)
		status = 3
	}
	os.Exit(status)
}

func demo() (status int, err error) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	l, err := lab.Setup(ctx, os.Stderr)
	if err != nil {
		return 0, err
	}
	dir, err := os.MkdirTemp("", "gvm-demo-")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	gvm := filepath.Join(dir, "gvm")
	build := exec.CommandContext(ctx, "go", "build", "-o", gvm, "gvm/cmd/gvm")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return 0, fmt.Errorf("go build: %w\n%s", err, out)
	}
	tty := term.IsTerminal(int(os.Stdin.Fd())) && term.IsTerminal(int(os.Stdout.Fd()))
	initrd := filepath.Join(dir, "initrd")
	err = lab.Initramfs{
		Kernel:   l.Cloud,
		Modules:  []string{"virtio_pci", "virtio_scsi", "sd_mod", "ext4"},
		Binaries: []string{filepath.Join(l.Tree, "sbin/mke2fs")},
		Root:     l.Tree,
		Init:     initScript,
	}.Build(initrd)
	if err != nil {
		return 0, err
	}
	mode := "mode=report"
	if tty {
		mode = "mode=shell"
	}
	args := []string{gvm, "run", "--kernel", l.Cloud.BZImage, "--initrd", initrd, "--disk",
		filepath.Join(dir, "disk.img") + ",size=256M", "--cmdline", "quiet " + mode}
	direct, why := vmm.RunsLinux()
	if direct {
		fmt.Fprintf(os.Stderr, "demo: on this host: %s\n", why)
		c := exec.CommandContext(ctx, args[0], args[1:]...)
		c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
		var exit *exec.ExitError
		if err := c.Run(); err != nil && !errors.As(err, &exit) {
			return 0, err
		}
		return c.ProcessState.ExitCode(), nil
	}
	fmt.Fprintf(os.Stderr, "demo: in the lab: %s\n", why)
	c := lab.Command{Args: args, Dir: dir, Writable: []string{dir}, Stdout: os.Stdout, Stderr: os.Stderr, TTY: tty}
	if tty {
		c.Stdin = os.Stdin
	}
	return l.Run(ctx, c)
}
