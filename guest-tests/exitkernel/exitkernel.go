// Package exitkernel makes a kernel for gvm test that runs no command: it ends at once, as if the
// command had ended with a status. It runs on KVM that Linux guests are too much for.
package exitkernel

import "encoding/binary"

// Image returns an ELF file with a PVH note. Its program tells the status by the agent's status
// port.
func Image(status byte) []byte {
	program := []byte{
		0x66, 0xba, 0x08, 0x05, // mov $statusport.Port, %dx
		0xb0, 1, 0xee, 0x42, 0xb0, 1, 0xee, // out 1; then statusport.Alive to the next port
		0x4a, 0xb0, status, 0xee, 0x42, 0xb0, 2, 0xee, // out status; then statusport.Exited
		0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x34, 0x66, 0xef, // PM1a_CNT: SLP_EN, S5
		0xf4, 0xeb, 0xfd, // hlt, for ever
	}
	const at, segments, note = 2 << 20, 64 + 2*56, 20
	le := binary.LittleEndian
	f := []byte("\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00")
	f = le.AppendUint32(le.AppendUint32(f, 62<<16|2), 1)        // EM_X86_64, ET_EXEC; EV_CURRENT
	for _, v := range []uint64{at, 64, 0, 56<<48 | 64<<32, 2} { // entry, program headers, sections, and sizes
		f = le.AppendUint64(f, v)
	}
	size := uint64(len(program))
	for _, v := range []uint64{
		7<<32 | 1, segments + note, at, at, size, size, 4, // PT_LOAD, RWX
		4<<32 | 4, segments, 0, 0, note, note, 4, // PT_NOTE
	} {
		f = le.AppendUint64(f, v)
	}
	f = append(f, "\x04\x00\x00\x00\x04\x00\x00\x00\x12\x00\x00\x00Xen\x00"...)
	return append(le.AppendUint32(f, at), program...)
}
