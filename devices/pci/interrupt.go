package pci

import "gvm/kvmapi/eventfd"

// Message is the content of an MSI-X table entry (PCI Local Bus 3.0, 6.8.2.9): the memory write
// that is the interrupt.
type Message struct {
	Addr uint64
	Data uint32
}

// Vector delivers one MSI-X vector. A device's worker or the kernel's vhost raises it by signalling
// Event and knows nothing of masks. While the vector is masked nothing consumes the event: it stays
// signalled as the pending bit. Unmask connects the vector again and delivers a pending event. The
// machine implements Vector by an irqfd that it assigns and deassigns.
type Vector interface {
	Event() *eventfd.FD
	Unmask(Message) error // also changes the message of an unmasked vector
	Mask() error
	Close() error
}

// Vectors makes the vectors of one device; the machine passes it to the transport.
type Vectors func() (Vector, error)
