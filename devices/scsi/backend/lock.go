package backend

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// LockedError says that another open of the image has a lock that excludes this
// one. It is ErrLocked.
type LockedError struct {
	Path string
	PID  int // the process that has it, 0 if it could not be found
}

func (e *LockedError) Error() string {
	switch e.PID {
	case 0:
		return e.Path + ": in use by another process"
	case os.Getpid():
		return e.Path + ": given twice: one image can be written by one disk only"
	}
	return fmt.Sprintf("%s: in use by process %d%s", e.Path, e.PID, command(e.PID))
}

func (e *LockedError) Unwrap() error { return ErrLocked }

// lock puts an open file description lock on the whole file: shared to read,
// exclusive to write. It goes with the descriptor, and cannot outlive the
// process.
func lock(fd int, path string, shared bool) error {
	l := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart}
	if shared {
		l.Type = unix.F_RDLCK
	}
	err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &l)
	switch {
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EACCES):
		return &LockedError{path, lockHolder(fd, shared)}
	case err != nil:
		return fmt.Errorf("%s: lock: %w", path, err)
	}
	return nil
}

// lockHolder finds a process with a lock on the file that fd has open. The
// kernel says nothing of the owner of an open file description lock, but shows
// the locks of each descriptor in its fdinfo (proc_pid_fdinfo(5)).
func lockHolder(fd int, shared bool) int {
	var want unix.Stat_t
	if err := unix.Fstat(fd, &want); err != nil {
		return 0
	}
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, path := range fds {
		var st unix.Stat_t
		if unix.Stat(path, &st) != nil || st.Dev != want.Dev || st.Ino != want.Ino {
			continue
		}
		part := strings.Split(path, "/") // "", proc, PID, fd, N
		info, err := os.ReadFile("/proc/" + part[2] + "/fdinfo/" + part[4])
		if err != nil || !hasLock(info, shared) {
			continue
		}
		if pid, err := strconv.Atoi(part[2]); err == nil {
			return pid
		}
	}
	return 0
}

// hasLock says whether fdinfo shows an open file description lock that excludes
// a shared or an exclusive one: "lock:	1: OFDLCK  ADVISORY  WRITE -1 …".
func hasLock(info []byte, shared bool) bool {
	for s := bufio.NewScanner(bytes.NewReader(info)); s.Scan(); {
		f := strings.Fields(s.Text())
		if len(f) < 5 || f[0] != "lock:" || f[2] != "OFDLCK" {
			continue
		}
		if f[4] == "WRITE" || !shared {
			return true
		}
	}
	return false
}

// command is the name of a process, in brackets.
func command(pid int) string {
	name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		return ""
	}
	return " (" + strings.TrimSpace(string(name)) + ")"
}
