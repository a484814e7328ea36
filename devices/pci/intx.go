package pci

import "sync"

// Line is an interrupt line of the machine, which several functions may drive: it is high while one
// of them asserts its INTx# (PCI 3.0, 2.2.6).
type Line struct {
	IRQ byte             // for the interrupt line register, as set by firmware
	Set func(level bool) // drives the line for one function; called when its level changes
}

// INTx is the INTA# pin of a function (PCI 3.0, 2.2.6). The pin is asserted while the
// device has an interrupt, unless the command register disables INTx or MSI-X is
// enabled (6.2.2, 6.8.2).
type INTx struct {
	f *Function

	mu      sync.Mutex // only the Line's locks are taken under it
	set     func(level bool)
	pending bool // the device has an interrupt: Interrupt Status
	off     bool // Interrupt Disable
	level   bool
}

// AddINTx adds an interrupt pin to f. The pin is wired when f is put on a bus with lines.
func (f *Function) AddINTx() *INTx {
	f.intx = &INTx{f: f, set: func(bool) {}}
	return f.intx
}

// Set sets whether the device has an interrupt for its driver. It may be called from any goroutine.
func (x *INTx) Set(pending bool) { x.update(func() { x.pending = pending }) }

func (x *INTx) disable(off bool) { x.update(func() { x.off = off }) }

func (x *INTx) update(change func()) {
	x.mu.Lock()
	defer x.mu.Unlock()
	change()
	level := x.pending && !x.off && (x.f.msix == nil || !x.f.msix.Enabled())
	if level != x.level {
		x.level = level
		x.set(level)
	}
}

func (x *INTx) status() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.pending
}
