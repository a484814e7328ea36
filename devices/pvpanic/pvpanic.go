// Package pvpanic is the ISA pvpanic device: one I/O port through which a guest reports that its
// kernel has panicked. The interface is that of QEMU's docs/specs/pvpanic.rst and Linux's
// include/uapi/misc/pvpanic.h; Linux finds the port by the ACPI device whose _HID is QEMU0001.
package pvpanic

// Port is the default I/O port; the register is one byte wide.
const Port = 0x505

// Event is a set of bits of the register.
type Event uint8

// Events. One write may report several.
const (
	Panicked    Event = 1 << 0 // the kernel panicked and does nothing more
	CrashLoaded Event = 1 << 1 // the kernel panicked and now runs its crash kernel
	Shutdown    Event = 1 << 2 // the guest shuts down normally

	supported = Panicked | CrashLoaded | Shutdown
)

// Handler is the register. Write calls it, on the vCPU's thread, with the events that the guest
// reports: at least one, and only those above.
type Handler func(Event)

// Read returns the events that may be reported; bytes past the register read as zero.
func (h Handler) Read(off uint64, p []byte) {
	clear(p)
	if off == 0 && len(p) > 0 {
		p[0] = byte(supported)
	}
}

// Write reports the events; bits that the device does not support are ignored.
func (h Handler) Write(off uint64, p []byte) {
	if off != 0 || len(p) == 0 {
		return
	}
	if e := Event(p[0]) & supported; e != 0 {
		h(e)
	}
}
