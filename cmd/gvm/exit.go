package main

import (
	"errors"
	"fmt"

	"github.com/urfave/cli/v2"

	"gvm/machine"
)

// Exit statuses: a contract with scripts. README.md and `gvm help exit-status`
// have the same table.
const (
	exitTests      = 1
	exitUsage      = 2
	exitHost       = 3
	exitCrash      = 4
	exitPanic      = 5
	exitReset      = 6
	exitFault      = 7
	exitWatchdog   = 8
	exitBug        = 70
	exitTimeout    = 124
	exitHangup     = 129
	exitQuit       = 130
	exitTerminated = 143 // SIGTERM or gvm stop
)

const exitStatusHelp = `gvm run and gvm kunit end with one of these, and nothing else:

   0         the guest powered itself off, or its Linux kernel halted (halt -f)
   1         gvm kunit, and gvm run with --junit or --results: a test failed or
             crashed, or the console showed no results
   2         usage or configuration: a bad flag or value; a named file that is
             missing, unreadable, not a kernel, not a disk, or in use by another
             gvm, another process or the host
   3         host failure: /dev/kvm, memory, descriptors, disk access, terminal;
             for a disk with backend=vhost all that keeps the kernel from
             serving it
   4         the guest crashed: triple fault, or KVM could not go on; registers
             and instruction bytes are on standard error
   5         the guest's kernel panicked (told by pvpanic, or seen on the
             console); the message says how the guest ended after that
   6         the guest asked for a reset (--on-reset=reboot starts it again
             instead)
   7         with --oops=fail or --strict: the guest ended well, but its kernel
             reported a fault (oops, BUG, KASAN, lockdep, a stall and so on)
   8         with --watchdog=exit: the guest's watchdog expired; the state of
             CPUs and devices is on standard error
   70        a bug in gvm, or a system call that its sandbox refused; the report
             is on standard error
   124       --timeout elapsed
   130       stopped by Ctrl-a x, by an interrupt (SIGINT), or by gdb's kill
   129, 143  stopped by SIGHUP, or by SIGTERM or gvm stop; a terminal that goes
             away is a SIGHUP
   131       SIGQUIT, with a dump of gvm's goroutines on standard error; 132 to
             159 likewise, 128 and the number of another such signal (SIGABRT
             and so on)

gvm test ends as its command does, or with 120 to 125: see gvm help test.
Other commands end with 0, 2 or 3 in the same sense, gvm trace diff and gvm
replay with 1 when something differs, and gvm kernel check with 1 when a
required option is missing.`

// usageError is wrong words on the command line.
type usageError struct{ error }

// configError is an error in a value that the user gave.
type configError struct{ error }

func (e configError) Unwrap() error { return e.error }

// exitStatus maps an error to the exit status of the process: that of an end, 2 if the user can
// correct the input, 3 if the host failed.
func exitStatus(err error) int {
	var (
		end    endError
		usage  usageError
		config configError
		words  cli.ExitCoder // help for an unknown command
	)
	switch {
	case err == nil:
		return 0
	case errors.As(err, &end):
		return end.status
	case errors.As(err, &usage), errors.As(err, &words), errors.As(err, &config), machine.IsConfig(err):
		return exitUsage
	}
	return exitHost
}

// exitStatusCommand exists for its help page: `gvm help exit-status`.
func exitStatusCommand() *cli.Command {
	return &cli.Command{
		Name:               "exit-status",
		Usage:              "list gvm's exit statuses",
		Description:        exitStatusHelp,
		CustomHelpTemplate: "{{.Description}}\n",
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return usageError{fmt.Errorf("exit-status takes no argument, and got %q", c.Args().First())}
			}
			_, err := fmt.Fprintln(c.App.Writer, exitStatusHelp)
			return err
		},
	}
}
