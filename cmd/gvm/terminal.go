package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"gvm/kvmapi/eventfd"
	"gvm/kvmapi/nowait"
	"gvm/machine"
	"gvm/panics"
	"gvm/vmm"
)

// errQuit is the end by Ctrl-a x.
var errQuit = errors.New("stopped by Ctrl-a x")

const escape = 0x01 // Ctrl-a

const escapeHelp = "\r\n" +
	"Ctrl-a x  stop the guest and leave\r\n" +
	"Ctrl-a b  send a break (Linux: SysRq)\r\n" +
	"Ctrl-a h  this help\r\n" +
	"Ctrl-a Ctrl-a  send Ctrl-a\r\n"

// terminal connects gvm's standard input and output to the guest's serial console. A terminal is
// raw while gvm is in its foreground; bytes pass unchanged.
type terminal struct {
	in    *os.File
	out   *os.File
	tty   *tty // nil if in is not a terminal
	shown bool // out is a terminal
	run   context.Context
	quit  func(error)
	wake  *eventfd.FD // ends the input goroutine
	input sync.WaitGroup

	unwatch func() // stops watching job control; set if there is a tty

	keys *machine.InputQueue
	help string // of the keys after Ctrl-a
	deaf bool   // Ctrl-a b is no command, as the guest takes no break
	// leave is the end by Ctrl-a x. If it is errDetached, Ctrl-a d has it too.
	leave error
}

// patience bounds how long a stopped run waits for a reader of its output: a pipe to a program that
// is itself stopped must not keep gvm alive.
const patience = 500 * time.Millisecond // less than the end of a machine has

// newTerminal returns standard input and output for a run, for open to take. It calls quit for
// Ctrl-a x and for output that fails.
func newTerminal(quit func(error)) *terminal {
	return &terminal{in: os.Stdin, out: os.Stdout, quit: quit, keys: machine.NewInputQueue(), help: escapeHelp,
		leave: errQuit}
}

// open makes the terminal raw, if it is one, until run is done.
func (t *terminal) open(run context.Context) (err error) {
	t.run = run
	t.shown = term.IsTerminal(int(t.out.Fd()))
	if t.wake, err = eventfd.New(); err != nil {
		return err
	}
	if fd := int(t.in.Fd()); term.IsTerminal(fd) {
		t.tty = &tty{fd: fd}
		awaitFatal()
		urgent.Lock() // before it is raw
		urgent.restore = t.tty.restore
		urgent.Unlock()
		has, err := t.tty.look(false)
		if err != nil {
			err = errors.Join(fmt.Errorf("terminal: raw mode: %w", err), t.wake.Close())
			t.wake, t.tty = nil, nil
			return err
		}
		if !has {
			note("in the background of this terminal: the guest gets no input until fg (with timeout(1): --foreground)")
		}
		t.unwatch = t.tty.watch(func(err error) { t.quit(fmt.Errorf("terminal: %w", err)) })
	}
	t.input.Go(panics.Func(t.read))
	t.input.Go(panics.Func(t.keys.Feed))
	return nil
}

// Write writes the guest's output. A closed pipe ends the run, as the guest would write to nowhere
// for ever.
func (t *terminal) Write(p []byte) (n int, err error) {
	p = bytes.Clone(p) // the write may outlive the call
	written := make(chan struct{})
	var wn int
	var werr error
	panics.Go(func() {
		defer close(written)
		wn, werr = t.out.Write(p)
		stderr.midLine.Store(t.shown && wn > 0 && p[wn-1] != '\n')
	})
	select {
	case <-written:
	case <-t.run.Done():
		select {
		case <-written:
		case <-time.After(nowait.LeftInside(t.run, patience)): // the machine's end waits for the console
			return 0, context.Cause(t.run)
		}
	}
	if werr != nil {
		t.gone("output", werr)
	}
	return wn, werr
}

// gone ends the run after an error of the console. A terminal that hung up ends it like SIGHUP,
// which comes with it.
func (t *terminal) gone(what string, err error) {
	if t.tty != nil && errors.Is(err, unix.EIO) {
		err = endError{exitHangup, err}
	}
	t.quit(fmt.Errorf("console %s: %w", what, err))
}

// Connect sets the guest's input.
func (t *terminal) Connect(w vmm.Input) { t.keys.Connect(w) }

// put queues input for the guest; nil is a break. If the queue is full, a pipe blocks its writer,
// and input of a terminal is dropped, since Ctrl-a must work even if the guest takes no input.
func (t *terminal) put(p []byte) { t.keys.Put(p, func() bool { return t.tty != nil }) }

// read passes input on until it ends or close wakes it. Ctrl-a is a command only on a terminal; in
// a pipe it is data.
func (t *terminal) read() {
	fds := []unix.PollFd{{Fd: int32(t.in.Fd()), Events: unix.POLLIN}, {Fd: int32(t.wake.Fd()), Events: unix.POLLIN}}
	buf := make([]byte, 4096)
	escaped := false
	for {
		// While gvm is in the background of a terminal, its input belongs to another job.
		timeout := -1
		if fds[0].Fd = int32(t.in.Fd()); t.tty != nil {
			timeout = int(jobPoll.Milliseconds())
			if !t.tty.foreground() {
				fds[0].Fd = -1
			}
		}
		if _, err := unix.Poll(fds, timeout); err != nil && !errors.Is(err, unix.EINTR) {
			t.quit(fmt.Errorf("console input: poll: %w", err))
			return
		}
		if fds[1].Revents != 0 {
			return
		}
		if fds[0].Revents == 0 {
			continue
		}
		if t.tty != nil {
			if has, err := t.tty.look(false); err == nil && !has {
				continue
			}
		}
		n, err := unix.Read(int(t.in.Fd()), buf)
		switch {
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue
		case t.tty == nil && (err != nil || n == 0):
			return // the guest runs on after the end of its input
		case errors.Is(err, unix.EIO) && !t.tty.foreground(): // SIGTTIN is ignored
			continue
		case err != nil:
			t.gone("input", err)
			return
		case n == 0: // a terminal that hung up reads as empty
			t.gone("input", unix.EIO)
			return
		}
		p := buf[:n]
		if t.tty == nil {
			t.put(p)
			continue
		}
		for len(p) > 0 {
			if escaped {
				escaped = false
				t.command(p[0])
				p = p[1:]
				continue
			}
			i := bytes.IndexByte(p, escape)
			if i < 0 {
				t.put(p)
				break
			}
			t.put(p[:i])
			p, escaped = p[i+1:], true
		}
	}
}

// command runs the command of the key after Ctrl-a. An unknown key lists the commands.
func (t *terminal) command(key byte) {
	switch key {
	case 'd', 'D':
		if t.leave != errDetached {
			_, _ = t.Write([]byte(t.help))
			return
		}
		t.quit(t.leave)
	case 'x', 'X':
		if t.run.Err() != nil {
			endNow(exitQuit, "stopped at once by Ctrl-a x")
		}
		t.quit(t.leave)
	case 'b', 'B':
		if t.deaf {
			_, _ = t.Write([]byte(t.help))
			return
		}
		t.put(nil)
	case escape:
		t.put([]byte{escape})
	default: // h and unknown keys
		_, _ = t.Write([]byte(t.help))
	}
}

// close restores the terminal and ends the input goroutines, once. A goroutine goes on to the end
// of the process that reads input which another process took first, or passes it to a machine that
// does not take it.
func (t *terminal) close() error {
	if t.wake == nil {
		return nil // not open
	}
	t.keys.Close()
	err := t.wake.Signal()
	ended := make(chan struct{})
	panics.Go(func() {
		t.input.Wait()
		close(ended)
	})
	left := false
	select {
	case <-ended:
	case <-time.After(nowait.Left(t.run, patience)):
		left = true
	}
	if t.tty != nil {
		t.unwatch()
		err = errors.Join(err, t.tty.restore())
	}
	if !left {
		err = errors.Join(err, t.wake.Close())
	}
	t.wake = nil
	return err
}

// terminalSize returns kernel words with the size of the terminal, since a serial line cannot carry
// it; none if standard input and output are not a terminal. Linux puts unknown words into the
// environment of init, where shells and curses look if the line has no size. systemd (254 and
// newer) sets the line's size by its own words.
func terminalSize() []string {
	if !term.IsTerminal(int(os.Stdin.Fd())) {
		return nil
	}
	columns, rows, err := term.GetSize(int(os.Stdout.Fd()))
	if err != nil || columns <= 0 || rows <= 0 {
		return nil
	}
	return []string{
		fmt.Sprintf("LINES=%d", rows), fmt.Sprintf("COLUMNS=%d", columns),
		fmt.Sprintf("systemd.tty.rows.ttyS0=%d", rows), fmt.Sprintf("systemd.tty.columns.ttyS0=%d", columns),
	}
}
