package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// proc is a running gvm, on pipes or on a terminal.
type proc struct {
	t        *testing.T
	cmd      *exec.Cmd
	master   *os.File // of the terminal; nil: pipes
	slave    *os.File
	input    io.WriteCloser
	settings unix.Termios // of the terminal, before the start

	mu    sync.Mutex
	more  *sync.Cond
	out   []byte
	errs  bytes.Buffer
	ended bool // the output has ended
	late  bool
	eof   chan struct{}
}

// startGVM starts gvm in dir with pipes for its input and output.
func startGVM(t *testing.T, dir string, args ...string) *proc {
	t.Helper()
	return startGVMAs(t, dir, func(*proc) {}, args...)
}

// startGVMAs is startGVM, but calls change before the start.
func startGVMAs(t *testing.T, dir string, change func(*proc), args ...string) *proc {
	t.Helper()
	p := newProc(t, args)
	if dir != "" {
		p.cmd.Dir = dir
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p.cmd.Stdout, p.cmd.Stderr = w, &p.errs
	if p.input, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	change(p)
	p.start(r)
	w.Close()
	return p
}

// startOnTerminal starts gvm as the session leader of a new terminal.
func startOnTerminal(t *testing.T, args ...string) *proc {
	t.Helper()
	return startOnTerminalAs(t, func(*proc) {}, args...)
}

// startOnTerminalAs is startOnTerminal, but calls change before the start.
func startOnTerminalAs(t *testing.T, change func(*proc), args ...string) *proc {
	t.Helper()
	p := newProc(t, args)
	p.master, p.slave = openPTY(t)
	p.settings = p.termios()
	p.settings.Cc[unix.VERASE], p.settings.Cc[unix.VMIN] = 'E', 7 // unusual settings, which nothing else would set
	p.settings.Iflag |= unix.IUTF8 | unix.IXANY
	p.setTermios(p.settings)
	p.settings = p.termios()
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = p.slave, p.slave, p.slave
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	p.input = p.master
	change(p)
	p.start(p.master)
	return p
}

func newProc(t *testing.T, args []string) *proc {
	p := &proc{t: t, cmd: command(t, args...), eof: make(chan struct{})}
	p.more = sync.NewCond(&p.mu)
	return p
}

// lastOutput is enough time to read the output of a process before its end.
const lastOutput = time.Second

// start starts the command, whose output comes from r.
func (p *proc) start(r *os.File) {
	p.t.Helper()
	if err := p.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	late := func() {
		p.mu.Lock()
		p.late = true
		p.mu.Unlock()
		p.more.Broadcast()
	}
	giveUp := time.AfterFunc(tooLong, late)
	pid := p.cmd.Process.Pid
	if p.slave != nil { // which keeps the terminal's output open behind the end of the process
		go func() {
			for unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
			}
			giveUp.Reset(lastOutput)
		}()
	}
	p.t.Cleanup(func() {
		giveUp.Stop()
		if p.cmd.ProcessState == nil {
			_ = p.cmd.Process.Kill()
			_ = p.cmd.Wait()
		}
		r.Close()
	})
	go func() {
		defer close(p.eof)
		buf := make([]byte, 4096)
		for {
			n, err := r.Read(buf)
			p.mu.Lock()
			p.out = append(p.out, buf[:n]...)
			p.ended = err != nil
			p.mu.Unlock()
			p.more.Broadcast()
			if err != nil {
				return
			}
		}
	}()
}

// expect waits until the output has every one of texts.
func (p *proc) expect(texts ...string) {
	p.t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, text := range texts {
		for !bytes.Contains(p.out, []byte(text)) {
			if p.ended || p.late {
				p.t.Fatalf("no %q in the output: %q%s", text, p.out, p.failure())
			}
			p.more.Wait()
		}
	}
}

// failure ends the process, and returns its standard error, if that is not on its terminal.
func (p *proc) failure() string {
	if p.slave != nil || p.cmd.ProcessState != nil {
		return ""
	}
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
	return fmt.Sprintf("; standard error: %q", p.errs.String())
}

// expectCount waits until the output has text n times.
func (p *proc) expectCount(text string, n int) {
	p.t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	for bytes.Count(p.out, []byte(text)) < n {
		if p.ended || p.late {
			p.t.Fatalf("not %d times %q in the output: %q%s", n, text, p.out, p.failure())
		}
		p.more.Wait()
	}
}

// eventually waits until done returns true.
func (p *proc) eventually(what string, done func() bool) {
	p.t.Helper()
	for !done() {
		p.mu.Lock()
		over := p.ended || p.late
		p.mu.Unlock()
		if over {
			p.t.Fatalf("never %s: %q", what, p.text())
		}
		time.Sleep(time.Millisecond)
	}
}

// text returns the output so far.
func (p *proc) text() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return string(p.out)
}

func (p *proc) typeIn(s string) {
	p.t.Helper()
	if _, err := io.WriteString(p.input, s); err != nil {
		p.t.Fatal(err)
	}
}

func (p *proc) signal(s syscall.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

// wait waits for the end. On a terminal, out is the terminal's output.
func (p *proc) wait() result {
	p.t.Helper()
	r := wait(p.t, p.cmd)
	if p.slave != nil && p.termios() != p.settings {
		p.t.Errorf("terminal settings changed from %+v to %+v", p.settings, p.termios())
	}
	if p.slave != nil {
		p.slave.Close() // the last one: now the master reads to the end
	}
	<-p.eof
	r.out, r.errs = string(p.out), p.errs.String()
	return r
}

// openPTY opens a pseudo-terminal (pty(7)).
func openPTY(t *testing.T) (master, slave *os.File) {
	t.Helper()
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal("/dev/ptmx: ", err)
	}
	master = os.NewFile(uintptr(fd), "ptmx")
	t.Cleanup(func() { master.Close() })
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal("TIOCSPTLCK: ", err)
	}
	n, err := unix.IoctlGetUint32(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal("TIOCGPTN: ", err)
	}
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { slave.Close() })
	return master, slave
}

// termios returns the terminal's settings.
func (p *proc) termios() unix.Termios {
	p.t.Helper()
	conn, err := p.slave.SyscallConn()
	if err != nil {
		p.t.Fatal(err)
	}
	var s *unix.Termios
	err = errors.Join(conn.Control(func(fd uintptr) { s, err = unix.IoctlGetTermios(int(fd), unix.TCGETS) }), err)
	if err != nil {
		p.t.Fatal(err)
	}
	return *s
}

func (p *proc) setTermios(s unix.Termios) {
	p.t.Helper()
	conn, err := p.slave.SyscallConn()
	if err != nil {
		p.t.Fatal(err)
	}
	if e := conn.Control(func(fd uintptr) { err = unix.IoctlSetTermios(int(fd), unix.TCSETS, &s) }); e != nil ||
		err != nil {
		p.t.Fatal(e, err)
	}
}

// lines converts terminal or serial output to the line ends of a file.
func lines(s string) string { return strings.ReplaceAll(s, "\r\n", "\n") }

// await waits until a descriptor has something to read, and returns its events; 0: it has none for
// too long.
func await(t *testing.T, fd int) int16 {
	t.Helper()
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		if _, err := unix.Poll(fds, int(tooLong.Milliseconds())); err == nil {
			return fds[0].Revents
		} else if err != unix.EINTR {
			t.Fatal(err)
		}
	}
}

// stuckOutput gives a command a standard output that nothing empties, starts it, and sends it a
// signal when that has something.
func stuckOutput(t *testing.T, cmd *exec.Cmd, s syscall.Signal) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	if _, err := unix.FcntlInt(r.Fd(), unix.F_SETPIPE_SZ, 4096); err != nil {
		t.Fatal(err)
	}
	cmd.Stdout = w
	err = cmd.Start()
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	if events := await(t, int(r.Fd())); events != unix.POLLIN {
		_ = cmd.Process.Kill()
		t.Fatalf("no output: events %#x", events)
	}
	if err := cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// openFIFO makes the pipe fifo in a directory of its own, and opens it to read and write. Each gvm
// gets one of its own: a pipe that is closed and opened again still has its bytes while a child has
// it, which another test forks at that moment.
func openFIFO(t *testing.T) (f *os.File, dir string) {
	t.Helper()
	dir = t.TempDir()
	path := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f, dir
}
