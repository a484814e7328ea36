package vhost

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Structures of linux/vhost_types.h, with the kernel's field names.
type (
	vringState struct{ Index, Num uint32 }

	vringFile struct {
		Index uint32
		FD    int32
	}

	vringAddr struct {
		Index, Flags           uint32
		Desc, Used, Avail, Log uint64
	}

	memoryRegion struct{ GuestPhysAddr, MemorySize, UserspaceAddr, FlagsPadding uint64 }

	memory struct {
		NRegions, _ uint32
		Regions     [MaxRegions]memoryRegion
	}

	workerState struct{ WorkerID uint32 }
	vringWorker struct{ Index, WorkerID uint32 }

	scsiTarget struct {
		ABIVersion     int32
		WWPN           [MaxWWPN + 1]byte
		TPGT, Reserved uint16
	}
)

const fileUnbind = -1 // VHOST_FILE_UNBIND

// Request numbers (linux/vhost.h). The direction of some contradicts the ioctl, but the numbers are
// the interface.
var (
	getFeatures        = ior[uint64](0x00)
	setFeatures        = iow[uint64](0x00)
	setOwner           = request(0, 0x01, 0)
	setMemTable        = request(iocWrite, 0x03, unsafe.Offsetof(memory{}.Regions))
	newWorker          = ior[workerState](0x08)
	freeWorker         = iow[workerState](0x09)
	setVringNum        = iow[vringState](0x10)
	setVringAddr       = iow[vringAddr](0x11)
	setVringBase       = iow[vringState](0x12)
	getVringBase       = request(iocRead|iocWrite, 0x12, unsafe.Sizeof(vringState{}))
	attachVringWorker  = iow[vringWorker](0x15)
	getVringWorker     = request(iocRead|iocWrite, 0x16, unsafe.Sizeof(vringWorker{}))
	setVringKick       = iow[vringFile](0x20)
	setVringCall       = iow[vringFile](0x21)
	setVringErr        = iow[vringFile](0x22)
	setBackendFeatures = iow[uint64](0x25)
	getBackendFeatures = ior[uint64](0x26)

	scsiSetEndpoint     = iow[scsiTarget](0x40)
	scsiClearEndpoint   = iow[scsiTarget](0x41)
	scsiGetABIVersion   = iow[int32](0x42)
	scsiSetEventsMissed = iow[uint32](0x43)
	scsiGetEventsMissed = iow[uint32](0x44)

	netSetBackend = iow[vringFile](0x30)

	vsockSetGuestCID = iow[uint64](0x60)
	vsockSetRunning  = iow[int32](0x61)
)

// Parts of a request number (asm-generic/ioctl.h).
const (
	iocWrite = 1
	iocRead  = 2

	vhostVirtio = 0xaf
)

func request(dir, nr, size uintptr) uintptr { return dir<<30 | size<<16 | vhostVirtio<<8 | nr }

// ior and iow return the request number for an argument of type T.
func ior[T any](nr uintptr) uintptr { return request(iocRead, nr, unsafe.Sizeof(*new(T))) }
func iow[T any](nr uintptr) uintptr { return request(iocWrite, nr, unsafe.Sizeof(*new(T))) }

// ioctl does one request. The conversion to uintptr is in the argument list of the system call,
// which keeps arg in place (package unsafe, rule 4).
func ioctl[T any](d *Device, name string, request uintptr, arg *T) error {
	if d.Before != nil {
		if err := d.Before(name); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(d.fd), request, uintptr(unsafe.Pointer(arg))); errno != 0 {
		return fmt.Errorf("%s: %w", name, errno)
	}
	return nil
}

// address returns the address of b in this process, for the kernel to keep; 0 for nil. The memory
// is a mapping and not Go heap, so it does not move.
func address(b []byte) uint64 { return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) }
