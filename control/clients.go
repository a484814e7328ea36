package control

import (
	"context"
	"net"
	"slices"
	"sync"
)

// maxClients bounds the connections of a server, and so its descriptors and goroutines.
const maxClients = 64

// clients are a server's connections. One more than maxClients closes the oldest that is not at the
// machine: a client that has not sent its request, or does not read its answer, does not lock out
// others.
type clients struct {
	net.Listener

	mu   sync.Mutex
	open []*client // in the order of arrival
}

// client is a connection.
type client struct {
	net.Conn
	all   *clients
	stage stage // guarded by all.mu
}

// stage is the progress of a client's request.
type stage int

const (
	sending stage = iota // the client has not sent all of it
	atMachine
	answering
)

// Accept returns the next connection. It closes one that comes while maxClients are at the machine.
func (cs *clients) Accept() (net.Conn, error) {
	for {
		conn, err := cs.Listener.Accept()
		if err != nil {
			return nil, err
		}
		c := &client{Conn: conn, all: cs}
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

// Close closes the connection.
func (c *client) Close() error {
	c.all.mu.Lock()
	c.all.open = slices.DeleteFunc(c.all.open, func(o *client) bool { return o == c })
	c.all.mu.Unlock()
	return c.Conn.Close()
}

type clientKey struct{}

// withClient is http.Server.ConnContext.
func withClient(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, clientKey{}, c)
}

// enter records that the client's request has reached a stage.
func (c *client) enter(s stage) {
	c.all.mu.Lock()
	c.stage = s
	c.all.mu.Unlock()
}

// closeSilent closes the connections of clients that have not sent their requests.
func (cs *clients) closeSilent() {
	cs.mu.Lock()
	silent := slices.DeleteFunc(slices.Clone(cs.open), func(c *client) bool { return c.stage != sending })
	cs.mu.Unlock()
	for _, c := range silent {
		c.Close()
	}
}
