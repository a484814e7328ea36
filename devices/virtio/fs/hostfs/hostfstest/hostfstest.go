// Package hostfstest mounts a file system of the host that answers badly, for tests.
package hostfstest

import (
	"encoding/binary"
	"fmt"
	"os"
	"sync"
	"testing"

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
	open        = 14
	statfs      = 17
	release     = 18
	Flush       = 25
	initialize  = 26
	batchForget = 42
)

var order = binary.LittleEndian

// Mount mounts a file system, which is one directory with a file in it, at a new directory. It
// answers a request as reply says: with an error number, or never. The function that it returns
// ends the file system, as does the end of the test.
func Mount(t testing.TB, dir string, reply func(opcode uint32) unix.Errno) (end func()) {
	t.Helper()
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	dev, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skipf("needs /dev/fuse: %v", err)
	}
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", dev)
	if err := unix.Mount("hostfstest", dir, "fuse", 0, options); err != nil {
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
	panics.Go(func() {
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
			if opcode == forget || opcode == batchForget {
				continue
			}
			no := reply(opcode)
			if no == Hang {
				continue
			}
			mode := uint32(unix.S_IFREG | 0o644)
			if node == 1 && opcode != Lookup {
				mode = unix.S_IFDIR | 0o755
			}
			attr := words([]uint64{node + 1, 0, 0, 0, 0, 0}, []uint32{0, 0, 0, mode, 1, 0, 0, 0, 512, 0})
			var body []byte
			switch {
			case no != 0:
			case opcode == initialize:
				body = words([]uint32{7, 31, 0, 0, 0, 4096}, make([]byte, 40))
			case opcode == getattr:
				body = words(make([]byte, 16), attr)
			case opcode == Lookup:
				body = words([]uint64{2, 0, 0, 0, 0}, attr)
			case opcode == open:
				body = words([]uint64{1, 0})
			case opcode == statfs:
				body = make([]byte, 80)
			case opcode != Flush && opcode != release:
				no = unix.ENOSYS
			}
			unix.Write(dev, words([]uint32{uint32(16 + len(body)), uint32(-int32(no))}, in[8:16], body))
		}
	})
	return end
}

// words puts slices of integers behind each other.
func words(parts ...any) (b []byte) {
	for _, p := range parts {
		b, _ = binary.Append(b, order, p) // of a fixed size: no error
	}
	return b
}
