package broker

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"gvm/control"
	"gvm/devices/block"
	"gvm/devices/scsi/lio"
	"gvm/machine/disk"
	"gvm/panics"
	"gvm/text"
)

// grantTime is how long after a request its image can be opened. The machine opens it at once, if
// at all.
const grantTime = time.Minute

// maxGrants bounds the files that the machine may open and has not: more than all connections of
// the control socket can ask for at a time.
const maxGrants = 128

// maxPath is PATH_MAX: no longer path can be opened.
const maxPath = 4096

// maxRefusals is how many refusals are logged: a machine may ask for any number of files.
const maxRefusals = 10

// maxRequests bounds the requests of the machine that are under way, and with that the threads that
// wait for storage.
const maxRequests = 64

// broker serves one machine.
type broker struct {
	conn    *net.UnixConn
	name    string // of the machine
	machine int    // its PID
	log     func(string)
	slots   chan struct{} // one for each request under way
	kernel  kernel
	door    *control.Door // nil: the machine has no control socket

	mu          sync.Mutex
	closed      bool // the command line's files are known
	images      map[string]image
	temporaries []time.Time     // ends of the times for a temporary file each
	beside      map[string]bool // paths beside images; true: to be written
	own         []ownFile       // removed at the end
	pins        []*os.File      // those of own, until this process ends
	record      *Record         // of the machine's end; nil: none
	refusals    int
}

// kernel has the functions of package lio.
type kernel struct {
	addTo      func(pid int, wwn string, u lio.Unit) (notes []string, err error)
	removeFrom func(pid int, wwn string, lun int) error
	takeDown   func(pid int, wwn string) error
}

// image is a grant to open an image once, and to have the kernel serve it once.
type image struct {
	options block.Options
	until   time.Time
	made    bool       // this process has made the file, and the machine may remove it
	vhost   *disk.Spec // of a disk that the kernel is to serve
	found   *found     // of that, when the machine has it open and the kernel does not serve it
}

// found is the state of an image when this process opened it.
type found struct {
	facts block.Facts
	file  *os.File // O_PATH, without a lock: another file at the image's path is another one
}

func (f *found) close() {
	if f != nil {
		f.file.Close()
	}
}

func newBroker(c *net.UnixConn, name string, machine int, log func(string)) *broker {
	return &broker{conn: c, name: name, machine: machine, log: log, slots: make(chan struct{}, maxRequests),
		kernel: kernel{lio.AddTo, lio.RemoveFrom, lio.TakeDown}, images: map[string]image{}, beside: map[string]bool{}}
}

// grant lets the machine open the files of a disk.
func (b *broker) grant(d disk.Spec) {
	b.mu.Lock()
	defer b.mu.Unlock()
	until := time.Now().Add(grantTime)
	b.prune()
	if d.Storage == disk.Temporary || d.Storage == disk.Image && d.Overlay == disk.OverlayOn {
		b.temporaries = append(b.temporaries, until)
	}
	if d.Storage != disk.Image || d.Path == "" || max(len(d.Path), len(d.Overlay)) > maxPath {
		return
	}
	g := image{options: d.ImageOptions(), until: until}
	if d.Backend == disk.Vhost {
		g.vhost = &d
	}
	b.images[d.Path].found.close()
	b.images[d.Path] = g
	if d.Overlay != "" && d.Overlay != disk.OverlayOn {
		b.images[d.Overlay] = image{options: block.Options{Overlay: true, NoLock: d.NoLock}, until: until}
	}
}

// prune forgets grants that are of no more use, and the oldest if there are too many. It keeps
// files that this process has made. The caller holds mu.
func (b *broker) prune() {
	b.temporaries = slices.DeleteFunc(b.temporaries, time.Now().After)
	b.temporaries = b.temporaries[max(len(b.temporaries)-maxGrants, 0):]
	var open []string
	for path, g := range b.images {
		if g.found != nil && time.Now().After(g.until) {
			g.found.close()
			g.found = nil
			b.images[path] = g
		}
		switch {
		case g.made:
		case time.Now().After(g.until):
			delete(b.images, path)
		default:
			open = append(open, path)
		}
	}
	if n := len(open) - maxGrants; n > 0 {
		slices.SortFunc(open, func(p, q string) int { return b.images[p].until.Compare(b.images[q].until) })
		for _, path := range open[:n] {
			b.images[path].found.close()
			delete(b.images, path)
		}
	}
}

// keepBeside lets the machine open the files beside an image.
func (b *broker) keepBeside(f *block.File) {
	for _, suffix := range sidecars {
		if path, err := f.Beside(suffix, ""); err == nil && path != "" {
			b.beside[path] = b.beside[path] || !f.ReadOnly()
		}
	}
}

// sidecars are the ends of names of the files beside an image.
var sidecars = []string{".pi", ".pr"}

// refuse logs that the machine asks for a file.
func (b *broker) refuse(m message) error {
	b.mu.Lock()
	b.refusals++
	n := b.refusals
	b.mu.Unlock()
	switch {
	case n <= maxRefusals:
		b.log(fmt.Sprintf("%s %q: refused, as no request of the control socket names it", m.Op, string(m.Path)))
	case n == maxRefusals+1:
		b.log("more files are refused, and not listed here")
	}
	return refusal(m.Path)
}

// serve answers the machine's requests until the socket's other end is closed. It reports whether
// the machine has ended in order. Requests that wait for storage end with the process.
func (b *broker) serve() (inOrder bool) {
	for r := newReceiver(b.conn); ; {
		m, data, files, err := r.next()
		if err != nil {
			return false
		}
		switch m.Op {
		case end:
			closeAll(files)
			return true
		case door:
			b.openDoor(m, files)
			continue
		case keep, closed:
			closeAll(files)
			b.keep(m)
			continue
		case atEnd:
			b.keepOwn(m, files)
			continue
		case records:
			b.keepRecord(m, files)
			continue
		}
		data = slices.Clone(data)
		select {
		case b.slots <- struct{}{}:
		default:
			b.answer(m, message{}, nil, unix.EAGAIN)
			closeAll(files)
			continue
		}
		panics.Go(func() {
			defer func() { <-b.slots }()
			defer closeAll(files)
			a, opened, err := b.do(m, data, files)
			b.answer(m, a, opened, err)
			closeAll(opened)
		})
	}
}

// answer answers a request.
func (b *broker) answer(m, a message, opened []*os.File, err error) {
	a.ID, a.Op, a.Err = m.ID, m.Op, encodeError(err, b.machine)
	if err := send(b.conn, a, nil, opened...); err != nil && len(opened) > 0 { // too many of them
		_ = send(b.conn, message{ID: m.ID, Op: m.Op, Err: encodeError(err, b.machine)}, nil)
	}
}

// openDoor takes over the machine's control socket, until the machine has closed itself.
func (b *broker) openDoor(m message, files []*os.File) {
	b.mu.Lock()
	late := b.closed
	b.mu.Unlock()
	if late || b.door != nil || len(files) != 2 {
		_ = b.refuse(m)
		closeAll(files)
		return
	}
	d, err := control.NewDoor(control.In(string(m.Path)), b.name, files[0], files[1], b.machine,
		func(err error) { b.log(err.Error()) })
	if err != nil {
		b.log(err.Error())
		closeAll(files)
		return
	}
	d.Serve(b.pass)
	b.door = d
}

// closeDoor gives up the machine's name.
func (b *broker) closeDoor() error {
	if b.door == nil {
		return nil
	}
	return b.door.Close()
}

// keep notes files of the command line, until the machine has closed itself.
func (b *broker) keep(m message) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, path := range m.Paths {
		if !b.closed {
			b.beside[string(path)] = true
		}
	}
	b.closed = b.closed || m.Op == closed
}

// keepOwn notes files that the machine has made, with a descriptor of each, until the machine has
// closed itself.
func (b *broker) keepOwn(m message, files []*os.File) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed || len(files) != len(m.Files) {
		closeAll(files)
		return
	}
	b.own, b.pins = append(b.own, m.Files...), append(b.pins, files...)
}

// keepRecord notes the directory for the machine's record, until the machine has closed itself.
func (b *broker) keepRecord(m message, files []*os.File) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed || b.record != nil || len(m.Paths) != 2 || len(files) != 1 {
		closeAll(files)
		return
	}
	b.record = &Record{Machine: string(m.Paths[1]), in: string(m.Paths[0]), parent: files[0]}
}

// doRecord makes a part of the machine's record.
func (b *broker) doRecord(m message) (a message, opened []*os.File, err error) {
	b.mu.Lock()
	r := b.record
	b.mu.Unlock()
	if r == nil {
		return a, nil, b.refuse(m)
	}
	switch m.Op {
	case recordDirectory:
		var path string
		path, err = r.Directory()
		a.Path = text.Name(path)
	case recordFiles:
		var names []string
		for _, name := range m.Paths {
			names = append(names, string(name))
		}
		opened, err = r.Create(names...)
	case recordCore:
		var f *os.File
		if f, a.Named, err = r.Core(); err == nil {
			opened = []*os.File{f}
		}
	case linkCore:
		err = r.LinkCore()
	case removeCore:
		err = r.RemoveCore()
	}
	for _, f := range opened {
		a.Paths = append(a.Paths, text.Name(f.Name()))
	}
	return a, opened, err
}

// removeOwn removes the machine's sockets.
func (b *broker) removeOwn() (err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, f := range b.own {
		err = errors.Join(err, f.remove())
	}
	return err
}

// do answers a request of the machine, if a request of the control socket allows that. The caller
// closes the files.
func (b *broker) do(m message, data []byte, files []*os.File) (a message, opened []*os.File, err error) {
	path := string(m.Path)
	switch m.Op {
	case openImage:
		return b.image(m)
	case temporary:
		if !b.takeTemporary() {
			return a, nil, b.refuse(m)
		}
		return one(block.System{}.Temporary())
	case addTo:
		a.Notes, err = b.addTo(m)
		return a, nil, err
	case removeFrom:
		return a, nil, b.kernel.removeFrom(b.machine, m.WWN, m.LUN)
	case takeDown:
		return a, nil, b.kernel.takeDown(b.machine, m.WWN)
	case recordDirectory, recordFiles, recordCore, linkCore, removeCore:
		return b.doRecord(m)
	}
	b.mu.Lock()
	writable, beside := b.beside[path]
	made := b.images[path].made
	b.mu.Unlock()
	write := m.Op != openFile || m.Flag&^(unix.O_RDONLY|unix.O_CLOEXEC) != 0
	switch {
	case m.Op == discard && made && len(files) == 1:
		return a, nil, block.System{}.Discard(files[0], path)
	case !beside, write && !writable:
		return a, nil, b.refuse(m)
	}
	switch m.Op {
	case openFile:
		const allowed = unix.O_RDWR | unix.O_CREAT | unix.O_EXCL | unix.O_CLOEXEC
		if m.Flag&^allowed != 0 {
			return a, nil, b.refuse(m)
		}
		return one(block.System{}.Open(path, m.Flag, m.Perm&0o666))
	case syncFile:
		if len(files) == 1 {
			return a, nil, block.System{}.Sync(files[0], path)
		}
	case replace:
		return a, nil, block.System{}.Replace(path, data)
	case remove:
		return a, nil, block.System{}.Remove(path)
	case discard:
		if len(files) == 1 {
			return a, nil, block.System{}.Discard(files[0], path)
		}
	}
	return a, nil, b.refuse(m)
}

// one returns a single file as an answer.
func one(f *os.File, err error) (message, []*os.File, error) {
	if err != nil {
		return message{}, nil, err
	}
	return message{}, []*os.File{f}, nil
}

// takeTemporary uses up a grant of a temporary file.
func (b *broker) takeTemporary() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.temporaries = slices.DeleteFunc(b.temporaries, time.Now().After)
	if len(b.temporaries) == 0 {
		return false
	}
	b.temporaries = b.temporaries[1:]
	return true
}

// image opens an image as the request has it. The locks and claims go on with the descriptors.
func (b *broker) image(m message) (a message, opened []*os.File, err error) {
	path := string(m.Path)
	b.mu.Lock()
	g, ok := b.images[path]
	until := g.until
	if ok && g.found == nil && m.Options != nil && g.allows(*m.Options) && time.Now().Before(until) {
		g.until = time.Time{}
		b.images[path] = g
	} else {
		ok = false
	}
	b.mu.Unlock()
	if !ok {
		return a, nil, b.refuse(m)
	}
	o := g.options
	if o.Overlay {
		o.Size = m.Options.Size
	}
	o.Uses = m.Options.Uses
	o.Note = func(s string) { a.Notes = append(a.Notes, s) }
	f, err := block.Open(path, o)
	if err != nil {
		if locked := (*block.LockedError)(nil); errors.As(err, &locked) && locked.Other != "" {
			locked.Other = disk.Absolute(locked.Other)
		}
		return a, nil, err
	}
	facts, files := f.Export()
	a.Facts = &facts
	b.mu.Lock()
	defer b.mu.Unlock()
	if g.made = facts.Made; g.vhost != nil {
		file, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", files[0].Fd()), unix.O_PATH, 0)
		if err != nil {
			return a, nil, errors.Join(err, f.Close())
		}
		b.images[path].found.close()
		g.found, g.until = &found{facts, file}, until
	}
	if g.made || g.vhost != nil {
		b.images[path] = g
	}
	if !o.Overlay {
		b.keepBeside(f)
	}
	// The caller closes the descriptors, and this process has no more use of the storage.
	f.Forget()
	return a, files, nil
}

// addTo has the kernel serve an image with this process's rights: one that the machine has opened,
// as its request has it.
func (b *broker) addTo(m message) (notes []string, err error) {
	path := string(m.Path)
	b.mu.Lock()
	g := b.images[path]
	found := g.found
	ok := found != nil && (g.vhost.LUN < 0 || g.vhost.LUN == m.LUN) && time.Now().Before(g.until)
	if ok {
		g.found, g.until = nil, time.Time{}
		b.images[path] = g
	}
	b.mu.Unlock()
	if !ok {
		return nil, b.refuse(m)
	}
	defer found.close()
	found.facts.Uses = nil // the machine has those
	f, err := block.Import(found.facts, []*os.File{found.file}, block.Options{})
	if err != nil {
		return nil, err
	}
	return b.kernel.addTo(b.machine, m.WWN, lio.Unit{LUN: m.LUN, UnitConfig: g.vhost.Unit(f)})
}

// allows reports whether the machine opens the image as the request says.
func (g image) allows(o options) bool {
	want := g.options
	return o.ReadOnly == want.ReadOnly && o.NoLock == want.NoLock && !o.Direct && o.Lend == want.Lend &&
		!o.Raw && o.Overlay == want.Overlay && (o.Size == want.Size || o.Overlay) &&
		max(o.BlockSize, 512) == max(want.BlockSize, 512)
}

// Arg0 is the first word of a broker's command line; the second one is the machine's name, and the
// third one is there if it has a Janitor.
const Arg0 = control.BrokerArg0

const withJanitor = "janitor"

// Descriptors of the broker.
const (
	pairFD = lifeFD + 1 + iota
	janitorFD
)

// keeperFD is a pidfd of the keeper's machine.
const keeperFD = lifeFD + 1

// Main is the program of the broker. log takes a line for the user.
func Main(args []string, log func(string)) error {
	if len(args) < 2 || len(args) > 3 {
		return errors.New("gvm starts this program itself")
	}
	name := args[1]
	pair := os.NewFile(pairFD, "pair")
	unix.CloseOnExec(pairFD)
	cred, err := unix.GetsockoptUcred(pairFD, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return fmt.Errorf("broker of %s: SO_PEERCRED: %w", name, err)
	}
	machine := int(cred.Pid)
	c, err := net.FileConn(pair)
	if err != nil {
		return fmt.Errorf("broker of %s: %w", name, err)
	}
	pair.Close()
	process, err := unix.PidfdOpen(machine, 0)
	if err != nil {
		process = -1 // it is dead
	}
	said := func(s string) { log(fmt.Sprintf("machine %s: %s", name, s)) }
	b := newBroker(c.(*net.UnixConn), name, machine, said)
	if len(args) == 3 {
		unix.CloseOnExec(janitorFD)
		conn, err := pairEnd(janitorFD)
		if err != nil {
			return fmt.Errorf("broker of %s: %w", name, err)
		}
		b.kernel = newJailed(name, conn)
	}
	inOrder := b.serve()
	err = errors.Join(b.removeOwn(), b.closeDoor())
	if owns := lio.Owns(machine); owns || !inOrder {
		_ = send(b.conn, message{Op: end}, nil) // it does not wait for this process
		err = errors.Join(err, afterDeath(process))
	}
	return err
}

// pass passes a connection to the machine, and lets that open the files of the request.
func (b *broker) pass(conn *net.UnixConn, head []byte, add *control.AddDisk) error {
	if add != nil {
		if d, err := disk.Added(*add); err == nil { // else the machine says why
			b.grant(d)
		}
	}
	f, err := conn.File()
	if err != nil {
		return err
	}
	defer f.Close()
	err = send(b.conn, message{Op: connection}, head, f)
	switch {
	case errors.Is(err, unix.EPIPE), errors.Is(err, unix.ECONNRESET), errors.Is(err, net.ErrClosed):
		return nil // the machine has ended
	case err != nil:
		return fmt.Errorf("control socket: a request is lost: %w", err)
	}
	return nil
}

// afterDeath waits for the end of a machine, and removes the kernel's targets that it has left.
func afterDeath(process int) error {
	if process >= 0 {
		// The descriptors of a process are closed before it counts as dead.
		fds := []unix.PollFd{{Fd: int32(process), Events: unix.POLLIN}}
		for {
			if _, err := unix.Poll(fds, -1); err != unix.EINTR {
				break
			}
		}
	}
	if _, err := os.Stat(lio.DefaultRoot); err != nil {
		return nil
	}
	_, err := lio.Collect("")
	return err
}
