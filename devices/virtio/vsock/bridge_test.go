package vsock

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvm/unixsocket"
)

// bridged is a guest's sockets behind a bridge.
type bridged struct {
	*stack
	b    *Bridge
	path string
}

// newBridged returns sockets with a bridge that change has changed.
func newBridged(t testing.TB, change func(*Bridge)) *bridged {
	t.Helper()
	path := filepath.Join(t.TempDir(), "vm.vsock")
	b, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	change(b)
	s := newStack(newRig(t, 200))
	s.dev.cfg.Accept = b.Accept
	b.Serve(s.dev.Dial)
	return &bridged{s, b, path}
}

// stop ends the machine, and then the bridge, after which nothing is left.
func (r *bridged) stop() {
	r.t.Helper()
	r.end()
	if err := r.dev.Reset(); err != nil {
		r.t.Error(err)
	}
	if err := r.b.Close(); err != nil {
		r.t.Error(err)
	}
	if _, err := os.Lstat(r.path); err == nil {
		r.t.Error("the socket is left")
	}
	if n := len(r.b.slots); n > 0 || len(r.b.joints) > 0 {
		r.t.Errorf("%d slots, %d connections are left", n, len(r.b.joints))
	}
	r.idle()
}

// idle waits until the device has no connection.
func (r *bridged) idle() {
	for held := 1; held > 0; runtime.Gosched() {
		r.dev.mu.Lock()
		held = r.dev.held
		r.dev.mu.Unlock()
	}
}

// client connects and sends a line.
func (r *bridged) client(line string) (*net.UnixConn, string) {
	r.t.Helper()
	c, err := net.Dial("unix", r.path)
	if err != nil {
		r.t.Error(err)
		return nil, ""
	}
	u := c.(*net.UnixConn)
	if _, err := io.WriteString(u, line); err != nil {
		r.t.Error(err)
	}
	answer, err := readLine(u)
	if err != nil {
		r.t.Error(err)
	}
	return u, answer
}

// readLine reads a line and no more.
func readLine(r io.Reader) (string, error) {
	var line []byte
	for b := make([]byte, 1); ; line = append(line, b[0]) {
		if _, err := io.ReadFull(r, b); err != nil || b[0] == '\n' {
			return string(line), err
		}
	}
}

// listen has the guest listen.
func (r *bridged) listen(port uint32, backlog int) chan *socket {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.listeners[port] = make(chan *socket, backlog)
	return r.listeners[port]
}

// listenHost has the host listen for the guest's connections.
func (r *bridged) listenHost(port uint32) *net.UnixListener {
	r.t.Helper()
	l, err := net.Listen("unix", fmt.Sprintf("%s_%d", r.path, port))
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { l.Close() })
	return l.(*net.UnixListener)
}

// TestBridge moves bytes over both kinds of connections, with both kinds of half-close.
func TestBridge(t *testing.T) {
	r := newBridged(t, func(*Bridge) {})
	defer r.stop()
	accepted := r.listen(52, 1)
	for _, hostFirst := range []bool{true, false} {
		u, answer := r.client("CONNECT 52\nearly")
		g := <-accepted
		if want := fmt.Sprintf("OK %d", g.hostPort); answer != want {
			t.Errorf("answer %q, want %q", answer, want)
		}
		exchange(t, u, g, "early", hostFirst)
	}
	l := r.listenHost(1024)
	for port, hostFirst := range []bool{true, false} {
		g := r.connect(key{uint32(port), 1024}, 1000)
		if g.reset {
			t.Fatal("refused")
		}
		u, err := l.AcceptUnix()
		if err != nil {
			t.Fatal(err)
		}
		exchange(t, u, g, "", hostFirst)
	}
	r.idle()
}

// exchange sends bytes each way. The one side ends its way first, and still gets the other's bytes.
func exchange(t *testing.T, u *net.UnixConn, g *socket, early string, hostFirst bool) {
	t.Helper()
	defer u.Close()
	h, k := content(1, 300_000), content(2, 200_000)
	send := func(w io.Writer, b []byte) {
		if _, err := w.Write(b); err != nil {
			t.Error(err)
		}
	}
	receive := func(r io.Reader, want []byte) {
		if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d bytes, want %d, %v", len(got), len(want), err)
		}
	}
	h = append([]byte(early), h...)
	toGuest := func() {
		var sender sync.WaitGroup
		sender.Go(func() {
			send(u, h[len(early):])
			u.CloseWrite()
		})
		receive(g, h)
		sender.Wait()
	}
	toHost := func() {
		var sender sync.WaitGroup
		sender.Go(func() {
			send(g, k)
			g.shutdown(shutSend)
		})
		receive(u, k)
		sender.Wait()
	}
	if hostFirst {
		toGuest()
		toHost()
	} else {
		toHost()
		toGuest()
	}
	g.shutdown(shutBoth)
}

// TestBridgeRefuses: neither side connects to nothing, and a client is told why.
func TestBridgeRefuses(t *testing.T) {
	r := newBridged(t, func(*Bridge) {})
	defer r.stop()
	for line, want := range map[string]string{
		"CONNECT 53\n":                     "ERR dial vsock port 53 of the guest: connection refused",
		"CONNECT\n":                        "ERR " + errRequest.Error(),
		"CONNECT 53 54\n":                  "ERR " + errRequest.Error(),
		"CONNECT 4294967296\n":             "ERR " + errRequest.Error(),
		"CONNECT 4294967295\n":             "ERR " + errRequest.Error(),
		"CONNECT -1\n":                     "ERR " + errRequest.Error(),
		"GET / HTTP/1.1\r\n":               "ERR " + errRequest.Error(),
		strings.Repeat("x", 2*maxRequest):  "ERR " + errRequest.Error(),
		strings.Repeat(" ", maxRequest-20): "",
	} {
		u, err := net.Dial("unix", r.path)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(u, line)
		if want == "" { // a line without an end
			u.Close()
			continue
		}
		if answer, err := bufio.NewReader(u).ReadString('\n'); answer != want+"\n" {
			t.Errorf("%q: %q, %v; want %q", line, answer, err, want)
		}
		u.Close()
	}
	if g := r.connect(key{7, 1025}, 1000); !g.reset {
		t.Error("nothing listens, and the guest is connected")
	}
	// A file that is no socket.
	if err := os.WriteFile(r.path+"_1026", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if g := r.connect(key{7, 1026}, 1000); !g.reset {
		t.Error("a file listens, and the guest is connected")
	}
	r.idle()
}

// FuzzConnect: a client's bytes are one request and the stream behind it, in any pieces, and no
// more bytes are read than the longest request has.
func FuzzConnect(f *testing.F) {
	for _, b := range []string{"CONNECT 52\n", "connect 4294967294\r\nfirst bytes", "CONNECT 4294967295\n",
		"CONNECT 1 2\n", "\n", "CONNECT", "", strings.Repeat("0", maxRequest)} {
		f.Add([]byte(b), byte(3))
	}
	f.Fuzz(func(t *testing.T, b []byte, piece byte) {
		pieces := &piecewise{b, max(int(piece), 1)}
		port, rest, err := readRequest(pieces)
		if n := len(b) - len(pieces.b); n > maxRequest {
			t.Errorf("%d bytes are read of %q", n, b)
		}
		if whole, _, wholeErr := readRequest(bytes.NewReader(b)); whole != port || wholeErr != err {
			t.Errorf("%q is port %d, %v; in pieces of %d %d, %v", b, whole, wholeErr, piece, port, err)
		}
		if err != nil {
			if err != errRequest && (err != io.EOF || len(b) > 0) || port != 0 || rest != nil {
				t.Errorf("%q is port %d, %q, %v", b, port, rest, err)
			}
			return
		}
		line, after, _ := bytes.Cut(b, []byte("\n"))
		if !bytes.Equal(slices.Concat(rest, pieces.b), after) {
			t.Errorf("%q is followed by %q and %q", b, rest, pieces.b)
		}
		again, err := parseRequest(fmt.Sprintf("CONNECT %d", port))
		if err != nil || again != port || port == math.MaxUint32 ||
			!strings.EqualFold(strings.Fields(string(line))[0], "CONNECT") {
			t.Errorf("%q is port %d, which is %d, %v", line, port, again, err)
		}
	})
}

// piecewise is a reader of b by n bytes at a time.
type piecewise struct {
	b []byte
	n int
}

func (r *piecewise) Read(p []byte) (int, error) {
	if len(r.b) == 0 {
		return 0, io.EOF
	}
	n := copy(p, r.b[:min(len(r.b), r.n)])
	r.b = r.b[n:]
	return n, nil
}

// TestBridgeGone: a side that is gone as a whole takes the connection with it, also one that its
// peer neither reads nor writes.
func TestBridgeGone(t *testing.T) {
	r := newBridged(t, func(*Bridge) {})
	defer r.stop()
	accepted := r.listen(52, 1)
	wait := func(g *socket, what func() bool) {
		r.mu.Lock()
		defer r.mu.Unlock()
		for !what() {
			g.changed.Wait()
		}
	}
	for name, gone := range map[string]func(u *net.UnixConn, g *socket){
		"client": func(u *net.UnixConn, g *socket) {
			u.Close()
			wait(g, func() bool { return g.peerShut == shutBoth || g.reset })
		},
		"client after its half-close": func(u *net.UnixConn, g *socket) {
			u.CloseWrite()
			wait(g, func() bool { return g.peerShut&shutSend != 0 })
			u.Close()
			wait(g, func() bool { return g.peerShut == shutBoth || g.reset })
		},
		"client that does not read": func(u *net.UnixConn, g *socket) {
			sent := make(chan error)
			go func() {
				_, err := g.Write(make([]byte, 4<<20))
				sent <- err
			}()
			io.ReadFull(u, make([]byte, 1))
			u.Close()
			if err := <-sent; err == nil {
				t.Error("4 MiB are written to a client that is gone")
			}
			wait(g, func() bool { return g.peerShut == shutBoth || g.reset })
		},
		"guest": func(u *net.UnixConn, g *socket) {
			g.shutdown(shutBoth)
			if n, err := io.Copy(io.Discard, u); n != 0 || err != nil {
				t.Error(n, err)
			}
		},
		"guest, by a reset": func(u *net.UnixConn, g *socket) {
			g.kill()
			if n, err := io.Copy(io.Discard, u); n != 0 || err != nil {
				t.Error(n, err)
			}
		},
		"guest that does not read": func(u *net.UnixConn, g *socket) {
			sent := make(chan error)
			go func() {
				_, err := u.Write(make([]byte, 4<<20))
				sent <- err
			}()
			io.ReadFull(g, make([]byte, 1))
			g.kill()
			if err := <-sent; !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ECONNRESET) {
				t.Error(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			u, _ := r.client("CONNECT 52\n")
			defer u.Close()
			gone(u, <-accepted)
			r.idle()
		})
	}
}

// TestBridgeEnd: the machine's end takes every connection in any state. What the guest has sent
// before its end arrives.
func TestBridgeEnd(t *testing.T) {
	r := newBridged(t, func(*Bridge) {})
	accepted := r.listen(52, 1)
	last, _ := r.client("CONNECT 52\n")
	g := <-accepted
	if _, err := io.WriteString(g, "last words"); err != nil {
		t.Fatal(err)
	}
	idle, _ := r.client("CONNECT 52\n")
	<-accepted
	full, _ := r.client("CONNECT 52\n")
	g = <-accepted
	go io.Copy(g, zeros{}) // until the reset
	go io.Copy(full, zeros{})
	silent, err := net.Dial("unix", r.path)
	if err != nil {
		t.Fatal(err)
	}
	half, err := net.Dial("unix", r.path)
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(half, "CONN")
	if _, err := io.ReadFull(full, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	r.mu.Lock()
	for _, so := range r.sockets { // their writers end
		so.reset = true
		so.changed.Broadcast()
	}
	r.mu.Unlock()
	r.stop()
	if b, err := io.ReadAll(last); err != nil || string(b) != "last words" {
		t.Errorf("%q, %v", b, err)
	}
	for _, c := range []net.Conn{idle, silent, half} {
		if b, err := io.ReadAll(c); len(b) > 0 || err != nil && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%q, %v", b, err)
		}
	}
	for _, c := range []net.Conn{last, idle, full, silent, half} {
		c.Close()
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

// TestBridgeParallel: a thousand connections at a time, half of them the guest's, with some of them
// killed, move data whose checksums are equal.
func TestBridgeParallel(t *testing.T) {
	const streams, size = 1000, 100_000
	r := newBridged(t, func(*Bridge) {})
	defer r.stop()
	accepted := r.listen(52, streams)
	l := r.listenHost(1024)
	var all sync.WaitGroup
	ready := make(chan struct{})
	var connected sync.WaitGroup
	connected.Add(streams)
	echo := func(c io.ReadWriter, finish func()) {
		io.Copy(c, c)
		finish()
	}
	check := func(i int, c io.ReadWriter, finish, kill func()) {
		connected.Done()
		<-ready
		if i%10 == 9 {
			io.CopyN(c, zeros{}, size)
			kill()
			return
		}
		data := content(uint64(i), size)
		all.Go(func() {
			if _, err := c.Write(data); err != nil {
				t.Errorf("stream %d: %v", i, err)
			}
			finish()
		})
		got, err := io.ReadAll(c)
		if sha256.Sum256(got) != sha256.Sum256(data) || err != nil {
			t.Errorf("stream %d: %d bytes came back, of %d: %v", i, len(got), size, err)
		}
		kill()
	}
	for i := range streams / 2 {
		all.Go(func() {
			u, answer := r.client("CONNECT 52\n")
			if !strings.HasPrefix(answer, "OK ") {
				t.Errorf("stream %d: %s", i, answer)
			}
			check(i, u, func() { u.CloseWrite() }, func() { u.Close() })
		})
		all.Go(func() {
			g := <-accepted
			echo(g, func() { g.shutdown(shutBoth) })
		})
		all.Go(func() {
			g := r.connect(key{uint32(10_000 + i), 1024}, 50_000)
			if g.reset {
				t.Errorf("connection %d of the guest is refused", i)
			}
			check(streams/2+i, g, func() { g.shutdown(shutSend) }, func() { g.shutdown(shutBoth) })
		})
		all.Go(func() {
			u, err := l.AcceptUnix()
			if err != nil {
				t.Error(err)
				return
			}
			echo(u, func() { u.Close() })
		})
	}
	connected.Wait()
	close(ready)
	all.Wait()
	r.idle()
}

// TestBridgeCrowd: clients beyond the bridge's slots wait, and the device refuses those beyond its
// own. None of them keeps the bridge from its end.
func TestBridgeCrowd(t *testing.T) {
	r := newBridged(t, func(b *Bridge) { b.slots = make(chan struct{}, 3) })
	defer r.stop()
	accepted := r.listen(52, 10)
	var crowd []net.Conn
	for range 3 {
		u, _ := r.client("CONNECT 52\n")
		crowd = append(crowd, u)
		<-accepted
	}
	if g := r.connect(key{7, 1024}, 1000); !g.reset {
		t.Error("the guest gets more than its part")
	}
	u, err := net.Dial("unix", r.path)
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	io.WriteString(u, "CONNECT 52\n")
	crowd[0].Close()
	if answer, err := readLine(u); err != nil || !strings.HasPrefix(answer, "OK ") {
		t.Error(answer, err)
	}
	for range 100 {
		c, err := net.Dial("unix", r.path)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	for _, c := range crowd[1:] {
		defer c.Close()
	}
}

// TestBridgePatience: neither a client that asks for nothing, nor a guest or a program that does
// not answer, has a place for long.
func TestBridgePatience(t *testing.T) {
	for request, want := range map[string]string{
		"":             "",
		"CONNECT 52\n": "ERR dial vsock port 52 of the guest: the guest does not answer\n",
	} {
		r := newBridged(t, func(b *Bridge) {
			if b.connectTimeout = time.Millisecond; request == "" {
				b.requestTimeout = time.Millisecond
			}
		})
		r.end() // the guest does not answer
		u, err := net.Dial("unix", r.path)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(u, request)
		if b, err := io.ReadAll(u); err != nil || string(b) != want {
			t.Errorf("%q: %q, %v; want %q", request, b, err, want)
		}
		u.Close()
		r.stop()
	}
}

// TestBridgeEndInDial: a client that waits for the guest at the end of the bridge reads the end of
// the connection, and no error of the bridge's own context.
func TestBridgeEndInDial(t *testing.T) {
	for range 50 { // the end closes the connection at the same time
		b, err := Listen(filepath.Join(t.TempDir(), "vsock"))
		if err != nil {
			t.Fatal(err)
		}
		dialed := make(chan struct{})
		b.Serve(func(ctx context.Context, _ uint32) (*Conn, error) {
			close(dialed)
			<-ctx.Done()
			return nil, context.Cause(ctx)
		})
		c, err := net.Dial("unix", b.Path())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(c, "CONNECT 52\n"); err != nil {
			t.Fatal(err)
		}
		<-dialed
		if err := b.Close(); err != nil {
			t.Error(err)
		}
		if said, err := io.ReadAll(c); err != nil || len(said) > 0 {
			t.Fatalf("%q, %v", said, err)
		}
		c.Close()
	}
}

// TestBridgeTrusts: a program of another user, which may listen where any user can make a file,
// gets no connection of the guest.
func TestBridgeTrusts(t *testing.T) {
	if os.Geteuid() != 0 {
		return // no program of another user can be made
	}
	r := newBridged(t, func(*Bridge) {})
	defer r.stop()
	const other = 65534
	for uid, refused := range map[int]bool{0: false, other: true} {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		port := uint32(1024 + uid)
		path := fmt.Sprintf("%s_%d", r.path, port)
		if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
			t.Fatal(err)
		}
		// listen(2) notes the effective user of its thread.
		listened := make(chan error)
		go func() {
			runtime.LockOSThread() // the thread ends with the goroutine
			_, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), uintptr(uid), ^uintptr(0))
			if errno != 0 {
				listened <- errno
				return
			}
			listened <- unix.Listen(fd, 1)
		}()
		if err := <-listened; err != nil {
			t.Fatal(err)
		}
		if g := r.connect(key{7, port}, 1000); g.reset != refused {
			t.Errorf("user %d: refused is %v", uid, g.reset)
		}
	}
}

// TestListen: a socket is its user's, replaces a stale one, and no other file.
func TestListen(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("long/", 40))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "vm.vsock")
	first, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Lstat(path); err != nil || fi.Mode() != os.ModeSocket|0o600 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	want := path + ": it exists and a program listens there; name another file"
	if _, err := Listen(path); !errors.Is(err, unixsocket.ErrExists) || err.Error() != want {
		t.Errorf("twice: %v, want %s", err, want)
	}
	first.remove = func() error { return nil } // as if the process were killed
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	second, err := Listen(path)
	if err != nil {
		t.Fatalf("a stale socket: %v", err)
	}
	// Close removes its own socket alone.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	other := []byte("another file")
	if err := os.WriteFile(path, other, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := second.Close(); err != nil {
		t.Error(err)
	}
	if b, err := os.ReadFile(path); err != nil || !bytes.Equal(b, other) {
		t.Errorf("%q, %v", b, err)
	}
	if err := os.Symlink("nothing", path+".link"); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		path:           "it exists and is no socket; remove it, or name another file",
		path + ".link": "it exists and is no socket; remove it, or name another file",
		dir + "none/x": "no such file or directory",
		filepath.Join(dir, strings.Repeat("x", 77)): "the name has 77 bytes, and that of a socket for vsock 76 at most",
	} {
		if b, err := Listen(path); err == nil || err.Error() != path+": "+want {
			t.Errorf("%v, %v; want %s", b, err, want)
		}
	}
}
