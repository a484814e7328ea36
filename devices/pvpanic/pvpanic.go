// Package pvpanic is the ISA pvpanic device: one I/O port through which a guest
// tells that its kernel has panicked. The interface is QEMU's
// docs/specs/pvpanic.rst and Linux's include/uapi/misc/pvpanic.h; Linux finds
// the port by the ACPI device whose _HID is QEMU0001.
package pvpanic

// Port is the default I/O port; the register is one byte wide.
const Port = 0x505

// Event is the bits of the register.
type Event uint8

// What a guest can tell. Several bits may come in one write.
const (
	Panicked    Event = 1 << 0 // the kernel panicked and will do no more
	CrashLoaded Event = 1 << 1 // the kernel panicked and now runs its crash kernel
	Shutdown    Event = 1 << 2 // the guest shuts down in good order

	supported = Panicked | CrashLoaded | Shutdown
)

// Handler is the register. Its Write calls it, on the vCPU's thread, with the
// events that the guest reports: at least one, and none but those above.
type Handler func(Event)

// Read gives the events that may be reported; what lies past the register
// reads as zero.
func (h Handler) Read(off uint64, p []byte) {
	clear(p)
	if off == 0 && len(p) > 0 {
		p[0] = byte(supported)
	}
}

// Write reports the events; bits that the device does not offer are ignored.
func (h Handler) Write(off uint64, p []byte) {
	if off != 0 || len(p) == 0 {
		return
	}
	if e := Event(p[0]) & supported; e != 0 {
		h(e)
	}
}
