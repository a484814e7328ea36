// Package vhost wraps the kernel's vhost interface (linux/vhost.h) in Go types: the kernel serves
// virtqueues in place of the process that owns the guest. Each method is one ioctl and names it in
// every error. The package has no policy: the device decides on the order of ioctls.
package vhost

import (
	"errors"
	"fmt"
	"io/fs"
	"runtime"

	"golang.org/x/sys/unix"
	"gvm/kvmapi/eventfd"
)

// Feature bits of vhost (virtio 1.3, 6, and linux/vhost_types.h).
const (
	FeatureLogAll   = 1 << 26 // VHOST_F_LOG_ALL: dirty pages are logged
	FeatureVersion1 = 1 << 32 // VIRTIO_F_VERSION_1
)

// MaxRegions is the maximum number of regions of a memory table: the kernel's default for the
// parameter max_mem_regions of its module vhost.
const MaxRegions = 64

// Device is an open vhost device of any kind. Its methods may be called from
// several goroutines.
type Device struct {
	fd int
	// Before, if not nil, is called with the name of each ioctl before the ioctl, from the
	// goroutine that does it. If it returns an error, the ioctl is not done and fails with that
	// error, so that tests can make each of them fail.
	Before func(ioctl string) error
}

// open opens the device at path, provided by module (option config of the kernel's configuration).
// The errors are for the user and say how to fix the problem.
func open(path, module, config string) (*Device, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return nil, fmt.Errorf("%s: %w; load the module (modprobe %s) of a kernel with %s", path, err, module, config)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("%s: %w; run as root, or let this user read and write it (chown, or a udev rule)", path, err)
	case err != nil:
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return &Device{fd: fd}, nil
}

// Close closes the device. The kernel stops serving its queues, unless another process (a child
// between fork and exec) holds the descriptor.
func (d *Device) Close() error { return unix.Close(d.fd) }

// Features returns the feature bits that this kernel's device has.
func (d *Device) Features() (uint64, error) {
	var v uint64
	err := ioctl(d, "VHOST_GET_FEATURES", getFeatures, &v)
	return v, err
}

// SetFeatures sets the feature bits that the driver accepted. A bit that Features lacks is
// EOPNOTSUPP.
func (d *Device) SetFeatures(v uint64) error {
	return ioctl(d, "VHOST_SET_FEATURES", setFeatures, &v)
}

// BackendFeatures returns the device's bits of vhost's own protocol; devices without any return
// ENOTTY.
func (d *Device) BackendFeatures() (uint64, error) {
	var v uint64
	err := ioctl(d, "VHOST_GET_BACKEND_FEATURES", getBackendFeatures, &v)
	return v, err
}

// SetBackendFeatures sets bits of vhost's own protocol.
func (d *Device) SetBackendFeatures(v uint64) error {
	return ioctl(d, "VHOST_SET_BACKEND_FEATURES", setBackendFeatures, &v)
}

// SetOwner makes this process the owner, whose memory the device reads and writes, and starts a
// worker thread. It comes first, except for the queries of features and version, and once: a second
// call is EBUSY.
func (d *Device) SetOwner() error {
	return undisturbed(func() error { return ioctl(d, "VHOST_SET_OWNER", setOwner, new(struct{})) })
}

// undisturbed calls f, which makes the kernel start a thread, with signals blocked. Since Linux 6.4
// the kernel clones this process for that, and a pending signal makes the clone fail with a
// misleading error (ENOMEM). Go sends itself signals all the time.
func undisturbed(f func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var all, old unix.Sigset_t
	for i := range all.Val {
		all.Val[i] = ^uint64(0)
	}
	if err := unix.PthreadSigmask(unix.SIG_SETMASK, &all, &old); err != nil {
		return fmt.Errorf("block signals: %w", err)
	}
	return errors.Join(f(), unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil))
}

// Region is one run of guest memory: Bytes is at guest physical address GPA. It is mapped memory,
// which does not move, and stays mapped until it is out of the table.
type Region struct {
	GPA   uint64
	Bytes []byte
}

// SetMemTable replaces the table of guest memory in this process. The kernel rejects a chain that
// points elsewhere.
func (d *Device) SetMemTable(regions []Region) error {
	if len(regions) > MaxRegions {
		return fmt.Errorf("VHOST_SET_MEM_TABLE: %d regions of memory: more than %d", len(regions), MaxRegions)
	}
	t := memory{NRegions: uint32(len(regions))}
	for i, r := range regions {
		t.Regions[i] = memoryRegion{GuestPhysAddr: r.GPA, MemorySize: uint64(len(r.Bytes)), UserspaceAddr: address(r.Bytes)}
	}
	return ioctl(d, "VHOST_SET_MEM_TABLE", setMemTable, &t)
}

// vring does a request about the vring with that index.
func vring[T any](d *Device, name string, request uintptr, index int, arg *T) error {
	if err := ioctl(d, name, request, arg); err != nil {
		return fmt.Errorf("%w (vring %d)", err, index)
	}
	return nil
}

// SetVringNum sets the number of descriptors of a vring, a power of two up to 32768. It is EBUSY
// while a backend is set. A missing vring is ENOBUFS, here and in the methods below.
func (d *Device) SetVringNum(index int, num uint16) error {
	return vring(d, "VHOST_SET_VRING_NUM", setVringNum, index, &vringState{uint32(index), uint32(num)})
}

// SetVringBase sets the index in the available ring at which the device continues. It is EBUSY
// while a backend is set.
func (d *Device) SetVringBase(index int, base uint16) error {
	return vring(d, "VHOST_SET_VRING_BASE", setVringBase, index, &vringState{uint32(index), uint32(base)})
}

// VringBase returns the index in the available ring that the device takes next. A device that is
// processing the vring finishes its pass first.
func (d *Device) VringBase(index int) (uint16, error) {
	s := vringState{Index: uint32(index)}
	err := vring(d, "VHOST_GET_VRING_BASE", getVringBase, index, &s)
	return uint16(s.Num), err
}

// VringAddr has the addresses of a vring's three parts in this process, in mapped memory; nil means
// none.
type VringAddr struct{ Desc, Driver, Device []byte }

// SetVringAddr sets a vring's addresses, which the kernel keeps. The zero VringAddr clears them.
func (d *Device) SetVringAddr(index int, a VringAddr) error {
	return vring(d, "VHOST_SET_VRING_ADDR", setVringAddr, index, &vringAddr{
		Index: uint32(index), Desc: address(a.Desc), Used: address(a.Device), Avail: address(a.Driver),
	})
}

// SetVringKick sets the eventfd that notifies the device of new buffers; nil: none. The device
// never resets its counter.
func (d *Device) SetVringKick(index int, fd *eventfd.FD) error {
	return vring(d, "VHOST_SET_VRING_KICK", setVringKick, index, file(index, fd))
}

// SetVringCall sets the eventfd that the device signals when it has used buffers; nil: none.
func (d *Device) SetVringCall(index int, fd *eventfd.FD) error {
	return vring(d, "VHOST_SET_VRING_CALL", setVringCall, index, file(index, fd))
}

// SetVringErr sets the eventfd that the device signals when it finds an error; nil: none.
func (d *Device) SetVringErr(index int, fd *eventfd.FD) error {
	return vring(d, "VHOST_SET_VRING_ERR", setVringErr, index, file(index, fd))
}

func file(index int, fd *eventfd.FD) *vringFile {
	if fd == nil {
		return &vringFile{uint32(index), fileUnbind}
	}
	return &vringFile{uint32(index), int32(fd.Fd())}
}

// NewWorker starts another worker thread and returns its number. Kernels before Linux 6.5 return
// ENOTTY, here and in the methods below.
func (d *Device) NewWorker() (uint32, error) {
	var s workerState
	err := undisturbed(func() error { return ioctl(d, "VHOST_NEW_WORKER", newWorker, &s) })
	return s.WorkerID, err
}

// FreeWorker stops a worker; EBUSY if a vring is attached to it. The remaining workers stop when
// the device is closed.
func (d *Device) FreeWorker(worker uint32) error {
	return ioctl(d, "VHOST_FREE_WORKER", freeWorker, &workerState{worker})
}

// AttachVringWorker assigns the vring to a worker.
func (d *Device) AttachVringWorker(index int, worker uint32) error {
	return vring(d, "VHOST_ATTACH_VRING_WORKER", attachVringWorker, index, &vringWorker{uint32(index), worker})
}

// VringWorker returns the number of the worker that serves the vring.
func (d *Device) VringWorker(index int) (uint32, error) {
	s := vringWorker{Index: uint32(index)}
	err := vring(d, "VHOST_GET_VRING_WORKER", getVringWorker, index, &s)
	return s.WorkerID, err
}
