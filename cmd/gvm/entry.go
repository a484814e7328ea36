package main

import (
	"os"

	"golang.org/x/sys/unix"
)

// start is the entry of the program that the Makefile builds. It asks whether standard output is
// open, and jumps to Go's entry: the runtime opens /dev/null in place of a closed one, where no
// write fails.
func start()

// stdoutFlags is what fcntl(2) with F_GETFD returned for standard output at the start: negative if
// that was closed. It is 0 where start is not the entry.
var stdoutFlags int64

// keepClosed makes writes to a standard output that was closed fail, as the user may have expected
// output.
func keepClosed() {
	if stdoutFlags >= 0 {
		return
	}
	fd, err := unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	_ = unix.Dup3(fd, 1, 0) // of an open descriptor
	unix.Close(fd)
}
