// Lab runs a command in the test lab: a machine with a real /dev/kvm and /dev/vhost-scsi, made by
// software emulation.
//
//	go run ./guest-tests/cmd/lab setup
//	go run ./guest-tests/cmd/lab kernel
//	go run ./guest-tests/cmd/lab distribution
//	go run ./guest-tests/cmd/lab [flags] -- COMMAND [ARGUMENT]...
//
// The command sees this machine's files, read-only except for the directories given with -w. Its
// exit status becomes the lab's; 3 means that the lab failed.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"golang.org/x/term"
	"gvm/guest-tests/lab"
)

func main() { os.Exit(run()) }

type list []string

func (l *list) String() string     { return strings.Join(*l, ",") }
func (l *list) Set(s string) error { *l = append(*l, s); return nil }

func run() int {
	var c lab.Command
	var writable, modules list
	flag.Var(&writable, "w", "`directory` that the command may write to; may be repeated")
	flag.Var(&modules, "module", "kernel `module` that L1 loads besides its usual ones; may be repeated")
	flag.StringVar(&c.Dir, "C", "", "working `directory` (default the first -w, or the current one)")
	flag.IntVar(&c.User, "u", 0, "run the command as the user with this `UID`, who may use /dev/kvm")
	flag.IntVar(&c.Memory, "m", 4096, "`MiB` of memory")
	flag.IntVar(&c.CPUs, "c", 2, "number of `CPUs`")
	flag.DurationVar(&c.Timeout, "t", 0, "end the run after this `duration`")
	kernel := ""
	for _, v := range lab.Versions() {
		flag.BoolFunc(v, "run L1 on the "+v+" kernel", func(string) error { kernel = v; return nil })
	}
	console := flag.String("console", "", "`file` for the output of L1's kernel")
	flag.Usage = func() {
		fmt.Fprintf(os.Stderr, "usage: lab setup | lab kernel | lab distribution | lab [flags] -- COMMAND [ARGUMENT]...\n")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() == 0 {
		flag.Usage()
		return 2
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	l, err := lab.Setup(ctx, os.Stderr)
	if err != nil {
		return fail(err)
	}
	if flag.NArg() == 1 && flag.Arg(0) == "setup" {
		return 0
	}
	if flag.NArg() == 1 && flag.Arg(0) == "kernel" {
		if err := l.BuildKernels(ctx, os.Stderr); err != nil {
			return fail(err)
		}
		return 0
	}
	if flag.NArg() == 1 && flag.Arg(0) == "distribution" {
		if err := l.MakeDistribution(ctx, os.Stderr); err != nil {
			return fail(err)
		}
		return 0
	}
	if kernel != "" {
		if c.Kernel, err = l.Kernel(kernel); err != nil {
			return fail(err)
		}
	}
	if *console != "" {
		f, err := os.Create(*console)
		if err != nil {
			return fail(err)
		}
		defer f.Close()
		c.Console = f
	}
	if c.Dir == "" && len(writable) == 0 {
		if c.Dir, err = os.Getwd(); err != nil {
			return fail(err)
		}
	}
	c.Args, c.Writable, c.Modules = flag.Args(), writable, modules
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	c.TTY = term.IsTerminal(int(os.Stdin.Fd())) && term.IsTerminal(int(os.Stdout.Fd()))
	code, err := l.Run(ctx, c)
	if err != nil {
		return fail(err)
	}
	return code
}

func fail(err error) int {
	fmt.Fprintln(os.Stderr, err)
	return 3
}
