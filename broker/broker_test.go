package broker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvm/control"
	"gvm/devices/block"
	"gvm/devices/scsi/lio"
	"gvm/devices/scsi/sidecar"
	"gvm/machine/disk"
	"gvm/text"
)

// With machineEnv the test binary is a machine with a name in that directory, that does nothing,
// and with sandboxEnv it is in a sandbox, with aloneEnv it has no control socket, with earlyEnv it
// is still at its start.
const (
	machineEnv = "GVM_TEST_MACHINE"
	sandboxEnv = "GVM_TEST_SANDBOX"
	aloneEnv   = "GVM_TEST_ALONE"
	earlyEnv   = "GVM_TEST_EARLY"
)

func TestMain(m *testing.M) {
	var err error
	switch os.Args[0] {
	case Arg0:
		err = Main(os.Args, func(s string) { println(s) })
	case KeeperArg0:
		err = Keep(os.Args)
	}
	if err != nil {
		println(err.Error())
		os.Exit(1)
	}
	if os.Args[0] == Arg0 || os.Args[0] == KeeperArg0 {
		os.Exit(0)
	}
	if dir := os.Getenv(machineEnv); dir != "" {
		idle(dir)
	}
	os.Exit(m.Run())
}

// fakeMachine has the disks of a real one, of which it opens the files.
type fakeMachine struct {
	control.Machine
	files block.Files
	added chan *block.File
}

func (m *fakeMachine) Info() control.Info { return control.Info{Name: "m"} }

func (m *fakeMachine) AddDisk(_ context.Context, a control.AddDisk) (control.Change, error) {
	d, err := disk.Added(a)
	if err != nil {
		return control.Change{}, err
	}
	o := d.ImageOptions()
	o.Files = m.files
	f, err := block.Open(d.Path, o)
	if err != nil {
		return control.Change{}, control.Errorf(http.StatusConflict, "%v", err)
	}
	m.added <- f
	return control.Change{}, nil
}

// setup is a broker in this process, a machine, and a client of its control socket.
type setup struct {
	*Client
	broker  *broker
	machine *fakeMachine
	asks    *control.Client
	dir     string

	mu     sync.Mutex
	log    []string
	kernel kernel // of the broker, which holds mu meanwhile
}

// pair returns the two ends of a machine and its broker.
func pair(t *testing.T) (ours, theirs *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if ours, err = pairEnd(fds[0]); err == nil {
		theirs, err = pairEnd(fds[1])
	}
	if err != nil {
		t.Fatal(err)
	}
	return ours, theirs
}

func newSetup(t *testing.T) *setup {
	t.Helper()
	s := &setup{dir: t.TempDir()}
	ours, theirs := pair(t)
	d := control.In(filepath.Join(s.dir, "run"))
	server, err := control.Claim(d, "m")
	if err != nil {
		t.Fatal(err)
	}
	s.Client = newClient("m", ours, func(string) {})
	close(s.started)
	socket, lock, err := server.HandOver(listener{s.Client}, s.End)
	if err != nil {
		t.Fatal(err)
	}
	lock2, err := unix.FcntlInt(lock.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	door, err := control.NewDoor(d, "m", socket, os.NewFile(uintptr(lock2), "lock"), 0, func(err error) { t.Error(err) })
	if err != nil {
		t.Fatal(err)
	}
	s.broker = newBroker(theirs, "m", os.Getpid(), func(line string) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.log = append(s.log, line)
	})
	s.kernel = s.broker.kernel
	s.broker.kernel = kernel{
		func(pid int, wwn string, u lio.Unit) ([]string, error) {
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.kernel.addTo(pid, wwn, u)
		},
		func(pid int, wwn string, lun int) error {
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.kernel.removeFrom(pid, wwn, lun)
		},
		func(pid int, wwn string) error {
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.kernel.takeDown(pid, wwn)
		},
	}
	door.Serve(s.broker.pass)
	go func() {
		if !s.broker.serve() {
			t.Error("the machine has not ended in order")
		}
		if err := door.Close(); err != nil {
			t.Error(err)
		}
		theirs.Close()
		close(s.over)
	}()
	go s.receive()
	s.machine = &fakeMachine{files: s.Client, added: make(chan *block.File, 1)}
	server.Serve(s.machine)
	s.asks = control.NewClient(d, "m")
	t.Cleanup(func() {
		if err := server.Close(); err != nil {
			t.Error(err)
		}
		if left, _ := filepath.Glob(filepath.Join(s.dir, "run/*")); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	})
	return s
}

func (s *setup) image(t *testing.T, name string) string {
	t.Helper()
	path := filepath.Join(s.dir, name)
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// add has the owner of the socket add a disk, and returns its image.
func (s *setup) add(t *testing.T, words string) *block.File {
	t.Helper()
	if _, err := s.asks.AddDisk(t.Context(), control.AddDisk{Disk: text.Name(words)}); err != nil {
		t.Fatal(err)
	}
	f := <-s.machine.added
	t.Cleanup(func() { f.Close() })
	return f
}

// TestAdd: the machine gets the image that a request names, locked, with the files beside it.
func TestAdd(t *testing.T) {
	s := newSetup(t)
	if err := s.Shut(); err != nil {
		t.Fatal(err)
	}
	if i, err := s.asks.Info(t.Context()); err != nil || i.Name != "m" {
		t.Errorf("%+v, %v", i, err)
	}
	path := filepath.Join(s.dir, "new.img")
	f := s.add(t, path+",size=1M,pi=1")
	if f.Path() != path || f.Identity() != path || f.Size() != 1<<20 || f.ReadOnly() || f.BlockSize() != 512 {
		t.Errorf("%s, %s: %d bytes", f.Path(), f.Identity(), f.Size())
	}
	if _, err := f.WriteAt([]byte("text"), 0); err != nil {
		t.Error(err)
	}
	if b, err := os.ReadFile(path); err != nil || !bytes.HasPrefix(b, []byte("text")) {
		t.Errorf("%.4q, %v", b, err)
	}
	if _, err := block.Open(path, block.Options{}); !errors.Is(err, block.ErrLocked) {
		t.Errorf("opened again: %v", err)
	}

	r := sidecar.NewReservations(f)
	state := append([]byte("GVM-PR\x00\x01"), make([]byte, 20<<10)...)
	if b, err := r.Load(); b != nil || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	if err := r.Save(state); err != nil {
		t.Error(err)
	}
	if b, err := r.Load(); !bytes.Equal(b, state) || err != nil {
		t.Errorf("%d bytes, %v", len(b), err)
	}
	if err := r.Save(nil); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path + ".pr"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}

	tuples, err := sidecar.OpenTuples(f)
	if err != nil {
		t.Fatal(err)
	}
	if err := tuples.WriteTuples([]byte("12345678"), 1); err != nil {
		t.Error(err)
	}
	if err := tuples.Close(); err != nil {
		t.Error(err)
	}
	if fi, err := os.Stat(path + ".pi"); err != nil || fi.Mode() != 0o600 {
		t.Error(err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	again, err := block.Open(path, block.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Close(); err != nil {
		t.Error(err)
	}
}

// TestAddErrors: the machine has the errors of the broker as its own.
func TestAddErrors(t *testing.T) {
	s := newSetup(t)
	if err := s.Shut(); err != nil {
		t.Fatal(err)
	}
	gz := filepath.Join(s.dir, "d.img")
	if err := os.WriteFile(gz, append([]byte("\x1f\x8b\x08"), make([]byte, 1<<20)...), 0o600); err != nil {
		t.Fatal(err)
	}
	used := s.image(t, "used.img")
	link := filepath.Join(s.dir, "link.img")
	if err := os.Symlink(used, link); err != nil {
		t.Fatal(err)
	}
	s.add(t, used)
	for words, want := range map[string]string{
		gz:                                "gzip file; decompress it first",
		filepath.Join(s.dir, "no.img"):    "file does not exist; check the path, or give a size to create it",
		used + ",size=2M,block_size=4096": "given twice: one image can be written by one disk only",
		link:                              "given twice: " + used + " is the same storage",
		s.dir:                             "is a directory, not a disk image; want a regular file or a block device",
	} {
		_, err := s.asks.AddDisk(t.Context(), control.AddDisk{Disk: text.Name(words)})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", words, err, want)
		}
	}
	for _, kind := range []error{block.ErrLocked, block.ErrFormat, fs.ErrNotExist, unix.ENOSPC} {
		if err := encodeError(&fs.PathError{Op: "open", Path: "x", Err: kind}, 1).decode(); !errors.Is(err, kind) {
			t.Errorf("%v is not %v", err, kind)
		}
	}
}

// TestHostile: the broker opens no file for a machine that no request names.
func TestHostile(t *testing.T) {
	s := newSetup(t)
	kept := s.image(t, "kept.img")
	first, err := s.Image(kept, block.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	if err := s.Shut(); err != nil {
		t.Fatal(err)
	}
	secret := s.image(t, "secret.img")
	named := s.image(t, "named.img")
	// Too late for another file of the command line.
	if err := send(s.conn, message{Op: keep, Paths: []text.Name{text.Name(secret)}}, nil); err != nil {
		t.Fatal(err)
	}
	if d, err := disk.Parse(named + ",readonly,pi=1"); err != nil {
		t.Fatal(err)
	} else {
		s.broker.grant(d)
	}
	readOnly := block.Options{ReadOnly: true, BlockSize: 512}
	refused := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, unix.EACCES) {
			t.Errorf("%s: %v", what, err)
		}
	}
	opened := func(path string, flag int) error {
		f, err := s.Open(path, flag, 0o600)
		if err == nil {
			if f.Name() != path {
				t.Errorf("messages call %s %s", path, f.Name())
			}
			f.Close()
		}
		return err
	}
	for _, o := range []block.Options{{}, {ReadOnly: true, Raw: true}, {ReadOnly: true, NoLock: true},
		{ReadOnly: true, Size: 4 << 20}, {ReadOnly: true, Lend: true}, {ReadOnly: true, Direct: true},
		{ReadOnly: true, Overlay: true}, {ReadOnly: true, BlockSize: 4096}} {
		_, err := s.Image(named, o)
		refused("the image with other options", err)
	}
	_, err = s.Image(secret, readOnly)
	refused("another image", err)
	_, err = s.Image(kept, block.Options{})
	refused("one of the command line", err)
	_, err = s.Temporary()
	refused("a temporary file", err)
	refused("a file beside the image, before it", opened(named+".pi", os.O_RDONLY))
	f, err := s.Image(named, readOnly)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	_, err = s.Image(named, readOnly)
	refused("the image once more", err)
	if err := opened(named+".pi", os.O_RDONLY); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	refused("to write beside it", opened(named+".pi", os.O_RDWR|os.O_CREATE))
	refused("the image itself", opened(named, os.O_RDONLY))
	if err := opened(kept+".pr", os.O_RDWR|os.O_CREATE); err != nil {
		t.Error(err)
	}
	refused("a truncated file", opened(kept+".pr", os.O_RDWR|os.O_TRUNC))
	refused("a name that means the same", opened(s.dir+"/./kept.img.pr", os.O_RDWR))
	refused("a file of the host", opened("/etc/passwd", os.O_RDONLY))
	refused("to replace a file", s.Replace(secret, []byte("x")))
	refused("to remove a file", s.Remove(secret))
	refused("to remove the image", s.Discard(os.Stdin, named))
	refused("to write a directory", s.Sync(os.Stdin, secret))
	_, err = s.call(message{Op: "unlink", Path: "/etc/passwd"}, nil)
	refused("another operation", err)
	_, err = s.call(message{Op: syncFile, Path: text.Name(kept + ".pr")}, nil)
	refused("a file that is not there", err)
	if err := s.Replace(kept+".pr", []byte("GVM-PR\x00")); err != nil {
		t.Error(err)
	}
	for _, path := range []string{kept, secret, named} {
		if _, err := os.Stat(path); err != nil {
			t.Error(err)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	want := `image "` + named + `": refused, as no request of the control socket names it`
	if len(s.log) != maxRefusals+1 || s.log[0] != want {
		t.Errorf("%d lines: %q", len(s.log), s.log)
	}
}

// TestPassMeetsEnd: the broker says nothing of a request to a machine that has ended.
func TestPassMeetsEnd(t *testing.T) {
	ours, theirs := pair(t)
	defer theirs.Close()
	connection, far := pair(t)
	defer connection.Close()
	defer far.Close()
	ours.Close()
	b := newBroker(theirs, "m", 1, func(string) {})
	if err := b.pass(connection, []byte("GET"), nil); err != nil {
		t.Error(err)
	}
}

// TestGrantEnds: a request that the machine has refused is not for later.
func TestGrantEnds(t *testing.T) {
	s := newSetup(t)
	if err := s.Shut(); err != nil {
		t.Fatal(err)
	}
	path := s.image(t, "disk.img")
	d, err := disk.Parse(path + ",overlay=on")
	if err != nil {
		t.Fatal(err)
	}
	s.broker.grant(d)
	if f, err := s.Temporary(); err != nil {
		t.Error(err)
	} else {
		f.Close()
	}
	s.broker.grant(d)
	s.broker.mu.Lock()
	g := s.broker.images[path]
	g.until = time.Now()
	s.broker.images[path] = g
	s.broker.temporaries[0] = g.until
	s.broker.mu.Unlock()
	if _, err := s.Image(path, d.ImageOptions()); !errors.Is(err, unix.EACCES) {
		t.Error(err)
	}
	if _, err := s.Temporary(); !errors.Is(err, unix.EACCES) {
		t.Error(err)
	}
}

// TestGrantsAreBounded: requests that the machine refuses make the broker keep no more and no more
// of them.
func TestGrantsAreBounded(t *testing.T) {
	b := newBroker(nil, "m", 0, nil)
	b.images["made"] = image{made: true}
	last := ""
	for i := range 4 * maxGrants {
		last = fmt.Sprintf("/%d.img", i)
		b.grant(disk.Spec{Path: last, Overlay: fmt.Sprintf("/%d.top", i)})
		b.grant(disk.Spec{Path: last, Overlay: disk.OverlayOn})
	}
	b.grant(disk.Spec{Path: "/" + strings.Repeat("x", maxPath)})
	const most = maxGrants + 3 // of the last two requests, and the file that was made
	if _, ok := b.images[last]; !ok || len(b.images) > most || len(b.temporaries) > most || !b.images["made"].made {
		t.Errorf("%d images and %d temporary files; the last one: %v", len(b.images), len(b.temporaries), ok)
	}
}

// TestOverlay continues an overlay, and makes one that ends with the machine.
func TestOverlay(t *testing.T) {
	s := newSetup(t)
	if err := s.Shut(); err != nil {
		t.Fatal(err)
	}
	base, top := s.image(t, "base.img"), filepath.Join(s.dir, "top")
	for i, overlay := range []string{top, top, "on"} {
		d, err := disk.Parse(base + ",overlay=" + overlay)
		if err != nil {
			t.Fatal(err)
		}
		s.broker.grant(d)
		o := d.ImageOptions()
		o.Files = s.Client
		b, err := block.Open(base, o)
		if err != nil {
			t.Fatal(err)
		}
		v, err := block.OpenOverlay(b, strings.TrimPrefix(overlay, "on"))
		if err != nil {
			t.Fatal(err)
		}
		const none = "\x00\x00\x00\x00"
		got := make([]byte, 4)
		if _, err := v.ReadAt(got, 4096); err != nil || string(got) != []string{none, "text", none}[i] {
			t.Errorf("%d: %q, %v", i, got, err)
		}
		if _, err := v.WriteAt([]byte("text"), 4096); err != nil {
			t.Error(err)
		}
		if err := v.Close(); err != nil {
			t.Error(err)
		}
	}
	// A file that is no overlay stays as it is.
	if err := os.WriteFile(top, []byte("a text"), 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := disk.Parse(base + ",overlay=" + top)
	if err != nil {
		t.Fatal(err)
	}
	s.broker.grant(d)
	o := d.ImageOptions()
	o.Files = s.Client
	b, err := block.Open(base, o)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if _, err := block.OpenOverlay(b, top); !errors.Is(err, block.ErrFormat) {
		t.Error(err)
	}
	if b, err := os.ReadFile(top); string(b) != "a text" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
}

// FuzzMessage: a machine that sends anything gets nothing.
func FuzzMessage(f *testing.F) {
	for _, line := range []string{`{"ID":1,"Op":"image","Path":"/etc/passwd","Options":{"ReadOnly":true}}`,
		`{"ID":1,"Op":"open","Path":"/etc/passwd","Flag":2}`, `{"Op":"connection"}`, `{"ID":2,"Op":"temporary"}`,
		`{"ID":3,"Op":"replace","Path":"/etc/passwd"}` + "\ndata", `{"Op":"closed","Paths":["/etc/passwd"]}`} {
		f.Add([]byte(line + "\n"))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		ours, theirs := pair(t)
		defer ours.Close()
		defer theirs.Close()
		if len(b) > maxMessage/2 {
			return
		}
		s := newBroker(theirs, "m", 1, func(string) {})
		s.closed = true
		if _, _, err := ours.WriteMsgUnix(b, nil, nil); err != nil {
			t.Fatal(err)
		}
		m, data, files, err := newReceiver(theirs).next()
		if err != nil || m.Op == keep || m.Op == closed || m.Op == end {
			return
		}
		a, opened, err := s.do(m, data, files)
		if err == nil || len(opened) > 0 || a.Facts != nil {
			t.Errorf("%+v: %v", m, err)
		}
		s.answer(m, a, opened, err)
		r, _, _, err := newReceiver(ours).next()
		if err != nil || r.ID != m.ID || r.Err == nil || r.Err.decode() == nil {
			t.Errorf("%+v, %v", r, err)
		}
	})
}

// TestDoorMessage: the control socket is handed over once, with its lock, and before closed.
func TestDoorMessage(t *testing.T) {
	ours, theirs := pair(t)
	refusals := make(chan string, maxRefusals+1)
	b := newBroker(theirs, "m", 1, func(line string) { refusals <- line })
	over := make(chan struct{})
	go func() {
		b.serve()
		close(over)
	}()
	d := control.In(filepath.Join(t.TempDir(), "run"))
	s, err := control.Claim(d, "m")
	if err != nil {
		t.Fatal(err)
	}
	socket, lock, err := s.HandOver(nil, func() error { return errOwn })
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		notice
		files   []*os.File
		refused bool
	}{
		{notice{Op: door, Path: text.Name(d.Path())}, nil, true},
		{notice{Op: door, Path: text.Name(d.Path())}, []*os.File{socket}, true},
		{notice{Op: door, Path: text.Name(d.Path())}, []*os.File{lock, lock}, true}, // no socket
		{notice{Op: door, Path: text.Name(d.Path())}, []*os.File{socket, lock}, false},
		{notice{Op: door, Path: text.Name(d.Path())}, []*os.File{lock, lock}, true},
		{notice{Op: closed}, nil, false},
		{notice{Op: door, Path: text.Name(d.Path())}, []*os.File{lock, lock}, true},
	} {
		if err := send(ours, step.notice, nil, step.files...); err != nil {
			t.Fatal(err)
		}
		if step.refused {
			t.Log(<-refusals)
		}
	}
	socket.Close()
	ours.Close()
	<-over
	if err := b.closeDoor(); err != nil {
		t.Error(err)
	}
	if len(refusals) > 0 {
		t.Errorf("refused too: %s", <-refusals)
	}
	if list, err := d.List(); err != nil || len(list) > 0 {
		t.Errorf("left: %v, %v", list, err)
	}
	if err := s.Release(); err != nil { // the lock is closed
		t.Error(err)
	}
}

// TestEndBeforeShut: a start that fails gives up the machine's name, which the broker has not got.
func TestEndBeforeShut(t *testing.T) {
	d := control.In(filepath.Join(t.TempDir(), "run"))
	s, err := control.Claim(d, "m")
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := pair(t)
	c := newClient("m", ours, func(line string) { t.Error(line) })
	go c.receive()
	go func() {
		b := newBroker(theirs, "m", 1, func(line string) { t.Error(line) })
		b.serve()
		theirs.Close()
		close(c.over)
	}()
	if err := c.Serve(s, d); err != nil {
		t.Fatal(err)
	}
	close(c.started) // too late for Serve, and before Start's own look
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if left, _ := filepath.Glob(filepath.Join(d.Path(), "*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}
