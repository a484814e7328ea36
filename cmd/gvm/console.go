package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/urfave/cli/v2"
	"golang.org/x/term"

	"gvm/control"
	"gvm/panics"
	"gvm/text"
)

// errDetached is the end of gvm console by Ctrl-a d.
var errDetached = errors.New("left the console")

const consoleHelp = "\r\n" +
	"Ctrl-a d  leave the console; the machine runs on (also Ctrl-a x)\r\n" +
	"Ctrl-a b  send a break (Linux: SysRq)\r\n" +
	"Ctrl-a h  this help\r\n" +
	"Ctrl-a Ctrl-a  send Ctrl-a\r\n"

func consoleCommand() *cli.Command {
	return &cli.Command{
		Name: "console", Usage: "use the console of a running machine", ArgsUsage: "[VM]",
		Description: `Standard input and output are the guest's serial port, beside those of
gvm run and of others that use the console: each sees the output, and each
may type. It begins with the last 16 KiB of output. On a terminal, Ctrl-a d
leaves the console, and Ctrl-a h shows the other keys; the machine runs on.

The guest does not wait for this command: output that it cannot write in time
is lost, and a line says how much. The command ends with the machine.

EXAMPLES
   gvm console                        if one machine runs
   gvm console build
   gvm console build </dev/null       watch only
   nohup gvm run --name build -k bzImage --disk d.img </dev/null >log &`,
		Action: func(c *cli.Context) error {
			if c.Args().Len() > 1 {
				return usageError{fmt.Errorf("console takes [VM], and got %s", text.Count(c.Args().Len(), "word"))}
			}
			client, err := theMachine(c.Args().First())
			if err != nil {
				return err
			}
			return useConsole(client)
		},
	}
}

// useConsole connects standard input and output to a machine's console.
func useConsole(client *control.Client) (err error) {
	ctx, stop := context.WithCancelCause(context.Background())
	defer stop(nil)
	conn, err := client.Console(ctx)
	if err != nil {
		return refused(err)
	}
	defer catchSignals(ctx, stop)()
	defer context.AfterFunc(ctx, panics.Func(func() { conn.Close() }))()
	t := newTerminal(stop)
	t.help, t.leave = consoleHelp, errDetached
	if err := t.open(ctx); err != nil {
		return errors.Join(err, conn.Close())
	}
	if term.IsTerminal(int(os.Stdin.Fd())) {
		note("the console of " + client.Name() + "; Ctrl-a d leaves it")
	}
	t.Connect(remoteInput{conn, client})
	_, err = io.Copy(t, conn)
	cause := context.Cause(ctx)
	stop(nil)
	conn.Close() // else input may wait for the machine
	err = errors.Join(t.close(), ignore(err, cause))
	switch {
	case errors.Is(cause, errDetached):
		note("left the console of " + client.Name() + ", which runs on")
		return err
	case cause != nil:
		return errors.Join(cause, err)
	}
	note("machine " + client.Name() + " has ended")
	return err
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
