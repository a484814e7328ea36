package control

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"gvm/text"
)

// TestManyClients: clients that send half a request, or do not read an answer, use a bounded number
// of descriptors and do not lock out others.
func TestManyClients(t *testing.T) {
	f := newFake()
	f.disks["big"] = Disk{Path: text.Name(strings.Repeat("x", 300<<10))} // an answer larger than a socket's buffer
	d, client := serve(t, f)
	dir, err := os.Open(d.path)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	descriptors := func() int {
		list, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	before, conns := descriptors(), []net.Conn{}
	defer func() {
		for _, c := range conns {
			c.Close()
		}
	}()
	const each = maxClients + 8
	for _, text := range []string{
		"", "G", "GET /v1/machine HTTP/1.1\r\nHost: gvm\r\n",
		"POST /v1/disks HTTP/1.1\r\nHost: gvm\r\nContent-Length: 10\r\n\r\n{",
		"GET /v1/disks HTTP/1.1\r\nHost: gvm\r\n\r\n",
	} {
		for range each {
			c, err := net.Dial("unix", socketPath(dir, "vm/sock"))
			if err != nil {
				t.Fatal(err)
			}
			conns = append(conns, c)
			_, _ = io.WriteString(c, text) // it may be closed already
		}
		info, err := client.Info(t.Context())
		for n := 0; errors.Is(err, ErrNoAnswer) && n < 30; n++ { // a busy host
			info, err = client.Info(t.Context())
		}
		if err != nil || info.Name != "vm" {
			t.Errorf("after clients that send %q: %+v, %v", text, info, err)
		}
		// The answer to Info came after all of these were accepted.
		if n := descriptors() - before - len(conns); n > maxClients+1 {
			t.Errorf("after clients that send %q: %d descriptors of the server", text, n)
		}
	}
	if _, err := conns[0].Read(make([]byte, 1)); !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the oldest client: %v", err)
	}
}

// slowPause is a machine whose Pause lasts until its client has gone, or proceed is closed.
type slowPause struct {
	*fake
	began, proceed chan struct{}
	gaveUp         chan error
}

func (s slowPause) Pause(ctx context.Context) error {
	s.began <- struct{}{}
	for range 10_000 { // time for the server to look at the client
		runtime.Gosched()
	}
	select {
	case <-ctx.Done():
		s.gaveUp <- context.Cause(ctx)
		return context.Cause(ctx)
	case <-s.proceed:
		return s.fake.Pause(ctx)
	}
}

// TestHalfClosedClient: a client that has closed its output waits for the answer, until it closes
// the connection.
func TestHalfClosedClient(t *testing.T) {
	d := testDir(t)
	s, err := Claim(d, "vm")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	m := slowPause{newFake(), make(chan struct{}), make(chan struct{}), make(chan error, 1)}
	s.Serve(m)
	ask := func() *net.UnixConn {
		t.Helper()
		dir, err := os.Open(d.path)
		if err != nil {
			t.Fatal(err)
		}
		defer dir.Close()
		c, err := net.Dial("unix", socketPath(dir, "vm/sock"))
		if err != nil {
			t.Fatal(err)
		}
		u := c.(*net.UnixConn)
		if _, err := io.WriteString(u, "POST /v1/machine/pause HTTP/1.1\r\nHost: gvm\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		if err := u.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		return u
	}
	gone := ask()
	<-m.began
	gone.Close()
	<-m.gaveUp
	waits := ask()
	defer waits.Close()
	<-m.began
	close(m.proceed)
	if b, err := io.ReadAll(waits); err != nil || !strings.HasPrefix(string(b), "HTTP/1.1 204 ") {
		t.Errorf("%q, %v", b, err)
	}
}
