package scsi

import "gvm/devices/block"

// charge counts one command that moves n bytes of the medium of u, or twice as many (countsTwice).
// A handler calls it after all of its checks and before it uses the medium, so a refused command
// costs nothing. errWait means that it is not the command's turn; the handler then runs again.
func (tk *task) charge(n int) error {
	l := tk.u.limit
	if l == nil {
		return nil
	}
	if tk.op.flags&countsTwice != 0 {
		n *= 2
	}
	if !l.Take(&tk.place, uint64(n)) || tk.now && tk.op.flags&nonBlocking == 0 {
		return errWait
	}
	tk.charged = true
	return nil
}

// await returns when k is admitted by the limits of u, or tk has been aborted.
func (tk *task) await(k *block.Place) {
	tk.u.set.interruptibly(tk, func(cut <-chan struct{}) {
		select {
		case <-k.Turn():
		case <-cut:
		}
	})
}

// limited reports whether the handler charges.
func (o *opcode) limited() bool { return o.data.ofBlocks() || o.flags&counts != 0 }
