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
	"context"
	"fmt"

	"gvm/devices/virtio/virtq"
	"gvm/guestmem"
	"gvm/inspect"
	"gvm/kvmapi/eventfd"
)

// ID is a virtio device ID (virtio 1.3, 5).
type ID uint16

// Device IDs that gvm has devices for.
const (
	IDNet     ID = 1
	IDConsole ID = 3
	IDRNG     ID = 4
	IDBalloon ID = 5
	IDSCSI    ID = 8
	IDVsock   ID = 19
	IDFS      ID = 26
)

var idNames = map[ID]string{IDNet: "net", IDConsole: "console", IDRNG: "entropy", IDBalloon: "balloon", IDSCSI: "scsi",
	IDVsock: "vsock", IDFS: "fs"}

// Name returns a word for a kind of device, or its number.
func (id ID) Name() string {
	if name := idNames[id]; name != "" {
		return name
	}
	return fmt.Sprintf("type %d", uint16(id))
}

// Feature bits of the ring and the transport (virtio 1.3, 6).
const (
	FeatureIndirectDesc = virtq.FeatureIndirectDesc // VIRTIO_F_INDIRECT_DESC
	FeatureEventIdx     = virtq.FeatureEventIdx     // VIRTIO_F_EVENT_IDX
	FeatureVersion1     = 1 << 32                   // VIRTIO_F_VERSION_1
)

// Device is all that a device author writes. The transport calls every method
// from one goroutine at a time.
//
// A device is reset, active or stopped. Activate starts it. Stop ends that with
// everything in flight finished, and an Activate with the bases that Stop returned
// continues: the driver does not notice, no chain is lost and none is served twice.
// Meanwhile the device keeps the driver's settings and the events it has not yet sent;
// a device that has such state says so at its Stop. Reset, which may follow at any
// time, forgets all of it. A pause of the machine and a cleared Bus Master Enable
// stop devices.
type Device interface {
	ID() ID
	// Features returns the device-type bits and the ring bits that the device
	// can serve; the transport adds VIRTIO_F_VERSION_1.
	Features() uint64
	// QueueSizes returns the largest size of each queue, each a power of two.
	QueueSizes() []uint16
	// Config returns a snapshot of device-specific configuration space.
	Config() []byte
	// Activate starts serving the queues, each at its Base: after a reset at
	// DRIVER_OK, or when a stopped device continues. An error, like a call of
	// a.Broken later, sets DEVICE_NEEDS_RESET.
	Activate(a Activation) error
	// Stop takes no more chains, finishes those that it took and returns the
	// Base of each queue to continue at; none if the device is not active. The
	// device does not use what Activate got until it is activated again. If ctx
	// ends before all is finished, Stop returns the cause of ctx, and the device
	// is active as before; where it cannot give up, as in a call of the kernel, it
	// waits as long as storage takes. After any other error the device can only
	// be reset.
	Stop(ctx context.Context) (bases []uint16, err error)
	// Reset stops the device too, but aborts requests in flight where it can, and
	// forgets the driver. Reset of a device that is reset does nothing.
	Reset() error
}

// ConfigWriter is a Device whose configuration space the driver may write. The
// device clamps the values that it takes.
type ConfigWriter interface {
	// WriteConfig stores p at offset off; the range is inside Config().
	WriteConfig(off uint32, p []byte)
}

// Inspector is a Device that shows its state. The transport calls Inspect as it calls the other
// methods.
type Inspector interface {
	// Inspect returns the device's state, and by queue how far the device is in the queue: nil for
	// those that it does not serve. It does not wait for storage or the driver.
	Inspect() (device []inspect.Node, queues [][]inspect.Node)
}

// Activation has a device's parameters at DRIVER_OK.
type Activation struct {
	Mem      *guestmem.Memory
	Features uint64  // those that the driver accepted
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
	Base uint16      // index of the first available entry to take: 0, or one from Stop
	Kick *eventfd.FD // signalled when the driver notifies
	Call *eventfd.FD // signal it to interrupt the driver
}
