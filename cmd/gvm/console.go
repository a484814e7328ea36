package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/term"

	"gvm/control"
	"gvm/panics"
	"gvm/text"
)

// errDetached is the end of gvm console by Ctrl-a d.
var errDetached = errors.New("left the console")

// The help of the keys after Ctrl-a. The virtio console has no break.
const (
	leaveHelp   = "\r\nCtrl-a d  leave the console; the machine runs on (also Ctrl-a x)\r\n"
	keysHelp    = "Ctrl-a h  this help\r\nCtrl-a Ctrl-a  send Ctrl-a\r\n"
	consoleHelp = leaveHelp + "Ctrl-a b  send a break (Linux: SysRq)\r\n" + keysHelp
	hvcHelp     = leaveHelp + keysHelp
)

func consoleCommand() *cli.Command {
	return &cli.Command{
		Name: "console", Usage: "use the console of a running machine", ArgsUsage: "[VM]",
		Description: `Standard input and output are the guest's serial port, beside those of
gvm run and of others that use the console: each sees the output, and each
may type. It begins with the last 16 KiB of output. On a terminal, Ctrl-a d
leaves the console, and Ctrl-a h shows the other keys; the machine runs on.

The guest does not wait for this command: output that it cannot write in time
is lost, and a line says how much. The command ends with the machine.

With --hvc it is the guest's virtio console, hvc0, of a machine that was
started with gvm run --hvc. The guest's terminal gets the size of this one,
at the start and at each change. If several use it, the last change counts.

EXAMPLES
   gvm console                        if one machine runs
   gvm console build
   gvm console build </dev/null       watch only
   gvm console build --hvc
   nohup gvm run --name build -k bzImage --disk d.img </dev/null >log &`,
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "hvc", Usage: "use the virtio console, hvc0, instead of the serial port"},
		},
		Action: func(c *cli.Context) error {
			if c.Args().Len() > 1 {
				return usageError{fmt.Errorf("console takes [VM], and got %s", text.Count(c.Args().Len(), "word"))}
			}
			client, err := theMachine(c.Args().First())
			if err != nil {
				return err
			}
			return useConsole(client, c.Bool("hvc"))
		},
	}
}

// useConsole connects standard input and output to a machine's console: COM1, or the virtio
// console.
func useConsole(client *control.Client, hvc bool) (err error) {
	ctx, stop := context.WithCancelCause(context.Background())
	defer stop(nil)
	connect, what := client.Console, "console"
	if hvc {
		connect, what = client.HVC, "virtio console"
	}
	conn, err := connect(ctx)
	if err != nil {
		return refused(err)
	}
	defer catchSignals(ctx, stop)()
	defer context.AfterFunc(ctx, panics.Func(func() { conn.Close() }))()
	t := newTerminal(stop)
	t.help, t.leave = consoleHelp, errDetached
	if hvc {
		t.help, t.deaf = hvcHelp, true
	}
	if err := t.open(ctx); err != nil {
		return errors.Join(err, conn.Close())
	}
	if term.IsTerminal(int(os.Stdin.Fd())) {
		note("the " + what + " of " + client.Name() + "; Ctrl-a d leaves it")
		if hvc {
			defer sendSizes(client)()
		}
	}
	t.Connect(remoteInput{conn, client})
	_, err = io.Copy(t, conn)
	cause := context.Cause(ctx)
	stop(nil)
	conn.Close() // else input may wait for the machine
	err = errors.Join(t.close(), ignore(err, cause))
	switch {
	case errors.Is(cause, errDetached):
		note("left the " + what + " of " + client.Name() + ", which runs on")
		return err
	case cause != nil:
		return errors.Join(cause, err)
	}
	note("machine " + client.Name() + " has ended")
	return err
}

// sizeRetry is when a size is sent again that did not reach the machine, whose process may be
// stopped.
const sizeRetry = time.Second

// sendSizes tells the guest the size of this terminal, now and after each change, until stop. Of
// changes that come fast it may leave out all but the last.
func sendSizes(client *control.Client) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	changed := make(chan struct{}, 1)
	changed <- struct{}{}
	unfollow := followSize(func(_, _ uint16) {
		select {
		case changed <- struct{}{}:
		default:
		}
	})
	var sender sync.WaitGroup
	sender.Go(panics.Func(func() {
		var again <-chan time.Time
		for {
			select {
			case <-ctx.Done():
				return
			case <-changed:
			case <-again:
			}
			again = nil
			columns, rows, err := term.GetSize(int(os.Stdout.Fd()))
			if err != nil || columns <= 0 || rows <= 0 { // no terminal, or one without a size
				continue
			}
			size := control.TerminalSize{Columns: uint16(columns), Rows: uint16(rows)}
			if client.ResizeHVC(ctx, size) != nil { // the console tells of a machine that has ended
				again = time.After(sizeRetry)
			}
		}
	}))
	return func() {
		unfollow()
		cancel()
		sender.Wait()
	}
}

// ignore returns no error that is of a connection that cause closed.
func ignore(err, cause error) error {
	if cause != nil {
		return nil
	}
	return err
}

// remoteInput is the input of a console over the control socket.
type remoteInput struct {
	io.Writer
	client *control.Client
}

// Break sends a break.
func (r remoteInput) Break() error { return r.client.Break(context.Background()) }
