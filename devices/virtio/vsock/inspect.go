package vsock

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"sort"

	"gvm/inspect"
)

// Inspect implements virtio.Inspector.
func (d *Device) Inspect() ([]inspect.Node, [][]inspect.Node) {
	d.mu.Lock() // never held for long
	defer d.mu.Unlock()
	keys := slices.Collect(maps.Keys(d.conns))
	sort.SliceStable(keys, func(i, j int) bool {
		a, b := keys[i], keys[j]
		return cmp.Or(cmp.Compare(a.hostPort, b.hostPort), cmp.Compare(a.guestPort, b.guestPort)) < 0
	})
	var conns []inspect.Node
	for _, k := range keys {
		conns = append(conns, d.conns[k].inspect())
	}
	return []inspect.Node{
		inspect.Int("guest_cid", d.cfg.CID),
		inspect.Int("connections", len(d.conns)),
		inspect.Group("connection", conns...).As(inspect.Passing),
		inspect.Int("unclosed", d.held-len(d.conns)),
		inspect.Int("rx_buffers", len(d.rx)),
		inspect.Int("event_buffers", len(d.events)),
		inspect.Bool("transport_reset_due", d.resetDue),
		inspect.Int("rsts", len(d.rsts)),
		inspect.Count("rsts_dropped", d.droppedRSTs),
		inspect.Count("rx_packets", d.rxPackets),
		inspect.Count("rx_bytes", d.rxBytes),
		inspect.Count("tx_packets", d.txPackets),
		inspect.Count("tx_bytes", d.txBytes),
		inspect.Count("tx_foreign", d.foreign),
	}, d.workers.Inspect()
}

// inspect returns the state of a connection, by the ports of the host and the guest.
func (c *Conn) inspect() inspect.Node {
	state := "connecting"
	switch {
	case c.closed:
		state = "closing"
	case c.established:
		state = "established"
	}
	return inspect.Group(fmt.Sprintf("%d-%d", c.hostPort, c.guestPort),
		inspect.Text("state", state),
		inspect.Bits("shutdown", c.shut),
		inspect.Bits("peer_shutdown", c.peerShut),
		inspect.Int("buf_alloc", c.bufAlloc),
		inspect.Int("fwd_cnt", c.fwdCnt),
		inspect.Int("rx_cnt", c.rxCnt),
		inspect.Int("buffered", c.in.n),
		inspect.Int("peer_buf_alloc", c.peerAlloc),
		inspect.Int("peer_fwd_cnt", c.peerFwd),
		inspect.Int("tx_cnt", c.txCnt),
		inspect.Int("to_write", len(c.out)))
}
