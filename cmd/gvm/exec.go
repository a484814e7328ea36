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
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"gvm/control"
	"gvm/guest/agent/wire"
	"gvm/kvmapi/eventfd"
	"gvm/kvmapi/nowait"
	"gvm/panics"
	"gvm/text"
)

func execCommand() *cli.Command {
	return sessionCommand(&cli.Command{
		Name: "exec", Usage: "run another command in the guest of gvm test", ArgsUsage: "VM [--] COMMAND [ARGUMENT...]",
		Description: `The guest runs COMMAND beside the command of gvm test, as the same user, in
the same directory and with the same environment. Its standard input, output
and error are those of gvm exec, byte for byte. SIGINT, SIGTERM and SIGHUP go
to it; the second one ends gvm exec, and the command gets SIGHUP.

The status is that of the command, 128 and the number of the signal that
ended it, 127 if there is no such command, or 125 if it was not run, or if
the machine ended before it. The agent must be reached by vsock, as gvm test
-v says.

EXAMPLES
   gvm exec mytest -- cat /proc/slabinfo
   gvm exec mytest -- sh -c 'cat >/tmp/in' <in`,
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "tty", Aliases: []string{"t"}, Usage: "give the command a terminal, which this one must be"},
		},
	}, nil)
}

func shellCommand() *cli.Command {
	return sessionCommand(&cli.Command{
		Name: "shell", Usage: "open a shell in the guest of gvm test", ArgsUsage: "VM",
		Description: `gvm shell VM is gvm exec --tty VM -- sh. The guest's terminal has the size of
this one. Ctrl-a x ends it without the shell's help, and Ctrl-a h shows the
other keys. Without a terminal the shell reads commands from standard input.

EXAMPLES
   gvm shell mytest
   echo uptime | gvm shell mytest`,
	}, []string{"sh"})
}

// sessionCommand completes a command that runs args in a guest; nil: those of the user. All that
// keeps it from that has the status 125, as with gvm test.
func sessionCommand(c *cli.Command, args []string) *cli.Command {
	c.OnUsageError = func(c *cli.Context, err error, sub bool) error {
		return endError{exitUntested, flagError(c, err, sub)}
	}
	c.Action = func(c *cli.Context) error {
		words, args := c.Args().Slice(), args
		if args == nil && len(words) > 1 {
			if words, args = words[:1], words[1:]; args[0] == "--" {
				args = args[1:]
			}
		}
		terminals := term.IsTerminal(int(os.Stdin.Fd())) && term.IsTerminal(int(os.Stdout.Fd()))
		tty := c.Bool("tty") || c.Command.Name == "shell" && terminals
		err := func() error {
			switch {
			case len(words) != 1 || len(args) == 0:
				return fmt.Errorf("%s takes %s, and got %s", c.Command.Name, c.Command.ArgsUsage,
					text.Count(c.Args().Len(), "word"))
			case tty && !terminals:
				return errors.New("--tty: standard input and output are no terminal")
			}
			client, err := theMachine(words[0])
			if err != nil {
				return err
			}
			return runSession(client, args, tty)
		}()
		if end := (endError{}); err != nil && !errors.As(err, &end) {
			err = endError{exitUntested, err}
		}
		return err
	}
	return c
}

// helloPatience bounds the wait for the agent's hello: its guest may hang.
const helloPatience = 10 * time.Second

// openSession begins a session with the agent of a machine, which the end of ctx ends.
func openSession(ctx context.Context, stop func(error), client *control.Client) (*wire.Host, error) {
	builds, err := agentIDs()
	if err != nil {
		return nil, err
	}
	conn, err := client.Agent(ctx)
	if err != nil {
		return nil, err
	}
	context.AfterFunc(ctx, panics.Func(func() { conn.Close() }))
	silent := time.AfterFunc(helloPatience, panics.Func(func() {
		stop(fmt.Errorf("the agent of machine %s does not answer in %v: its guest may hang", client.Name(), helloPatience))
	}))
	h, err := wire.Accept(conn, wire.HostConfig{Builds: builds})
	silent.Stop()
	if err != nil {
		conn.Close()
		return nil, lostSession(ctx, client, err)
	}
	return h, nil
}

// runSession runs a command in the guest of a machine.
func runSession(client *control.Client, args []string, tty bool) error {
	cmd := &wire.Command{}
	for _, a := range args {
		cmd.Args = append(cmd.Args, text.Name(a))
	}
	ctx, stop := context.WithCancelCause(context.Background())
	defer stop(nil)
	s := &execSession{stop: stop}
	defer catchSignals(ctx, s.take)()
	h, err := openSession(ctx, stop, client)
	if err != nil {
		return err
	}
	defer h.Close()
	s.begin(h)
	size := func() (rows, columns uint16) {
		w, h, _ := term.GetSize(int(os.Stdout.Fd()))
		return uint16(h), uint16(w)
	}
	var stdin io.Reader
	var stdout, stderr io.Writer = os.Stdout, os.Stderr
	if tty {
		var sizes sync.Mutex // the last size to come is the last that the guest gets
		defer followSize(func(_, _ uint16) {
			panics.Go(func() { // ends with the connection
				sizes.Lock()
				defer sizes.Unlock()
				_ = h.Winsize(size())
			})
		})()
		rows, columns := size() // after the first look at changes
		cmd.Terminal = &wire.Terminal{Rows: rows, Columns: columns}
		cmd.Env = append(cmd.Env, text.Name("TERM="+os.Getenv("TERM")))
		terminal := newTerminal(stop)
		if err := terminal.open(ctx); err != nil {
			return err
		}
		defer func() {
			if err := terminal.close(); err != nil {
				note(err.Error())
			}
		}()
		r, w := io.Pipe()
		defer r.Close()
		terminal.Connect(keyboard{w})
		stdin, stdout, stderr = r, terminal, terminal
	} else {
		wake, err := eventfd.New()
		if err != nil {
			return err
		}
		in := &input{file: os.Stdin, spare: true, wake: wake}
		defer in.close()
		stdin = in
	}
	if err := h.Command(cmd); err != nil {
		return lostSession(ctx, client, err)
	}
	var outputs sync.WaitGroup
	outputs.Go(panics.Func(func() { copyOut(stdout, h.Stdout, s.failed) }))
	outputs.Go(panics.Func(func() { copyOut(stderr, h.Stderr, s.failed) }))
	panics.Go(func() { // ends with h, or with stdin
		copyIn(h.Stdin, stdin, s.inputFailed)
		_ = h.Stdin.Close()
	})
	exit, err := h.Wait()
	s.over()
	drained := make(chan struct{})
	panics.Go(func() { outputs.Wait(); close(drained) })
	select {
	case <-drained:
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	_ = h.Bye() // a guest that has ended meanwhile needs none
	switch {
	case err != nil:
		return lostSession(ctx, client, err)
	case s.err() != nil:
		return s.err()
	case exit.Err != "":
		return endError{exit.Status, errors.New(exit.Err)}
	case exit.Signal != 0:
		return endError{128 + exit.Signal, errors.New("")}
	case exit.Status != 0:
		return endError{exit.Status, errors.New("")}
	}
	return nil
}

// lostSession returns the reason why a session was lost.
func lostSession(ctx context.Context, client *control.Client, err error) error {
	switch cause := context.Cause(ctx); {
	case errors.Is(cause, errQuit):
		return endError{exitQuit, cause}
	case cause != nil:
		return cause
	case errors.As(err, new(*wire.VersionError)):
		return err
	}
	lost := fmt.Errorf("machine %s ended, or its agent, before the command did", client.Name())
	if err != nil && !nowait.IsCut(err) {
		lost = fmt.Errorf("%w: %w", lost, err)
	}
	return lost
}

// execSession is a command in a guest, for the signals of gvm exec.
type execSession struct {
	stop func(error)

	mu        sync.Mutex
	host      *wire.Host // nil: the command does not run
	past      bool       // a signal came
	streamErr error
}

func (s *execSession) begin(h *wire.Host) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.host = h
}

// over has the next signal end the session: the command has ended, and the reader of its output may
// take any time.
func (s *execSession) over() { s.begin(nil) }

// take passes the first signal on, and ends the session at the second, or when the command has
// ended.
func (s *execSession) take(cause error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var end endError
	first := !s.past
	if s.past = true; first && s.host != nil && errors.As(cause, &end) {
		h := s.host
		panics.Go(func() { _ = h.Signal(end.status - 128) }) // ends with the connection
		return
	}
	s.stop(cause)
}

// failed takes an error of the streams.
func (s *execSession) failed(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.streamErr = errors.Join(s.streamErr, err)
}

// inputFailed takes an error of the input, which matters to a command that runs.
func (s *execSession) inputFailed(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.host != nil {
		s.streamErr = errors.Join(s.streamErr, fmt.Errorf("read the command's input: %w", err))
	}
}

func (s *execSession) err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.streamErr
}

// copyIn copies the input of the command, which may take none.
func copyIn(to io.Writer, from io.Reader, failed func(error)) {
	b := make([]byte, 64<<10)
	for {
		n, err := from.Read(b)
		if n > 0 {
			if _, err := to.Write(b[:n]); err != nil {
				return
			}
		}
		if err != nil {
			if err != io.EOF {
				failed(err)
			}
			return
		}
	}
}

// copyOut copies a stream of the command. A closed pipe is the command's affair.
func copyOut(to io.Writer, from io.ReadCloser, failed func(error)) {
	b := make([]byte, 64<<10)
	for {
		n, err := from.Read(b)
		if n > 0 {
			if _, err := to.Write(b[:n]); err != nil {
				if !errors.Is(err, unix.EPIPE) {
					failed(err)
				}
				_ = from.Close()
				return
			}
		}
		if err != nil {
			return
		}
	}
}
