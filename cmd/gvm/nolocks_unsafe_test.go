package main

import (
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// noLocksEnv makes a gvm of a test fail to lock any open file description.
const noLocksEnv = "GVM_TEST_NO_LOCKS"

// takeLocksAway makes every fcntl of this process for such locks fail with ENOLCK (seccomp(2)).
func takeLocksAway() {
	const number, second = 0, 16 + 8 // of struct seccomp_data: nr, the low half of args[1]
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: number},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 4, K: unix.SYS_FCNTL},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: second},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jt: 1, K: unix.F_OFD_GETLK},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: unix.F_OFD_SETLK},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.ENOLCK)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
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
