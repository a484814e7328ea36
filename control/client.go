package control

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"gvm/inspect"
	"gvm/kvmapi/nowait"
	"gvm/panics"
)

// maxAnswer bounds an answer, with room to spare.
const maxAnswer = 32 << 20

// How long a client waits for the machine's state, and for an operation, which the server abandons
// before that. A process on a busy host may not run for seconds. A client without an answer looks
// each lookPeriod whether the process is stopped.
const (
	askTimeout    = 10 * time.Second
	changeTimeout = time.Minute
	lookPeriod    = time.Second
)

// ErrNoAnswer means that a machine took a request and did not answer it in time. Its process may be
// stopped.
var ErrNoAnswer = errors.New("no answer")

// stoppedError is ErrNoAnswer with its reason.
type stoppedError string

func (e stoppedError) Error() string { return ErrNoAnswer.Error() + ": " + string(e) }
func (e stoppedError) Unwrap() error { return ErrNoAnswer }

// Errors of a machine whose process lives, as Directory.List has told, and whose control socket
// does not, or is gone.
var (
	ErrNoListener = errors.New("nothing listens on its control socket: its broker has ended, or the machine ends " +
		"just now; kill -TERM PID ends it")
	ErrNoSocket = errors.New("its control socket is gone: the machine ends just now, or a program removed the socket; " +
		"kill -TERM PID ends it")
)

// ErrCut means that a machine closed a connection before its answer was complete.
var ErrCut = errors.New("it closed the connection, as it ends just now or has too many clients")

// Client sends requests to the machine with a name in a Directory. It holds no resources.
type Client struct {
	dir  Directory
	name string
}

// NewClient returns a client for the machine of that name. The first request looks for the machine.
func NewClient(d Directory, name string) *Client {
	return &Client{dir: d, name: name}
}

// reply is an answer, and the connection that it comes by, whose operations end with the request's
// context until release.
type reply struct {
	*http.Response
	conn    net.Conn
	in      *bufio.Reader
	release func() bool
}

// send sends a request, and reads the head of the answer. The caller closes the connection.
func (c *Client) send(ctx context.Context, method, path string, header http.Header, body io.Reader) (*reply, error) {
	r, err := http.NewRequest(method, "http://gvm/v1/"+path, body)
	if err != nil {
		return nil, err
	}
	conn, err := c.dir.dial(ctx, c.name)
	if err != nil {
		return nil, err
	}
	a := &reply{conn: conn, in: bufio.NewReader(conn),
		release: context.AfterFunc(ctx, panics.Func(func() { _ = conn.SetDeadline(time.Now()) }))}
	r.Header = header
	if err = r.Write(conn); err == nil {
		a.Response, err = http.ReadResponse(a.in, r)
	}
	if err != nil {
		a.release()
		conn.Close()
	}
	return a, err
}

// dial connects to the socket of a name.
func (d Directory) dial(ctx context.Context, name string) (net.Conn, error) {
	conn, err := d.dialSocket(ctx, name)
	switch {
	case errors.Is(err, unix.ECONNREFUSED):
		return nil, ErrNoListener
	case errors.Is(err, fs.ErrNotExist): // the directory goes with the last machine
		return nil, ErrNoSocket
	}
	return conn, err
}

func (d Directory) dialSocket(ctx context.Context, name string) (net.Conn, error) {
	if err := private(d.path, os.Geteuid()); err != nil {
		return nil, err
	}
	dir, err := os.Open(d.path)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", socketPath(dir, name+inside+socketFile))
	if errors.Is(err, fs.ErrNotExist) {
		conn, err = dialer.DialContext(ctx, "unix", socketPath(dir, name+beside+socketFile))
	}
	return conn, err
}

// Process opens the process that owns the machine's socket, as a descriptor that becomes readable
// when the process ends (pidfd_open(2)).
func (c *Client) Process(ctx context.Context) (*os.File, error) {
	conn, err := c.dir.dial(ctx, c.name)
	if err != nil {
		return nil, err
	}
	defer conn.Close() // until then the process lives, and its PID is its own
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return nil, err
	}
	fd := -1
	if e := raw.Control(func(s uintptr) {
		if fd, err = unix.GetsockoptInt(int(s), unix.SOL_SOCKET, unix.SO_PEERPIDFD); err == nil {
			return
		}
		cred, e := unix.GetsockoptUcred(int(s), unix.SOL_SOCKET, unix.SO_PEERCRED) // before Linux 6.5
		if e != nil {
			err = e
			return
		}
		fd, err = unix.PidfdOpen(int(cred.Pid), 0)
	}); e != nil {
		return nil, e
	}
	if err != nil {
		return nil, fmt.Errorf("process of machine %s: %w", c.name, err)
	}
	return os.NewFile(uintptr(fd), "process of machine "+c.name), nil
}

// Info returns the machine's description.
func (c *Client) Info(ctx context.Context) (Info, error) {
	return ask[Info](ctx, c, http.MethodGet, "machine", nil)
}

// Pause stops the machine's CPUs.
func (c *Client) Pause(ctx context.Context) error {
	_, err := ask[struct{}](ctx, c, http.MethodPost, "machine/pause", nil)
	return err
}

// Resume resumes the machine's CPUs.
func (c *Client) Resume(ctx context.Context) error {
	_, err := ask[struct{}](ctx, c, http.MethodPost, "machine/resume", nil)
	return err
}

// Stop ends the machine; the guest may end by itself first.
func (c *Client) Stop(ctx context.Context, s Stop) (Stopped, error) {
	return ask[Stopped](ctx, c, http.MethodPost, "machine/stop", s)
}

// Reset starts the guest again.
func (c *Client) Reset(ctx context.Context) error {
	_, err := ask[struct{}](ctx, c, http.MethodPost, "machine/reset", nil)
	return err
}

// NMI raises a non-maskable interrupt on the CPUs.
func (c *Client) NMI(ctx context.Context) error {
	_, err := ask[struct{}](ctx, c, http.MethodPost, "machine/nmi", nil)
	return err
}

// SysRq sends a break and a key to the console.
func (c *Client) SysRq(ctx context.Context, s SysRq) error {
	_, err := ask[struct{}](ctx, c, http.MethodPost, "machine/sysrq", s)
	return err
}

// Break sends a break on the console.
func (c *Client) Break(ctx context.Context) error {
	_, err := ask[struct{}](ctx, c, http.MethodPost, "console/break", nil)
	return err
}

// ResizeHVC tells the guest the size of the virtio console's terminal.
func (c *Client) ResizeHVC(ctx context.Context, s TerminalSize) error {
	_, err := ask[struct{}](ctx, c, http.MethodPost, "hvc/size", s)
	return err
}

// Name returns the machine's name.
func (c *Client) Name() string { return c.name }

// Disks returns the disks.
func (c *Client) Disks(ctx context.Context) ([]Disk, error) {
	return ask[[]Disk](ctx, c, http.MethodGet, "disks", nil)
}

// AddDisk adds a disk.
func (c *Client) AddDisk(ctx context.Context, a AddDisk) (Change, error) {
	return ask[Change](ctx, c, http.MethodPost, "disks", a)
}

// RemoveDisk removes the disk with a LUN, a serial number or an absolute path.
func (c *Client) RemoveDisk(ctx context.Context, id string) (Change, error) {
	return ask[Change](ctx, c, http.MethodDelete, "disks/"+segment(id), nil)
}

// ResizeDisk changes a disk's size, or makes the machine read it again.
func (c *Client) ResizeDisk(ctx context.Context, id string, r ResizeDisk) (Change, error) {
	return ask[Change](ctx, c, http.MethodPost, "disks/"+segment(id)+"/resize", r)
}

// Balloon returns the state of the balloon.
func (c *Client) Balloon(ctx context.Context) (Balloon, error) {
	return ask[Balloon](ctx, c, http.MethodGet, "balloon", nil)
}

// ResizeBalloon asks the guest for a balloon of another size.
func (c *Client) ResizeBalloon(ctx context.Context, r ResizeBalloon) (Balloon, error) {
	return ask[Balloon](ctx, c, http.MethodPost, "balloon", r)
}

// Inspect returns the machine's state at a path, "" for all. Values are strings, json.Numbers and
// bools.
func (c *Client) Inspect(ctx context.Context, path string) (inspect.Node, error) {
	var names []string
	for name := range strings.SplitSeq(path, "/") {
		if name != "" {
			names = append(names, segment(name))
		}
	}
	return ask[inspect.Node](ctx, c, http.MethodGet, "inspect/"+strings.Join(names, "/"), nil)
}

// segment escapes an ID as one segment of a path, even "." and "..".
func segment(id string) string { return strings.ReplaceAll(url.PathEscape(id), ".", "%2E") }

// BrokerArg0 is the first word of the command line of a process that has a machine's socket.
const BrokerArg0 = "gvm-broker"

// stopped returns an error if the machine's process, or its broker, is stopped by a signal.
func (c *Client) stopped() error {
	for _, place := range []string{inside, beside} {
		lock, err := nowait.Open(c.dir.file(c.name, place, lockFile), os.O_RDONLY, 0, nowait.Regular)
		if err != nil {
			continue
		}
		defer lock.Close()
		pid := holder(lock)
		if isStopped(pid) {
			return stoppedError("its process is stopped (kill -CONT PID)")
		}
		lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
		for _, list := range lists {
			children, _ := os.ReadFile(list)
			for child := range strings.FieldsSeq(string(children)) {
				words, _ := os.ReadFile("/proc/" + child + "/cmdline")
				if n, _ := strconv.Atoi(child); bytes.HasPrefix(words, []byte(BrokerArg0+"\x00")) && isStopped(n) {
					return stoppedError("its broker is stopped: kill -CONT " + child)
				}
			}
		}
		return nil
	}
	return nil
}

// isStopped reports whether a process is stopped by a signal (proc_pid_stat(5)).
func isStopped(pid int) bool {
	stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, state, _ := bytes.Cut(stat[bytes.LastIndexByte(stat, ')')+1:], []byte(" "))
	return bytes.HasPrefix(state, []byte("T"))
}

// ask makes a request. The error is an *Error if the machine refused it.
func ask[T any](ctx context.Context, c *Client, method, path string, body any) (answer T, err error) {
	err = c.ask(ctx, method, path, body, &answer)
	return answer, err
}

// patiently has do make a request within limit. It gives up on a machine whose process is stopped.
func (c *Client) patiently(ctx context.Context, limit time.Duration, do func(context.Context) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, ErrNoAnswer)
	defer cancel()
	ctx, giveUp := context.WithCancelCause(ctx)
	defer giveUp(nil)
	panics.Go(func() { // ends with ctx
		for {
			select {
			case <-ctx.Done():
				return
			case <-time.After(lookPeriod):
			}
			if err := c.stopped(); err != nil {
				giveUp(err)
			}
		}
	})
	err := do(ctx)
	cause := context.Cause(ctx)
	var stopped stoppedError
	switch {
	case err == nil:
	case errors.As(cause, &stopped):
		err = fmt.Errorf("machine %s: %w", c.name, cause)
	case cause == ErrNoAnswer:
		err = fmt.Errorf("machine %s: %w within %v: its process may be stopped (kill -CONT PID), or its host overloaded",
			c.name, cause, limit)
	}
	return err
}

// noAnswer is the error of a request whose answer did not come, or not all of it. If ctx has ended,
// that is its cause.
func (c *Client) noAnswer(ctx context.Context, err error) error {
	if nowait.IsCut(err) {
		err = ErrCut
	}
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	return fmt.Errorf("machine %s does not answer: %w", c.name, err)
}

// ask is the function ask, once for all types of answers.
func (c *Client) ask(ctx context.Context, method, path string, body, answer any) error {
	limit := changeTimeout
	if method == http.MethodGet {
		limit = askTimeout
	}
	var content []byte
	if body != nil {
		var err error
		if content, err = json.Marshal(body); err != nil {
			return err
		}
	}
	return c.patiently(ctx, limit, func(ctx context.Context) error {
		resp, err := c.send(ctx, method, path, http.Header{"Connection": {"close"}}, bytes.NewReader(content))
		if err != nil {
			return c.noAnswer(ctx, err)
		}
		defer resp.conn.Close()
		defer resp.release()
		b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
		if err != nil {
			return c.noAnswer(ctx, err)
		}
		switch resp.StatusCode {
		case http.StatusNoContent:
			return nil
		case http.StatusOK:
			if err := json.Unmarshal(b, answer); err != nil {
				return fmt.Errorf("machine %s sends an answer that this gvm does not understand: %w", c.name, err)
			}
			return nil
		}
		return refusal(resp.Response, b)
	})
}
