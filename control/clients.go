package control

import (
	"errors"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"gvm/kvmapi/nowait"
	"gvm/panics"
)

// maxClients bounds the connections of a server, and so its descriptors and goroutines.
const maxClients = 64

// clients are a server's connections. One more than maxClients closes the oldest that is not at the
// machine: a client that has not sent its request, or does not read its answer, does not lock out
// others.
type clients struct {
	net.Listener

	mu   sync.Mutex
	open []*client      // in the order of arrival
	done sync.WaitGroup // requests, of those that serve accepts
}

// client is a connection.
type client struct {
	socket
	all   *clients
	stage stage // guarded by all.mu
}

// socket is a connection of the Listener.
type socket interface {
	net.Conn
	syscall.Conn
}

// hasGone reports whether the other end, which sends no more, has closed the connection. It waits
// for that until the deadline for reading: a client may close its output alone, as socat(1) does.
func (c *client) hasGone() bool {
	raw, err := c.SyscallConn()
	if err == nil {
		err = raw.Read(func(fd uintptr) bool {
			events, err := nowait.Events(int(fd), 0)
			return err != nil || events != 0 // POLLHUP
		})
	}
	return !errors.Is(err, os.ErrDeadlineExceeded)
}

// stage is the progress of a client's request.
type stage int

const (
	sending stage = iota // the client has not sent all of it
	atMachine
	answering
	streaming // the request has ended, and the connection may belong to a stream
)

// Accept returns the next connection. It closes one that comes while maxClients are at the machine.
func (cs *clients) Accept() (net.Conn, error) {
	for {
		conn, err := cs.Listener.Accept()
		if err != nil {
			return nil, err
		}
		c := &client{socket: conn.(socket), all: cs}
		cs.mu.Lock()
		cs.open = append(cs.open, c)
		var victim *client
		if len(cs.open) > maxClients {
			victim = cs.open[slices.IndexFunc(cs.open, func(c *client) bool { return c.stage != atMachine })]
		}
		cs.mu.Unlock()
		if victim != nil {
			victim.Close()
		}
		if victim != c {
			return c, nil
		}
	}
}

// serve calls do with each connection, in a goroutine of its own, until the Listener is closed.
func (cs *clients) serve(do func(*client)) {
	for {
		conn, err := cs.Accept()
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil: // such as a lack of descriptors
			time.Sleep(10 * time.Millisecond)
			continue
		}
		cs.done.Add(1)
		panics.Go(func() {
			c := conn.(*client)
			defer func() {
				c.Close()
				c.enter(streaming)
			}()
			do(c)
		})
	}
}

// wait waits up to limit for the requests, and reports whether all have ended. serve has returned.
func (cs *clients) wait(limit time.Duration) bool {
	done := make(chan struct{})
	panics.Go(func() {
		cs.done.Wait()
		close(done)
	})
	select {
	case <-done:
		return true
	case <-time.After(limit):
		return false
	}
}

// Close closes the connection.
func (c *client) Close() error {
	c.all.mu.Lock()
	c.all.open = slices.DeleteFunc(c.all.open, func(o *client) bool { return o == c })
	c.all.mu.Unlock()
	return c.socket.Close()
}

// enter records that the client's request has reached a stage.
func (c *client) enter(s stage) {
	c.all.mu.Lock()
	defer c.all.mu.Unlock()
	if s == streaming && c.stage != s {
		c.all.done.Done()
	}
	c.stage = s
}

// closeUntil closes the connections of clients in the stages up to last.
func (cs *clients) closeUntil(last stage) {
	cs.mu.Lock()
	open := slices.DeleteFunc(slices.Clone(cs.open), func(c *client) bool { return c.stage > last })
	cs.mu.Unlock()
	for _, c := range open {
		c.Close()
	}
}
