package agent

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"gvm/guest/agent/wire"
	"gvm/panics"
)

// lateOutput bounds the time after the command's end in which its children may still write. A child
// that left the command's process group is not waited for.
const lateOutput = time.Second

// eofPeriod is the time between two characters that end a terminal's input.
const eofPeriod = time.Second

// streams are the host's ends of a command's streams. Without a host that listens, all are nil, and
// the output goes to the console.
type streams struct {
	stdin          io.ReadCloser
	stdout, stderr io.WriteCloser
	started        func(pid int) error
}

// job is a command. Signals and window sizes may come at any time.
type job struct {
	mu      sync.Mutex
	group   int           // process group of the command while it runs, else 0
	signals []unix.Signal // that came before it
	size    *wire.Terminal
	master  *os.File // of the terminal
}

// signal sends a signal to the command: in a terminal to the group in the foreground.
func (j *job) signal(number int) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.kill(unix.Signal(number))
}

func (j *job) kill(s unix.Signal) {
	switch {
	case j.group == 0 && len(j.signals) < 100:
		j.signals = append(j.signals, s)
	case j.group > 0:
		group := j.group
		if j.master != nil {
			control(j.master, func(fd int) {
				if foreground, err := unix.IoctlGetInt(fd, unix.TIOCGPGRP); err == nil && foreground > 0 {
					group = foreground
				}
			})
		}
		unix.Kill(-group, s)
	}
}

func (j *job) winsize(rows, columns uint16) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.size = &wire.Terminal{Rows: rows, Columns: columns}
	j.resize()
}

func (j *job) resize() {
	if j.master != nil {
		control(j.master, func(fd int) {
			unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: j.size.Rows, Col: j.size.Columns})
		})
	}
}

// control calls f with the descriptor of file, and leaves the file in Go's poller.
func control(file *os.File, f func(fd int)) error {
	c, err := file.SyscallConn()
	if err != nil {
		return err
	}
	return c.Control(func(fd uintptr) { f(int(fd)) })
}

// run runs cmd to its end, which it returns after all output.
func (j *job) run(cmd *wire.Command, s streams) wire.Exit {
	f, err := j.open(cmd, s)
	if err != nil {
		return wire.Exit{Status: exitNoTest, Err: err.Error()}
	}
	pid, ended, failed, err := start(cmd, f)
	f.closeChild()
	if err != nil {
		return wire.Exit{Status: exitNoTest, Err: err.Error()}
	}
	if failed != nil {
		<-ended
		return *failed
	}
	if s.started != nil {
		s.started(pid)
	}
	j.mu.Lock()
	j.group = pid
	for _, s := range j.signals {
		j.kill(s)
	}
	j.signals = nil
	j.mu.Unlock()

	var outputs sync.WaitGroup
	for _, o := range f.outputs {
		outputs.Go(panics.Func(o.copy))
	}
	if f.input != nil {
		panics.Go(func() { f.feed(s.stdin) })
	}
	ws := <-ended
	j.mu.Lock()
	j.group = -1 // nothing is left to signal
	j.mu.Unlock()
	for deadline := time.Now().Add(lateOutput); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if unix.Kill(-pid, 0) == unix.ESRCH {
			break
		}
	}
	for _, o := range f.outputs {
		o.from.SetReadDeadline(time.Now())
	}
	outputs.Wait()
	if f.input != nil {
		s.stdin.Close()
		f.input.Close()
	}
	if ws.Signaled() {
		return wire.Exit{Signal: int(ws.Signal())}
	}
	return wire.Exit{Status: ws.ExitStatus()}
}

// reaper waits for all children, as the first program has to: orphans become its own.
type reaper struct {
	mu      sync.Mutex
	ends    map[int]chan unix.WaitStatus // of the children that start has started
	running bool
}

var theReaper reaper

// start starts a child, whose end it sends.
func (r *reaper) start(fork func() (pid int, err error)) (pid int, ended <-chan unix.WaitStatus, err error) {
	r.mu.Lock() // the child may end before it is in ends
	defer r.mu.Unlock()
	if pid, err = fork(); err != nil {
		return 0, nil, err
	}
	end := make(chan unix.WaitStatus, 1)
	if r.ends == nil {
		r.ends = map[int]chan unix.WaitStatus{}
	}
	r.ends[pid] = end
	if !r.running {
		r.running = true
		panics.Go(r.reap)
	}
	return pid, end, nil
}

// reap ends when there are no children.
func (r *reaper) reap() {
	for {
		var ws unix.WaitStatus
		child, err := unix.Wait4(-1, &ws, 0, nil)
		r.mu.Lock()
		switch end := r.ends[child]; {
		case err == nil && end != nil:
			delete(r.ends, child)
			end <- ws
		case err != nil && err != unix.EINTR && len(r.ends) == 0:
			r.running = false
		}
		over := !r.running
		r.mu.Unlock()
		if over {
			return
		}
	}
}

// files are the ends of a command's streams.
type files struct {
	child    []int // stdin, stdout, stderr of the command
	owned    []int // of these, to close
	input    *os.File
	terminal bool
	outputs  []output
}

func (f *files) closeChild() {
	for _, fd := range f.owned {
		unix.Close(fd)
	}
	f.owned = nil
}

// open makes the command's pipes or its terminal.
func (j *job) open(cmd *wire.Command, s streams) (*files, error) {
	f := &files{}
	switch {
	case s.stdin == nil:
		null, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("open /dev/null: %w", err)
		}
		f.child, f.owned = []int{null, 1, 2}, []int{null}
		return f, nil
	case cmd.Terminal != nil:
		master, slave, err := openTerminal(int(cmd.UID))
		if err != nil {
			return nil, fmt.Errorf("make a terminal: %w", err)
		}
		j.mu.Lock()
		j.master = master
		if j.size == nil {
			j.size = cmd.Terminal
		}
		j.resize()
		j.mu.Unlock()
		f.child, f.owned, f.input, f.terminal = []int{slave, slave, slave}, []int{slave}, master, true
		f.outputs = []output{{master, s.stdout}}
		s.stderr.Close()
		return f, nil
	}
	var own [3]*os.File
	for i, name := range []string{"stdin", "stdout", "stderr"} {
		// Not os.Pipe: the command's end must block.
		var p [2]int
		if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
			return nil, fmt.Errorf("make a pipe for %s: %w", name, err)
		}
		mine, theirs := p[0], p[1]
		if i == 0 {
			mine, theirs = p[1], p[0]
		}
		unix.Fchown(theirs, int(cmd.UID), int(cmd.GID)) // so that the user can open /dev/stderr
		unix.SetNonblock(mine, true)
		own[i] = os.NewFile(uintptr(mine), name)
		f.child, f.owned = append(f.child, theirs), append(f.owned, theirs)
	}
	f.input, f.outputs = own[0], []output{{own[1], s.stdout}, {own[2], s.stderr}}
	return f, nil
}

// feed copies the host's stdin to the command.
func (f *files) feed(stdin io.ReadCloser) {
	_, err := io.Copy(f.input, stdin)
	switch {
	case err != nil:
		stdin.Close() // the command has closed it, or has ended
	case f.terminal:
		// A shell that begins to edit lines drops the character that came before, and each reader
		// wants one: it is sent until the terminal is closed.
		for err == nil {
			_, err = f.input.Write([]byte{endOfFile(f.input)})
			time.Sleep(eofPeriod)
		}
	}
	if !f.terminal {
		f.input.Close()
	}
}

// output is a stream of the command's output.
type output struct {
	from *os.File
	to   io.WriteCloser
}

// copy copies to the host until the stream ends, or its deadline is over and all that it held then
// has been copied.
func (o output) copy() {
	defer o.to.Close()
	defer o.from.Close()
	buf := make([]byte, wire.MaxPayload)
	late, left := false, 0
	for {
		n, err := o.read(buf, late)
		if _, err := o.to.Write(buf[:n]); err != nil {
			return // the closed pipe ends the command, if it writes on
		}
		left -= n
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded) && !late:
			late, left = true, capacity(o.from)
			o.from.SetReadDeadline(time.Time{})
		case err != nil: // io.EOF, or EIO of a terminal that has been closed
			return
		case late && left <= 0: // an orphan wrote the rest
			return
		}
	}
}

// capacity returns the most bytes that a pipe or a terminal can hold.
func capacity(file *os.File) (n int) {
	err := control(file, func(fd int) { n, _ = unix.FcntlInt(uintptr(fd), unix.F_GETPIPE_SZ, 0) })
	if err != nil || n <= 0 {
		return 128 << 10 // a terminal has 64 KiB (drivers/tty/tty_buffer.c) and its reader's 4 KiB
	}
	return n
}

// read reads the bytes that are there. It waits for some unless late.
func (o output) read(buf []byte, late bool) (n int, err error) {
	if !late {
		return o.from.Read(buf)
	}
	c, err := o.from.SyscallConn()
	if err != nil {
		return 0, err
	}
	rawErr := c.Read(func(fd uintptr) bool {
		n, err = unix.Read(int(fd), buf)
		return true
	})
	if n <= 0 {
		return 0, errors.Join(err, rawErr, io.EOF)
	}
	return n, nil
}

// start starts cmd in a session of its own. It returns when the command runs, or has failed to.
func start(cmd *wire.Command, f *files) (pid int, ended <-chan unix.WaitStatus, failed *wire.Exit, _ error) {
	attr := &syscall.ProcAttr{Dir: cmp.Or(string(cmd.Dir), "/"), Env: strs(cmd.Env),
		Sys: &syscall.SysProcAttr{Setsid: true, Setctty: f.terminal}}
	for _, fd := range f.child {
		attr.Files = append(attr.Files, uintptr(fd))
	}
	if alike(cmd) {
		pid, ended, err := theReaper.start(func() (int, error) {
			return syscall.ForkExec(string(cmd.Args[0]), strs(cmd.Args), attr)
		})
		if err == nil {
			return pid, ended, nil, nil
		} // else the stage finds the reason
	}
	b, err := cmd.Encode()
	if err != nil {
		return 0, nil, nil, err
	}
	var in, out [2]int
	if err := unix.Pipe2(in[:], unix.O_CLOEXEC); err != nil {
		return 0, nil, nil, fmt.Errorf("make a pipe: %w", err)
	}
	to := os.NewFile(uintptr(in[1]), "command")
	defer to.Close()
	if err := unix.Pipe2(out[:], unix.O_CLOEXEC); err != nil {
		unix.Close(in[0])
		return 0, nil, nil, fmt.Errorf("make a pipe: %w", err)
	}
	from := os.NewFile(uintptr(out[0]), "exit")
	defer from.Close()
	exe := "/proc/self/exe"
	if _, err := os.Stat(exe); err != nil {
		exe = os.Args[0]
	}
	attr.Dir, attr.Env, attr.Files = "", nil, append(attr.Files, uintptr(in[0]), uintptr(out[1]))
	pid, ended, err = theReaper.start(func() (int, error) { return syscall.ForkExec(exe, []string{stageName}, attr) })
	unix.Close(in[0])
	unix.Close(out[1])
	if err != nil {
		return 0, nil, nil, fmt.Errorf("start %s: %w", exe, err)
	}
	to.Write(b) // fails if the process ends, which ended tells
	to.Close()
	return pid, ended, readExit(from, cmd), nil
}

// alike reports whether cmd is a path of a program, with the user and the limits of the agent.
func alike(cmd *wire.Command) bool {
	return cmd.Copy == nil && strings.Contains(string(cmd.Args[0]), "/") &&
		cmd.UID == 0 && cmd.GID == 0 && len(cmd.Groups) == 0 &&
		!slices.ContainsFunc(cmd.Rlimits, func(r wire.Rlimit) bool {
			var own unix.Rlimit
			return unix.Getrlimit(r.Resource, &own) != nil || own != unix.Rlimit{Cur: r.Soft, Max: r.Hard}
		})
}
