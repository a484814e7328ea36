package block

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// LockedError says that something else has the image. It is ErrLocked.
type LockedError struct {
	Path string
	PID  int    // the process that has it, 0 if it could not be found
	By   string // the user if that is not a process, and the mend
	// Other is the path by which this process has it, "" if that is not known.
	Other string
}

func (e *LockedError) Error() string {
	switch {
	case e.By != "":
		return e.Path + ": in use: " + e.By
	case e.PID == 0:
		return e.Path + ": in use by another process; end that first"
	case e.PID == os.Getpid() && e.Other != "" && e.Other != e.Path:
		return e.Path + ": given twice: " + e.Other +
			" is the same storage, and one image can be written by one disk only"
	case e.PID == os.Getpid():
		return e.Path + ": given twice: one image can be written by one disk only"
	}
	return fmt.Sprintf("%s: in use by process %d%s; end that first", e.Path, e.PID, command(e.PID))
}

func (e *LockedError) Unwrap() error { return ErrLocked }

// noLocks are the errors of file systems without locks, of which some NFS, FUSE and 9p
// are. EINVAL is that of a kernel that does not know the kind of lock.
var noLocks = []error{unix.ENOLCK, unix.EOPNOTSUPP, unix.ENOSYS, unix.EINVAL}

// setLock sets or asks for a lock: a variable, so that tests can take it away.
var setLock = unix.FcntlFlock

// lock puts open file description locks on a range of a file, exclusive to write it, else shared,
// and on markDisk and the mark of the access. They go with the descriptor, and cannot outlive the
// process.
func lock(fd int, path string, a access, s span) error {
	if err := lockRange(fd, path, unix.F_OFD_SETLK, a.shared(), s); err != nil {
		return err
	}
	if err := lockRange(fd, path, unix.F_OFD_SETLK, true, markDisk); err != nil {
		return err
	}
	if s == whole {
		markHolder(fd)
	}
	own, other, ok := a.marks()
	if !ok {
		return nil
	}
	if err := lockRange(fd, path, unix.F_OFD_SETLK, true, own); err != nil {
		return err
	}
	return lockRange(fd, path, unix.F_OFD_GETLK, false, other)
}

// lockRange locks a range of a file, or only asks whether it could (F_OFD_GETLK).
func lockRange(fd int, path string, command int, shared bool, s span) error {
	l := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: s.from, Len: s.to - s.from}
	if shared {
		l.Type = unix.F_RDLCK
	}
	err := setLock(uintptr(fd), command, &l)
	switch {
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EACCES),
		err == nil && command == unix.F_OFD_GETLK && l.Type != unix.F_UNLCK:
		return &LockedError{Path: path, PID: lockHolder(fd, shared, s)}
	case slices.ContainsFunc(noLocks, func(e error) bool { return errors.Is(err, e) }):
		return badImage(ErrNoLocks, path, "the file system has no locks (%v), so nothing would keep another machine"+
			" from writing it too; if none does, lock=off goes on without", err)
	case err != nil:
		return fmt.Errorf("%s: lock: %w", path, err)
	}
	return nil
}

// Lock locks a file of gvm's that is no image against being taken as one, if its file system has
// locks. It goes with the descriptor.
func Lock(f *os.File, path string, shared bool) error {
	if err := lock(int(f.Fd()), path, accessOf(shared), whole); errors.Is(err, ErrLocked) {
		return err
	}
	return nil
}

// markHolder marks the file that fd has open as this process's, for markedHolder.
func markHolder(fd int) {
	l := unix.Flock_t{Type: unix.F_RDLCK, Whence: io.SeekStart, Start: holderMark, Len: 1}
	_ = setLock(uintptr(fd), unix.F_SETLK, &l) // without it the message lacks the PID
}

// markedHolder returns a process that has marked the file that fd has open, and not closed a
// descriptor of it since. 0 is none.
func markedHolder(fd int) int {
	l := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: holderMark, Len: 1}
	if err := setLock(uintptr(fd), unix.F_GETLK, &l); err != nil || l.Type == unix.F_UNLCK {
		return 0
	}
	return max(0, int(l.Pid)) // the kernel answers -1 for the lock of a file description
}

// lockHolder finds a process with a lock on a range of the file that fd has open. The kernel says
// nothing of the owner of an open file description lock, but shows the locks of each descriptor in
// its fdinfo (proc_pid_fdinfo(5)). It hides those of other users' processes, and of gvms in their
// sandboxes from all but root: these have a mark.
func lockHolder(fd int, shared bool, s span) int {
	var want unix.Stat_t
	if err := unix.Fstat(fd, &want); err != nil {
		return 0
	}
	pid := findOpen(func(st *unix.Stat_t, info string) bool {
		if st.Dev != want.Dev || st.Ino != want.Ino {
			return false
		}
		b, err := os.ReadFile(info)
		return err == nil && hasLock(b, shared, s)
	})
	if pid == 0 {
		return markedHolder(fd)
	}
	return pid
}

// findOpen finds a process, this one first, with an open file that match knows, by its
// status and the path of its fdinfo. 0 is none.
func findOpen(match func(st *unix.Stat_t, info string) bool) int {
	for _, proc := range []string{strconv.Itoa(os.Getpid()), "[0-9]*"} {
		fds, _ := filepath.Glob("/proc/" + proc + "/fd/*")
		for _, path := range fds {
			var st unix.Stat_t
			part := strings.Split(path, "/") // "", proc, PID, fd, N
			if unix.Stat(path, &st) != nil || !match(&st, "/proc/"+part[2]+"/fdinfo/"+part[4]) {
				continue
			}
			if pid, err := strconv.Atoi(part[2]); err == nil {
				return pid
			}
		}
	}
	return 0
}

// hasLock reports whether fdinfo shows a lock, of an open file description or a process, that
// excludes a shared or an exclusive one of a range: "lock:	1: OFDLCK  ADVISORY  WRITE -1 08:01:42 0
// EOF".
func hasLock(info []byte, shared bool, s span) bool {
	for lines := bufio.NewScanner(bytes.NewReader(info)); lines.Scan(); {
		f := strings.Fields(lines.Text())
		if len(f) < 9 || f[0] != "lock:" || f[2] != "OFDLCK" && f[2] != "POSIX" || !s.meets(spanOfLock(f[7], f[8])) {
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

// lock locks the image. Where there are no locks, one that is only read goes on without, as does
// any with NoLock.
func (b *File) lock(o Options) error {
	err := lock(b.fd, b.path, accessOf(o.ReadOnly), whole)
	if errors.Is(err, ErrNoLocks) && (o.ReadOnly || o.NoLock) {
		if o.Note != nil && !o.NoLock {
			o.Note(b.path + ": the file system has no locks:" +
				" nothing keeps another machine from writing it while this one reads it")
		}
		return nil
	}
	return err
}
