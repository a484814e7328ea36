// Package debugport is the POST code port of a PC: a guest writes a byte, and
// the machine notes which byte came when. It times a boot from the inside.
package debugport

// Port is the I/O port at which PCs have it.
const Port = 0x80

// Handler is the one-byte register. Its Write calls it with the byte, on the
// vCPU's thread; vCPUs may do so at the same time.
type Handler func(code byte)

// Read answers as a bus that nobody drives: the port is write-only.
func (h Handler) Read(_ uint64, p []byte) {
	for i := range p {
		p[i] = 0xff
	}
}

// Write reports p's first byte, the only one that the port is wide.
func (h Handler) Write(_ uint64, p []byte) {
	if len(p) > 0 {
		h(p[0])
	}
}
