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

// deviceConfig has the parameters of the devices.
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
	// make makes the machine's devices of this kind, perhaps none. What else a device can do, such as
	// virtio.ConfigWriter and vmm.PowerCycler, is found by its methods.
	make func(deviceConfig) ([]virtio.Device, error)
}

// deviceTable has a row for every kind of virtio device that a guest gets, in the order of their
// PCI slots. A new kind of device is a row here and a package of its own: package example below
// devices/virtio is one, and TestNewDevice has its row.
var deviceTable = []deviceKind{
	{"virtio-scsi", virtio.IDSCSI, deviceConfig.inProcess},
	{"vhost-scsi", virtio.IDSCSI, deviceConfig.kernel},
	{"virtio-rng", virtio.IDRNG, func(deviceConfig) ([]virtio.Device, error) { return []virtio.Device{rng.New()}, nil }},
	{"virtio-vsock", virtio.IDVsock, func(c deviceConfig) ([]virtio.Device, error) {
		if c.vsock == nil {
			return nil, nil
		}
		return []virtio.Device{c.vsock}, nil
	}},
	{"virtio-console", virtio.IDConsole, func(c deviceConfig) ([]virtio.Device, error) {
		if c.console == nil {
			return nil, nil
		}
		return []virtio.Device{c.console}, nil
	}},
	{"virtio-balloon", virtio.IDBalloon, func(c deviceConfig) ([]virtio.Device, error) {
		if c.balloon == nil {
			return nil, nil
		}
		return []virtio.Device{c.balloon}, nil
	}},
	{"virtio-fs", virtio.IDFS, func(c deviceConfig) ([]virtio.Device, error) { return c.shares, nil }},
	{"virtio-net", virtio.IDNet, func(c deviceConfig) ([]virtio.Device, error) { return c.nets, nil }},
}

// makeDevices makes the devices of every row.
func makeDevices(c deviceConfig) (devices []virtio.Device, _ error) {
	for _, row := range deviceTable {
		made, err := row.make(c)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", row.name, err)
		}
		for _, d := range made {
			if d.ID() != row.id {
				return nil, fmt.Errorf("%s: its row has device ID %d, the device has %d", row.name, row.id, d.ID())
			}
		}
		devices = append(devices, made...)
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
func (s scsiDevice) kernel() (made []virtio.Device, _ error) {
	for _, d := range s.disks.KernelDevices() {
		made = append(made, d)
	}
	return made, nil
}
