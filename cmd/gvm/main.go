// Command gvm is a lightweight hypervisor for x86-64 Linux: it boots a guest on
// /dev/kvm and gives it virtio-scsi disks.
package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"gvm/broker"
	"gvm/guest/agent"
	"gvm/jail"
	"gvm/kvmapi/nowait"
	"gvm/panics"
	"gvm/testrun"
	"gvm/text"
	"gvm/vmm"
)

// version is set by the Makefile's build for a release.
var version = "0.1.0-dev"

// program is the function that main runs: gvm, or in a build with the tag man the writer of its man
// pages.
var program = gvm

func main() {
	agent.Main(os.Args) // gvm is the first program of its test guests too
	os.Exit(program(os.Args))
}

// gvm runs the command line and returns the exit status.
//
// It does so in another thread than the main one, which waits: Linux gives the signal of a process
// to the main thread if it can, and to no other while that one waits for storage that does not
// answer, so that the signal would wait too. Only the jail is made by the main thread, which
// /proc/self shows; it takes no signals meanwhile.
func gvm(args []string) int {
	if err := enoughLimits(thisHost()); err != nil { // before a goroutine needs another thread
		fmt.Fprintf(printer(os.Stderr), "gvm: %v\n", err)
		if args[0] == cellArg0 || len(args) > 1 && args[1] == "test" {
			return exitUntested
		}
		return exitHost
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	status := make(chan int, 1)
	panics.Go(func() { status <- runCommandLine(args) }) // which reports its panics itself
	for {
		select {
		case s := <-status:
			return s
		case do := <-onMainThread:
			do()
		}
	}
}

// onMainThread takes functions for the main thread.
var onMainThread = make(chan func())

func runCommandLine(args []string) (status int) {
	switch args[0] {
	case broker.Arg0:
		return runBroker(args, broker.Main)
	case broker.KeeperArg0:
		return runBroker(args, func(args []string, _ func(string)) error { return broker.Keep(args) })
	case jail.Arg0:
		return runJanitor(args)
	}
	if args[0] == cellArg0 {
		var err error
		if args, err = takeOrder(args); err != nil {
			note(err.Error())
			stderr.flush(patience)
			return exitUntested
		}
	}
	bug := exitBug
	if len(args) > 1 && args[1] == "test" { // whose other statuses are verdicts
		bug = exitUntested
	}
	processStart = startOfProcess()
	defer func() {
		if r := recover(); r != nil {
			fmt.Fprintf(printer(os.Stderr), "gvm: "+bugReport+"%v\n%s", r, debug.Stack())
			status = bug
		}
	}()
	var panicked atomic.Pointer[panics.Panic]
	defer panics.Handle(func(p *panics.Panic) {
		if panicked.CompareAndSwap(nil, p) {
			time.AfterFunc(panicPatience, panics.Func(func() { exitNow(bug, patience, func() { reportPanic(p) }) }))
		}
	})()
	defer func() {
		wait := left(patience)
		if status < exitTimeout { // no end was requested: a pager may take its time
			wait = -1
		}
		stderr.flush(wait)
	}()
	told := false // of the panic, by the end in order
	defer func() {
		if p := panicked.Load(); p != nil {
			status = bug
			if !told {
				reportPanic(p)
			}
		}
	}()
	if len(args) > 1 && (args[1] == "run" && !asksForJail(args) || args[1] == "test") {
		begun = vmm.Begin()
		catchFatal()
	}
	a := app(args)
	out := &keepError{w: a.Writer}
	a.Writer = out
	var err error
	if !completeWord(out, a.Commands, args) {
		err = a.Run(flagsFirst(a.Commands, args))
	}
	if begun != nil {
		err = errors.Join(err, begun.Close())
		begun = nil
	}
	awaitImmediateEnd()
	if err == nil {
		err = out.err // functions that print help return no error
	}
	if err == nil {
		return 0
	}
	if s := errorText(err); s != "" { // a command of gvm test says its own reason
		told = strings.HasPrefix(s, bugReport)
		stderr.say("gvm: " + s + "\n")
	}
	return exitStatus(err)
}

// panicPatience bounds the end in order after the panic of a goroutine, which may have left a lock
// locked.
const panicPatience = 3 * time.Second

// bugReport begins the message about a bug of gvm.
const bugReport = "a bug in gvm, please report it: "

func reportPanic(p *panics.Panic) {
	stderr.say(text.Lines(fmt.Sprintf("gvm: "+bugReport+"%v\n%s", p, p.Stack)))
}

// printer returns a writer to the terminal for everything but the guest's console. It escapes text
// from other sources, which may be anywhere in the output.
func printer(w io.Writer) io.Writer { return text.NewWriter(w) }

// keepError keeps the first error of a writer.
type keepError struct {
	w   io.Writer
	err error
}

func (k *keepError) Write(p []byte) (int, error) {
	n, err := k.w.Write(p)
	if err != nil && k.err == nil {
		k.err = err
	}
	return n, err
}

// errorText formats an error for printing. It keeps the lines of joined errors and of a report
// about the guest's end; in other errors a line break can only come from a name, and is escaped.
func errorText(err error) string {
	s := strings.TrimSpace(err.Error()) + mend(err)
	var end endError
	reports := []int{exitCrash, exitPanic, exitFault, exitWatchdog, exitBug}
	if several(err) || errors.As(err, &end) && slices.Contains(reports, end.status) {
		return text.Lines(s)
	}
	return text.Printable(s)
}

// mend returns the remedy of an error that comes from many places, for behind its text; "" if it is
// not known.
func mend(err error) string {
	switch {
	case errors.Is(err, unix.EMFILE):
		return "; raise RLIMIT_NOFILE (ulimit -n)"
	case errors.Is(err, unix.ENFILE):
		return "; raise fs.file-max (sysctl)"
	case errors.Is(err, unix.EFBIG):
		return nowait.LimitMend(err)
	case errors.Is(err, fs.ErrNotExist) && strings.HasPrefix(pathOf(err), "/proc/") && nowait.NoProc():
		return "; " + nowait.ProcMend
	}
	return ""
}

// pathOf returns the path of the file or socket that an error names, or "".
func pathOf(err error) string {
	var file *fs.PathError
	var socket *net.OpError
	switch {
	case errors.As(err, &file):
		return file.Path
	case errors.As(err, &socket) && socket.Addr != nil:
		return socket.Addr.String()
	}
	return ""
}

// untested is the result of a test for an error of the host.
func untested(err error) *testrun.Result {
	res := testrun.Untested(err)
	res.Text += mend(err)
	return res
}

// several reports whether errors.Join combined more than one error into err.
func several(err error) bool {
	switch e := err.(type) {
	case interface{ Unwrap() []error }:
		all := e.Unwrap()
		return len(all) > 1 && errors.Join(all...).Error() == err.Error() || slices.ContainsFunc(all, several)
	case interface{ Unwrap() error }:
		return several(e.Unwrap())
	}
	return false
}

// commands are in the order of gvm's help page. The last one, help, uses all others.
var commands = []struct {
	name string
	make func() *cli.Command
}{
	{"run", runCommand}, {"test", testCommand}, {"kunit", kunitCommand}, {"list", listCommand}, {"disk", diskCommand},
	{"balloon", balloonCommand}, {"inspect", inspectCommand}, {"stat", statCommand},
	{"pause", pauseCommand}, {"resume", resumeCommand},
	{"reset", resetCommand}, {"dump", dumpCommand},
	{"console", consoleCommand}, {"exec", execCommand}, {"shell", shellCommand}, {"cp", cpCommand},
	{"nmi", nmiCommand}, {"sysrq", sysrqCommand},
	{"stop", stopCommand}, {"image", imageCommand}, {"kernel", kernelCommand}, {"doctor", doctorCommand},
	{"bench", benchCommand}, {"trace", traceCommand},
	{"replay", replayCommand}, {"lio", lioCommand}, {"abi", abiCommand}, {"completion", completionCommand},
	{"exit-status", exitStatusCommand}, {"help", helpCommand},
}

// app makes the command line for args. If the first word is a command, app makes only that one:
// making all would take a noticeable part of a guest's start.
func app(args []string) *cli.App {
	a := &cli.App{
		Name:    "gvm",
		Usage:   "boot Linux guests on KVM with virtio-scsi disks",
		Version: version,
		Writer:  printer(os.Stdout), ErrWriter: printer(os.Stderr),
		Description: `gvm run boots a kernel in a virtual machine on this terminal; without any
argument it boots a small guest of its own and so shows that all works.`,
		EnableBashCompletion:      true,
		DisableSliceFlagSeparator: true,
		Flags:                     []cli.Flag{cli.HelpFlag},
		HideHelpCommand:           true, // helpCommand replaces it
		OnUsageError:              flagError,
		ExitErrHandler:            func(*cli.Context, error) {},
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return unknownCommand(c.App.Commands, nil, c.Args().First())
			}
			return cli.ShowAppHelp(c)
		},
	}
	rows := commands
	for i, c := range commands[:len(commands)-1] {
		if len(args) > 1 && args[1] == c.name {
			rows = commands[i : i+1]
		}
	}
	for _, c := range rows {
		a.Commands = append(a.Commands, c.make())
	}
	complete(a.Commands)
	return a
}
