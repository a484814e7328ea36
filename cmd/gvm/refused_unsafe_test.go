package main

import (
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// refusedEnv names system calls that fail in a gvm of a test: locks (of open file descriptions), as
// on some network file systems, landlock, as on an old kernel, or seccomp or execve, as in some
// containers.
const refusedEnv = "GVM_TEST_REFUSED"

// refuse makes the named calls of this process fail (seccomp(2)).
func refuse(calls string) {
	const number, second = 0, 16 + 8 // of struct seccomp_data: nr, the low half of args[1]
	equal := func(value uint32, yes, no uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jt: yes, Jf: no, K: value}
	}
	load := func(offset uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset}
	}
	end := func(action uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: action}
	}
	fail := func(errno unix.Errno) unix.SockFilter { return end(unix.SECCOMP_RET_ERRNO | uint32(errno)) }
	allow := end(unix.SECCOMP_RET_ALLOW)
	filter, ok := map[string][]unix.SockFilter{
		"locks": {load(number), equal(unix.SYS_FCNTL, 0, 4), load(second), equal(unix.F_OFD_GETLK, 1, 0),
			equal(unix.F_OFD_SETLK, 0, 1), fail(unix.ENOLCK), allow},
		"landlock": {load(number), equal(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 1), fail(unix.ENOSYS), allow},
		"execve":   {load(number), equal(unix.SYS_EXECVE, 0, 1), fail(unix.EPERM), allow},
		"seccomp":  {load(number), equal(unix.SYS_SECCOMP, 0, 1), fail(unix.EPERM), allow},
	}[calls]
	if !ok {
		fmt.Printf("%s=%s: unknown\n", refusedEnv, calls)
		os.Exit(99)
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		fmt.Println("no new privileges:", err)
		os.Exit(99)
	}
	// unsafe: the kernel reads the program here.
	if _, _, err := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC,
		uintptr(unsafe.Pointer(&prog))); err != 0 {
		fmt.Println("seccomp:", err)
		os.Exit(99)
	}
	runtime.KeepAlive(filter)
}
