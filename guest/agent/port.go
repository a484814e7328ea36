package agent

import (
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"

	"gvm/devices/statusport"
	"gvm/panics"
)

func outb(port uint16, value byte)
func inb(port uint16) byte

// openStatusPort returns a function that makes a report by the status port. The kernel needs no
// driver for it, but CONFIG_X86_IOPL_IOPERM, which it has unless it was turned off; stock kernels
// lack /dev/port more often.
func openStatusPort() (report func(statusport.Kind, byte), err error) {
	type request struct {
		kind  statusport.Kind
		value byte
		done  chan struct{}
	}
	requests, opened := make(chan request), make(chan error)
	panics.Go(func() {
		runtime.LockOSThread() // which alone may use the ports (ioperm(2))
		if _, _, errno := unix.Syscall(unix.SYS_IOPERM, statusport.Port, statusport.Size, 1); errno != 0 {
			opened <- fmt.Errorf("ioperm: %w", errno)
			return
		}
		if magic := string([]byte{inb(statusport.Port), inb(statusport.Port + 1)}); magic != statusport.Magic {
			opened <- fmt.Errorf("it reads %q", magic)
			return
		}
		opened <- nil
		for r := range requests { // ends with the machine
			outb(statusport.Port, r.value)
			outb(statusport.Port+1, byte(r.kind))
			close(r.done)
		}
	})
	if err := <-opened; err != nil {
		return nil, err
	}
	return func(kind statusport.Kind, value byte) {
		r := request{kind, value, make(chan struct{})}
		requests <- r
		<-r.done
	}, nil
}
