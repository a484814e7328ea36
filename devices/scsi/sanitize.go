package scsi

import "encoding/binary"

// States of a unit as to SANITIZE.
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

// notReady returns the sense data that a command for the medium meets, if any.
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

// sanitize is SANITIZE (SBC-4 5.29). All of the medium that the initiator can
// read is changed; what a host's file system or device keeps of it elsewhere is
// not this target's. An operation that was begun goes on to its end, whatever
// task management function comes, but not over the end of this process.
func sanitize(tk *task) error {
	u, action, n := tk.u, tk.op.action(), int(binary.BigEndian.Uint16(tk.CDB[7:]))
	var pattern []byte
	if action == sanitizeOverwrite {
		if n <= 4 || n > 4+int(u.blockSize) {
			return invalidCDB(7, 7)
		}
		b, err := tk.parameters(n)
		if err != nil {
			return err
		}
		// The CDB is what all of these are errors of (SBC-4 5.29.2.2).
		if size := int(binary.BigEndian.Uint16(b[2:])); b[0]&0x1f == 0 || size == 0 || size > n-4 {
			return InvalidFieldInCDB
		} else {
			pattern = append(b[:1:1], b[4:4+size]...)
		}
	} else if n != 0 {
		return invalidCDB(7, 7)
	}
	switch state := u.sanitize.Load(); {
	case u.stopped.Load():
		return BecomingReady
	case state == sanitizing:
		return SanitizeInProgress
	case action != sanitizeExitFailure:
		u.sanitize.Store(sanitizing)
	case state == sanitizeFailed:
		return invalidCDB(1, 4) // only after one with AUSE
	default:
		u.sanitize.Store(notSanitizing)
		return nil
	}
	do := func() error {
		err := u.erase(pattern)
		switch {
		case err == nil:
			u.sanitize.Store(notSanitizing)
		case tk.CDB[1]&0x20 != 0: // AUSE
			u.sanitize.Store(sanitizeFailedAUSE)
		default:
			u.sanitize.Store(sanitizeFailed)
		}
		if err != nil {
			return SanitizeFailed
		}
		return nil
	}
	if tk.CDB[1]&0x80 != 0 { // IMMED
		tk.after = func() error {
			u.medium.Lock()
			defer u.medium.Unlock()
			_ = do() // commands to come tell of a failure
			return nil
		}
		return nil
	}
	return do()
}

// erase discards every block, or overwrites it as pattern says, whose first byte is
// that of the parameter list and the rest what is repeated in every block.
func (u *Unit) erase(pattern []byte) error {
	blocks := u.Blocks()
	if pattern == nil {
		if err := u.zero(0, blocks, true); err != nil {
			return err
		}
		return u.flush()
	}
	how, block := pattern[0], make([]byte, u.blockSize)
	for i := range block {
		block[i] = pattern[1+i%(len(pattern)-1)]
	}
	for range how & 0x1f { // OVERWRITE COUNT
		if err := u.repeat(0, blocks, block); err != nil {
			return err
		}
		if err := u.flush(); err != nil {
			return err
		}
		if how&0x80 != 0 { // INVERT
			for i := range block {
				block[i] = ^block[i]
			}
		}
	}
	return nil
}
