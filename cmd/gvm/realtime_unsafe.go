package main

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// ignoreRealTime ignores the real-time signals that the Go runtime leaves to C libraries and does
// not let programs catch. By default they would end the process without restoring the terminal.
func ignoreRealTime() {
	ignore := struct{ handler, flags, restorer, mask uintptr }{handler: 1} // SIG_IGN
	for _, s := range []uintptr{32, 34} {
		_, _, _ = unix.RawSyscall6(unix.SYS_RT_SIGACTION, s, uintptr(unsafe.Pointer(&ignore)), 0,
			unsafe.Sizeof(ignore.mask), 0, 0)
	}
}
