package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"gvm/control"
	"gvm/guest/agent/archive"
	"gvm/guest/agent/wire"
	"gvm/kvmapi/eventfd"
	"gvm/panics"
	"gvm/text"
)

func cpCommand() *cli.Command {
	return &cli.Command{
		Name: "cp", Usage: "copy files into the guest of gvm test, or out of it", ArgsUsage: "SOURCE DESTINATION",
		Description: `One of SOURCE and DESTINATION is VM:PATH, a path in the guest of a machine,
which starts from the directory of gvm test's command. The copy is made as
the user of that command. The other one is a path here, or - for standard
input or output and one file. A path here with a colon begins with ./ or /.

A DESTINATION that is a directory gets the copy by the name of SOURCE; else
DESTINATION is the copy itself, and a file in its place is replaced. With
--recursive SOURCE may be a directory: DIR/. is all in it. Permissions
and times are kept, the owner is the user of the copy, and symbolic links
below SOURCE stay links. Devices, pipes and sockets are left out, which a
line and the status 2 tell. A file that was not copied whole has no name.

The agent must be reached by vsock, as gvm test -v says. The exit status is
0, 2 if a machine, a file or a permission is missing, or 3 if the machine or
storage fails.

EXAMPLES
   gvm cp mytest:/proc/config.gz .
   gvm cp -r mytest:/sys/kernel/tracing/events/sched sched
   gvm cp -r tests/. mytest:/tmp
   tar c tests | gvm cp - mytest:/tmp/tests.tar`,
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "recursive", Aliases: []string{"r"}, Usage: "copy a directory and all in it"},
		},
		Action: func(c *cli.Context) error {
			if c.Args().Len() != 2 {
				return usageError{fmt.Errorf("cp takes SOURCE DESTINATION, and got %s", text.Count(c.Args().Len(), "word"))}
			}
			from, to := c.Args().Get(0), c.Args().Get(1)
			vm, path, out := guestPath(from)
			host := to
			if !out {
				var in bool
				if vm, path, in = guestPath(to); !in {
					return usageError{errors.New("cp: neither SOURCE nor DESTINATION is in a guest: want VM:PATH")}
				}
				host = from
			} else if _, _, in := guestPath(to); in {
				return usageError{fmt.Errorf("cp: SOURCE and DESTINATION are in guests; if %s is a path here, write ./%s",
					to, to)}
			}
			switch {
			case host == "":
				return usageError{errors.New("cp: SOURCE or DESTINATION is empty: want a path")}
			case vm == "":
				return usageError{fmt.Errorf("cp: %q names no machine: want VM:PATH; a path here begins with ./ or /",
					map[bool]string{true: from, false: to}[out])}
			case host == "-" && c.Bool("recursive"):
				return usageError{errors.New("cp: - is for one file, and --recursive for a directory")}
			}
			client, err := theMachine(vm)
			if err != nil {
				return err
			}
			if out {
				return copyOutOf(client, path, host, c.Bool("recursive"))
			}
			return copyInto(client, host, path, c.Bool("recursive"))
		},
	}
}

// guestPath splits VM:PATH. Other words are paths of the host.
func guestPath(word string) (vm, path string, ok bool) {
	vm, path, ok = strings.Cut(word, ":")
	if path == "" {
		path = "."
	}
	return vm, path, ok && !strings.Contains(vm, "/")
}

// copyOutOf copies from a guest to the host.
func copyOutOf(client *control.Client, path, dest string, recursive bool) error {
	c := &wire.Copy{Path: text.Name(path), Recursive: recursive}
	return runCopy(client, c, func(h *wire.Host) error {
		_ = h.Stdin.Close()
		if dest == "-" {
			return archive.UnpackStream(h.Stdout, os.Stdout)
		}
		return archive.Unpack(h.Stdout, dest, archive.Base(path))
	})
}

// copyInto copies from the host into a guest.
func copyInto(client *control.Client, source, path string, recursive bool) error {
	c := &wire.Copy{Path: text.Name(path), Base: text.Name(archive.Base(source)), Into: true}
	pack := func(w io.Writer) error { return archive.Pack(w, source, recursive) }
	if source == "-" {
		wake, err := eventfd.New()
		if err != nil {
			return err
		}
		in := &input{file: os.Stdin, wake: wake}
		defer in.close()
		c.Base = ""
		pack = func(w io.Writer) error { return archive.PackStream(w, in) }
	}
	return runCopy(client, c, func(h *wire.Host) error {
		err := pack(h.Stdin)
		if err == nil || errors.As(err, new(*archive.LeftOutError)) {
			_ = h.Stdin.Close() // a connection that is gone has another error
		}
		return err
	})
}

// runCopy has the agent of a machine copy, while move moves the archive.
func runCopy(client *control.Client, c *wire.Copy, move func(*wire.Host) error) error {
	ctx, stop := context.WithCancelCause(context.Background())
	defer stop(nil)
	defer catchSignals(ctx, stop)()
	h, err := openSession(ctx, stop, client)
	if err != nil {
		return refused(err)
	}
	defer h.Close()
	if err := h.Command(&wire.Command{Args: []text.Name{"gvm-cp"}, Copy: c}); err != nil {
		return lostSession(ctx, client, err)
	}
	said := make(chan string, 1)
	panics.Go(func() { // ends with the session
		var b bytes.Buffer
		_, _ = io.CopyN(&b, h.Stderr, 1<<10)
		_ = h.Stderr.Close()
		said <- strings.TrimSpace(b.String())
	})
	moved := make(chan error, 1)
	panics.Go(func() { moved <- move(h) }) // ends with the session, unless storage hangs
	type end struct {
		exit wire.Exit
		err  error
	}
	ended := make(chan end, 1)
	panics.Go(func() { // ends with the session
		exit, err := h.Wait()
		ended <- end{exit, err}
	})
	taken := ended // by a guest that takes no more of a file that may never end
	if !c.Into {
		taken = nil
	}
	var e end
	select {
	case err = <-moved:
		if err != nil && !errors.As(err, new(*archive.StreamError)) && !errors.As(err, new(*archive.LeftOutError)) {
			return copyError(err)
		}
		_ = h.Stdout.Close()
		e = <-ended
		_ = h.Bye() // a guest that has ended meanwhile needs none
	case e = <-taken:
		if e == (end{}) { // it has all, but the files left out are not known yet
			select {
			case err = <-moved:
			case <-ctx.Done():
			case <-time.After(helloPatience):
				return fmt.Errorf("machine %s: its agent has ended before it had all", client.Name())
			}
		}
		_ = h.Bye()
	case <-ctx.Done():
		select {
		case <-moved: // and has removed files that are not whole
		case <-time.After(patience):
		}
	}
	switch exit := e.exit; {
	case ctx.Err() != nil || e.err != nil:
		return lostSession(ctx, client, e.err)
	case exit == wire.Exit{Status: wire.CopyRefused}:
		return configError{fmt.Errorf("machine %s: %s", client.Name(), <-said)}
	case exit == wire.Exit{Status: wire.CopyFailed}:
		return fmt.Errorf("machine %s: %s", client.Name(), <-said)
	case exit != wire.Exit{}:
		return fmt.Errorf("machine %s: its agent could not copy: %s (status %d, signal %d)", client.Name(), exit.Err,
			exit.Status, exit.Signal)
	}
	return copyError(err)
}

// copyError gives an error on the host its exit status.
func copyError(err error) error {
	if err != nil && archive.Refused(err) {
		return configError{err}
	}
	return err
}
