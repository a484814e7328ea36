package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"gvm/broker"
	"gvm/guest/kernel"
	"gvm/kvmapi/nowait"
	"gvm/machine"
	"gvm/panics"
	"gvm/text"
	"gvm/unixsocket"
)

// gdbAddress is a parsed --gdb: where gvm waits for a debugger.
type gdbAddress struct {
	network, address string // of package net; network stdio has no address
}

// isStdio reports whether the debugger has standard input and output, so that the console has not.
func (a *gdbAddress) isStdio() bool { return a != nil && a.network == "stdio" }

// parseGDB reads stdio, unix:PATH, PORT or HOST:PORT. Without a HOST only this host can connect.
func parseGDB(s string) (*gdbAddress, error) {
	const want = "want a port such as :1234, HOST:PORT, unix:PATH or stdio"
	path, isUnix := strings.CutPrefix(s, "unix:")
	switch {
	case s == "stdio":
		return &gdbAddress{"stdio", ""}, nil
	case isUnix && path == "":
		return nil, errors.New("the path is empty; name a file")
	case isUnix && len(path) > maxUnixPath:
		return nil, fmt.Errorf("the path has %d bytes, and that of a socket %d at most", len(path), maxUnixPath)
	case isUnix:
		return &gdbAddress{"unix", path}, nil
	case strings.Contains(s, "/"):
		return nil, fmt.Errorf("%s; for a socket at this path: unix:%s", want, s)
	}
	s = strings.TrimPrefix(s, "tcp:") // QEMU's word
	if !strings.Contains(s, ":") {
		s = ":" + s
	}
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return nil, errors.New(want)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return nil, fmt.Errorf("%q is no port from 1 to 65535; %s%s", port, want, text.Suggest(port, []string{"stdio"}))
	}
	if host == "" {
		host = "localhost"
	}
	return &gdbAddress{"tcp", net.JoinHostPort(host, port)}, nil
}

// maxUnixPath is the longest path of a socket (unix(7)).
const maxUnixPath = 107

// gdbServer waits for debuggers of a machine and serves one at a time.
type gdbServer struct {
	to       string       // gdb's words for target remote
	listener net.Listener // nil: stdio
	stdio    io.ReadWriteCloser
	remove   func() error // removes it, if it still has its path
	serving  sync.WaitGroup
}

// listen opens the place where debuggers connect.
// The broker removes its socket; nil: the gdbServer does.
func (a *gdbAddress) listen(ctx context.Context, b *broker.Client) (*gdbServer, error) {
	s := &gdbServer{to: a.address, remove: func() error { return nil }}
	if a.isStdio() {
		stdio, err := openStdio()
		s.stdio = stdio
		return s, err
	}
	if a.network == "unix" {
		return s, s.listenUnix(a.address, b)
	}
	var err error
	s.listener, err = new(net.ListenConfig).Listen(ctx, a.network, a.address)
	switch {
	case err != nil && ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, configError{fmt.Errorf("--gdb %s: another program waits there; give another port", a.address)}
	case err != nil:
		var op *net.OpError
		if errors.As(err, &op) {
			err = op.Err
		}
		return nil, configError{fmt.Errorf("--gdb: wait at %s %s: %w; give an address of this host, or a port alone",
			a.network, a.address, err)}
	}
	if !s.listener.Addr().(*net.TCPAddr).IP.IsLoopback() {
		note(fmt.Sprintf("--gdb %s: every host that reaches this port controls the guest", a.address))
	}
	return s, nil
}

// listenUnix is listen for a path, at which no program waits.
func (s *gdbServer) listenUnix(path string, b *broker.Client) error {
	var err error
	if s.to, err = filepath.Abs(path); err != nil {
		return err
	}
	urgent.making.Lock()
	defer urgent.making.Unlock()
	dir, err := os.OpenFile(filepath.Dir(path), os.O_RDONLY|unix.O_DIRECTORY, 0)
	var l *net.UnixListener
	var made fs.FileInfo
	if err == nil {
		defer dir.Close()
		l, made, err = unixsocket.Listen(dir, path)
	}
	if errno := syscall.Errno(0); errors.As(err, &errno) && errno != syscall.EWOULDBLOCK { // of a lock
		return configError{fmt.Errorf("--gdb unix:%w", nowait.CreateError(path, errno))}
	}
	if err != nil {
		return configError{fmt.Errorf("--gdb unix:%s: %w", path, err)}
	}
	s.listener = l
	if s.remove = removal(s.to, made); b != nil {
		s.remove = b.RemoveAtEnd(s.to, made)
	}
	removeAtEnd(s.remove)
	return nil
}

// removal returns a function that removes a file, if it still has its path.
func removal(path string, made fs.FileInfo) func() error {
	return func() error {
		if now, err := os.Lstat(path); err != nil || !os.SameFile(made, now) {
			return nil
		}
		return os.Remove(path)
	}
}

// leavePatience is the time that gvm has to let the guest run on after a debugger has left, when
// another waits: gdb closes its connection and connects again at target remote.
const leavePatience = 2 * time.Second

// serve serves debuggers until the machine has ended. While one is connected, others are refused.
func (s *gdbServer) serve(m *machine.Machine) {
	if s.listener == nil {
		s.serving.Go(panics.Func(func() { s.client(m, s.stdio) }))
		return
	}
	s.serving.Go(panics.Func(func() {
		s.accept(m.Ended(), leavePatience, func(c net.Conn) { s.client(m, c) })
	}))
}

// closePatience is the time that the close of a TCP connection has to get through a busy kernel: a
// debugger that connects again behind it may be here first.
const closePatience = 100 * time.Millisecond

// acceptPeriod is the time between two attempts to accept a debugger, if the first failed.
const acceptPeriod = 50 * time.Millisecond

// accept calls serve for one connection at a time, and refuses others meanwhile: after
// closePatience if the peer of that one has not closed it, or else after patience.
func (s *gdbServer) accept(ended <-chan struct{}, patience time.Duration, serve func(net.Conn)) {
	busy := make(chan struct{}, 1)
	var last net.Conn
	refused := false
	for {
		c, err := s.listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // the process may have too many files for now
			if !refused {
				note(fmt.Sprintf("--gdb: no debugger can connect now: %v%s", err, mend(err)))
			}
			refused = true
			select {
			case <-ended:
				return
			case <-time.After(acceptPeriod):
			}
			continue
		}
		refused = false
		wait := patience
		for since := time.Now(); connected(last); time.Sleep(time.Millisecond) {
			if time.Since(since) > closePatience {
				wait = 0
				break
			}
		}
		select {
		case busy <- struct{}{}:
			last = c
			s.serving.Go(panics.Func(func() {
				serve(c)
				<-busy
			}))
		case <-ended:
			c.Close()
		case <-time.After(wait):
			c.Close()
			note("--gdb: a second debugger was refused: one is connected")
		}
	}
}

// connected reports whether neither side has closed the connection c, which may be nil.
func connected(c net.Conn) bool {
	s, ok := c.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return false
	}
	gone := false
	err = raw.Control(func(fd uintptr) {
		events, err := nowait.Events(int(fd), unix.POLLRDHUP)
		gone = err == nil && events != 0
	})
	return err == nil && !gone
}

// client serves a debugger.
func (s *gdbServer) client(m *machine.Machine, c io.ReadWriteCloser) {
	if err := m.ServeDebugger(c); err != nil {
		note(fmt.Sprintf("--gdb: the debugger was lost: %v", err))
	}
}

// close ends the wait for debuggers. A served one ends with the machine.
func (s *gdbServer) close() error {
	var err error
	if s.listener != nil {
		err = errors.Join(s.listener.Close(), s.remove())
	}
	s.serving.Wait()
	return err
}

// command returns the words that start gdb for the machine.
func (s *gdbServer) command(k *kernel.Kernel, spec *machine.Spec) string {
	var vmlinux, scripts string
	if k != nil {
		vmlinux, scripts = k.Debug()
	}
	words := []string{"gdb"}
	if scripts != "" {
		words = append(words, "-iex", shellWord("add-auto-load-safe-path "+scripts))
	}
	words = append(words, "-ex", shellWord("target remote "+s.to))
	// Modules are known once the kernel runs. lx-symbols reads the kernel's symbols anew, without its
	// offset.
	if scripts != "" && !spec.StartStopped && !spec.Moves() {
		words = append(words, "-ex", "lx-symbols")
	}
	if vmlinux != "" {
		words = append(words, shellWord(vmlinux))
	}
	return strings.Join(words, " ")
}

// shellWord quotes a word for a shell, if it needs that.
func shellWord(s string) string {
	if strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-+:=,@") == "" && s != "" {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// stdio is the connection by standard input and output.
type stdio struct{ in, out *os.File }

func (s stdio) Read(p []byte) (int, error)  { return s.in.Read(p) }
func (s stdio) Write(p []byte) (int, error) { return s.out.Write(p) }
func (s stdio) Close() error                { return errors.Join(s.in.Close(), s.out.Close()) }

// openStdio opens standard input and output so that Close ends a Read and a Write: the Go runtime
// waits for descriptors that do not block. A pipe or terminal is opened anew for it; that of a
// socket is shared with nothing else.
func openStdio() (io.ReadWriteCloser, error) {
	var files [2]*os.File
	for i, flag := range []int{os.O_RDONLY, os.O_WRONLY} {
		name := fmt.Sprintf("/proc/self/fd/%d", i)
		fd, err := unix.Open(name, flag|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
		if errors.Is(err, unix.ENXIO) { // a socket
			if fd, err = unix.FcntlInt(uintptr(i), unix.F_DUPFD_CLOEXEC, 0); err == nil {
				err = unix.SetNonblock(fd, true)
			}
		}
		if err != nil {
			return nil, configError{fmt.Errorf("--gdb stdio: %s: %w", [...]string{"standard input", "standard output"}[i], err)}
		}
		files[i] = os.NewFile(uintptr(fd), name)
	}
	return stdio{files[0], files[1]}, nil
}
