package vsock

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"gvm/kvmapi/nowait"
	"gvm/panics"
	"gvm/unixsocket"
)

// Limits of a Bridge.
const (
	// maxName is the longest name of its socket: a socket's address has 107 bytes (unix(7)), of which
	// /proc/self/fd/NNNNN/ and _PORT take up to 31.
	maxName = 76
	// maxRequest is longer than "CONNECT 4294967295\r\n".
	maxRequest     = 32
	requestTimeout = 10 * time.Second
	// connectTimeout is how long a guest or a client waits for the other's answer. Linux gives a
	// connection of the guest 2 s.
	connectTimeout = 5 * time.Second
	retryInterval  = 10 * time.Millisecond
	// lastWords is how long Close lets clients take data that the guest has sent, and endTimeout
	// how long it waits for the end of connections after that.
	lastWords  = 200 * time.Millisecond
	endTimeout = 300 * time.Millisecond
	// A connection's buffers have minBuffer bytes until it fills one.
	minBuffer = 4 << 10
	maxBuffer = 64 << 10
)

// Bridge connects a guest's sockets with unix sockets of the host, in the convention of
// Firecracker. A client of the socket at PATH sends "CONNECT PORT\n", gets "OK HOSTPORT\n", and is
// connected with that port of the guest; instead of OK it may get "ERR reason\n" and the end. A
// connection of the guest to port P of the host goes to the program of this user's, or root's, that
// listens at PATH_P. An end of the stream in one direction ends it in the other half of the bridge.
//
// Each connection has two goroutines, which end with it. Their number is bounded, so that neither
// side takes all descriptors of the process.
type Bridge struct {
	path     string
	name     string   // the last part of path
	dir      *os.File // the rest
	listener *net.UnixListener
	made     fs.FileInfo // the socket
	remove   func() error

	requestTimeout, connectTimeout time.Duration

	life   context.Context // until Close
	cancel context.CancelFunc
	slots  chan struct{} // one for each connection
	owners sync.WaitGroup

	mu     sync.Mutex
	closed bool
	joints map[*joint]bool
}

// Listen makes the socket at path, which this user alone can connect to. It replaces one of this
// user's that no program listens at any more. Clients wait until Serve.
func Listen(path string) (_ *Bridge, err error) {
	b := &Bridge{path: path, name: filepath.Base(path), joints: map[*joint]bool{},
		requestTimeout: requestTimeout, connectTimeout: connectTimeout}
	defer func() {
		if err != nil {
			_ = b.dir.Close() // nil if it is not open
			err = fmt.Errorf("%s: %w", path, err)
		}
	}()
	if len(b.name) > maxName {
		return nil, fmt.Errorf("the name has %d bytes, and that of a socket for vsock %d at most", len(b.name), maxName)
	}
	if b.dir, err = openDir(filepath.Dir(path)); err != nil {
		return nil, err
	}
	if b.listener, b.made, err = unixsocket.Listen(b.dir, b.address("")); err != nil {
		return nil, err
	}
	b.remove = sync.OnceValue(func() error {
		if now, err := os.Lstat(b.address("")); err != nil || !os.SameFile(b.made, now) {
			return nil
		}
		return os.Remove(b.address(""))
	})
	b.slots = make(chan struct{}, maxBridged())
	b.life, b.cancel = context.WithCancel(context.Background())
	return b, nil
}

// maxBridged returns how many connections a Bridge has at a time: twice those of a device, as some
// have not been connected yet, and not more than take a quarter of the process' descriptors.
func maxBridged() int {
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		return maxConns
	}
	return int(max(min(2*maxConns, files.Cur/4), 1))
}

func openDir(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if pe := (*fs.PathError)(nil); errors.As(err, &pe) {
		return nil, pe.Err
	}
	return f, err
}

// address returns the path of the socket, with a suffix, by the open directory: it fits into a
// socket's address even if the path of the directory is long.
func (b *Bridge) address(suffix string) string {
	return fmt.Sprintf("/proc/self/fd/%d/%s%s", b.dir.Fd(), b.name, suffix)
}

// Path returns the path of the socket.
func (b *Bridge) Path() string { return b.path }

// RemoveBy has the function remove the socket, which it gets, instead of the Bridge. It is called
// before Serve.
func (b *Bridge) RemoveBy(by func(path string, made fs.FileInfo) (remove func() error)) {
	b.remove = by(b.path, b.made)
}

// Remove removes the socket, as Close does: for a process that ends at once. It may be called at
// any time before Close has returned.
func (b *Bridge) Remove() error { return b.remove() }

// Close ends the bridge and its connections. Clients have a moment to take data that the guest has
// sent, if the device has been reset: Close is for the end of the machine.
func (b *Bridge) Close() error {
	b.cancel()
	err := errors.Join(b.listener.Close(), b.remove())
	b.mu.Lock()
	b.closed = true
	for j := range b.joints {
		_ = j.u.SetWriteDeadline(time.Now().Add(lastWords))
	}
	b.mu.Unlock()
	over := make(chan struct{})
	panics.Go(func() {
		b.owners.Wait()
		close(over)
	})
	for _, patience := range []time.Duration{lastWords, endTimeout} {
		select {
		case <-over:
			return errors.Join(err, b.dir.Close())
		case <-time.After(patience):
		}
		b.mu.Lock()
		for j := range b.joints {
			j.end()
		}
		b.mu.Unlock()
	}
	// A connect to a file system of the host that does not answer keeps the directory.
	return errors.Join(err, fmt.Errorf("%s: a connection of the guest's to the host does not end", b.path))
}

// start runs f as the owner of a connection, in a slot that the caller has taken. After Close it
// only gives the slot back.
func (b *Bridge) start(f func()) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		<-b.slots
		return false
	}
	b.owners.Go(panics.Func(func() {
		defer func() { <-b.slots }()
		f()
	}))
	return true
}

// Accept is for Config.Accept.
func (b *Bridge) Accept(port uint32, c *Conn) bool {
	select {
	case b.slots <- struct{}{}:
	default:
		return false
	}
	c.Hold()
	return b.start(func() {
		u, err := b.connect(port)
		if err != nil {
			_ = c.Close()
			return
		}
		if err := c.Accept(); err != nil {
			_ = u.Close()
			_ = c.Close()
			return
		}
		b.join(u, c, nil)
	})
}

// connect connects to the program that listens for connections of the guest to a port. It waits
// while that has a full backlog.
func (b *Bridge) connect(port uint32) (*net.UnixConn, error) {
	ctx, cancel := context.WithTimeout(b.life, b.connectTimeout)
	defer cancel()
	for {
		c, err := new(net.Dialer).DialContext(ctx, "unix", b.address("_"+strconv.FormatUint(uint64(port), 10)))
		if errors.Is(err, unix.EAGAIN) {
			select {
			case <-time.After(retryInterval):
				continue
			case <-ctx.Done():
			}
		}
		if err != nil {
			return nil, err
		}
		u := c.(*net.UnixConn)
		if err := trusted(u); err != nil {
			_ = u.Close()
			return nil, err
		}
		return u, nil
	}
}

// trusted refuses a program of another user: the directory may be one where any user can put a
// socket.
func trusted(u *net.UnixConn) error {
	raw, err := u.SyscallConn()
	if err != nil {
		return err
	}
	var peer *unix.Ucred
	if e := raw.Control(func(fd uintptr) {
		peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); e != nil || err != nil {
		return errors.Join(e, err)
	}
	if peer.Uid != 0 && int(peer.Uid) != os.Geteuid() {
		return unix.EACCES
	}
	return nil
}

// Serve starts to serve clients. dial is Device.Dial.
func (b *Bridge) Serve(dial func(context.Context, uint32) (*Conn, error)) {
	b.owners.Go(panics.Func(func() {
		for {
			select {
			case b.slots <- struct{}{}:
			case <-b.life.Done():
				return
			}
			u, err := b.listener.AcceptUnix()
			if err == nil && b.start(func() { b.client(dial, u) }) {
				continue
			}
			if err == nil {
				_ = u.Close()
				return
			}
			<-b.slots
			select { // the process may have too many files for now
			case <-time.After(retryInterval):
			case <-b.life.Done():
				return
			}
		}
	}))
}

// client serves a client.
func (b *Bridge) client(dial func(context.Context, uint32) (*Conn, error), u *net.UnixConn) {
	stay := context.AfterFunc(b.life, panics.Func(func() { _ = u.Close() }))
	defer stay()
	_ = u.SetReadDeadline(time.Now().Add(b.requestTimeout))
	port, rest, err := readRequest(u)
	if err == io.EOF {
		_ = u.Close()
		return
	}
	var c *Conn
	if err == nil {
		ctx, cancel := context.WithTimeoutCause(b.life, b.connectTimeout, errNoAnswer)
		c, err = dial(ctx, port)
		cancel()
	}
	if err != nil {
		if b.life.Err() == nil { // else it says no more than the end of the connection
			_, _ = fmt.Fprintf(u, "ERR %v\n", err)
		}
		_ = u.Close()
		return
	}
	if _, err = fmt.Fprintf(u, "OK %d\n", c.HostPort()); err != nil || !stay() {
		_ = u.Close()
		_ = c.Close()
		return
	}
	_ = u.SetReadDeadline(time.Time{})
	b.join(u, c, rest)
}

var errNoAnswer = errors.New("the guest does not answer")

// readRequest reads "CONNECT PORT\n". rest is the input after it. io.EOF is a client that asks for
// nothing.
func readRequest(r io.Reader) (port uint32, rest []byte, err error) {
	buf := make([]byte, 0, maxRequest)
	for {
		n, err := r.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		line, rest, whole := bytes.Cut(buf, []byte("\n"))
		switch {
		case whole:
			if port, err = parseRequest(string(line)); err != nil {
				return 0, nil, err
			}
			return port, rest, nil
		case len(buf) == cap(buf), err != nil && len(buf) > 0:
			return 0, nil, errRequest
		case err != nil:
			return 0, nil, io.EOF
		}
	}
}

var errRequest = fmt.Errorf("want a line CONNECT PORT, with a port up to %d", uint32(math.MaxUint32-1))

func parseRequest(line string) (uint32, error) {
	words := strings.Fields(line)
	if len(words) != 2 || !strings.EqualFold(words[0], "CONNECT") {
		return 0, errRequest
	}
	port, err := strconv.ParseUint(words[1], 10, 32)
	if err != nil || port == math.MaxUint32 { // VMADDR_PORT_ANY
		return 0, errRequest
	}
	return uint32(port), nil
}

// joint is the two ends of a connection.
type joint struct {
	u *net.UnixConn
	c *Conn
}

// end ends both. It may be called twice.
func (j *joint) end() {
	_ = j.u.Close()
	_ = j.c.Close()
}

// half is an end of a connection.
type half interface {
	io.ReadWriter
	CloseRead() error
	CloseWrite() error
}

// begun is a unix connection of which some bytes have been read.
type begun struct {
	*net.UnixConn
	first []byte
}

func (b *begun) Read(p []byte) (int, error) {
	if len(b.first) > 0 {
		n := copy(p, b.first)
		b.first = b.first[n:]
		return n, nil
	}
	return b.UnixConn.Read(p)
}

// join moves bytes both ways, the first to the guest, until each way has ended, or one side is gone
// as a whole.
func (b *Bridge) join(u *net.UnixConn, c *Conn, first []byte) {
	j := &joint{u, c}
	defer j.end()
	b.mu.Lock()
	closed := b.closed
	b.joints[j] = true
	b.mu.Unlock()
	defer func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		delete(b.joints, j)
	}()
	if closed {
		return
	}
	var ended atomic.Int32
	var toGuest sync.WaitGroup
	toGuest.Go(panics.Func(func() {
		forward(c, &begun{u, first})
		if ended.Add(1) < 2 {
			waitGone(u)
		}
		j.end()
	}))
	forward(u, c)
	if ended.Add(1) < 2 {
		c.Wait()
	}
	j.end()
	toGuest.Wait()
}

// forward moves bytes until src has no more or dst takes no more, and tells the other.
func forward(dst, src half) {
	for buf := make([]byte, minBuffer); ; {
		n, err := src.Read(buf)
		if n > 0 {
			if _, err := dst.Write(buf[:n]); err != nil {
				_ = src.CloseRead()
				return
			}
		}
		if err != nil {
			_ = dst.CloseWrite()
			return
		}
		if n == len(buf) && n < maxBuffer {
			buf = make([]byte, 4*n)
		}
	}
}

// waitGone waits until the peer of u has closed it, both ways, or u is closed.
func waitGone(u *net.UnixConn) {
	raw, err := u.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Read(func(fd uintptr) bool {
		events, err := nowait.Events(int(fd), 0)
		return err == nil && events&(unix.POLLHUP|unix.POLLERR) != 0
	})
}
