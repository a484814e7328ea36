package net

import (
	"fmt"

	"gvm/inspect"
)

// Inspect implements virtio.Inspector.
func (d *Device) Inspect() ([]inspect.Node, [][]inspect.Node) {
	d.mu.Lock() // never held for long
	defer d.mu.Unlock()
	m := d.cfg.MAC
	state := []inspect.Node{
		inspect.Text("mac", fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x", m[0], m[1], m[2], m[3], m[4], m[5])),
		inspect.Bool("link_up", !d.down.Load()),
		inspect.Int("mtu", d.cfg.MTU),
		inspect.Bool("vhost", d.cfg.Kernel != nil),
		inspect.Int("virtqueue_pairs", d.used),
	}
	var pairs []inspect.Node
	for i, p := range d.pairs {
		pairs = append(pairs, p.inspect(i))
	}
	queues := d.workers.Inspect()
	if d.kernel > 0 {
		copy(queues, d.cfg.Kernel.Inspect())
	}
	if d.cfg.Kernel != nil {
		return state, queues
	}
	return append(state, inspect.Group("pair", pairs...)), queues
}

func (p *pair) inspect(i int) inspect.Node {
	p.mu.Lock()
	defer p.mu.Unlock()
	return inspect.Group(fmt.Sprint(i),
		inspect.Count("rx_frames", p.rxFrames.Load()),
		inspect.Count("rx_bytes", p.rxBytes.Load()),
		inspect.Count("rx_dropped", p.rxDropped.Load()),
		inspect.Int("rx_buffers", len(p.held)),
		inspect.Int("rx_waiting", len(p.frame)),
		inspect.Count("tx_frames", p.txFrames.Load()),
		inspect.Count("tx_bytes", p.txBytes.Load()),
		inspect.Count("tx_dropped", p.txDropped.Load()))
}
