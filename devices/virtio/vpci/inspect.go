package vpci

import (
	"fmt"

	"gvm/devices/virtio"
	"gvm/devices/virtio/virtq"
	"gvm/inspect"
)

// inspect returns the state of the device: the fields of the common configuration structure (virtio
// 1.3, 4.1.4.3), the rings of the queues that the driver has enabled, and the device's own.
func (d *Device) inspect() inspect.Node { return inspect.Locked("virtio", &d.mu, d.inspectLocked) }

func (d *Device) inspectLocked() []inspect.Node {
	status, isr := d.status, byte(0)
	a := d.act.Load()
	if a != nil && a.broken.Load() {
		status |= statusNeedsReset
	}
	d.intx.mu.Lock()
	isr = d.intx.status
	d.intx.mu.Unlock()
	nodes := []inspect.Node{
		inspect.Int("device_type", d.cfg.Device.ID()),
		inspect.Bits("device_status", status),
		inspect.Bits("device_feature", d.offered),
		inspect.Bits("driver_feature", d.accepted),
		inspect.Bits("config_msix_vector", d.cfgVector.Load()),
		inspect.Int("config_generation", byte(d.gen.Load())),
		inspect.Bits("isr_status", isr),
	}
	if a != nil {
		nodes = append(nodes, inspect.Text("device_state", [...]string{"failed", "active", "stopped"}[a.state]))
		if reason := a.reason.Load(); reason != nil {
			nodes = append(nodes, inspect.Text("error", (*reason).Error()))
		}
	}
	var own []inspect.Node
	var progress [][]inspect.Node
	if i, ok := d.cfg.Device.(virtio.Inspector); ok {
		own, progress = i.Inspect()
	}
	queues := inspect.Group("queue")
	for i := range d.queues {
		q := &d.queues[i]
		n := inspect.Group(fmt.Sprint(i),
			inspect.Bool("queue_enable", q.enabled),
			inspect.Int("queue_size", q.size),
			inspect.Bits("queue_msix_vector", q.vector),
			inspect.Bits("queue_desc", q.desc),
			inspect.Bits("queue_driver", q.driver),
			inspect.Bits("queue_device", q.used))
		if q.enabled {
			l := virtq.Layout{Size: q.size, Desc: q.desc, Driver: q.driver, Device: q.used}
			n.Nodes = append(n.Nodes, virtq.InspectRings(d.cfg.Mem, l, d.accepted)...)
		}
		switch {
		case i < len(progress):
			n.Nodes = append(n.Nodes, progress[i]...)
		case q.enabled && a != nil && a.state == stopped:
			n.Nodes = append(n.Nodes, inspect.Int("last_avail_idx", a.Queues[i].Base))
		}
		queues.Nodes = append(queues.Nodes, n)
	}
	nodes = append(nodes, queues, d.events.Node("event"))
	if len(own) > 0 {
		nodes = append(nodes, inspect.Group("device", own...))
	}
	return nodes
}
