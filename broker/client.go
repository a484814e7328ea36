package broker

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"gvm/control"
	"gvm/devices/block"
	"gvm/devices/scsi/lio"
	"gvm/machine/disk"
	"gvm/panics"
	"gvm/text"
)

// endPatience bounds the wait for the broker's end.
const endPatience = 500 * time.Millisecond

var (
	errOwn   = errors.New("the machine's name is not the broker's")
	errEnded = errors.New("the broker has ended: this machine can open no files any more")
)

// Client is the machine's end. It is the block.Files of the machine's disks, which opens the files
// itself before Close, and a net.Listener with the connections of the control socket.
type Client struct {
	machine string // its name
	note    func(string)
	started chan struct{} // closed when conn and pid are set, or failed
	conn    *net.UnixConn // nil: there is no broker
	pid     int
	life    int // of execute
	failed  error
	over    chan struct{} // closed when the process has ended
	name    chan struct{} // closed when the process has given up the machine's name

	connections chan net.Conn
	refuse      func()        // ends Accept
	refused     chan struct{} // closed by refuse
	end         func() error  // is endOnce, once
	wake        func()        // lets a held process go on, once

	mu        sync.Mutex
	door      string     // the directory of the control socket; "": there is none
	doorFiles []*os.File // the socket and its lock, until the broker has them
	shut      bool       // the broker opens the files
	ending    bool       // the machine ends, and so does the broker
	dead      bool       // the broker has ended
	taking    int        // targets that the broker takes down just now
	last      uint64
	waiting   map[uint64]chan answer
	images    []*block.File // opened before shut
	own       []ownFile     // that the broker removes
	pins      []*os.File    // the last ones of own, until the broker has them
	record    *Record       // that the broker makes; nil: none
}

type answer struct {
	message
	files []*os.File
}

// Start starts the broker of a machine of the name, while the caller goes on. note takes a line for
// the user. The caller calls End, which the end of Serve's socket does too. What a broker leaves
// that has died, the keeper removes. janitor leads to the machine's Janitor, and is the broker's
// afterwards; nil: there is none.
func Start(name string, note func(string), janitor *os.File) *Client {
	c := newClient(name, nil, note)
	panics.Go(func() {
		err := c.start(janitor)
		if err != nil { // which Shut says
			c.mu.Lock()
			c.ending, c.failed = true, err
			c.mu.Unlock()
			close(c.over)
		} else {
			c.hold()
		}
		close(c.started)
		if err != nil {
			return
		}
		c.mu.Lock()
		_ = c.hand() // Shut says why not
		c.mu.Unlock()
		yieldFirst(c.pid)
		c.receive()
		// Not before: each thread that waits makes the entry into the sandbox longer.
		c.failed = ended(c.pid)
		unix.Close(c.life)
		close(c.over)
	})
	return c
}

// start starts the process.
func (c *Client) start(janitor *os.File) error {
	defer janitor.Close()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("broker: socketpair: %w", err)
	}
	theirs := os.NewFile(uintptr(fds[1]), "pair")
	defer theirs.Close()
	if c.conn, err = pairEnd(fds[0]); err != nil {
		return fmt.Errorf("broker: %w", err)
	}
	args, files := []string{Arg0, c.machine}, []*os.File{theirs}
	if janitor != nil {
		args, files = append(args, withJanitor), append(files, janitor)
	}
	if c.pid, c.life, err = execute(args, files...); err != nil {
		c.conn.Close()
		c.conn = nil
	}
	return err
}

// Serve has the broker take over the machine's control socket, in the directory d, as soon as it is
// there, or by Shut.
func (c *Client) Serve(s *control.Server, d control.Directory) error {
	socket, lock, err := s.HandOver(listener{c}, c.End)
	if err != nil {
		return fmt.Errorf("broker: %w", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.door, c.doorFiles = d.Path(), []*os.File{socket, lock}
	c.handSoon()
	return nil
}

// handSoon is hand, if the broker is there: else Start calls that. The caller holds mu.
func (c *Client) handSoon() {
	select {
	case <-c.started:
		_ = c.hand() // Shut says why not
	default:
	}
}

// hand gives the broker the files to remove that it has not yet: the sooner, the less is left of a
// machine that is killed. The caller holds mu after started.
func (c *Client) hand() error {
	if c.conn == nil {
		return nil
	}
	if c.doorFiles != nil {
		if err := send(c.conn, notice{Op: door, Path: text.Name(c.door)}, nil, c.doorFiles...); err != nil {
			return err
		}
		c.doorFiles[0].Close()
		c.doorFiles = nil
	}
	if len(c.pins) > 0 {
		files := c.own[len(c.own)-len(c.pins):]
		if err := send(c.conn, notice{Op: atEnd, Files: files}, nil, c.pins...); err != nil {
			return err
		}
		closeAll(c.pins)
		c.pins = nil
	}
	return nil
}

func newClient(machine string, conn *net.UnixConn, note func(string)) *Client {
	c := &Client{machine: machine, note: note, conn: conn,
		started: make(chan struct{}), over: make(chan struct{}), name: make(chan struct{}), refused: make(chan struct{}),
		connections: make(chan net.Conn, maxArrivals), waiting: map[uint64]chan answer{}}
	c.refuse = sync.OnceFunc(func() { close(c.refused) })
	c.end = sync.OnceValue(c.endOnce)
	c.wake = sync.OnceFunc(func() {
		if c.pid != 0 {
			_ = unix.Kill(c.pid, unix.SIGCONT)
		}
	})
	return c
}

// pairEnd makes a connection of a descriptor.
func pairEnd(fd int) (*net.UnixConn, error) {
	f := os.NewFile(uintptr(fd), "pair")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	return c.(*net.UnixConn), nil
}

// receive takes the broker's messages until it ends.
func (c *Client) receive() {
	for r := newReceiver(c.conn); ; {
		m, data, files, err := r.next()
		if err != nil {
			break
		}
		if m.Op == connection && len(files) == 1 {
			c.arrive(files[0], slices.Clone(data))
			continue
		}
		if m.Op == end && m.ID == 0 {
			close(c.name)
			break
		}
		c.mu.Lock()
		ch := c.waiting[m.ID]
		delete(c.waiting, m.ID)
		c.mu.Unlock()
		if ch == nil {
			closeAll(files)
			continue
		}
		ch <- answer{m, files}
	}
	c.mu.Lock()
	c.dead = true
	said := c.door != "" && c.doorFiles == nil && !c.ending
	waiting := c.waiting
	c.waiting = nil
	c.mu.Unlock()
	c.refuse()
	for _, ch := range waiting {
		close(ch)
	}
	if said {
		c.note("the broker has ended: disks can no longer be added, and gvm list, gvm disk, gvm stop and the like " +
			"do not reach this machine")
	}
}

// arrive gives a connection to Accept.
func (c *Client) arrive(f *os.File, head []byte) {
	defer f.Close()
	general, err := net.FileConn(f)
	if err != nil {
		return
	}
	conn, ok := general.(*net.UnixConn)
	if !ok {
		general.Close()
		return
	}
	select {
	case c.connections <- &begun{UnixConn: conn, head: head}:
	default: // the machine accepts none
		conn.Close()
	}
}

// maxArrivals is how many connections wait for the machine to serve them.
const maxArrivals = 64

// begun is a connection with the bytes that have been read of it.
type begun struct {
	*net.UnixConn
	head []byte
}

func (b *begun) Read(p []byte) (int, error) {
	if len(b.head) > 0 {
		n := copy(p, b.head)
		b.head = b.head[n:]
		return n, nil
	}
	return b.UnixConn.Read(p)
}

// listener has the connections of the control socket.
type listener struct{ *Client }

// Accept implements net.Listener.
func (l listener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.connections:
		return conn, nil
	case <-l.refused:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (l listener) Close() error {
	l.refuse()
	for {
		select {
		case conn := <-l.connections:
			conn.Close()
		default:
			return nil
		}
	}
}

// Addr implements net.Listener.
func (l listener) Addr() net.Addr { return &net.UnixAddr{Name: l.machine, Net: "unix"} }

// RemoveAtEnd has the broker remove a socket of the machine's at the end. The broker knows of it as
// soon as it is there itself, or from Shut on. The caller has made the socket and not called Shut.
// remove removes it if Shut has not been called.
func (c *Client) RemoveAtEnd(path string, made fs.FileInfo) (remove func() error) {
	st := made.Sys().(*syscall.Stat_t)
	f := ownFile{text.Name(path), st.Dev, st.Ino}
	c.mu.Lock()
	defer c.mu.Unlock()
	if pin := f.pin(); pin != nil {
		c.own, c.pins = append(c.own, f), append(c.pins, pin)
		c.handSoon()
	}
	return func() error {
		if c.isShut() {
			return nil
		}
		return f.remove()
	}
}

// KeepRecord has the broker make a record after Shut, which closes the record's directory.
func (c *Client) KeepRecord(r *Record) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.record, r.client = r, c
}

// recordFiles asks for n files of the record.
func (c *Client) recordFiles(m message, n int) (files []*os.File, named bool, err error) {
	a, err := c.call(m, nil)
	if err != nil {
		return nil, false, err
	}
	defer closeAll(a.files)
	if len(a.files) != n || len(a.Paths) != n {
		return nil, false, fmt.Errorf("broker: %d files for %d", len(a.files), n)
	}
	for i, f := range a.files {
		f, err := renamed(f, string(a.Paths[i]))
		if err != nil {
			closeAll(files)
			return nil, false, err
		}
		files = append(files, f)
	}
	return files, a.Named, nil
}

// End ends the broker, which gives up the machine's name.
func (c *Client) End() error { return c.end() }

func (c *Client) endOnce() error {
	<-c.started
	c.wake()
	c.mu.Lock()
	c.ending = true
	patience := endPatience
	if c.taking > 0 { // the machine has waited for it already
		patience = 0
	}
	own := c.doorFiles != nil // the socket's name is not the broker's yet
	if own {
		c.doorFiles[0].Close()
		c.doorFiles = nil
	}
	closeAll(c.pins)
	c.pins = nil
	c.mu.Unlock()
	if c.conn == nil {
		return c.failed
	}
	defer c.conn.Close()
	_ = c.conn.SetWriteDeadline(time.Now().Add(endPatience))
	_ = send(c.conn, message{Op: end}, nil)
	err := errors.New("the broker does not end")
	select {
	case <-c.over:
		err = c.failed
	case <-c.name:
		err = nil
	case <-time.After(patience):
	}
	if own {
		err = errors.Join(err, errOwn)
	}
	return err
}

// Shut has the broker open all files from now on, for a machine that may open none any more. If the
// machine has files to be removed at its end or a target of the kernel's, Shut starts a keeper.
func (c *Client) Shut() error {
	err := c.shutNow()
	if errors.Is(err, unix.EPIPE) {
		return errors.New("broker: the process has ended during the start")
	}
	return err
}

func (c *Client) shutNow() error {
	<-c.started
	defer c.wake() // the last step, and before the sandbox refuses it
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn == nil {
		return c.failed
	}
	if len(c.own) > 0 || lio.Owns(os.Getpid()) { // no target comes later
		if err := startKeeper(c.machine, c.own); err != nil {
			return err
		}
	}
	var paths []text.Name
	size := 0
	for _, f := range c.images {
		for _, suffix := range sidecars {
			path, err := f.Beside(suffix, "")
			if err != nil || path == "" || f.ReadOnly() {
				continue
			}
			if size += 2 * len(path); size > maxMessage/2 {
				if err := send(c.conn, notice{Op: keep, Paths: paths}, nil); err != nil {
					return err
				}
				paths, size = nil, 2*len(path)
			}
			paths = append(paths, text.Name(path))
		}
	}
	if err := c.hand(); err != nil {
		return err
	}
	if r := c.record; r != nil {
		names := []text.Name{text.Name(r.in), text.Name(r.Machine)}
		if err := send(c.conn, notice{Op: records, Paths: names}, nil, r.parent); err != nil {
			return err
		}
		if err := r.Close(); err != nil {
			return err
		}
	}
	c.shut, c.images = true, nil
	return send(c.conn, notice{Op: closed, Paths: paths}, nil)
}

// isShut reports whether the broker opens the files.
func (c *Client) isShut() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.shut
}

// call asks the broker, and waits for its answer.
func (c *Client) call(m message, data []byte, files ...*os.File) (answer, error) {
	ch := make(chan answer, 1)
	c.mu.Lock()
	if c.dead {
		c.mu.Unlock()
		return answer{}, errEnded
	}
	c.last++
	m.ID = c.last
	c.waiting[m.ID] = ch
	c.mu.Unlock()
	if err := send(c.conn, m, data, files...); err != nil {
		c.mu.Lock()
		delete(c.waiting, m.ID)
		c.mu.Unlock()
		if errors.Is(err, unix.EPIPE) || errors.Is(err, net.ErrClosed) { // before receive knows it
			err = errEnded
		}
		return answer{}, fmt.Errorf("broker: %w", err)
	}
	a, ok := <-ch
	if !ok {
		return answer{}, errEnded
	}
	err := a.Err.decode()
	if err != nil {
		closeAll(a.files)
	}
	return a, err
}

// one is call for one descriptor as answer, and names its file.
func (c *Client) one(m message, name string) (*os.File, error) {
	a, err := c.call(m, nil)
	if err != nil {
		return nil, err
	}
	if len(a.files) != 1 {
		closeAll(a.files)
		return nil, fmt.Errorf("broker: %d files for one", len(a.files))
	}
	return renamed(a.files[0], name)
}

// renamed returns an open file by another name, for messages. It closes f.
func renamed(f *os.File, name string) (*os.File, error) {
	defer f.Close()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("broker: dup: %w", err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// Image implements block.Files.
func (c *Client) Image(path string, o block.Options) (*block.File, error) {
	o.Files = c
	if !c.isShut() {
		f, err := block.System{}.Image(path, o)
		if err == nil {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.images = append(c.images, f)
		}
		return f, err
	}
	m := message{Op: openImage, Path: text.Name(path), Options: &options{ReadOnly: o.ReadOnly, NoLock: o.NoLock,
		Direct: o.Direct, Lend: o.Lend, Raw: o.Raw, Overlay: o.Overlay, Size: o.Size, BlockSize: o.BlockSize,
		Uses: block.Uses()}}
	a, err := c.call(m, nil)
	if errors.Is(err, unix.EMSGSIZE) { // Import looks for uses too; only the message is worse
		m.Options.Uses = nil
		a, err = c.call(m, nil)
	}
	for _, note := range a.Notes {
		if o.Note != nil {
			o.Note(note)
		}
	}
	if err != nil {
		return nil, err
	}
	if a.Facts == nil || len(a.files) == 0 {
		closeAll(a.files)
		return nil, fmt.Errorf("broker: no image for %s", path)
	}
	return block.Import(*a.Facts, a.files, o)
}

// Temporary implements block.Files.
func (c *Client) Temporary() (*os.File, error) {
	if !c.isShut() {
		return block.System{}.Temporary()
	}
	return c.one(message{Op: temporary}, "temporary file")
}

// Open implements block.Files.
func (c *Client) Open(path string, flag int, perm fs.FileMode) (*os.File, error) {
	if !c.isShut() {
		return block.System{}.Open(path, flag, perm)
	}
	return c.one(message{Op: openFile, Path: text.Name(path), Flag: flag, Perm: perm}, path)
}

// Sync implements block.Files.
func (c *Client) Sync(f *os.File, path string) error {
	if !c.isShut() {
		return block.System{}.Sync(f, path)
	}
	_, err := c.call(message{Op: syncFile, Path: text.Name(path)}, nil, f)
	return err
}

// Replace implements block.Files.
func (c *Client) Replace(path string, data []byte) error {
	if !c.isShut() {
		return block.System{}.Replace(path, data)
	}
	_, err := c.call(message{Op: replace, Path: text.Name(path)}, data)
	return err
}

// Remove implements block.Files.
func (c *Client) Remove(path string) error {
	if !c.isShut() {
		return block.System{}.Remove(path)
	}
	_, err := c.call(message{Op: remove, Path: text.Name(path)}, nil)
	return err
}

// Discard implements block.Files.
func (c *Client) Discard(f *os.File, path string) error {
	if !c.isShut() {
		return block.System{}.Discard(f, path)
	}
	_, err := c.call(message{Op: discard, Path: text.Name(path)}, nil, f)
	return err
}

// AddTo implements disk.Targets.
func (c *Client) AddTo(t *lio.Target, u lio.Unit) (notes []string, err error) {
	if !c.isShut() {
		return disk.Direct{}.AddTo(t, u)
	}
	path := text.Name(u.Backend.(*block.File).Path())
	a, err := c.call(message{Op: addTo, Path: path, WWN: t.WWN, LUN: u.LUN}, nil)
	return a.Notes, err
}

// RemoveFrom implements disk.Targets.
func (c *Client) RemoveFrom(t *lio.Target, lun int) error {
	if !c.isShut() {
		return disk.Direct{}.RemoveFrom(t, lun)
	}
	_, err := c.call(message{Op: removeFrom, WWN: t.WWN, LUN: lun}, nil)
	return err
}

// TakeDown implements disk.Targets.
func (c *Client) TakeDown(t *lio.Target) error {
	if !c.isShut() {
		return disk.Direct{}.TakeDown(t)
	}
	c.mu.Lock()
	c.taking++
	c.mu.Unlock()
	_, err := c.call(message{Op: takeDown, WWN: t.WWN}, nil)
	c.mu.Lock()
	c.taking--
	c.mu.Unlock()
	if errors.Is(err, errEnded) { // the keeper does it
		return nil
	}
	return err
}

var (
	_ block.Files  = (*Client)(nil)
	_ disk.Targets = (*Client)(nil)
)
