// Package unixsocket makes unix sockets at paths that a user chose.
package unixsocket

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ErrExists is the error of Listen for a file that another program uses or that is no stale socket
// of this user's.
var ErrExists = errors.New("it exists")

// Listen makes a socket at address, a path of a file in the open directory, which this user alone
// can connect to. It replaces a socket of this user's at which no program listens: that of a
// process that was killed. The socket stays when the listener is closed. Errors do not contain
// the address.
func Listen(dir *os.File, address string) (l *net.UnixListener, made fs.FileInfo, err error) {
	// The lock keeps another gvm from replacing the same stale socket, or this one before it listens.
	// A directory without locks, as on NFS, has a socket without that.
	if err := lock(dir); err != nil {
		return nil, nil, err
	}
	defer unix.Flock(int(dir.Fd()), unix.LOCK_UN)
	if err := removeStale(address); err != nil {
		return nil, nil, err
	}
	// A socket has its mode from the beginning: unix_bind takes that of the descriptor.
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		return errors.Join(c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }), err)
	}}
	general, err := config.Listen(context.Background(), "unix", address)
	if err != nil {
		return nil, nil, plain(err)
	}
	l = general.(*net.UnixListener)
	l.SetUnlinkOnClose(false) // the file may be another one by then
	if made, err = os.Lstat(address); err != nil {
		return nil, nil, errors.Join(plain(err), l.Close())
	}
	return l, made, nil
}

// lockTimeout bounds the wait for a directory's lock, which Listen holds for microseconds.
const lockTimeout = time.Second

// lock locks a directory if it can be locked.
func lock(dir *os.File) error {
	for giveUp := time.Now().Add(lockTimeout); ; time.Sleep(time.Millisecond) {
		switch err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); {
		case err != unix.EINTR && err != unix.EWOULDBLOCK:
			return nil
		case time.Now().After(giveUp):
			return fmt.Errorf("lock the directory: %w", err)
		}
	}
}

// removeStale removes a socket at which no program listens.
func removeStale(address string) error {
	fi, err := os.Lstat(address)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return plain(err)
	case fi.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("%w and is no socket; remove it, or name another file", ErrExists)
	case int(fi.Sys().(*syscall.Stat_t).Uid) != os.Geteuid():
		return fmt.Errorf("%w and is another user's; name another file", ErrExists)
	}
	c, err := net.Dial("unix", address)
	if err == nil {
		c.Close()
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("%w and a program listens there; name another file", ErrExists)
	}
	return plain(os.Remove(address))
}

// plain returns the error of a system call without the address.
func plain(err error) error {
	var op *net.OpError
	var path *fs.PathError
	switch {
	case errors.As(err, &op):
		return op.Err
	case errors.As(err, &path):
		return path.Err
	}
	return err
}
