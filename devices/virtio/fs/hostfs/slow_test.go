package hostfs

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// host mounts a file system, which is one directory with a file in it. It answers a request as reply
// says: with an error number, or with hang never. The function that it returns ends it.
func host(t *testing.T, dir string, reply func(opcode uint32) unix.Errno) (end func()) {
	t.Helper()
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	dev, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skipf("needs /dev/fuse: %v", err)
	}
	if err := unix.Mount("host", dir, "fuse", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", dev)); err != nil {
		unix.Close(dev)
		t.Skipf("needs to mount: %v", err)
	}
	done := make(chan struct{})
	end = sync.OnceFunc(func() {
		if err := unix.Unmount(dir, unix.MNT_FORCE|unix.MNT_DETACH); err != nil { // which aborts requests
			t.Error(err)
		}
		<-done
		unix.Close(dev)
	})
	t.Cleanup(end)
	go func() {
		defer close(done)
		in := make([]byte, 1<<16)
		for {
			n, err := unix.Read(dev, in)
			if err == unix.EINTR || err == unix.ENOENT || err == unix.EAGAIN {
				continue
			}
			if err != nil {
				return // unmounted
			}
			opcode, node := order.Uint32(in[4:]), order.Uint64(in[16:n])
			if opcode == opForget || opcode == opBatchForget {
				continue
			}
			no := reply(opcode)
			if no == hang {
				continue
			}
			mode := uint32(unix.S_IFREG | 0o644)
			if node == 1 && opcode != opLookup {
				mode = unix.S_IFDIR | 0o755
			}
			attr := put32(put64(nil, node+1, 0, 0, 0, 0, 0), 0, 0, 0, mode, 1, 0, 0, 0, 512, 0)
			var body []byte
			switch {
			case no != 0:
			case opcode == opInit:
				body = append(put32(nil, 7, 31, 0, 0, 0, 4096), make([]byte, initOutLen-24)...)
			case opcode == opGetattr:
				body = append(make([]byte, 16), attr...)
			case opcode == opLookup:
				body = append(put64(nil, 2, 0, 0, 0, 0), attr...)
			case opcode == opOpen:
				body = put64(nil, 1, 0)
			case opcode == opStatfs:
				body = make([]byte, 80)
			case opcode != opFlush && opcode != opRelease:
				no = unix.ENOSYS
			}
			answer := put32(nil, uint32(outHeaderLen+len(body)), uint32(-int32(no)))
			unix.Write(dev, append(put64(answer, order.Uint64(in[8:])), body...))
		}
	}()
	return end
}

const hang = ^unix.Errno(0)

// TestHungClose: the close of a file, for which the host does not answer, keeps back that request alone.
func TestHungClose(t *testing.T) {
	dir := t.TempDir()
	asked := make(chan struct{}, 10)
	end := host(t, filepath.Join(dir, "hung"), func(opcode uint32) unix.Errno {
		if opcode == opFlush {
			asked <- struct{}{}
			return hang
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
