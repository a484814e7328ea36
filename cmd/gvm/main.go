// Command gvm is a lightweight hypervisor for x86-64 Linux: it boots a guest on
// /dev/kvm and gives it virtio-scsi disks.
package main

import (
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"strings"

	"github.com/urfave/cli/v2"
)

// version is set by the Makefile's build for a release.
var version = "0.1.0-dev"

func main() {
	os.Exit(gvm(os.Args))
}

// gvm runs the command line and returns the exit status.
func gvm(args []string) (status int) {
	defer func() {
		if r := recover(); r != nil {
			fmt.Fprintf(os.Stderr, "gvm: a bug in gvm, please report it: %v\n%s", r, debug.Stack())
			status = exitBug
		}
	}()
	err := app().Run(args)
	if err == nil {
		return 0
	}
	fmt.Fprintf(os.Stderr, "gvm: %s\n", strings.TrimSpace(err.Error()))
	var end endError
	if errors.As(err, &end) {
		return end.status
	}
	return exitStatus(err)
}

func app() *cli.App {
	a := &cli.App{
		Name:    "gvm",
		Usage:   "boot Linux guests on KVM with virtio-scsi disks",
		Version: version,
		Description: `gvm run boots a kernel in a virtual machine on this terminal; without any
argument it boots a small guest of its own and so shows that all works.`,
		Commands: []*cli.Command{
			runCommand(), listCommand(), diskCommand(), pauseCommand(), resumeCommand(), imageCommand(), doctorCommand(),
			benchCommand(), traceCommand(), replayCommand(), lioCommand(), abiCommand(), completionCommand(),
			exitStatusCommand(), helpCommand(),
		},
		EnableBashCompletion:      true,
		DisableSliceFlagSeparator: true,
		Flags:                     []cli.Flag{cli.HelpFlag},
		HideHelpCommand:           true, // helpCommand is there
		OnUsageError:              flagError,
		ExitErrHandler:            func(*cli.Context, error) {},
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return unknownCommand(c.App.Commands, nil, c.Args().First())
			}
			return cli.ShowAppHelp(c)
		},
	}
	complete(a.Commands)
	return a
}

// exitStatusCommand is there for its help: `gvm help exit-status`.
func exitStatusCommand() *cli.Command {
	return &cli.Command{
		Name:               "exit-status",
		Usage:              "what gvm's exit status says",
		Description:        exitStatusHelp,
		CustomHelpTemplate: "{{.Description}}\n",
		Action:             func(c *cli.Context) error { _, err := fmt.Fprintln(c.App.Writer, exitStatusHelp); return err },
	}
}
