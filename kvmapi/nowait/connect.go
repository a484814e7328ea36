package nowait

import "golang.org/x/sys/unix"

// Connect connects the socket fd, which is in blocking mode, and is again after a success. The
// kernel bounds the attempt, a vsock one by 2 s. A signal does not end it: by connect(2) it would
// give up a vsock connection that the other end may have accepted, and a second connect(2) makes
// another one.
func Connect(fd int, sa unix.Sockaddr) error {
	if err := unix.SetNonblock(fd, true); err != nil {
		return err
	}
	err := unix.Connect(fd, sa)
	if err == unix.EINPROGRESS {
		err = connected(fd)
	}
	if err != nil {
		return err
	}
	return unix.SetNonblock(fd, false)
}

// connected waits for the end of an attempt.
func connected(fd int) error {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
	for {
		if _, err := unix.Poll(fds, -1); err == unix.EINTR {
			continue
		} else if err != nil {
			return err
		}
		e, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
		if err == nil && e != 0 {
			err = unix.Errno(e)
		}
		return err
	}
}
