package vscsi

import "gvm/inspect"

// Inspect implements virtio.Inspector.
func (d *Device) Inspect() ([]inspect.Node, [][]inspect.Node) {
	d.events.mu.Lock() // never held for long
	defer d.events.mu.Unlock()
	return []inspect.Node{
		inspect.Int("num_queues", d.cfg.Queues),
		inspect.Int("sense_size", d.senseSize.Load()),
		inspect.Int("cdb_size", d.cdbSize.Load()),
		inspect.Int("event_buffers", len(d.events.buffers)),
		inspect.Bool("events_missed", d.events.missed),
		d.functions.inspect(),
	}, d.workers.Inspect()
}
