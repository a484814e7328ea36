package scsi

import (
	"errors"
	"time"
)

// worker is the owner of long work. The work checks between two pieces whether its owner has been
// stopped, so that an abort, a reset, a detach, a resize and the end of the machine wait for at
// most one piece (TestLongCommandsAbort).
type worker interface{ stopped() bool }

// errStopped ends work of a stopped worker. Initiators do not see it.
var errStopped = errors.New("scsi: stopped")

// pieces cuts a range of blocks for operations of a backend without data. Such an operation may be
// fast for any length (a hole, a file of zeroes) or slow (a device that writes the zeroes).
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

// next returns the length of the next piece of n blocks.
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
