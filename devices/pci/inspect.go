package pci

import (
	"encoding/binary"
	"fmt"

	"gvm/inspect"
)

// Inspect returns a group for every function, by the address that Linux shows: bus, device and
// function.
func (b *Bus) Inspect() inspect.Node {
	bus := inspect.Group("pci")
	for i := range b.slot {
		if f := b.slot[i].Load(); f != nil {
			bus.Nodes = append(bus.Nodes, inspect.Group(fmt.Sprintf("00:%02x.0", i), f.inspect()...))
		}
	}
	return bus
}

func (f *Function) inspect() []inspect.Node {
	nodes := []inspect.Node{inspect.Text("name", f.Name), inspect.Locked("config", &f.mu, f.inspectConfig)}
	if f.intx != nil {
		nodes = append(nodes, inspect.Locked("intx", &f.intx.mu, f.intx.inspect))
	}
	if f.msix != nil {
		nodes = append(nodes, inspect.Locked("msix", &f.msix.mu, f.msix.inspect))
	}
	if f.Inspect != nil {
		nodes = append(nodes, f.Inspect())
	}
	return nodes
}

// inspectConfig returns the registers of the header (PCI 3.0, 6.1); mu is held.
func (f *Function) inspectConfig() []inspect.Node {
	le := binary.LittleEndian
	nodes := []inspect.Node{
		inspect.Bits("vendor_id", le.Uint16(f.conf[regVendor:])),
		inspect.Bits("device_id", le.Uint16(f.conf[regDevice:])),
		inspect.Bits("command", f.command()),
		inspect.Bits("status", le.Uint16(f.conf[regStatus:])&^statusINTx),
		inspect.Bits("class", le.Uint32(f.conf[regRevision:])>>8),
		inspect.Int("interrupt_line", f.conf[regIntLine]),
		inspect.Int("interrupt_pin", f.conf[regIntPin]),
	}
	if f.bus == nil {
		return nodes
	}
	f.bus.mapping.Lock()
	defer f.bus.mapping.Unlock()
	for _, r := range f.bars {
		bar := inspect.Group(fmt.Sprintf("bar%d", r.Index), inspect.Bits("base", f.base(r)), inspect.Bits("size", r.Size),
			inspect.Bool("mapped", r.mapped))
		if r.err != nil {
			bar.Nodes = append(bar.Nodes, inspect.Text("error", r.err.Error()))
		}
		nodes = append(nodes, bar)
	}
	return nodes
}

// inspect returns the pin's state; mu is held.
func (x *INTx) inspect() []inspect.Node {
	return []inspect.Node{inspect.Bool("interrupt_status", x.pending), inspect.Bool("interrupt_disable", x.off),
		inspect.Bool("asserted", x.level)}
}

// inspect returns the capability and the table (PCI 3.0, 6.8.2); mu is held.
func (m *MSIX) inspect() []inspect.Node {
	table := inspect.Group("vector")
	for i := range m.vec {
		e := m.table[i*entrySize:][:entrySize]
		v := &m.vec[i]
		table.Nodes = append(table.Nodes, inspect.Group(fmt.Sprint(i),
			inspect.Bits("address", binary.LittleEndian.Uint64(e)),
			inspect.Bits("data", binary.LittleEndian.Uint32(e[entryData:])),
			inspect.Bool("masked", e[entryCtrl]&entryMasked != 0),
			inspect.Bool("connected", v.live),
			inspect.Bool("pending", !v.live && m.Enabled() && v.Event().Pending())))
	}
	return []inspect.Node{inspect.Bool("enable", m.Enabled()), inspect.Bool("function_mask", m.masked), table}
}
