package main

import (
	"fmt"
	"math"

	"golang.org/x/sys/unix"

	"gvm/text"
)

// leastFiles is enough for a machine without disks.
const leastFiles = 64

// leastThreads is enough to refuse a machine that takes more (checkThreads). Linux counts those of
// all processes of a user, except root's.
const leastThreads = 8

// countedThreads is a limit of threads that is large enough not to look how many the user has.
const countedThreads = 4096

// enoughLimits refuses limits of the process that leave no room for a message: Go's runtime ends a
// process that it cannot give memory, a thread or its poller. A process with still less memory does
// not come to this.
func enoughLimits(h hostLimits) error {
	number := func(n uint64) string { return fmt.Sprint(n) }
	for _, l := range []struct {
		resource    int
		name        string
		least, want uint64
		word        func(uint64) string
	}{
		{unix.RLIMIT_NOFILE, "RLIMIT_NOFILE (ulimit -n)", leastFiles, leastFiles, number},
		{unix.RLIMIT_AS, "RLIMIT_AS (ulimit -v)", 800 << 20, 2 << 30, text.FormatSize},
		{unix.RLIMIT_DATA, "RLIMIT_DATA (ulimit -d)", 96 << 20, 1 << 30, text.FormatSize},
	} {
		if n := h.rlimit(l.resource); n < l.least {
			return fmt.Errorf("%s is %s: raise it to %s at least", l.name, l.word(n), l.word(l.want))
		}
	}
	n := h.rlimit(unix.RLIMIT_NPROC)
	if n >= countedThreads || less(n, h.allThreads()) >= leastThreads || h.anyThreads() {
		return nil
	}
	if used := h.userThreads(); less(n, used) < leastThreads {
		return fmt.Errorf("RLIMIT_NPROC (ulimit -u) is %d, and this user's processes have %d threads: "+
			"raise it to %d at least", n, used, used+4*leastThreads)
	}
	return nil
}

// keptFiles is how many open files an added disk leaves for the requests of the control socket.
// Without one for a connection gvm stop would not reach the machine.
const keptFiles = 16

// spareFiles refuses a disk for which the process has too many open files. Linux gives a file the
// lowest number that is free.
func spareFiles(h hostLimits) error {
	limit := h.rlimit(unix.RLIMIT_NOFILE)
	if limit > math.MaxInt32 {
		return nil
	}
	for n := limit - keptFiles; n < limit; n++ {
		if _, err := unix.FcntlInt(uintptr(n), unix.F_GETFD, 0); err != unix.EBADF {
			return fmt.Errorf("RLIMIT_NOFILE (ulimit -n), which is %d, leaves the machine fewer than %d open files: "+
				"start it with a higher limit", limit, keptFiles)
		}
	}
	return nil
}
