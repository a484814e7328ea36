package main

import (
	"context"
	"errors"
	"io"
	"os"
	"os/signal"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"gvm/kvmapi/eventfd"
	"gvm/panics"
	"gvm/testrun"
)

// streams connects the command's streams: those of gvm, its terminal, or the output of a cell. The
// returned function restores the terminal, or closes files.
func (t *testConfig) streams(ctx context.Context, stop func(error), cfg *testrun.Config) (func(), error) {
	if t.output != nil {
		return t.output.connect(cfg)
	}
	if !t.tty {
		wake, err := eventfd.New()
		if err != nil {
			return nil, err
		}
		in := &input{file: os.Stdin, spare: true, wake: wake}
		cfg.Stdin, cfg.Stdout, cfg.Stderr = in, os.Stdout, os.Stderr
		return in.close, nil
	}
	terminal := newTerminal(stop)
	r, w := io.Pipe()
	cfg.Stdin, cfg.Stdout, cfg.Stderr = r, terminal, terminal
	cfg.Spec.Ready = func(ending context.Context) error {
		if err := terminal.open(ending); err != nil {
			return err
		}
		terminal.Connect(keyboard{w})
		return nil
	}
	return func() {
		_ = r.Close()
		if err := terminal.close(); err != nil {
			note(err.Error())
		}
	}, nil
}

// keyboard is the command's terminal as the destination of keys.
type keyboard struct{ io.Writer }

// Break does nothing: the command's terminal is no serial line.
func (keyboard) Break() error { return nil }

// input is gvm's standard input, whose Read ends with the run.
type input struct {
	file *os.File
	// spare is set for the input of a command, which need not read it: input that cannot be read at
	// all is empty then.
	spare bool
	mu    sync.Mutex  // held while Read uses wake
	wake  *eventfd.FD // nil: closed
}

// Read reads input. Spare input has ended if it is a terminal that another job has, a directory, or
// a file that is open for writing alone, as nohup(1) gives it.
func (in *input) Read(p []byte) (int, error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	for in.wake != nil {
		fds := []unix.PollFd{{Fd: int32(in.file.Fd()), Events: unix.POLLIN},
			{Fd: int32(in.wake.Fd()), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return 0, err
		}
		if fds[1].Revents != 0 {
			break
		}
		if fds[0].Revents == 0 {
			continue
		}
		n, err := unix.Read(int(in.file.Fd()), p)
		switch {
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue
		case err == nil && n == 0, in.spare && (errors.Is(err, unix.EBADF) || errors.Is(err, unix.EISDIR) ||
			errors.Is(err, unix.EIO) && term.IsTerminal(int(in.file.Fd()))):
			return 0, io.EOF
		case err != nil:
			return 0, err
		}
		return n, nil
	}
	return 0, os.ErrClosed
}

// close ends a Read. It does not wait for one whose input another process took first, and which
// waits for more until the end of this process.
func (in *input) close() {
	_ = in.wake.Signal() // of an eventfd that is open
	if in.mu.TryLock() {
		_ = in.wake.Close()
		in.wake = nil
		in.mu.Unlock()
	}
}

// testSignals passes signals on to the command, and ends the machine.
type testSignals struct {
	stop  func(error)
	grace time.Duration // for the command to end by the signal

	mu   sync.Mutex
	run  *testrun.Run // nil: not begun
	past bool         // a signal came
}

func (s *testSignals) begin(run *testrun.Run) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.run = run
}

// take passes the first signal on, if the agent is there, and ends the machine at the second.
func (s *testSignals) take(cause error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var end endError
	first := !s.past
	if s.past = true; first && s.run != nil && errors.As(cause, &end) {
		s.run.Terminate(end.status-128, cause, s.grace)
		return
	}
	s.stop(cause)
}

// followSize passes each new size of this terminal to that of a command, until the returned
// function is called.
func followSize(winsize func(rows, columns uint16)) (stop func()) {
	changed := make(chan os.Signal, 1)
	signal.Notify(changed, unix.SIGWINCH)
	var watcher sync.WaitGroup
	watcher.Go(panics.Func(func() {
		for range changed {
			if columns, rows, err := term.GetSize(int(os.Stdout.Fd())); err == nil {
				winsize(uint16(rows), uint16(columns))
			}
		}
	}))
	return func() {
		signal.Stop(changed)
		close(changed)
		watcher.Wait()
	}
}
