package scsi

import "testing"

// AddCommand adds WRITE INVERTED(12), a vendor specific command, until the test ends: the row and
// the function here are all that a command takes.
func AddCommand(t testing.TB) {
	t.Cleanup(func() { opcodes[0xc0] = opcode{} })
	opcodes[0xc0] = opcode{name: "WRITE INVERTED(12)", usage: "\x08" + rest12, extent: extent12, data: blocksOut,
		flags: medium | writes | fuaBit, run: writeInverted}
}

// writeInverted writes the complement of data-out.
func writeInverted(tk *task) error {
	lba, n, err := tk.transfer()
	if err != nil {
		return err
	}
	b, err := tk.parameters(n * int(tk.u.blockSize))
	if err != nil {
		return err
	}
	if err := tk.charge(len(b)); err != nil {
		return err
	}
	for i := range b {
		b[i] = ^b[i]
	}
	return tk.u.write([][]byte{b}, lba, tk.op.fua(tk.CDB))
}
