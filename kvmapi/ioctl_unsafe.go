package kvmapi

import (
	"errors"
	"fmt"
	"unsafe"

	"github.com/bobuhiro11/gokvm/kvm"
	"golang.org/x/sys/unix"
)

// ioctl calls request on fd with the address of arg, and returns the kernel's result. The
// conversion to uintptr is in the argument list of the system call, which keeps arg in place
// (package unsafe, rule 4).
func ioctl[T any](fd int, name string, request uintptr, arg *T) (int, error) {
	r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(unsafe.Pointer(arg)))
	if errno != 0 {
		return 0, fmt.Errorf("%s: %w", name, errno)
	}
	return int(r), nil
}

// ioctlInt is ioctl for requests whose argument is a number.
func ioctlInt(fd int, name string, request, arg uintptr) (int, error) {
	r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, arg)
	if errno != 0 {
		return 0, fmt.Errorf("%s: %w", name, errno)
	}
	return int(r), nil
}

// ior, iow and iowr return the request number for an argument of type T.
func ior[T any](nr uintptr) uintptr  { return kvm.IIOR(nr, unsafe.Sizeof(*new(T))) }
func iow[T any](nr uintptr) uintptr  { return kvm.IIOW(nr, unsafe.Sizeof(*new(T))) }
func iowr[T any](nr uintptr) uintptr { return kvm.IIOWR(nr, unsafe.Sizeof(*new(T))) }

// address returns the address of b in this process, for KVM to map. The mapping is not Go heap, so
// it does not move.
func address(b []byte) uint64 { return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) }

// runData views a vCPU's mmap as struct kvm_run. page comes from mmap of at
// least KVM_GET_VCPU_MMAP_SIZE bytes, which exceeds the structure.
func runData(page []byte) *kvm.RunData { return (*kvm.RunData)(unsafe.Pointer(&page[0])) }

// enter is KVM_RUN. EINTR is a value, not an error: interrupted is true.
func enter(fd int) (interrupted bool, err error) {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), kvm.IIO(nrRun), 0)
	switch {
	case errno == 0:
		return false, nil
	case errors.Is(errno, unix.EINTR), errors.Is(errno, unix.EAGAIN):
		return true, nil
	}
	return false, fmt.Errorf("KVM_RUN: %w", errno)
}
