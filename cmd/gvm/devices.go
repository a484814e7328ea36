package main

import (
	"slices"

	"gvm/devices/virtio"
	"gvm/devices/virtio/rng"
	"gvm/devices/virtio/vscsi"
)

// deviceTable is every kind of virtio device that a guest gets, in the order of
// their PCI slots. A new kind of device is a row here and a package of its own.
var deviceTable = []struct {
	name string
	make func(runConfig, *disks) ([]virtio.Device, error)
}{
	{"virtio-scsi", func(c runConfig, ds *disks) ([]virtio.Device, error) {
		if !ds.inProcess() {
			return nil, nil
		}
		cfg := vscsi.Config{Target: ds.target, Queues: c.requestQueues(), Poll: c.poll, Protection: slices.ContainsFunc(c.disks, func(d disk) bool { return d.pi })}
		if c.trace != nil {
			cfg.Observer = c.trace.Device(0)
		}
		d, err := vscsi.New(cfg)
		if err != nil {
			return nil, err
		}
		ds.events = d
		return []virtio.Device{d}, nil
	}},
	{"vhost-scsi", func(_ runConfig, ds *disks) (made []virtio.Device, _ error) {
		for _, k := range ds.kernels {
			made = append(made, k.device)
		}
		return made, nil
	}},
	{"virtio-rng", func(runConfig, *disks) ([]virtio.Device, error) { return []virtio.Device{rng.New()}, nil }},
}
