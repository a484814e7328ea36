package scsi

import (
	"errors"
	"time"
)

// worker is what long work is done for. The work looks between two pieces whether that has been
// stopped, so that an abort, a reset, a detach, a resize and the end of the machine wait for one piece
// at most (TestLongCommandsAbort).
type worker interface{ stopped() bool }

// errStopped ends work for a worker that has been stopped. It is not seen by initiators.
var errStopped = errors.New("scsi: stopped")

// pieces cuts a range of blocks for operations of a backend that take no data, each of which may take
// a moment for any length (a hole, a file of zeroes) or long (a device that writes the zeroes).
type pieces struct {
	size, most uint64 // blocks
	began      time.Time
}

const (
	firstPiece   = 64 << 20 // bytes
	largestPiece = 4 << 30
)

// pieces begins with pieces of 64 MiB.
func (u *Unit) pieces() pieces {
	return pieces{size: uint64(firstPiece / u.blockSize), most: uint64(largestPiece / u.blockSize)}
}

// next returns how many of n blocks are the next piece.
func (p *pieces) next(n uint64) uint64 {
	if !p.began.IsZero() {
		switch d := time.Since(p.began); {
		case d < 10*time.Millisecond && p.size < p.most:
			p.size *= 2
		case d > 100*time.Millisecond && p.size > 2048:
			p.size /= 2
		}
	}
	p.began = time.Now()
	return min(n, p.size)
}
