// Package i8042 is what is left of a PC's keyboard controller: the command that
// resets the machine. There is no keyboard, and the device says so at once.
//
// A stock kernel is quickest when no controller is promised: with the 8042 bit
// of the FADT's IAPC_BOOT_ARCH clear and no PNP0303 device, Linux prints one
// line and touches no port. A controller that passes its self-test but has no
// ports costs commands and time-outs instead. A kernel told to probe all the
// same (i8042.nopnp) drains the output buffer first, and gives up after 16
// bytes: hence a status in which the output buffer is full for ever. An empty
// one would have it wait half a second for each of five self-tests. The input
// buffer is always empty, so that a kernel that resets by this port (reboot=k)
// waits for nothing either.
package i8042

// Port is the I/O port of the command and status register, one byte wide. The
// data port, 0x60, has nothing behind it: a bus that reads as ones there is
// what this device counts on.
const Port = 0x64

const (
	statusOBF = 1 << 0 // output buffer full

	// Commands 0xf0-0xff pulse the output port's lines whose bit is 0; line 0
	// is the processor's reset.
	cmdPulse  = 0xf0
	lineReset = 1 << 0
)

// Handler is the register at Port. Its Write calls it, on the vCPU's thread,
// when the guest resets the machine (command 0xfe, as a rule).
type Handler func()

// Read gives the status.
func (h Handler) Read(_ uint64, p []byte) {
	clear(p)
	if len(p) > 0 {
		p[0] = statusOBF
	}
}

// Write takes a command; every one but the reset is ignored.
func (h Handler) Write(_ uint64, p []byte) {
	if len(p) > 0 && p[0]&cmdPulse == cmdPulse && p[0]&lineReset == 0 {
		h()
	}
}
