// Package virtio is the contract between a virtio device and the transport
// that shows it to the guest (virtio 1.3). A device author implements Device;
// the transport (vpci) does feature negotiation, status, queue set-up and
// interrupts, and hands the device its queues at DRIVER_OK.
//
// A Queue carries the ring's layout and two eventfds, which is what an
// in-process worker and the kernel's vhost both need: everything before this
// point is shared by both.
package virtio

import (
	"gvm/devices/virtio/virtq"
	"gvm/guestmem"
	"gvm/kvmapi/eventfd"
)

// ID is a virtio device ID (virtio 1.3, 5).
type ID uint16

// Device IDs that gvm has devices for.
const (
	IDRNG  ID = 4
	IDSCSI ID = 8
)

// Feature bits of the ring and the transport (virtio 1.3, 6).
const (
	FeatureIndirectDesc = virtq.FeatureIndirectDesc // VIRTIO_F_INDIRECT_DESC
	FeatureEventIdx     = virtq.FeatureEventIdx     // VIRTIO_F_EVENT_IDX
	FeatureVersion1     = 1 << 32                   // VIRTIO_F_VERSION_1
)

// Device is all that a device author writes. The transport calls every method
// from one goroutine at a time.
type Device interface {
	ID() ID
	// Features returns the device-type bits and the ring bits that the device
	// can serve; the transport adds VIRTIO_F_VERSION_1.
	Features() uint64
	// QueueSizes returns the largest size of each queue, each a power of two.
	QueueSizes() []uint16
	// Config returns a snapshot of device-specific configuration space.
	Config() []byte
	// Activate starts serving the queues; it is DRIVER_OK. An error, like a
	// call of a.Broken later, sets DEVICE_NEEDS_RESET.
	Activate(a Activation) error
	// Reset stops every worker, waits until each has stopped and forgets the
	// queues. The device can be activated again afterwards. Reset of a device
	// that is not active does nothing.
	Reset() error
}

// ConfigWriter is a Device whose configuration space the driver may write. The
// device clamps what it takes.
type ConfigWriter interface {
	// WriteConfig stores p at offset off; the range is inside Config().
	WriteConfig(off uint32, p []byte)
}

// Activation is what a device gets at DRIVER_OK.
type Activation struct {
	Mem      *guestmem.Memory
	Features uint64  // what the driver accepted
	Queues   []Queue // as many as QueueSizes; those the driver left alone have Size 0
	// Broken reports that the guest broke a rule of the device or the ring:
	// the transport sets DEVICE_NEEDS_RESET and tells the driver. It may be
	// called from any goroutine, more than once, and does not block.
	Broken func(error)
	// ConfigChanged raises the configuration change interrupt.
	ConfigChanged func()
}

// Queue is one virtqueue that the driver set up: where its rings are, the
// doorbell to wait on and the interrupt to raise.
type Queue struct {
	virtq.Layout
	Kick *eventfd.FD // signalled when the driver notifies
	Call *eventfd.FD // signal it to interrupt the driver
}
