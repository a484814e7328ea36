package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"gvm/jail"
	"gvm/panics"
)

// tty is a terminal that is raw while gvm is in its foreground process group. From the background
// gvm neither sets nor reads it: SIGTTOU and SIGTTIN would stop gvm, and the settings belong to
// another job.
type tty struct {
	fd int

	mu     sync.Mutex
	before unix.Termios // the settings to restore
	raw    unix.Termios // gvm's own settings
	held   bool         // gvm made the terminal raw
	taken  bool         // it did so before, and before and raw are set
	closed bool
}

// jobPoll is how often gvm checks whether its process group has the terminal. A shell may give and
// take the terminal without a signal.
const jobPoll = 200 * time.Millisecond

// foreground reports whether gvm may use the terminal. A terminal that is not gvm's controlling one
// has no job control (ENOTTY). One that hung up fails on the next read (EIO).
func (t *tty) foreground() bool {
	group, err := unix.IoctlGetInt(t.fd, unix.TIOCGPGRP)
	return err != nil || group == unix.Getpgrp()
}

// look takes the terminal if gvm is in the foreground, and gives it back if gvm no longer is. again
// is true after the process was stopped, when a shell has set the terminal. look reports whether
// the terminal may be read.
func (t *tty) look(again bool) (bool, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch fg := t.foreground(); {
	case t.closed:
		return false, nil
	case !fg:
		return false, t.giveBack()
	case t.held && !again:
		return true, nil
	}
	now, err := unix.IoctlGetTermios(t.fd, unix.TCGETS)
	if err != nil {
		return true, err
	}
	// The settings are not read back: the process may stop here, and another job set the terminal.
	if !t.taken || *now != t.raw {
		t.before = *now
	}
	t.raw, t.held, t.taken = rawSettings(*now), true, true
	return true, unix.IoctlSetTermios(t.fd, unix.TCSETS, &t.raw)
}

// rawSettings returns the settings of term.MakeRaw, which are those of cfmakeraw (termios(3)).
func rawSettings(s unix.Termios) unix.Termios {
	s.Iflag &^= unix.IGNBRK | unix.BRKINT | unix.PARMRK | unix.ISTRIP | unix.INLCR | unix.IGNCR | unix.ICRNL | unix.IXON
	s.Oflag &^= unix.OPOST
	s.Lflag &^= unix.ECHO | unix.ECHONL | unix.ICANON | unix.ISIG | unix.IEXTEN
	s.Cflag = s.Cflag&^(unix.CSIZE|unix.PARENB) | unix.CS8
	s.Cc[unix.VMIN], s.Cc[unix.VTIME] = 1, 0
	return s
}

// giveBack restores the former settings. In the background it does so only while the settings are
// gvm's own: otherwise the foreground job has set the terminal. The caller holds mu.
func (t *tty) giveBack() error {
	if !t.held {
		return nil
	}
	t.held = false
	if !t.foreground() {
		if now, err := unix.IoctlGetTermios(t.fd, unix.TCGETS); err != nil || *now != t.raw {
			return nil
		}
	}
	return unix.IoctlSetTermios(t.fd, unix.TCSETS, &t.before)
}

// restore gives the terminal back for good. It may be called at any time, from any goroutine.
func (t *tty) restore() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
	if err := t.giveBack(); err != nil {
		return fmt.Errorf("terminal: %w", err)
	}
	return nil
}

// watch follows job control until stop is called. It gives the terminal back before SIGTSTP stops
// gvm, and takes it again when gvm continues in the foreground.
func (t *tty) watch(fail func(error)) (stop func()) {
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, unix.SIGCONT)
	if !signal.Ignored(unix.SIGTSTP) {
		signal.Notify(signals, unix.SIGTSTP)
	}
	over, parents := make(chan struct{}), lineage(os.Getppid())
	var watcher sync.WaitGroup
	watcher.Go(panics.Func(func() {
		tick := time.NewTicker(jobPoll)
		defer tick.Stop()
		for {
			again := false
			select {
			case <-over:
				return
			case <-tick.C:
			case s := <-signals:
				if again = true; s == unix.SIGTSTP {
					t.mu.Lock()
					err := t.giveBack()
					t.mu.Unlock()
					if err = errors.Join(err, suspend(parents)); err != nil {
						fail(err)
						return
					}
				}
			}
			if _, err := t.look(again); err != nil && !errors.Is(err, unix.EIO) {
				fail(err)
				return
			}
		}
	}))
	return func() {
		close(over)
		watcher.Wait()
		signal.Stop(signals)
	}
}

// suspend stops the process like SIGTSTP without a handler, since Go cannot remove its handler. It
// does not stop an orphaned process group, which nothing would continue (POSIX 2.4.3).
func suspend(parents map[int]int) error {
	if orphaned(os.Getppid(), parents) {
		return nil
	}
	runtime.LockOSThread() // the signal stops the process before Tgkill returns
	defer runtime.UnlockOSThread()
	return unix.Tgkill(unix.Getpid(), unix.Gettid(), unix.SIGSTOP)
}

// orphaned reports whether the process group is orphaned: its nearest ancestor outside the group,
// from parent upwards, is not in its session. parents are those of the ancestors in the group.
func orphaned(parent int, parents map[int]int) bool {
	for parent > 1 {
		session, err := unix.Getsid(parent)
		own, _ := unix.Getsid(0)
		if err != nil || session != own {
			return true
		}
		if group, err := unix.Getpgid(parent); err != nil || group != unix.Getpgrp() {
			return err != nil
		}
		parent = parents[parent]
	}
	return true
}

// lineage returns the parents of the ancestors in the process group, from parent upwards. They are
// read once: in the sandbox gvm cannot, and in a jail root has read them. An ancestor whose own
// parent has ended has init for one, or a process that the shell is below as well.
func lineage(parent int) map[int]int {
	if in := jail.Here(); in != nil {
		return in.Parents
	}
	parents := map[int]int{}
	for parent > 1 && parents[parent] == 0 {
		if group, err := unix.Getpgid(parent); err != nil || group != unix.Getpgrp() {
			break
		}
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", parent))
		if err != nil {
			break
		}
		next := 0
		after := string(stat[bytes.LastIndexByte(stat, ')')+1:]) // skips the name (proc_pid_stat(5))
		if _, err := fmt.Sscanf(after, " %c %d", new(rune), &next); err != nil {
			break
		}
		parents[parent], parent = next, next
	}
	return parents
}
