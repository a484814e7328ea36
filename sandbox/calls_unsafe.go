package sandbox

import (
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// landlockVersion returns the version of Landlock's interface, 0 without Landlock.
func landlockVersion() int {
	n, _, errno := unix.RawSyscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno != 0 {
		return 0
	}
	return int(n)
}

// createRuleset makes a set of rules. Its attributes are as long as those of version 6; a kernel
// with shorter ones takes zeroes.
func createRuleset(a *unix.LandlockRulesetAttr) (int, error) {
	fd, _, errno := unix.RawSyscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(a)),
		unsafe.Offsetof(a.Quiet_access_fs), 0)
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}

// addPathRule allows access to the file or directory fd and all below it.
func addPathRule(rules, fd int, access uint64) error {
	a := unix.LandlockPathBeneathAttr{Allowed_access: access, Parent_fd: int32(fd)}
	if _, _, errno := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, uintptr(rules), unix.LANDLOCK_RULE_PATH_BENEATH,
		uintptr(unsafe.Pointer(&a)), 0, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

// capSets are the sets of capabilities of a thread.
type capSets struct{ effective, permitted, inheritable uint64 }

// capget returns this thread's sets.
func capget() (s capSets, err error) {
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var d [2]unix.CapUserData
	if err = unix.Capget(&h, &d[0]); err != nil {
		return s, err
	}
	join := func(low, high uint32) uint64 { return uint64(high)<<32 | uint64(low) }
	return capSets{join(d[0].Effective, d[1].Effective), join(d[0].Permitted, d[1].Permitted),
		join(d[0].Inheritable, d[1].Inheritable)}, nil
}

// Arguments of capset in all threads: at a fixed address, as each thread reads them.
var (
	capHeader = unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	capData   [2]unix.CapUserData
)

// capset makes keep the effective and permitted capabilities of all threads.
func capset(keep uint64) error {
	for i := range capData {
		word := uint32(keep >> (32 * i))
		capData[i] = unix.CapUserData{Effective: word, Permitted: word}
	}
	return allThreads(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&capHeader)), uintptr(unsafe.Pointer(&capData)), 0)
}

// haveSeccomp returns an error if the kernel has no seccomp filters.
func haveSeccomp() error {
	action := uint32(unix.SECCOMP_RET_ALLOW)
	if _, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_GET_ACTION_AVAIL, 0,
		uintptr(unsafe.Pointer(&action))); errno != 0 {
		return errno
	}
	return nil
}

// loadFilter installs a filter, and returns its listener if the flags ask for one.
func loadFilter(program []unix.SockFilter, flags uintptr) (int, error) {
	p := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	fd, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&p)))
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}

// notification is struct seccomp_notif (linux/seccomp.h).
type notification struct {
	id         uint64
	pid, flags uint32
	nr         int32
	arch       uint32
	ip         uint64
	args       [6]uint64
}

// refusal is the notice's call.
func (n *notification) refusal() Refusal {
	return Refusal{Name: callName(int(n.nr)), Number: int(n.nr), Args: n.args, Arch: n.arch}
}

// held is the time for which a refused call waits at most.
var held = unix.NsecToTimespec(int64(500 * time.Millisecond))

// one is the number that is written to an eventfd.
var one = uint64(1)

// listen waits for a notice of a refused call, writes to the eventfd wake, and closes the listener
// fd when held is over. In between its thread has no processor of Go's scheduler, and needs none.
//
//go:nosplit
//go:norace
func listen(fd, wake int, n *notification) syscall.Errno {
	entersyscallblock()
	errno := unix.EINTR
	for errno == unix.EINTR || errno == unix.ENOENT { // ENOENT: the call was given up meanwhile
		_, _, errno = unix.RawSyscall(unix.SYS_IOCTL, uintptr(fd), unix.SECCOMP_IOCTL_NOTIF_RECV,
			uintptr(unsafe.Pointer(n)))
	}
	if errno == 0 {
		unix.RawSyscall(unix.SYS_WRITE, uintptr(wake), uintptr(unsafe.Pointer(&one)), unsafe.Sizeof(one))
		unix.RawSyscall(unix.SYS_NANOSLEEP, uintptr(unsafe.Pointer(&held)), 0, 0)
		unix.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0)
	}
	exitsyscall()
	return errno
}

// The two halves of a system call of package syscall (runtime/proc.go), which other packages may
// use.
//
//go:linkname entersyscallblock runtime.entersyscallblock
func entersyscallblock()

//go:linkname exitsyscall runtime.exitsyscall
func exitsyscall()
