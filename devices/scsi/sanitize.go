package scsi

import (
	"context"
	"encoding/binary"

	"gvm/panics"
)

// States of SANITIZE of a unit.
const (
	notSanitizing int32 = iota
	sanitizing
	sanitizeFailed     // until another SANITIZE succeeds
	sanitizeFailedAUSE // or EXIT FAILURE MODE is received
)

// Service actions of SANITIZE (SBC-4 5.29.1).
const (
	sanitizeOverwrite   = 0x01
	sanitizeBlockErase  = 0x02
	sanitizeExitFailure = 0x1f
)

// notReady returns the sense data for a command that uses the medium, nil if the unit is ready.
func (u *Unit) notReady() error {
	switch {
	case u.stopped.Load():
		return BecomingReady
	case u.sanitize.Load() == sanitizing:
		return SanitizeInProgress
	case u.sanitize.Load() != notSanitizing:
		return SanitizeFailed
	}
	return nil
}

// sanitizeOperation is the operation that SANITIZE begins. It belongs to the unit, not to the
// command: abort and reset end a command that waits for it. Only Detach and the end of the target
// end the operation itself, which then has failed (SBC-4 4.11). It goes on over a power cycle of
// the guest.
type sanitizeOperation struct {
	life context.Context // done when the operation is stopped
	stop context.CancelFunc
	err  error         // valid once done is closed
	done chan struct{} // closed when the operation has ended
}

func (o *sanitizeOperation) stopped() bool { return o.life.Err() != nil }

// stopSanitize ends the operation, if there is one, and returns a channel that is closed when it
// has ended. No command may begin one meanwhile.
func (u *Unit) stopSanitize() <-chan struct{} {
	op := u.sanitizing.Load()
	if op == nil {
		return closedChannel
	}
	op.stop()
	return op.done
}

var closedChannel = func() chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}()

// sanitize is SANITIZE (SBC-4 5.29). It changes all blocks that the initiator can read. Copies that
// the host's file system or device keeps elsewhere are out of its reach.
func sanitize(tk *task) error {
	u, action, n := tk.u, tk.op.action(), tk.listLength()
	var pattern []byte
	if action == sanitizeOverwrite {
		if n <= 4 || n > 4+int(u.blockSize) {
			return invalidCDB(7, 7)
		}
		b, err := tk.parameters(n)
		if err != nil {
			return err
		}
		// All of these are errors of the CDB (SBC-4 5.29.2.2).
		if size := int(binary.BigEndian.Uint16(b[2:])); b[0]&0x1f == 0 || size == 0 || size > n-4 {
			return InvalidFieldInCDB
		} else {
			pattern = append(b[:1:1], b[4:4+size]...)
		}
	} else if n != 0 {
		return invalidCDB(7, 7)
	}
	op, err := tk.beginSanitize(action, pattern)
	if op == nil || tk.CDB[1]&0x80 != 0 { // IMMED
		return err // later commands report a failure
	}
	u.set.interruptibly(tk, func(cut <-chan struct{}) {
		select {
		case <-op.done:
			err = op.err
		case <-cut:
		}
	})
	return err
}

// beginSanitize waits until no other command uses the medium, then begins the operation. For EXIT
// FAILURE MODE it returns no operation. It sets no state before the wait is over
// (TestSanitizeAborted).
func (tk *task) beginSanitize(action byte, pattern []byte) (*sanitizeOperation, error) {
	u := tk.u
	if u.sanitize.Load() == sanitizing {
		return nil, SanitizeInProgress
	}
	if !tk.lockMedium(u, true) {
		return nil, TargetFailure // aborted
	}
	defer u.medium.unlock(true)
	switch state := u.sanitize.Load(); {
	case u.stopped.Load():
		return nil, BecomingReady
	case state == sanitizing:
		return nil, SanitizeInProgress
	case tk.stopped():
		return nil, TargetFailure
	case action != sanitizeExitFailure:
	case state == sanitizeFailed:
		return nil, invalidCDB(1, 4) // only after one with AUSE
	default:
		u.sanitize.Store(notSanitizing)
		return nil, nil
	}
	op, failed := &sanitizeOperation{done: make(chan struct{})}, sanitizeFailed
	op.life, op.stop = context.WithCancel(context.Background())
	if tk.CDB[1]&0x20 != 0 { // AUSE
		failed = sanitizeFailedAUSE
	}
	u.sanitize.Store(sanitizing)
	u.sanitizing.Store(op)
	panics.Go(func() { // Detach and Target.End stop it
		defer close(op.done)
		defer op.stop()
		ended := notSanitizing
		if err := u.erase(op, pattern); err != nil {
			ended, op.err = failed, SanitizeFailed
		}
		u.sanitize.Store(ended)
		u.sanitizing.CompareAndSwap(op, nil) // unless another has begun
	})
	return op, nil
}

// writeBacker is a backend that can write most data back in pieces, before a flush that cannot be
// stopped; *block.File is one.
type writeBacker interface {
	WriteBack(context.Context) error
}

// erase discards every block, or overwrites it. The first byte of pattern is that of the parameter
// list; the rest is repeated in every block.
func (u *Unit) erase(op *sanitizeOperation, pattern []byte) error {
	passes, block := byte(1), []byte(nil)
	if pattern != nil {
		passes, block = pattern[0]&0x1f, make([]byte, u.blockSize) // OVERWRITE COUNT
		for i := range block {
			block[i] = pattern[1+i%(len(pattern)-1)]
		}
	}
	for range passes {
		if err := u.erasePass(op, block); err != nil {
			return err
		}
		if w, ok := u.b.(writeBacker); ok && u.Dirty() {
			_ = w.WriteBack(op.life) // the flush returns an error of the storage again
			if op.stopped() {
				return errStopped
			}
		}
		if err := u.flush(); err != nil {
			return err
		}
		if pattern != nil && pattern[0]&0x80 != 0 { // INVERT
			for i := range block {
				block[i] = ^block[i]
			}
		}
	}
	return nil
}

// erasePass writes block to all blocks, or discards them if it is nil. Between two pieces the
// medium is free, for a resize.
func (u *Unit) erasePass(op *sanitizeOperation, block []byte) error {
	p := u.pieces()
	piece := func(lba uint64) (n uint64, err error) {
		u.medium.lock(false, nil)
		defer u.medium.unlock(false)
		rest := u.Blocks() - min(lba, u.Blocks())
		if block != nil {
			n = min(rest, uint64(overwritePiece/u.blockSize))
			return n, u.fill(op, lba, n, block)
		}
		if n = p.next(rest); n == 0 {
			return 0, nil
		}
		return n, u.zero(op, lba, n, true)
	}
	for lba := uint64(0); ; {
		if op.stopped() {
			return errStopped
		}
		n, err := piece(lba)
		if n == 0 || err != nil {
			return err
		}
		lba += n
	}
}

// overwritePiece is the size in bytes of a piece with data, which slow storage writes in a second.
const overwritePiece = 1 << 20
