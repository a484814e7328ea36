package nowait_test

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"gvm/kvmapi/nowait"
)

// waitsInKernel returns when a thread of this process sleeps.
func waitsInKernel(t *testing.T, thread int) {
	t.Helper()
	for {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/stat", thread))
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(stat), ") S ") {
			return
		}
	}
}

// TestConnect: signals do not end a connect that waits for the other end, and a refused one has its
// error.
func TestConnect(t *testing.T) {
	socket := func() int {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		return fd
	}
	listener := socket()
	if err := unix.Bind(listener, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	to, err := unix.Getsockname(listener)
	if err != nil {
		t.Fatal(err)
	}
	if err := nowait.Connect(socket(), to); err != unix.ECONNREFUSED {
		t.Errorf("without a listener: %v", err)
	}
	if err := unix.Listen(listener, 0); err != nil {
		t.Fatal(err)
	}
	if err := nowait.Connect(socket(), to); err != nil { // takes the only place in the backlog
		t.Fatal(err)
	}
	tid, waits := make(chan int), make(chan error)
	fd := socket()
	// As the connect of vsock has. Without a bound Linux repeats the call by itself.
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{Sec: 600}); err != nil {
		t.Fatal(err)
	}
	go func() {
		runtime.LockOSThread()
		tid <- unix.Gettid()
		waits <- nowait.Connect(fd, to)
	}()
	thread := <-tid
	waitsInKernel(t, thread)
	for range 100 {
		if err := unix.Tgkill(os.Getpid(), thread, unix.SIGURG); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		accepted, _, err := unix.Accept(listener)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(accepted)
	}
	if err := <-waits; err != nil {
		t.Error(err)
	}
	if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK != 0 {
		t.Errorf("flags %#x, %v: want blocking mode", flags, err)
	}
}
