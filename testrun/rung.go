package testrun

import (
	"errors"
	"io"
	"net"

	"golang.org/x/sys/unix"

	"gvm/devices/virtio/console"
	"gvm/devices/virtio/vsock"
	"gvm/guest/agent/wire"
	"gvm/machine"
	"gvm/panics"
)

// Rung is a way by which the agent reaches the host.
type Rung int

// The rungs, the best first.
const (
	Vsock   Rung = iota + 1 // virtio-vsock, port wire.VsockPort of the host
	Console                 // the port wire.PortName of a virtio console
	COM2                    // the second serial port
	Status                  // the port of package statusport: the end of the command alone
)

// Rungs are all of them, the best first.
var Rungs = []Rung{Vsock, Console, COM2, Status}

var rungNames = map[Rung]string{Vsock: "vsock", Console: "console", COM2: "com2", Status: "status"}

// String returns the rung's name in flags and verdicts.
func (r Rung) String() string { return rungNames[r] }

// listener waits for the agent on a rung.
type listener struct {
	rung   Rung
	stream io.ReadWriteCloser
}

// close ends the wait. The machine closes the stream too, and the second close does nothing.
func (l *listener) close() { _ = l.stream.Close() }

// listen gives the machine the devices of the rungs.
func (r *Run) listen(spec *machine.Spec) (all []*listener) {
	rungs := r.cfg.Rungs
	if rungs == nil {
		rungs = Rungs
	}
	for _, rung := range rungs {
		switch rung {
		case Vsock:
			spec.Vsock = &vsock.Config{Accept: r.accept}
		case Console:
			near, far := net.Pipe()
			spec.Ports = append(spec.Ports, console.Port{Name: wire.PortName, Stream: far})
			all = append(all, &listener{rung, near})
		case COM2:
			near, far := net.Pipe()
			spec.COM2 = far
			all = append(all, &listener{rung, near})
		case Status:
			spec.Status = r.takeStatus
		}
	}
	return all
}

// maxConns bounds the guest's connections to the agent's port.
const maxConns = 16

// accept serves a connection from the guest.
func (r *Run) accept(port uint32, c *vsock.Conn) bool {
	if port != wire.VsockPort || r.conns.Add(1) > maxConns {
		return false
	}
	r.sessions.Go(panics.Func(func() { r.serve(&listener{Vsock, c}) }))
	return true
}

// serve waits for the agent on a rung, and serves its command if this is the first hello.
func (r *Run) serve(l *listener) {
	<-r.began
	h, err := wire.Accept(l.stream, wire.HostConfig{
		Builds:  []string{r.cfg.Build},
		Started: func(int) { r.mark(&r.times.Started); r.phase("the command's start") },
		Alive:   r.touch,
		Log:     r.cfg.Say,
	})
	if err != nil {
		switch {
		case !errors.As(err, new(*wire.VersionError)):
		case r.chosen() != 0: // another program of the guest
			l.close()
		default:
			r.lost(err)
		}
		return
	}
	if !r.hello(l.rung, h) {
		_ = h.Close()
		return
	}
	r.copies.Go(panics.Func(func() { r.copyOut(r.cfg.Stdout, h.Stdout) }))
	r.copies.Go(panics.Func(func() { r.copyOut(r.cfg.Stderr, h.Stderr) }))
	panics.Go(func() { r.copyIn(h.Stdin) })
	exit, err := h.Wait()
	if err != nil {
		r.lost(err)
		return
	}
	r.ended(exit)
	_ = h.Bye() // a guest that has ended meanwhile needs none
}

// copyOut copies a stream of the command. A closed pipe is the command's affair.
func (r *Run) copyOut(to io.Writer, from io.ReadCloser) {
	b := make([]byte, 64<<10)
	for {
		n, err := from.Read(b)
		if n > 0 {
			r.touch()
			if _, err := to.Write(b[:n]); err != nil {
				if !errors.Is(err, unix.EPIPE) {
					r.mu.Lock()
					r.outErr = errors.Join(r.outErr, err)
					r.mu.Unlock()
				}
				_ = from.Close()
				return
			}
		}
		if err != nil {
			return // the end of the stream, or of the connection
		}
	}
}

// copyIn copies the command's standard input, and closes it at its end.
func (r *Run) copyIn(to io.WriteCloser) {
	b := make([]byte, 64<<10)
	for from := r.cfg.Stdin; from != nil; {
		n, err := from.Read(b)
		if n > 0 {
			if _, err := to.Write(b[:n]); err != nil {
				return // the command takes no more
			}
			r.touch()
		}
		if err != nil {
			r.mu.Lock()
			if err != io.EOF && r.exit == nil {
				r.inErr = err
			}
			r.mu.Unlock()
			break
		}
	}
	_ = to.Close()
}
