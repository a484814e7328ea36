package hostfs

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvm/devices/block"
	"gvm/devices/virtio/fs/hostfs/hostfstest"
)

// TestReadOnly sends every request that changes something.
func TestReadOnly(t *testing.T) {
	o := newOutside(t, t.TempDir())
	c := open(t, Config{Dir: o.tree, ReadOnly: true, Valid: time.Hour})
	for opcode, row := range ops {
		if !row.changes {
			continue
		}
		if _, err := c.do(uint32(opcode), 1, make([]byte, row.args), "a", "b"); err != unix.EROFS {
			t.Errorf("opcode %d: %v", opcode, err)
		}
	}
	file := c.walk("file")
	for _, flags := range []uint32{unix.O_WRONLY, unix.O_RDWR, unix.O_TRUNC} {
		if _, err := c.do(opOpen, file, put32(nil, flags, 0)); err != unix.EROFS {
			t.Errorf("open with flags %#x: %v", flags, err)
		}
	}
	b := c.ok(opOpen, file, make([]byte, 8))
	if flags := order.Uint32(b[8:]); flags != keepCache {
		t.Errorf("open flags %#x", flags)
	}
	if b := c.ok(opRead, file, put64(put32(put64(nil, entry(b), 3), 100, 0), 0, 0)); string(b) != "the tree" {
		t.Errorf("read %q", b)
	}
	// That there is no file is remembered too.
	if b := c.ok(opLookup, 1, nil, "none"); entry(b) != 0 || order.Uint64(b[16:]) != 3600 {
		t.Errorf("% x", b)
	}
}

// TestDisk: the client does not write a file that a machine has as a disk, and writes one of which
// a program has locked a part.
func TestDisk(t *testing.T) {
	dir := t.TempDir()
	c := open(t, Config{Dir: dir})
	path := filepath.Join(dir, "disk.img")
	if err := os.WriteFile(path, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	node := c.walk("disk.img")
	write := func() (errs []error) {
		for _, flags := range []uint32{unix.O_WRONLY, unix.O_RDWR, unix.O_RDWR | unix.O_TRUNC, unix.O_TRUNC} {
			b, err := c.do(opOpen, node, put32(nil, flags, 0))
			if errs = append(errs, err); err == nil {
				c.ok(opRelease, node, put64(nil, entry(b), 0, 0))
			}
		}
		_, err := c.do(opCreate, 1, put32(nil, unix.O_RDWR|unix.O_TRUNC, 0o644, 0, 0), "disk.img")
		errs = append(errs, err)
		_, err = c.do(opSetattr, node, append(put64(put32(nil, setSize, 0), 0, 8192), make([]byte, 64)...))
		return append(errs, err)
	}
	for _, readOnly := range []bool{false, true} {
		f, err := block.Open(path, block.Options{ReadOnly: readOnly})
		if err != nil {
			t.Fatal(err)
		}
		for i, err := range write() {
			if err != unix.ETXTBSY {
				t.Errorf("readonly %v, write %d: %v", readOnly, i, err)
			}
		}
		c.ok(opRelease, node, put64(nil, c.openFile(opOpen, node, unix.O_RDONLY), 0, 0))
		if fi, err := f.Stat(); err != nil || fi.Size() != 4096 {
			t.Errorf("%d bytes, %v", fi.Size(), err)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
	if by, ok := loopOn(t, path); ok {
		for _, readOnly := range []bool{false, true} {
			f, err := block.Open(by, block.Options{ReadOnly: readOnly})
			if err != nil {
				t.Fatal(err)
			}
			for i, err := range write() {
				if err != unix.ETXTBSY {
					t.Errorf("by %s, readonly %v, write %d: %v", by, readOnly, i, err)
				}
			}
			f.Close()
		}
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	l := unix.Flock_t{Type: unix.F_WRLCK, Start: 100, Len: 100}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &l); err != nil {
		t.Fatal(err)
	}
	for i, err := range write() {
		if err != nil {
			t.Errorf("a part is locked, write %d: %v", i, err)
		}
	}
	if fi, err := f.Stat(); err != nil || fi.Size() != 8192 {
		t.Errorf("%d bytes, %v", fi.Size(), err)
	}
}

// loopOn makes a loop device on the middle of a file of 4096 bytes, if this process may.
func loopOn(t *testing.T, path string) (device string, ok bool) {
	c := exec.Command("losetup", "--find", "--show", "--offset", "1024", "--sizelimit", "2048", path)
	out, err := c.CombinedOutput()
	if device = strings.TrimSpace(string(out)); err != nil {
		t.Logf("without a loop device: losetup: %v: %s", err, device)
		return "", false
	}
	t.Cleanup(func() { _ = exec.Command("losetup", "--detach", device).Run() })
	return device, true
}

// TestIdentity replaces a file on the host by another, which may get the number of its inode.
func TestIdentity(t *testing.T) {
	for _, files := range []int{0, 3} {
		dir := t.TempDir()
		c := open(t, Config{Dir: dir, Files: files})
		path := filepath.Join(dir, "file")
		read := func(node uint64) string {
			h := c.openFile(opOpen, node, 0)
			defer c.ok(opRelease, node, put64(nil, h, 0, 0))
			return string(c.ok(opRead, node, put64(put32(put64(nil, h, 0), 100, 0), 0, 0)))
		}
		ids := map[uint64]bool{}
		for i := range 20 {
			text := fmt.Sprint("version ", i)
			if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
			id := c.walk("file")
			if got := read(id); got != text || ids[id] {
				t.Fatalf("with %d files, node %d: %q, want %q", files, id, got, text)
			}
			ids[id] = true
			if c.walk("file") != id {
				t.Fatal("another node for the same file")
			}
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			for j := range 3 {
				c.ok(opMkdir, 1, make([]byte, 8), fmt.Sprint("d", i, j))
			}
		}
	}
}

// TestFewFiles walks a tree that has more files than there are descriptors, and works with those
// that were closed: by its new name after a rename, after its removal, and while a program of the
// client has it open.
func TestFewFiles(t *testing.T) {
	dir := t.TempDir()
	c := open(t, Config{Dir: dir, Files: 12})
	parent := uint64(1)
	var ids []uint64
	for i := range 30 {
		parent = entry(c.ok(opMkdir, parent, put32(nil, 0o755, 0), "d"))
		ids = append(ids, parent, entry(c.ok(opMknod, parent, put32(nil, unix.S_IFREG|0o644, 0, 0, 0), fmt.Sprint(i))))
	}
	for range 2 {
		for _, id := range ids {
			c.ok(opGetattr, id, make([]byte, 16))
		}
	}
	if n := c.fs.Counts().Files; n > 12 {
		t.Errorf("%d descriptors", n)
	}
	// d/d/1 becomes moved, and d is renamed.
	c.ok(opRename, ids[2], put64(nil, 1), "1", "moved")
	c.ok(opRename, 1, put64(nil, 1), "d", "e")
	removed := entry(c.ok(opMknod, 1, put32(nil, unix.S_IFREG|0o644, 0, 0, 0), "removed"))
	c.ok(opUnlink, 1, nil, "removed")
	for _, id := range ids {
		c.ok(opGetattr, id, make([]byte, 16))
	}
	if b := c.ok(opGetattr, removed, make([]byte, 16)); order.Uint32(b[16+64:]) != 0 {
		t.Errorf("the removed file has links: % x", b)
	}
	// When all are in use, there are no more.
	var err error
	for i := 0; err == nil && i < 20; i++ {
		_, err = c.do(opOpendir, 1, make([]byte, 8))
	}
	if err != unix.ENFILE {
		t.Errorf("with too many open files: %v", err)
	}
}

// TestHungClose: the close of a file, for which the host does not answer, keeps back that request
// alone.
func TestHungClose(t *testing.T) {
	dir := t.TempDir()
	asked := make(chan struct{}, 10)
	end := hostfstest.Mount(t, filepath.Join(dir, "hung"), func(opcode uint32) unix.Errno {
		if opcode == opFlush {
			asked <- struct{}{}
			return hostfstest.Hang
		}
		return 0
	})
	c := open(t, Config{Dir: dir})
	node := c.walk("hung/file")
	h := c.openFile(opOpen, node, 0)
	message, done := c.message(opRelease, node, put64(nil, h, 0, 0)), make(chan error)
	go func() {
		_, err := c.fs.Serve([][]byte{message}, [][]byte{make([]byte, 100)})
		done <- err
	}()
	<-asked
	c.ok(opMkdir, 1, put32(nil, 0o755, 0), "beside")
	if n := c.fs.Counts().Handles; n != 0 {
		t.Errorf("%d open files", n)
	}
	end()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestInterrupted: a signal of this process that interrupts the host is not the client's matter.
func TestInterrupted(t *testing.T) {
	dir := t.TempDir()
	var interrupted atomic.Bool
	hostfstest.Mount(t, filepath.Join(dir, "slow"), func(opcode uint32) unix.Errno {
		if opcode == hostfstest.Lookup && interrupted.CompareAndSwap(false, true) {
			return unix.EINTR
		}
		return 0
	})
	c := open(t, Config{Dir: dir})
	if c.walk("slow/file"); !interrupted.Load() {
		t.Error("nothing was interrupted")
	}
}

// TestResetWhileServing: a request from before a reset keeps no descriptor after the next one.
func TestResetWhileServing(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "a", "b"), 0o700); err != nil {
		t.Fatal(err)
	}
	c := open(t, Config{Dir: dir}) // whose end checks the descriptors
	a, err := c.fs.use(c.walk("a"))
	if err != nil {
		t.Fatal(err)
	}
	c.ok(opDestroy, 1, nil)
	b, _, err := c.fs.child(a, "b")
	if err != nil {
		t.Fatal(err)
	}
	c.fs.know(b)
	c.fs.done(b)
	c.fs.done(a)
}

// TestReaddir lists a directory with little room, from every offset.
func TestReaddir(t *testing.T) {
	dir := t.TempDir()
	for i := range 300 {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("%0*d", i%200+3, i)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c := open(t, Config{Dir: dir})
	for _, opcode := range []uint32{opReaddir, opReaddirplus} {
		h := c.openFile(opOpendir, 1, 0)
		names := map[string]bool{}
		for offset := uint64(0); ; {
			b := c.ok(opcode, 1, put64(put32(put64(nil, h, offset), 512, 0), 0, 0))
			if len(b) == 0 {
				break
			}
			for len(b) > 0 {
				if opcode == opReaddirplus {
					node, name := entry(b), b[entryOutLen+direntLen]
					if node != 0 != (name != '.') {
						t.Fatalf("node %d of %q", node, name)
					}
					b = b[entryOutLen:]
				}
				n := int(order.Uint32(b[16:]))
				name := string(b[direntLen : direntLen+n])
				if names[name] {
					t.Fatalf("%q twice", name)
				}
				names[name] = true
				offset = order.Uint64(b[8:])
				b = b[(direntLen+n+7)&^7:]
			}
		}
		if len(names) != 302 {
			t.Errorf("opcode %d: %d names", opcode, len(names))
		}
		if _, err := c.do(opcode, 1, put64(put32(put64(nil, h, 0), 16, 0), 0, 0)); err != unix.EINVAL {
			t.Errorf("with no room for one: %v", err)
		}
	}
}

// TestMessages sends malformed messages, and ones that are too long.
func TestMessages(t *testing.T) {
	c := open(t, Config{Dir: t.TempDir()})
	out := make([]byte, 100)
	if n, err := c.fs.Serve([][]byte{make([]byte, 39)}, [][]byte{out}); n != 0 || err == nil {
		t.Errorf("a short header: %d, %v", n, err)
	}
	getattr := [][]byte{c.message(opGetattr, 1, make([]byte, 16))}
	if n, err := c.fs.Serve(getattr, [][]byte{out[:15]}); n != 0 || err == nil {
		t.Errorf("no room for a header: %d, %v", n, err)
	}
	n, err := c.fs.Serve(getattr, [][]byte{out})
	if n != outHeaderLen || err != nil || -int32(order.Uint32(out[4:])) != int32(unix.EIO) {
		t.Errorf("no room for an answer: %d, %v, % x", n, err, out[:16])
	}
	for _, tt := range []struct {
		opcode uint32
		args   []byte
		want   error
	}{
		{opGetattr, make([]byte, 15), unix.EINVAL},
		{opLookup, []byte("no end"), unix.EINVAL},
		{opLookup, append(bytes.Repeat([]byte("a"), 256), 0), unix.ENAMETOOLONG},
		{opSetxattr, make([]byte, 200<<10), unix.E2BIG},
		{0, nil, unix.ENOSYS},
		{4096, nil, unix.ENOSYS}, // CUSE_INIT
		{^uint32(0), nil, unix.ENOSYS},
		{opInterrupt, make([]byte, 8), unix.ENOSYS},
		{opInit, put32(nil, 7, 22, 0, 0), unix.EPROTO},
	} {
		if _, err := c.do(tt.opcode, 1, tt.args); err != tt.want {
			t.Errorf("opcode %d with %d bytes: %v, want %v", tt.opcode, len(tt.args), err, tt.want)
		}
	}
	// An answer to INTERRUPT is optional.
	if n, err := c.fs.Serve([][]byte{c.message(opInterrupt, 1, make([]byte, 8))}, nil); n != 0 || err != nil {
		t.Errorf("INTERRUPT without room for an answer: %d, %v", n, err)
	}
	b := c.ok(opInit, 1, put32(nil, 7, 50, 1<<20, ^uint32(0)))
	if len(b) != initOutLen || order.Uint32(b[4:]) != protocolMinor || order.Uint32(b[12:])&(1<<16|1<<30) != 0 {
		t.Errorf("init: % x", b)
	}
	if b := c.ok(opInit, 1, put32(nil, 8, 0, 0, 0)); order.Uint32(b) != 7 {
		t.Errorf("init of version 8: % x", b)
	}
}
