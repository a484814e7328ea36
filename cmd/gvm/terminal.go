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
	"gvm/vmm"
)

// errQuit is Ctrl-a x.
var errQuit = errors.New("stopped by Ctrl-a x")

const escape = 0x01 // Ctrl-a

const escapeHelp = "\r\n" +
	"Ctrl-a x  stop the guest and leave\r\n" +
	"Ctrl-a b  send a break (Linux: SysRq)\r\n" +
	"Ctrl-a h  this help\r\n" +
	"Ctrl-a Ctrl-a  send Ctrl-a\r\n"

// terminal is gvm's own standard input and output as the guest's serial
// console. A terminal is raw while gvm is in its foreground; bytes pass as they are.
type terminal struct {
	in    *os.File
	out   *os.File
	tty   *tty // nil where in is not a terminal
	run   context.Context
	quit  func(error)
	wake  *eventfd.FD // ends the input goroutine
	input sync.WaitGroup

	unwatch func() // ends the watch of job control, where there is a tty

	mu     sync.Mutex
	to     vmm.Input // the guest's input; nil: nowhere
	queue  [][]byte  // what was typed and is not the guest's yet; nil stands for a break
	queued int       // bytes of it, a break as one
	change *sync.Cond
	done   bool
}

// maxQueued bounds the input that waits for the guest. A pipe waits then; a
// terminal's is dropped, since Ctrl-a has to be seen whatever the guest does.
const maxQueued = 1 << 20

// patience is how long a run that was stopped waits for somebody to take the
// output: a pipe to a program that is itself stopped must not keep gvm alive.
const patience = 500 * time.Millisecond // less than the end of a machine has

// newTerminal returns standard input and output for a run, which open takes. quit is called for
// Ctrl-a x and for output that fails.
func newTerminal(quit func(error)) *terminal {
	t := &terminal{in: os.Stdin, out: os.Stdout, quit: quit}
	t.change = sync.NewCond(&t.mu)
	return t
}

// open takes the terminal, if it is one, for a run that is to end when run is done.
func (t *terminal) open(run context.Context) (err error) {
	t.run = run
	if t.wake, err = eventfd.New(); err != nil {
		return err
	}
	if fd := int(t.in.Fd()); term.IsTerminal(fd) {
		t.tty = &tty{fd: fd}
		has, err := t.tty.look(false)
		if err != nil {
			err = errors.Join(fmt.Errorf("terminal: raw mode: %w", err), t.wake.Close())
			t.wake, t.tty = nil, nil
			return err
		}
		if !has {
			note("in the background of this terminal: the guest gets no input until fg (with timeout(1): --foreground)")
		}
		urgent.Lock()
		urgent.restore = t.tty.restore
		urgent.Unlock()
		t.unwatch = t.tty.watch(func(err error) { t.quit(fmt.Errorf("terminal: %w", err)) })
	}
	t.input.Go(t.read)
	t.input.Go(t.feed)
	return nil
}

// Write sends the guest's output on. A reader that is gone (a closed pipe) ends
// the run: the guest would write to nowhere for ever.
func (t *terminal) Write(p []byte) (n int, err error) {
	p = bytes.Clone(p) // the write may outlive the call
	written := make(chan struct{})
	var wn int
	var werr error
	go func() {
		defer close(written)
		wn, werr = t.out.Write(p)
	}()
	select {
	case <-written:
	case <-t.run.Done():
		select {
		case <-written:
		case <-time.After(patience):
			return 0, context.Cause(t.run)
		}
	}
	if werr != nil {
		t.gone("output", werr)
	}
	return wn, werr
}

// gone ends the run for a console that failed; for a terminal that hung up, as
// the signal does that comes with it.
func (t *terminal) gone(what string, err error) {
	if t.tty != nil && errors.Is(err, unix.EIO) {
		err = endError{exitHangup, err}
	}
	t.quit(fmt.Errorf("console %s: %w", what, err))
}

// Connect says where input goes.
func (t *terminal) Connect(w vmm.Input) {
	t.mu.Lock()
	t.to = w
	t.mu.Unlock()
	t.change.Broadcast()
}

// put queues input for the guest; nil is a break.
func (t *terminal) put(p []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for t.tty == nil && t.queued >= maxQueued && !t.done {
		t.change.Wait()
	}
	if t.queued < maxQueued {
		t.queue = append(t.queue, bytes.Clone(p))
		t.queued += max(1, len(p))
		t.change.Broadcast()
	}
}

// feed gives the queue to the guest; while the machine reboots it waits for the
// next one.
func (t *terminal) feed() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for {
		for !t.done && (t.to == nil || len(t.queue) == 0) {
			t.change.Wait()
		}
		if t.done {
			return
		}
		to, p := t.to, t.queue[0]
		t.mu.Unlock()
		n, err := give(to, p)
		t.mu.Lock()
		if t.queued -= n; err == nil {
			t.queued -= max(1, len(p)) - len(p)
			t.queue = t.queue[1:]
		} else if p != nil {
			t.queue[0] = p[n:]
		}
		if err != nil && t.to == to {
			t.to = nil
		}
		t.change.Broadcast()
	}
}

func give(to vmm.Input, p []byte) (int, error) {
	if p != nil {
		return to.Write(p)
	}
	return 0, to.Break()
}

// read passes input on until it ends or close wakes it. Ctrl-a is taken out on
// a terminal only: what comes through a pipe is data.
func (t *terminal) read() {
	fds := []unix.PollFd{{Fd: int32(t.in.Fd()), Events: unix.POLLIN}, {Fd: int32(t.wake.Fd()), Events: unix.POLLIN}}
	buf := make([]byte, 4096)
	escaped := false
	for {
		// The input of a terminal in whose background gvm is belongs to another job.
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
			return // the end of the input is not the end of the guest
		case errors.Is(err, unix.EIO) && !t.tty.foreground(): // SIGTTIN is ignored
			continue
		case err != nil:
			t.gone("input", err)
			return
		case n == 0: // what a terminal that hung up reads as
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

// command is the key after Ctrl-a. One that means nothing is answered by the keys that do.
func (t *terminal) command(key byte) {
	switch key {
	case 'x', 'X':
		if t.run.Err() != nil {
			endNow(exitQuit, "stopped at once by Ctrl-a x")
		}
		t.quit(errQuit)
	case 'b', 'B':
		t.put(nil)
	case escape:
		t.put([]byte{escape})
	default: // h among them
		_, _ = t.Write([]byte(escapeHelp))
	}
}

// close restores the terminal and ends the input goroutine, once.
func (t *terminal) close() error {
	if t.wake == nil {
		return nil // not open
	}
	t.mu.Lock()
	t.done = true
	t.mu.Unlock()
	t.change.Broadcast()
	err := t.wake.Signal()
	t.input.Wait()
	if t.tty != nil {
		t.unwatch()
		err = errors.Join(err, t.tty.restore())
	}
	err = errors.Join(err, t.wake.Close())
	t.wake = nil
	return err
}
