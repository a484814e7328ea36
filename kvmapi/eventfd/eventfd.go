// Package eventfd wraps eventfd(2), the only form of doorbells and interrupts between the guest,
// KVM, vhost and gvm's own workers: KVM signals a doorbell (ioeventfd) and consumes an interrupt
// (irqfd), and vhost does both without involving gvm.
//
// The descriptors are raw and blocking. A worker that owns a queue reads its doorbell on a locked
// OS thread, which wakes sooner than a goroutine parked in the runtime's poller.
package eventfd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"gvm/kvmapi/nowait"
)

// FD is one eventfd with a 64-bit counter. All methods may be called from several goroutines. Close
// must come after the last use; wake callers of Wait first, by Signal.
type FD struct {
	fd    int
	close sync.Once
}

// New returns an eventfd whose counter is zero, close-on-exec, in blocking
// mode. The error is eventfd(2)'s, with its name.
func New() (*FD, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	return &FD{fd: fd}, nil
}

// Fd returns the descriptor's number, for KVM_IRQFD, KVM_IOEVENTFD and
// VHOST_SET_VRING_KICK/CALL/ERR. FD remains its owner.
func (f *FD) Fd() int { return f.fd }

// Signal adds one to the counter. It wakes one Wait, injects the interrupt of an irqfd, or wakes a
// vhost worker.
func (f *FD) Signal() error {
	one := [8]byte{1} // native order; gvm runs only on x86-64
	for {
		_, err := unix.Write(f.fd, one[:])
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("eventfd: signal: %w", err)
		}
	}
}

// Wait blocks until the counter is not zero, resets it and returns its old value. It is for a
// goroutine locked to its OS thread.
func (f *FD) Wait() (uint64, error) {
	var b [8]byte
	for {
		_, err := unix.Read(f.fd, b[:])
		if err == nil {
			return binary.LittleEndian.Uint64(b[:]), nil
		}
		if !errors.Is(err, unix.EINTR) {
			return 0, fmt.Errorf("eventfd: wait: %w", err)
		}
	}
}

// Pending reports whether the counter is not zero, and does not change it. The pending bit of a
// masked MSI-X vector reads it.
func (f *FD) Pending() bool {
	events, err := nowait.Events(f.fd, unix.POLLIN)
	return err == nil && events&unix.POLLIN != 0
}

// Drain resets the counter without blocking, and reports whether it was not zero.
func (f *FD) Drain() (bool, error) {
	var b [8]byte
	for {
		_, err := unix.Preadv2(f.fd, [][]byte{b[:]}, -1, unix.RWF_NOWAIT)
		switch {
		case err == nil:
			return true, nil
		case errors.Is(err, unix.EAGAIN):
			return false, nil
		case !errors.Is(err, unix.EINTR):
			return false, fmt.Errorf("eventfd: drain: %w", err)
		}
	}
}

// Close releases the descriptor; later calls do nothing.
func (f *FD) Close() error {
	var err error
	f.close.Do(func() { err = unix.Close(f.fd) })
	return err
}
