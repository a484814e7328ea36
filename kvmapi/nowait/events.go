package nowait

import "golang.org/x/sys/unix"

// Events returns the events of poll(2) that a descriptor has now: those asked for, and POLLHUP,
// POLLERR and POLLNVAL. A signal, such as those of Go's scheduler, can interrupt a poll that does
// not wait as well, and is no answer: the poll is repeated.
func Events(fd int, events int16) (int16, error) {
	fds := []unix.PollFd{{Fd: int32(fd), Events: events}}
	for {
		if _, err := unix.Poll(fds, 0); err != unix.EINTR {
			return fds[0].Revents, err
		}
	}
}
