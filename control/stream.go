package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"gvm/panics"
	"gvm/text"
)

// consoleProtocol is the protocol of a connection to the console: bytes in both directions.
const consoleProtocol = "gvm-console"

// agentProtocol is the protocol of a connection to the agent: that of package wire.
const agentProtocol = "gvm-agent"

// stream is an answer that takes the connection over.
type stream struct {
	protocol string
	io.ReadWriteCloser
}

// upgrade returns an endpoint that makes the connection a stream of a protocol.
func upgrade(protocol string, open func(*http.Request) (io.ReadWriteCloser, error)) endpoint {
	return func(r *http.Request) (any, error) {
		if !strings.EqualFold(r.Header.Get("Upgrade"), protocol) {
			return nil, Errorf(http.StatusUpgradeRequired, "want Connection: Upgrade and Upgrade: %s", protocol)
		}
		s, err := open(r)
		return stream{protocol, s}, err
	}
}

// streams are the connections that streams have taken.
type streams struct {
	mu    sync.Mutex
	conns map[net.Conn]bool // nil: closed
	done  sync.WaitGroup
}

// add adds a connection, unless the streams are closed.
func (s *streams) add(c net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conns == nil {
		return false
	}
	s.conns[c] = true
	s.done.Add(1)
	return true
}

func (s *streams) remove(c net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
	s.done.Done()
}

// close waits up to limit for the clients to read the ends of their streams, and closes the
// connections.
func (s *streams) close(limit time.Duration) {
	s.mu.Lock()
	conns := s.conns
	s.conns = nil
	s.mu.Unlock()
	late := time.AfterFunc(limit, panics.Func(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		for c := range conns {
			c.Close()
		}
	}))
	s.done.Wait()
	late.Stop()
}

// serve moves bytes between a connection, whose input is in, and a stream until either ends.
func (s *streams) serve(conn net.Conn, in io.Reader, of stream) {
	defer of.Close()
	if !s.add(conn) {
		return
	}
	defer s.remove(conn)
	_ = conn.SetDeadline(time.Time{}) // those of a request
	if _, err := io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+
		of.protocol+"\r\n\r\n"); err != nil {
		return
	}
	var input sync.WaitGroup
	input.Go(panics.Func(func() {
		_, _ = io.Copy(of, in)
		of.Close() // which ends the output
	}))
	_, _ = io.Copy(conn, of)
	conn.Close() // which ends the input
	of.Close()
	input.Wait()
}

// Console connects to the machine's console. The caller closes the connection. It reads as ended
// when the machine has.
func (c *Client) Console(ctx context.Context) (io.ReadWriteCloser, error) {
	return c.upgrade(ctx, "console", consoleProtocol, askTimeout)
}

// HVC connects to the machine's virtio console, as Console does to COM1.
func (c *Client) HVC(ctx context.Context) (io.ReadWriteCloser, error) {
	return c.upgrade(ctx, "hvc", consoleProtocol, askTimeout)
}

// Agent connects to the agent in the machine's guest, for a session by wire.Accept. The caller
// closes the connection. It reads as ended when the machine has.
func (c *Client) Agent(ctx context.Context) (io.ReadWriteCloser, error) {
	return c.upgrade(ctx, "agent", agentProtocol, changeTimeout)
}

// upgrade makes a connection a stream of a protocol. The machine answers within limit.
func (c *Client) upgrade(ctx context.Context, path, protocol string, limit time.Duration) (io.ReadWriteCloser, error) {
	var s streamConn
	err := c.patiently(ctx, limit, func(ctx context.Context) error {
		resp, err := c.send(ctx, http.MethodGet, path, http.Header{"Connection": {"Upgrade"}, "Upgrade": {protocol}}, nil)
		if err != nil {
			return c.noAnswer(ctx, err)
		}
		if resp.StatusCode == http.StatusSwitchingProtocols {
			if !resp.release() {
				resp.conn.Close()
				return c.noAnswer(ctx, nil)
			}
			s = streamConn{resp.conn, resp.in}
			return nil
		}
		defer resp.conn.Close()
		defer resp.release()
		b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
		if err != nil {
			return c.noAnswer(ctx, err)
		}
		if resp.StatusCode < http.StatusMultipleChoices {
			return fmt.Errorf("machine %s sends an answer that this gvm does not understand: %s", c.name, resp.Status)
		}
		return refusal(resp.Response, b)
	})
	if err == nil {
		return s, nil
	}
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	return nil, err
}

// streamConn is the client's end of a stream, whose input is in.
type streamConn struct {
	net.Conn
	in io.Reader
}

// Read returns io.EOF at the machine's end, also if it has not read all that was written: Linux
// resets the connection then.
func (s streamConn) Read(p []byte) (int, error) {
	n, err := s.in.Read(p)
	if errors.Is(err, unix.ECONNRESET) {
		err = io.EOF
	}
	return n, err
}

// refusal returns the error in an answer.
func refusal(resp *http.Response, body []byte) error {
	var e struct {
		Error text.Name `json:"error"`
	}
	if json.Unmarshal(body, &e) != nil || e.Error == "" {
		e.Error = text.Name(resp.Status)
	}
	return &Error{resp.StatusCode, string(e.Error)}
}
