package control

import (
	"context"
	"net"
	"slices"
	"sync"
)

// maxClients bounds the connections of a server, and so its descriptors and goroutines.
const maxClients = 64

// clients are a server's connections. One more than maxClients closes the oldest of those that are not at
// the machine: a client that has not sent its request, or does not take its answer, keeps no other out.
type clients struct {
	*net.UnixListener

	mu   sync.Mutex
	open []*client // in the order in which they came
}

// client is a connection.
type client struct {
	net.Conn
	all       *clients
	atMachine bool // guarded by all.mu
}

// Accept returns the next connection. One that comes while maxClients are at the machine is closed.
func (cs *clients) Accept() (net.Conn, error) {
	for {
		conn, err := cs.UnixListener.Accept()
		if err != nil {
			return nil, err
		}
		c := &client{Conn: conn, all: cs}
		cs.mu.Lock()
		cs.open = append(cs.open, c)
		var victim *client
		if len(cs.open) > maxClients {
			victim = cs.open[slices.IndexFunc(cs.open, func(c *client) bool { return !c.atMachine })]
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

// enter says that the request of ctx is at the machine, until the function that it returns is called.
func enter(ctx context.Context) (leave func()) {
	c := ctx.Value(clientKey{}).(*client)
	set := func(at bool) {
		c.all.mu.Lock()
		c.atMachine = at
		c.all.mu.Unlock()
	}
	set(true)
	return func() { set(false) }
}
