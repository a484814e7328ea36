// Package hostfstest mounts a file system of the host that answers badly, for tests.
package hostfstest

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvm/panics"
)

// Hang is for a request that is never answered.
const Hang = ^unix.Errno(0)

// Opcodes of <linux/fuse.h>.
const (
	Lookup      = 1
	forget      = 2
	getattr     = 3
	setattr     = 4
	mkdir       = 9
	Open        = 14
	write       = 16
	statfs      = 17
	release     = 18
	Flush       = 25
	initialize  = 26
	Create      = 35
	Poll        = 40
	batchForget = 42
)

var order = binary.LittleEndian

// Mount mounts a file system with one file, named file, at a new directory. Files and directories
// can be made, but files keep nothing. It answers a request as reply says: with an error number, or
// never. The function that it returns ends the file system, as does the end of the test.
func Mount(t testing.TB, dir string, reply func(opcode uint32) unix.Errno) (end func()) {
	t.Helper()
	s := mount(t, dir)
	end = sync.OnceFunc(s.end)
	t.Cleanup(end)
	s.serve(func(opcode uint32, _ string) unix.Errno { return reply(opcode) })
	return end
}

// Mortal is a file system that answers until it is struck. After that it does not even take
// requests, so that a signal still ends a process that waits for it.
type Mortal struct {
	t testing.TB
	*server
	left atomic.Int32           // answers from the next OPEN on; 0: all
	last atomic.Pointer[string] // the name whose LOOKUP has the last answer; nil: none
}

// MountMortal mounts a file system like that of Mount, until the end of the test.
func MountMortal(t testing.TB, dir string) *Mortal {
	t.Helper()
	s := mount(t, dir)
	t.Cleanup(s.end)
	// The kernel learns that there is no FLUSH, which a process sends for each file at its exit, and
	// whose wait nothing ends.
	released := make(chan struct{}, 1)
	m := &Mortal{t: t, server: s}
	opened := false
	s.serve(func(opcode uint32, name string) unix.Errno {
		opened = opened || opcode == Open && m.left.Load() > 0
		last := m.last.Load()
		if opened && m.left.Add(-1) == 0 || opcode == Lookup && last != nil && *last == name {
			m.wakeUp()
		}
		switch opcode {
		case Flush:
			return unix.ENOSYS
		case release:
			select {
			case released <- struct{}{}:
			default:
			}
		}
		return 0
	})
	fd, err := unix.Open(filepath.Join(dir, "file"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Close(fd); err != nil {
		t.Fatal(err)
	}
	<-released
	return m
}

// Strike ends the answers.
func (m *Mortal) Strike() {
	m.wakeUp()
	<-m.done
}

// StrikeAfter ends the answers after n of them, of which the first is to the next OPEN.
func (m *Mortal) StrikeAfter(n int) { m.left.Store(int32(n)) }

// StrikeAfterLookup ends the answers with that to the next LOOKUP of a name.
func (m *Mortal) StrikeAfterLookup(name string) { m.last.Store(&name) }

// Struck is closed when there are no more answers.
func (m *Mortal) Struck() <-chan struct{} { return m.done }

func (m *Mortal) wakeUp() {
	if _, err := unix.Write(m.wake, order.AppendUint64(nil, 1)); err != nil {
		m.t.Error(err)
	}
}

// Asked waits until a process waits for an answer, and reports whether that is before the time.
func (m *Mortal) Asked(most time.Duration) bool {
	for end := time.Now().Add(most); time.Now().Before(end); {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(m.dev), Events: unix.POLLIN}}, 100)
		if n > 0 && err == nil {
			return true
		}
	}
	return false
}

// server serves a file system.
type server struct {
	t    testing.TB
	dir  string
	dev  int
	wake int // an eventfd, which ends the service
	done chan struct{}

	nodes []node // the first has number 1, and is the root
}

// node is a directory, or a file, which has no names.
type node struct{ names map[string]uint64 }

func mount(t testing.TB, dir string) *server {
	t.Helper()
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	dev, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Skipf("needs /dev/fuse: %v", err)
	}
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", dev)
	if err := unix.Mount("hostfstest", dir, "fuse", 0, options); err != nil {
		unix.Close(dev)
		t.Skipf("needs to mount: %v", err)
	}
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	return &server{t, dir, dev, wake, make(chan struct{}), []node{{map[string]uint64{"file": 2}}, {}}}
}

func (s *server) end() {
	if err := unix.Unmount(s.dir, unix.MNT_FORCE|unix.MNT_DETACH); err != nil { // which aborts requests
		s.t.Error(err)
	}
	<-s.done
	unix.Close(s.dev)
	unix.Close(s.wake)
}

// serve answers requests until the end of the file system, or until it is woken.
func (s *server) serve(reply func(opcode uint32, name string) unix.Errno) {
	panics.Go(func() {
		defer close(s.done)
		in := make([]byte, 1<<20)
		for {
			fds := []unix.PollFd{{Fd: int32(s.dev), Events: unix.POLLIN}, {Fd: int32(s.wake), Events: unix.POLLIN}}
			if _, err := unix.Poll(fds, -1); err != nil && err != unix.EINTR {
				return
			}
			if fds[1].Revents != 0 {
				return
			}
			n, err := unix.Read(s.dev, in)
			if err == unix.EINTR || err == unix.ENOENT || err == unix.EAGAIN {
				continue
			}
			if err != nil {
				return // unmounted
			}
			s.answer(in[:n], reply)
		}
	})
}

// answer answers a request.
func (s *server) answer(in []byte, reply func(opcode uint32, name string) unix.Errno) {
	opcode, id := order.Uint32(in[4:]), order.Uint64(in[16:])
	if opcode == forget || opcode == batchForget {
		return
	}
	name := ""
	if args, ok := beforeName[opcode]; ok {
		name = unix.ByteSliceToString(in[40+args:])
	}
	no := reply(opcode, name)
	if no == Hang {
		return
	}
	if no == 0 && name != "" {
		id, no = s.named(id, name, opcode)
	}
	var body []byte
	switch {
	case no != 0:
	case opcode == initialize:
		body = words([]uint32{7, 31, 0, 0, 0, 4096}, make([]byte, 40))
	case opcode == getattr, opcode == setattr:
		body = words(make([]byte, 16), s.attr(id))
	case opcode == Lookup, opcode == mkdir:
		body = words([]uint64{id, 0, 0, 0, 0}, s.attr(id))
	case opcode == Create:
		body = words([]uint64{id, 0, 0, 0, 0}, s.attr(id), []uint64{1, 0})
	case opcode == Open:
		body = words([]uint64{1, 0})
	case opcode == write:
		body = words([]uint32{order.Uint32(in[56:]), 0}) // the size of fuse_write_in
	case opcode == statfs:
		body = make([]byte, 80)
	case opcode != Flush && opcode != release:
		no = unix.ENOSYS
	}
	unix.Write(s.dev, words([]uint32{uint32(16 + len(body)), uint32(-int32(no))}, in[8:16], body))
}

// beforeName has the sizes of the arguments before the name, of requests that have one.
var beforeName = map[uint32]int{Lookup: 0, mkdir: 8, Create: 16}

// named returns the node of a name in a directory, which a request other than LOOKUP makes.
func (s *server) named(dir uint64, name string, opcode uint32) (uint64, unix.Errno) {
	names := s.nodes[dir-1].names
	id, ok := names[name]
	switch {
	case opcode == Lookup && !ok:
		return 0, unix.ENOENT
	case opcode == mkdir && ok:
		return 0, unix.EEXIST
	case !ok:
		n := node{}
		if opcode == mkdir {
			n.names = map[string]uint64{}
		}
		s.nodes = append(s.nodes, n)
		id = uint64(len(s.nodes))
		names[name] = id
	}
	return id, 0
}

// attr returns a node's struct fuse_attr.
func (s *server) attr(id uint64) []byte {
	mode := uint32(unix.S_IFREG | 0o644)
	if s.nodes[id-1].names != nil {
		mode = unix.S_IFDIR | 0o755
	}
	return words([]uint64{id, 0, 0, 0, 0, 0}, []uint32{0, 0, 0, mode, 1, 0, 0, 0, 512, 0})
}

// words puts slices of integers behind each other.
func words(parts ...any) (b []byte) {
	for _, p := range parts {
		b, _ = binary.Append(b, order, p) // of a fixed size: no error
	}
	return b
}
