package main

import (
	"gvm/devices/virtio"
	"gvm/devices/virtio/rng"
	"gvm/devices/virtio/vscsi"
	"gvm/machine/disk"
)

// deviceTable is every kind of virtio device that a guest gets, in the order of
// their PCI slots. A new kind of device is a row here and a package of its own.
var deviceTable = []struct {
	name string
	make func(runConfig, *disk.Set) ([]virtio.Device, error)
}{
	{"virtio-scsi", func(c runConfig, ds *disk.Set) ([]virtio.Device, error) {
		if !ds.InProcess() {
			return nil, nil
		}
		cfg := vscsi.Config{Target: ds.Target(), Queues: c.requestQueues(), Poll: c.poll, Protection: ds.Protected()}
		if c.trace != nil {
			cfg.Observer = c.trace.Device(0)
		}
		d, err := vscsi.New(cfg)
		if err != nil {
			return nil, err
		}
		ds.Notify(d)
		return []virtio.Device{d}, nil
	}},
	{"vhost-scsi", func(_ runConfig, ds *disk.Set) (made []virtio.Device, _ error) {
		for _, d := range ds.KernelDevices() {
			made = append(made, d)
		}
		return made, nil
	}},
	{"virtio-rng", func(runConfig, *disk.Set) ([]virtio.Device, error) { return []virtio.Device{rng.New()}, nil }},
}
