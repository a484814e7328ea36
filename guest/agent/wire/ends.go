package wire

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"time"

	"gvm/panics"
)

// Exit is the end of a command: one of a status, a signal and a failed start.
type Exit struct {
	Status int    // 0 to 255; after a failed start 127: no file, 126: no program, 125: else
	Signal int    // that ended the command, or 0
	Err    string // reason of a failed start
}

// MaxSignal is the largest number of a signal: _NSIG of Linux.
const MaxSignal = 64

const (
	exited = iota
	signaled
	notStarted
)

func (e Exit) frame() []byte {
	switch {
	case e.Err != "":
		return append([]byte{notStarted, byte(e.Status)}, e.Err[:min(len(e.Err), MaxPayload-2)]...)
	case e.Signal != 0:
		return []byte{signaled, byte(e.Signal)}
	}
	return []byte{exited, byte(e.Status)}
}

func parseExit(p []byte) (Exit, error) {
	switch {
	case len(p) == 2 && p[0] == exited:
		return Exit{Status: int(p[1])}, nil
	case len(p) == 2 && p[0] == signaled && p[1] > 0 && p[1] <= MaxSignal:
		return Exit{Signal: int(p[1])}, nil
	case len(p) > 2 && p[0] == notStarted && p[1] >= 125 && p[1] <= 127:
		return Exit{Status: int(p[1]), Err: string(p[2:])}, nil
	}
	return Exit{}, fmt.Errorf("the exit frame % x is wrong", p[:min(len(p), 16)])
}

// HostConfig configures a Host. Its functions are called in order and hold up the connection until
// they return.
type HostConfig struct {
	Builds  []string      // BuildID of each program that may be the agent
	Window  int           // bytes buffered for each of Stdout and Stderr; 0 is 256 KiB
	Started func(pid int) // nil: not called
	Alive   func()        // each AlivePeriod while the guest's user space runs
	Log     func(line string)
}

// Host is gvm's end of a connection. Its methods may be called by any goroutine.
type Host struct {
	Hello  Hello // the agent's
	Stdin  io.WriteCloser
	Stdout io.ReadCloser
	Stderr io.ReadCloser

	c       *conn
	cfg     HostConfig
	started bool          // reader
	exit    Exit          // before exited is closed
	exited  chan struct{} // the exit frame came
}

// Accept waits for the agent's hello and answers it. To give up, close rw.
func Accept(rw io.ReadWriteCloser, cfg HostConfig) (*Host, error) {
	if cfg.Window == 0 {
		cfg.Window = 256 << 10
	}
	c := newConn(rw)
	h := &Host{c: c, cfg: cfg, exited: make(chan struct{}), Stdin: c.sender(stdin),
		Stdout: c.receiver(stdout, cfg.Window), Stderr: c.receiver(stderr, cfg.Window)}
	var err error
	if h.Hello, err = c.frames.readHello(roleAgent, cfg.Builds...); err != nil {
		return nil, fmt.Errorf("wait for the agent: %w", err)
	}
	if _, err := rw.Write(appendHello(nil, roleHost, Hello{Build: h.Hello.Build})); err != nil {
		return nil, fmt.Errorf("answer the agent: %w", err)
	}
	if err := c.start(h.frame); err != nil {
		return nil, err
	}
	return h, nil
}

func (h *Host) frame(f frame) error {
	switch {
	case h.isExited():
	case f.typ == frameStarted && len(f.payload) == 4 && !h.started:
		h.started = true
		if h.cfg.Started != nil {
			h.cfg.Started(int(binary.LittleEndian.Uint32(f.payload)))
		}
		return nil
	case f.typ == frameAlive && len(f.payload) == 0:
		if h.cfg.Alive != nil {
			h.cfg.Alive()
		}
		return nil
	case f.typ == frameLog:
		if h.cfg.Log != nil {
			h.cfg.Log(string(f.payload))
		}
		return nil
	case f.typ == frameExit:
		var err error
		h.exit, err = parseExit(f.payload)
		if err == nil {
			close(h.exited)
			h.c.endInputs() // an agent that fails does not close them
		}
		return err
	}
	if f.typ == frameAlive { // its goroutine does not know of the exit
		return nil
	}
	return fmt.Errorf("frame %d of %d bytes is wrong from an agent", f.typ, len(f.payload))
}

func (h *Host) isExited() bool {
	select {
	case <-h.exited:
		return true
	default:
		return false
	}
}

// Wait waits for the end of the command, or returns the error that ended the connection before it.
// All that the command wrote can be read from Stdout and Stderr, before and after.
func (h *Host) Wait() (Exit, error) {
	select {
	case <-h.exited:
	case <-h.c.gone:
		if !h.isExited() {
			return Exit{}, fmt.Errorf("the connection to the agent ended: %w", h.c.err)
		}
	}
	return h.exit, nil
}

// Command gives an agent that waits in Agent.Command its command.
func (h *Host) Command(c *Command) error {
	b, err := c.Encode()
	if err != nil {
		return err
	}
	for len(b) > 0 {
		n := min(len(b), MaxPayload)
		if err := h.c.write(frameCommand, 0, b[:n]...); err != nil {
			return err
		}
		b = b[n:]
	}
	return h.c.write(frameCommand, 0)
}

// Signal sends a signal to the command's process group. In a terminal that is the group in the
// foreground.
func (h *Host) Signal(number int) error { return h.c.write(frameSignal, 0, byte(number)) }

// Winsize sets the size of the command's terminal.
func (h *Host) Winsize(rows, columns uint16) error {
	p := binary.LittleEndian.AppendUint16(nil, rows)
	return h.c.write(frameWinsize, 0, binary.LittleEndian.AppendUint16(p, columns)...)
}

// Bye lets the agent power the machine off. Call it after Wait.
func (h *Host) Bye() error { return h.c.write(frameBye, 0) }

// Close ends the connection. Reads, writes and Wait return.
func (h *Host) Close() error { return h.c.close() }

// AgentConfig configures an Agent. Its functions are called in order and hold up the connection
// until they return.
type AgentConfig struct {
	Hello   Hello
	Window  int // bytes buffered for Stdin; 0 is 16 KiB, which fits a serial line's buffer
	Signal  func(number int)
	Winsize func(rows, columns uint16)
}

// Agent is the guest's end of a connection. Its methods may be called by any goroutine.
type Agent struct {
	Stdin  io.ReadCloser
	Stdout io.WriteCloser
	Stderr io.WriteCloser

	c   *conn
	cfg AgentConfig
	bye chan struct{} // bye came

	parts   bytes.Buffer  // of the command; reader
	command chan *Command // has it once
	whole   bool          // command has or had it; reader
}

// Dial says hello and waits for the host's answer. To give up, close rw.
func Dial(rw io.ReadWriteCloser, cfg AgentConfig) (*Agent, error) {
	if cfg.Window == 0 {
		cfg.Window = 16 << 10
	}
	c := newConn(rw)
	a := &Agent{c: c, cfg: cfg, bye: make(chan struct{}), command: make(chan *Command, 1),
		Stdin: c.receiver(stdin, cfg.Window), Stdout: c.sender(stdout), Stderr: c.sender(stderr)}
	if _, err := rw.Write(appendHello(nil, roleAgent, cfg.Hello)); err != nil {
		return nil, fmt.Errorf("say hello to the host: %w", err)
	}
	if _, err := c.frames.readHello(roleHost, cfg.Hello.Build); err != nil {
		return nil, fmt.Errorf("wait for the host: %w", err)
	}
	if err := c.start(a.frame); err != nil {
		return nil, err
	}
	panics.Go(a.sayAlive)
	return a, nil
}

func (a *Agent) sayAlive() {
	t := time.NewTicker(AlivePeriod)
	defer t.Stop()
	for {
		select {
		case <-a.c.gone:
			return
		case <-t.C:
			if a.c.write(frameAlive, 0) != nil {
				return
			}
		}
	}
}

func (a *Agent) frame(f frame) error {
	switch {
	case f.typ == frameSignal && len(f.payload) == 1:
		if a.cfg.Signal != nil {
			a.cfg.Signal(int(f.payload[0]))
		}
	case f.typ == frameWinsize && len(f.payload) == 4:
		if a.cfg.Winsize != nil {
			a.cfg.Winsize(binary.LittleEndian.Uint16(f.payload), binary.LittleEndian.Uint16(f.payload[2:]))
		}
	case f.typ == frameBye && len(f.payload) == 0:
		select {
		case <-a.bye:
			return fmt.Errorf("a second bye")
		default:
			close(a.bye)
		}
	case f.typ == frameCommand && !a.whole && a.parts.Len()+len(f.payload) <= maxCommand:
		if a.parts.Write(f.payload); len(f.payload) > 0 {
			return nil
		}
		cmd, err := ReadCommand(&a.parts)
		if err != nil {
			return err
		}
		a.whole = true
		a.command <- cmd
	default:
		return fmt.Errorf("frame %d of %d bytes is wrong from a host", f.typ, len(f.payload))
	}
	return nil
}

// Command waits for the command of an agent that has no command file.
func (a *Agent) Command() (*Command, error) {
	select {
	case cmd := <-a.command:
		return cmd, nil
	case <-a.c.gone:
		return nil, fmt.Errorf("wait for the command: %w", a.c.err)
	}
}

// Started tells the host the command's process ID.
func (a *Agent) Started(pid int) error {
	return a.c.write(frameStarted, 0, binary.LittleEndian.AppendUint32(nil, uint32(pid))...)
}

// Log sends a line for the user.
func (a *Agent) Log(line string) error {
	return a.c.write(frameLog, 0, []byte(line[:min(len(line), MaxPayload)])...)
}

// Exit tells the end of the command, after all output, and waits for the host's bye, at most
// patience.
func (a *Agent) Exit(e Exit, patience time.Duration) error {
	if err := a.c.write(frameExit, 0, e.frame()...); err != nil {
		return err
	}
	select {
	case <-a.bye:
		return nil
	case <-a.c.gone:
		select {
		case <-a.bye:
			return nil
		default:
			return fmt.Errorf("the connection to the host ended: %w", a.c.err)
		}
	case <-time.After(patience):
		return fmt.Errorf("the host has not taken the exit status in %v", patience)
	}
}

// Gone returns a channel that is closed when the connection has ended.
func (a *Agent) Gone() <-chan struct{} { return a.c.gone }

// Close ends the connection.
func (a *Agent) Close() error { return a.c.close() }
