package nowait

import (
	"os"

	"golang.org/x/sys/unix"
)

// WakeAtClose has Linux send SIGCONT to the process pid, which has inherited the read end r of a
// pipe, when the last write end is closed, as at the end of a process that keeps it for that. Data
// in the pipe bring the signal too. A process that is stopped reads no end of a file.
//
// The signal has the rights that the caller has now, where that of PR_SET_PDEATHSIG has those of
// the process that dies. That one may be another user's by then, or in a scope of Landlock's (Linux
// 6.12). See fcntl(2), F_SETSIG.
func WakeAtClose(r *os.File, pid int) error {
	c, err := r.SyscallConn()
	if err != nil {
		return err
	}
	controlErr := c.Control(func(fd uintptr) {
		var flags int
		if _, err = unix.FcntlInt(fd, unix.F_SETSIG, int(unix.SIGCONT)); err != nil {
			return
		}
		if _, err = unix.FcntlInt(fd, unix.F_SETOWN, pid); err != nil {
			return
		}
		if flags, err = unix.FcntlInt(fd, unix.F_GETFL, 0); err == nil {
			_, err = unix.FcntlInt(fd, unix.F_SETFL, flags|unix.O_ASYNC)
		}
	})
	if err == nil {
		err = controlErr
	}
	return os.NewSyscallError("fcntl", err)
}
