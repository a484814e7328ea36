package lio

import (
	"os"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// sgIOHdr is struct sg_io_hdr of scsi/sg.h.
type sgIOHdr struct {
	interfaceID, direction  int32
	cmdLen, mxSbLen         uint8
	iovecCount              uint16
	dxferLen                uint32
	dxfer, cmd, sbp         *byte
	timeout, flags          uint32
	packID                  int32
	usrPtr                  uintptr
	status, masked, msg, sb uint8
	hostStatus, driver      uint16
	resid                   int32
	duration, info          uint32
}

// write10 sends WRITE(10) of one block to LBA 0, past the kernel's own read-only check (SG_IO).
func write10(t *testing.T, dev string, block []byte) (status uint8, sense []byte) {
	t.Helper()
	f, err := os.OpenFile(dev, os.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cdb := []byte{0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0}
	sense = make([]byte, 32)
	h := sgIOHdr{
		interfaceID: 'S', direction: -2, // SG_DXFER_TO_DEV
		cmdLen: uint8(len(cdb)), cmd: &cdb[0], mxSbLen: uint8(len(sense)), sbp: &sense[0],
		dxferLen: uint32(len(block)), dxfer: &block[0], timeout: 10000,
	}
	const sgIO = 0x2285
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), sgIO, uintptr(unsafe.Pointer(&h))); errno != 0 {
		t.Fatalf("%s: SG_IO: %v", dev, errno)
	}
	return h.status, sense[:h.sb]
}
