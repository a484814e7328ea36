package machine

import (
	"time"

	"gvm/devices/scsi/trace"
	"gvm/devices/virtio"
	"gvm/devices/virtio/rng"
	"gvm/devices/virtio/vscsi"
	"gvm/machine/disk"
)

// scsiDevice has the parameters of the devices that serve disks.
type scsiDevice struct {
	queues int
	poll   time.Duration
	trace  *trace.File // nil: none
	disks  *disk.Set
}

// deviceTable has a row for every kind of virtio device that a guest gets, in the order of their
// PCI slots. A new kind of device is a row here and a package of its own.
var deviceTable = []struct {
	name string
	make func(scsiDevice) ([]virtio.Device, error)
}{
	{"virtio-scsi", scsiDevice.inProcess},
	{"vhost-scsi", scsiDevice.kernel},
	{"virtio-rng", func(scsiDevice) ([]virtio.Device, error) { return []virtio.Device{rng.New()}, nil }},
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
