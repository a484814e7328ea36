package machine

import (
	"fmt"
	"time"

	"gvm/devices/scsi/trace"
	"gvm/devices/virtio"
	"gvm/devices/virtio/balloon"
	"gvm/devices/virtio/console"
	"gvm/devices/virtio/rng"
	"gvm/devices/virtio/vscsi"
	"gvm/machine/disk"
)

// deviceConfig has the devices that the machine has made already, and the parameters of the others.
type deviceConfig struct {
	scsiDevice
	vsock   virtio.Device   // nil: none
	console *console.Device // nil: none
	balloon *balloon.Device // nil: none
	shares  []virtio.Device
	nets    []virtio.Device
}

// scsiDevice has the parameters of the devices that serve disks.
type scsiDevice struct {
	queues int
	poll   time.Duration
	trace  *trace.File // nil: none
	disks  *disk.Set
}

// deviceKind is a kind of virtio device.
type deviceKind struct {
	name string    // for messages
	id   virtio.ID // the PCI device ID is 0x1040 more (virtio 1.3, 4.1.2.1)
	// make makes the machine's devices of this kind, perhaps none. Other abilities of a device, such
	// as virtio.ConfigWriter and vmm.PowerCycler, are found by its methods.
	make func() ([]virtio.Device, error)
}

// deviceTable returns a row for every kind of virtio device that a guest gets, in the order of
// their PCI slots. A row gets its own part of the configuration alone. A new kind of device is a
// row here and a package of its own: package example below devices/virtio is one, and TestNewDevice
// has its row.
var deviceTable = func(c deviceConfig) []deviceKind {
	return []deviceKind{
		{"virtio-scsi", virtio.IDSCSI, c.inProcess},
		{"vhost-scsi", virtio.IDSCSI, c.kernel},
		{"virtio-rng", virtio.IDRNG, optional(rng.New())},
		{"virtio-vsock", virtio.IDVsock, optional(c.vsock)},
		{"virtio-console", virtio.IDConsole, optional(c.console)},
		{"virtio-balloon", virtio.IDBalloon, optional(c.balloon)},
		{"virtio-fs", virtio.IDFS, made(c.shares)},
		{"virtio-net", virtio.IDNet, made(c.nets)},
	}
}

// made returns the function of a row whose devices are there.
func made(devices []virtio.Device) func() ([]virtio.Device, error) {
	return func() ([]virtio.Device, error) { return devices, nil }
}

// optional is made for one device, or none if it is nil.
func optional[D interface {
	comparable
	virtio.Device
}](device D) func() ([]virtio.Device, error) {
	if none := *new(D); device == none {
		return made(nil)
	}
	return made([]virtio.Device{device})
}

// makeDevices makes the devices of every row.
func makeDevices(c deviceConfig) (devices []virtio.Device, _ error) {
	for _, row := range deviceTable(c) {
		list, err := row.make()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", row.name, err)
		}
		for _, d := range list {
			if d.ID() != row.id {
				return nil, fmt.Errorf("%s: its row has device ID %d, the device has %d", row.name, row.id, d.ID())
			}
		}
		devices = append(devices, list...)
	}
	return devices, nil
}

// inProcess makes the device of gvm's own target.
func (s scsiDevice) inProcess() ([]virtio.Device, error) {
	if !s.disks.InProcess() {
		return nil, nil
	}
	cfg := vscsi.Config{Target: s.disks.Target(), Queues: s.queues, Poll: s.poll, Protection: s.disks.Protected()}
	if s.trace != nil {
		cfg.Observer = s.trace.Device(0)
	}
	d, err := vscsi.New(cfg)
	if err != nil {
		return nil, err
	}
	s.disks.Notify(d)
	return []virtio.Device{d}, nil
}

// kernel makes the devices of the kernel's targets.
func (s scsiDevice) kernel() (devices []virtio.Device, _ error) {
	for _, d := range s.disks.KernelDevices() {
		devices = append(devices, d)
	}
	return devices, nil
}
