package nowait_test

import (
	"testing"

	"golang.org/x/sys/unix"

	"gvm/kvmapi/nowait"
)

// TestStream: Write and Writev send, Read receives, and each says when that would wait.
func TestStream(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[0])
	b := make([]byte, 100)
	if n, err := nowait.Read(fds[1], b); err != unix.EAGAIN {
		t.Errorf("read of nothing: %d, %v, want EAGAIN", n, err)
	}
	var v nowait.Vectors
	for _, buffers := range [][][]byte{{[]byte("one"), nil, []byte(" two")}, {[]byte(" three")}} {
		if _, err := v.Writev(fds[0], buffers); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := nowait.Write(fds[0], []byte(" four")); err != nil {
		t.Fatal(err)
	}
	const want = "one two three four"
	if n, err := nowait.Read(fds[1], b); err != nil || string(b[:n]) != want {
		t.Errorf("read %q, %v, want %q", b[:n], err, want)
	}
	for err = nil; err == nil; _, err = nowait.Write(fds[0], b) {
	}
	_, errv := v.Writev(fds[0], [][]byte{b})
	if err != unix.EAGAIN || errv != unix.EAGAIN {
		t.Errorf("writes without room: %v and %v, want EAGAIN", err, errv)
	}
	unix.Close(fds[1])
	if _, err := nowait.Write(fds[0], b); err != unix.EPIPE {
		t.Errorf("write without a reader: %v, want EPIPE", err)
	}
}
