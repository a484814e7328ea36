package kvmapi

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/bobuhiro11/gokvm/kvm"
	"golang.org/x/sys/unix"
)

// Exits counts the returns of Run, by reason. The other reasons end a machine.
type Exits struct{ IO, MMIO, Interrupted uint64 }

// Exits returns the counts since the vCPU was made. It belongs to Run's goroutine.
func (c *VCPU) Exits() Exits { return c.exits }

// Stat is a statistic that KVM keeps, with KVM's name for it.
type Stat struct {
	Name    string
	Value   uint64
	Counter bool // it only grows (KVM_STATS_TYPE_CUMULATIVE)
}

// Stats returns KVM's statistics of the vCPU, without its histograms (KVM_GET_STATS_FD). It returns
// none if this KVM is older than Linux 5.14.
func (c *VCPU) Stats() ([]Stat, error) {
	fd, err := ioctlInt(c.fd, "KVM_GET_STATS_FD", kvm.IIO(nrGetStatsFD), 0)
	if errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EINVAL) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	b := make([]byte, 64<<10) // KVM of Linux 6.18 has 4 KiB
	n, err := unix.Pread(fd, b, 0)
	if err != nil {
		return nil, fmt.Errorf("read KVM's statistics of a vCPU: %w", err)
	}
	return parseStats(b[:n])
}

// statHeader is struct kvm_stats_header.
type statHeader struct{ Flags, NameSize, Count, ID, Descriptors, Data uint32 }

// statDescriptor is struct kvm_stats_desc without the name.
type statDescriptor struct {
	Flags      uint32
	Exponent   int16
	Size       uint16 // values
	Offset     uint32 // in the data
	BucketSize uint32
}

// statType is KVM_STATS_TYPE_MASK, where KVM_STATS_TYPE_CUMULATIVE is 0.
const statType = 0xf

// parseStats reads the file of KVM_GET_STATS_FD (Documentation/virt/kvm/api.rst, 4.133).
func parseStats(b []byte) (stats []Stat, err error) {
	var h statHeader
	if _, err := binary.Decode(b, binary.LittleEndian, &h); err != nil {
		return nil, fmt.Errorf("KVM's statistics: %d bytes are no header", len(b))
	}
	size := binary.Size(statDescriptor{})
	for i := range int(h.Count) {
		at := int(h.Descriptors) + i*(size+int(h.NameSize))
		if at+size+int(h.NameSize) > len(b) {
			return nil, fmt.Errorf("KVM's statistics: descriptor %d is behind their end, at %d", i, len(b))
		}
		var d statDescriptor
		if _, err := binary.Decode(b[at:], binary.LittleEndian, &d); err != nil {
			return nil, err
		}
		name, _, _ := bytes.Cut(b[at+size:at+size+int(h.NameSize)], []byte{0})
		value := int(h.Data) + int(d.Offset)
		if value+8 > len(b) {
			return nil, fmt.Errorf("KVM's statistics: %s is behind their end, at %d", name, len(b))
		}
		if d.Size == 1 {
			stats = append(stats, Stat{string(name), binary.LittleEndian.Uint64(b[value:]), d.Flags&statType == 0})
		}
	}
	return stats, nil
}
