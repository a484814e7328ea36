package pci

import "gvm/kvmapi/eventfd"

// Message is what an MSI-X table entry holds (PCI Local Bus 3.0, 6.8.2.9):
// the memory write that is the interrupt.
type Message struct {
	Addr uint64
	Data uint32
}

// Vector delivers one MSI-X vector. Whoever raises it (a device's worker or
// the kernel's vhost) signals Event and knows nothing of masks: while the
// vector is masked nobody consumes the event, so that it stays signalled, which
// is the pending bit; Unmask connects it again and a pending one is delivered.
// The machine implements it by an irqfd that is taken off and put back.
type Vector interface {
	Event() *eventfd.FD
	Unmask(Message) error // also changes the message of a vector that is not masked
	Mask() error
	Close() error
}

// Vectors makes the vectors of one device; the machine hands it to the
// transport.
type Vectors func() (Vector, error)
