// Package i8042 is the remainder of a PC's keyboard controller: the command that resets the
// machine. There is no keyboard, and the device reports that at once.
//
// A stock kernel boots fastest without a controller: if the 8042 bit of the FADT's IAPC_BOOT_ARCH
// is clear and there is no PNP0303 device, Linux prints one line and touches no port. A controller
// that passes its self-test but has no ports costs commands and time-outs. A kernel that is told to
// probe anyway (i8042.nopnp) drains the output buffer first, and gives up after 16 bytes. So the
// status always shows a full output buffer: with an empty one the kernel would wait half a second
// for each of five self-tests. The input buffer is always empty, so that a kernel that resets by
// this port (reboot=k) does not wait either.
package i8042

// Port is the I/O port of the command and status register, one byte wide. There must be no device
// at the data port, 0x60: the bus reads as ones there.
const Port = 0x64

const (
	statusOBF = 1 << 0 // output buffer full

	// Commands 0xf0-0xff pulse the output port's lines whose bit is 0; line 0
	// is the processor's reset.
	cmdPulse  = 0xf0
	lineReset = 1 << 0
)

// Handler is the register at Port. Write calls it, on the vCPU's thread, when the guest resets the
// machine (usually by command 0xfe).
type Handler func()

// Read returns the status.
func (h Handler) Read(_ uint64, p []byte) {
	clear(p)
	if len(p) > 0 {
		p[0] = statusOBF
	}
}

// Write takes a command. It ignores all but the reset.
func (h Handler) Write(_ uint64, p []byte) {
	if len(p) > 0 && p[0]&cmdPulse == cmdPulse && p[0]&lineReset == 0 {
		h()
	}
}
