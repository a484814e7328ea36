package main

import (
	"gvm/devices/virtio"
	"gvm/devices/virtio/rng"
	"gvm/devices/virtio/vscsi"
)

// deviceTable is every virtio device that a guest gets, in the order of their
// PCI slots. A new kind of device is a row here and a package of its own.
var deviceTable = []struct {
	name string
	make func(runConfig, *disks) (virtio.Device, error)
}{
	{"virtio-scsi", func(c runConfig, ds *disks) (virtio.Device, error) {
		cfg := vscsi.Config{Target: ds.target, Queues: c.requestQueues()}
		if c.trace != nil {
			cfg.Observer = c.trace.Device(0)
		}
		return vscsi.New(cfg)
	}},
	{"virtio-rng", func(runConfig, *disks) (virtio.Device, error) { return rng.New(), nil }},
}
