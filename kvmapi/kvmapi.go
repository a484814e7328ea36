// Package kvmapi wraps /dev/kvm in Go types: System, VM and VCPU are the three kinds of descriptor.
// Each method is one ioctl of the KVM API (Documentation/virt/kvm/api.rst) and names it in every
// error. The package has no policy: package vmm defines the machine.
//
// Structure layouts and ioctl numbers come from github.com/bobuhiro11/gokvm/kvm; this package
// defines the few that are missing or wrong there. A test compares all of them with the kernel's
// own headers. gokvm's functions are not called: they pass the address of a Go local as an integer,
// although the runtime may move it, and retry EINTR, so that a vCPU cannot be stopped.
package kvmapi

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/bobuhiro11/gokvm/kvm"
	"golang.org/x/sys/unix"
)

// Device is the path of the KVM device.
const Device = "/dev/kvm"

// APIVersion is the only version of the KVM API since Linux 2.6.22. The kernel's documentation
// tells users to refuse any other.
const APIVersion = 12

// Capabilities that gokvm lacks (linux/kvm.h).
const (
	CapNRVCPUs         = int(kvm.CapNRVCPUS)
	CapMaxVCPUs        = 66
	CapMaxVCPUID       = 128
	CapImmediateExit   = 136
	CapX2APICAPI       = 129
	CapTSCDeadline     = int(kvm.CapTSCDeadlineTimer)
	CapIOEventFDAnyLen = 122
	CapSetGuestDebug   = 23
	CapSetGuestDebug2  = 195 // the bits of GuestDebug.Control
)

// System is an open /dev/kvm.
type System struct{ fd int }

// Open opens /dev/kvm and checks the API version. The errors are for the user and say how to fix
// the problem.
func Open() (*System, error) {
	fd, err := unix.Open(Device, unix.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%s: %w; load the module (modprobe kvm-intel or kvm-amd), enable virtualization in "+
			"the firmware, or pass the device into the container", Device, err)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("%s: %w; join its group (sudo usermod -aG kvm $USER, then log in again)", Device, err)
	case err != nil:
		return nil, fmt.Errorf("%s: %w", Device, err)
	}
	s := &System{fd}
	v, err := ioctlInt(fd, "KVM_GET_API_VERSION", kvm.IIO(nrGetAPIVersion), 0)
	if err == nil && v != APIVersion {
		err = fmt.Errorf("KVM_GET_API_VERSION: this kernel speaks version %d, gvm speaks %d", v, APIVersion)
	}
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("%s: %w", Device, err)
	}
	return s, nil
}

// Close closes /dev/kvm; VMs made from it stay open.
func (s *System) Close() error { return unix.Close(s.fd) }

// Check returns KVM_CHECK_EXTENSION's value for a capability: 0 if absent, else 1 or a number
// defined by the capability.
func (s *System) Check(capability int) int {
	return checkExtension(s.fd, capability)
}

func checkExtension(fd, capability int) int {
	n, err := ioctlInt(fd, "KVM_CHECK_EXTENSION", kvm.IIO(nrCheckExtension), uintptr(capability))
	if err != nil {
		return 0
	}
	return n
}

// MaxCPUIDEntries bounds a CPUID table (KVM_MAX_CPUID_ENTRIES in the kernel).
const MaxCPUIDEntries = 256

type cpuid2 struct {
	Nent, _ uint32
	Entries [MaxCPUIDEntries]kvm.CPUIDEntry2
}

// SupportedCPUID returns KVM_GET_SUPPORTED_CPUID: every leaf that this host can give a guest.
func (s *System) SupportedCPUID() ([]kvm.CPUIDEntry2, error) {
	c := &cpuid2{Nent: MaxCPUIDEntries}
	if _, err := ioctl(s.fd, "KVM_GET_SUPPORTED_CPUID", kvm.IIOWR(nrGetSupportedCPUID, 8), c); err != nil {
		return nil, err
	}
	return c.Entries[:min(c.Nent, MaxCPUIDEntries)], nil
}

// CreateVM makes a virtual machine without memory and vCPUs.
func (s *System) CreateVM() (*VM, error) {
	// KVM returns EINTR if a signal (such as Go's preemption) arrives while it takes its locks. It
	// has made nothing then, so retrying is safe.
	for {
		fd, err := ioctlInt(s.fd, "KVM_CREATE_VM", kvm.IIO(nrCreateVM), 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		unix.CloseOnExec(fd)
		size, err := ioctlInt(s.fd, "KVM_GET_VCPU_MMAP_SIZE", kvm.IIO(nrGetVCPUMmapSize), 0)
		if err != nil {
			unix.Close(fd)
			return nil, err
		}
		return &VM{fd: fd, runSize: size}, nil
	}
}
