package vhostscsi

import (
	"gvm/inspect"
)

// Inspect implements virtio.Inspector: the target's name, and by vring the base that the kernel has
// reached (VHOST_GET_VRING_BASE). The kernel does not show more.
func (d *Device) Inspect() (device []inspect.Node, queues [][]inspect.Node) {
	return []inspect.Node{inspect.Text("vhost_wwpn", d.cfg.WWPN), inspect.Bool("endpoint", d.rings != nil)},
		d.rings.Inspect()
}
