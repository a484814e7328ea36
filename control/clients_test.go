package control

import (
	"errors"
	"io"
	"net"
	"os"
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
