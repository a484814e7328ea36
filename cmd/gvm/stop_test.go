package main

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvm/control"
)

// TestSignalGrace: a signal ends a start at once, and a machine in its grace time; a second signal
// ends the machine at once.
func TestSignalGrace(t *testing.T) {
	ctx, stop := context.WithCancelCause(context.Background())
	first, second := errors.New("first"), errors.New("second")
	start := &ending{stop: stop, grace: time.Hour}
	start.signal(first)
	start.signal(second)
	if context.Cause(ctx) != first {
		t.Errorf("ended by %v", context.Cause(ctx))
	}
	var given []time.Duration
	run := &ending{stop: stop, grace: time.Hour}
	run.begin(func(_ error, grace time.Duration) bool { given = append(given, grace); return true })
	run.signal(first)
	run.signal(second)
	if !slices.Equal(given, []time.Duration{time.Hour, 0}) {
		t.Errorf("grace times %v", given)
	}
}

// endingMachine is a machine that ends when it is asked to stop.
type endingMachine struct {
	evilMachine
	end func() (control.Stopped, error)
}

func (m endingMachine) Stop(control.Stop) (control.Stopped, error) { return m.end() }

// deafListener has connections that are closed instead of an answer to gvm stop.
type deafListener struct{ net.Listener }

func (l deafListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &deafConn{UnixConn: c.(*net.UnixConn)}, nil
}

type deafConn struct {
	*net.UnixConn
	deaf bool
}

func (c *deafConn) Read(p []byte) (int, error) {
	n, err := c.UnixConn.Read(p)
	c.deaf = c.deaf || bytes.Contains(p[:n], []byte("machine/stop"))
	return n, err
}

func (c *deafConn) Write(p []byte) (int, error) {
	if c.deaf {
		return 0, errors.Join(c.Close(), unix.EPIPE)
	}
	return c.UnixConn.Write(p)
}

// TestStopMeetsEnd: gvm stop succeeds if the machine ends before it has answered, and if another
// machine has its name at once.
func TestStopMeetsEnd(t *testing.T) {
	t.Setenv("XDG_RUNTIME_DIR", t.TempDir())
	dir := control.DefaultDirectory()
	ended := make(chan error, 1)
	for vm, end := range map[string]func(*control.Server) (control.Stopped, error){
		"no-answer": func(s *control.Server) (control.Stopped, error) {
			go func() { ended <- s.Close() }()
			return control.Stopped{}, nil
		},
		"refusal": func(s *control.Server) (control.Stopped, error) {
			go func() { ended <- s.Close() }()
			return control.Stopped{}, control.ErrEnded
		},
		"another": func(s *control.Server) (control.Stopped, error) {
			err := s.Release()
			other, claimed := control.Claim(dir, "another")
			if claimed == nil {
				t.Cleanup(func() { _ = other.Close() })
			}
			ended <- errors.Join(err, claimed, os.WriteFile(filepath.Join(dir.Machine("another"), "lock"), []byte("1"), 0))
			return control.Stopped{Outlived: true}, nil
		},
	} {
		t.Run(vm, func(t *testing.T) {
			s, err := control.Claim(dir, vm)
			if err != nil {
				t.Fatal(err)
			}
			if vm == "no-answer" {
				deafen(t, s)
			}
			s.Serve(endingMachine{end: func() (control.Stopped, error) { return end(s) }})
			if err := stopMachine(t.Context(), control.NewClient(dir, vm), 0); err != nil {
				t.Error(err)
			}
			if err := errors.Join(<-ended, s.Close()); err != nil && !errors.Is(err, net.ErrClosed) {
				t.Error(err)
			}
		})
	}
}

// deafen gives a server a deafListener.
func deafen(t *testing.T, s *control.Server) {
	t.Helper()
	connections := &deafListener{}
	socket, _, err := s.HandOver(connections, func() error { return errors.New("the server has the name") })
	if err == nil {
		connections.Listener, err = net.FileListener(socket)
		err = errors.Join(err, socket.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}
