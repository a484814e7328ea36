package vhostscsi

import (
	"gvm/inspect"
)

// Inspect implements virtio.Inspector: the target's name, and by vring the base that the kernel has
// reached (VHOST_GET_VRING_BASE). The kernel does not show more.
func (d *Device) Inspect() (device []inspect.Node, queues [][]inspect.Node) {
	device = []inspect.Node{inspect.Text("vhost_wwpn", d.cfg.WWPN), inspect.Bool("endpoint", d.watch != nil)}
	if d.watch == nil || d.dev == nil {
		return device, nil
	}
	for i, q := range d.watch.a.Queues {
		var vring []inspect.Node
		if q.Size != 0 {
			if base, err := d.dev.VringBase(i); err == nil {
				vring = []inspect.Node{inspect.Int("last_avail_idx", base)}
			} else {
				vring = []inspect.Node{inspect.Text("error", err.Error())}
			}
		}
		queues = append(queues, vring)
	}
	return device, queues
}
