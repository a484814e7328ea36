package control

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"gvm/panics"
)

// Door is the socket of a Server in another process. It accepts the connections, reads their
// requests, and passes both on, so that the Server's process can make no request itself.
type Door struct {
	clients clients
	machine int // PID of the Server's process
	release func() error
	refused func(error)
	wait    time.Duration
	accepts sync.WaitGroup
}

// maxRequest bounds a request of which the Door reads the body, as the Server does.
const maxRequest = maxHeader + 4096 + maxBody

// NewDoor makes a Door of the files of Server.HandOver, for the machine of that name. machine is
// the process of the Server. refused is told of connections that are not passed on.
func NewDoor(d Directory, name string, socket, lock *os.File, machine int, refused func(error)) (*Door, error) {
	l, err := net.FileListener(socket)
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	return &Door{clients: clients{Listener: l}, machine: machine, refused: refused, wait: readTimeout,
		release: sync.OnceValue(func() error { return d.release(name, lock) })}, socket.Close()
}

// Serve starts to call pass, in a goroutine each, with connections and the beginnings of their
// requests. add is the disk that a request adds, or nil. pass does not keep the connection.
func (d *Door) Serve(pass func(conn *net.UnixConn, head []byte, add *AddDisk) error) {
	d.accepts.Go(panics.Func(func() {
		d.clients.serve(func(c *client) {
			if err := d.admit(c, pass); err != nil {
				d.refused(err)
			}
		})
	}))
}

// admit reads a request, and passes it on.
func (d *Door) admit(c *client, pass func(*net.UnixConn, []byte, *AddDisk) error) error {
	conn := c.socket.(*net.UnixConn)
	if err := d.check(conn); err != nil {
		return err
	}
	_ = conn.SetReadDeadline(time.Now().Add(d.wait))
	var head bytes.Buffer
	add, err := readRequest(io.TeeReader(io.LimitReader(conn, maxRequest), &head))
	if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, net.ErrClosed) || head.Len() == 0 {
		return nil // as the Server treats such a client
	}
	_ = conn.SetReadDeadline(time.Time{})
	c.enter(atMachine)
	return pass(conn, head.Bytes(), add)
}

// readRequest reads a request as far as it takes to know whether it adds a disk. One that is not
// valid adds none: the Server says why.
func readRequest(r io.Reader) (add *AddDisk, err error) {
	req, err := http.ReadRequest(bufio.NewReaderSize(r, 4096))
	if err != nil || req.Method != http.MethodPost || req.URL.Path != "/v1/disks" {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(req.Body, maxBody+1))
	if err != nil || len(b) > maxBody {
		return nil, err
	}
	req.Body = io.NopCloser(bytes.NewReader(b))
	add = &AddDisk{}
	if body(req, add) != nil {
		return nil, nil
	}
	return add, nil
}

// check refuses connections of others than the socket's owner and root, and those of the machine's
// own process.
func (d *Door) check(conn *net.UnixConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	if e := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); e != nil {
		return e
	}
	switch {
	case err != nil:
		return fmt.Errorf("control socket: SO_PEERCRED: %w", err)
	case int(cred.Pid) == d.machine:
		return errors.New("control socket: a request of the machine itself is refused")
	case cred.Uid != 0 && int(cred.Uid) != os.Geteuid():
		return fmt.Errorf("control socket: a request of user %d is refused", cred.Uid)
	}
	return nil
}

// Close ends the Door and gives up the name.
func (d *Door) Close() error {
	err := d.clients.Listener.Close()
	d.accepts.Wait()
	return errors.Join(err, d.release())
}
