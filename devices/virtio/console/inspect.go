package console

import (
	"strconv"

	"gvm/inspect"
)

// Inspect implements virtio.Inspector.
func (d *Device) Inspect() ([]inspect.Node, [][]inspect.Node) {
	d.mu.Lock() // never held for long
	defer d.mu.Unlock()
	var ports []inspect.Node
	for _, p := range d.ports {
		ports = append(ports, inspect.Group(strconv.Itoa(p.id),
			inspect.Text("name", p.name),
			inspect.Bool("console", p.console),
			inspect.Bool("guest_open", p.guestOpen),
			inspect.Bool("host_open", !p.hostGone),
			inspect.Bits("messages_due", p.owed),
			inspect.Int("rx_buffers", len(p.rx)),
			inspect.Int("rx_pending", len(p.in)),
			inspect.Count("rx_bytes", p.rxBytes),
			inspect.Int("tx_chains", len(p.tx)),
			inspect.Int("tx_pending", len(p.out)),
			inspect.Count("tx_bytes", p.txBytes)))
	}
	return []inspect.Node{
		inspect.Bool("multiport", d.multiport),
		inspect.Int("cols", d.cols),
		inspect.Int("rows", d.rows),
		inspect.Int("control_buffers", len(d.control)),
		inspect.Group("port", ports...),
	}, d.workers.Inspect()
}
