// Package debugport is the POST code port of a PC: a guest writes a byte, and the machine records
// it with the time. It times a boot from inside the guest.
package debugport

// Port is the I/O port of PCs.
const Port = 0x80

// Handler is the one-byte register. Write calls it with the byte, on the vCPU's thread; vCPUs may
// do so at the same time.
type Handler func(code byte)

// Read reads as an undriven bus: the port is write-only.
func (h Handler) Read(_ uint64, p []byte) {
	for i := range p {
		p[i] = 0xff
	}
}

// Write reports p's first byte: the port is one byte wide.
func (h Handler) Write(_ uint64, p []byte) {
	if len(p) > 0 {
		h(p[0])
	}
}
