package virtq

import (
	"gvm/guestmem"
	"gvm/inspect"
)

// InspectRings returns the fields of a queue's two rings that the driver and the device wrote last
// (virtio 1.3, 2.7.6 and 2.7.8), or none if the rings are not where they may be.
func InspectRings(mem *guestmem.Memory, l Layout, features uint64) []inspect.Node {
	q, err := New(mem, l, features, 0)
	if err != nil {
		return nil
	}
	nodes := []inspect.Node{
		inspect.Bits("avail_flags", guestmem.LoadUint16(q.avail)),
		inspect.Int("avail_idx", q.Available()),
		inspect.Bits("used_flags", guestmem.LoadUint16(q.used)),
		inspect.Int("used_idx", guestmem.LoadUint16(q.used[idxOff:])),
	}
	if q.eventIdx {
		nodes = append(nodes, inspect.Int("used_event", guestmem.LoadUint16(q.usedEvent)),
			inspect.Int("avail_event", guestmem.LoadUint16(q.availEvent)))
	}
	return nodes
}

// Inspect returns how far the device is: the index of the next available entry that it takes, as
// vhost calls it, and the chains that it has taken and not given back.
func (q *Queue) Inspect() []inspect.Node {
	return []inspect.Node{inspect.Int("last_avail_idx", q.nextAvail), inspect.Int("in_flight", q.inFlight)}
}
