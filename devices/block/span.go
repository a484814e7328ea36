package block

import (
	"fmt"
	"math"
)

// span is a range of the bytes of a file or device.
type span struct{ from, to int64 }

// whole has every byte that there is, or will be. No storage has the last four of a lock's range.
var whole = span{0, math.MaxInt64 - 3}

// markDisk is locked shared by each use of a part or of the whole, so that a lock of a part shows
// that a machine has it (isDisk in package hostfs).
var markDisk = span{math.MaxInt64 - 3, math.MaxInt64 - 2}

// The marks tell apart shared locks: each of two uses that exclude each other locks its own mark
// shared, and then asks for the other's.
var (
	markRead  = span{math.MaxInt64 - 2, math.MaxInt64 - 1} // of reading
	markParts = span{math.MaxInt64 - 1, math.MaxInt64}     // of writingParts
)

// holderMark is the byte that each process with a lock of the whole locks shared by a lock of the
// process, which has a PID for other users, and which any close of the file in that process takes
// away.
const holderMark = math.MaxInt64

// access is the use of a range of storage.
type access int

const (
	reading access = iota
	writing
	readingParts // reads parts of the range, it is not known which
	writingParts // writes parts of the range, it is not known which
)

// accessOf is that of a disk to all of its own storage.
func accessOf(readOnly bool) access {
	if readOnly {
		return reading
	}
	return writing
}

// parts is the access to the devices below one whose ranges there are not known.
func (a access) parts() access {
	switch a {
	case reading:
		return readingParts
	case writing:
		return writingParts
	}
	return a
}

// shared reports whether the lock of the range is shared.
func (a access) shared() bool { return a != writing }

// marks returns the mark of a, and the one that excludes it; false if a has none.
func (a access) marks() (own, other span, ok bool) {
	switch a {
	case reading:
		return markRead, markParts, true
	case writingParts:
		return markParts, markRead, true
	}
	return span{}, span{}, false
}

// excludes reports whether no two uses may have a range in common as a and o.
func (a access) excludes(o access) bool {
	return !a.shared() || !o.shared() || min(a, o) == reading && max(a, o) == writingParts
}

// part returns where s, a range of something that begins at byte off of a file or device and has n
// bytes there, all to the end if n is 0, is in that.
func (s span) part(off, n uint64) span {
	shift := func(at int64) int64 { return int64(min(off+uint64(at), uint64(whole.to))) }
	all := whole.to
	if n > 0 {
		all = int64(min(off+n, uint64(whole.to)))
	}
	return span{shift(s.from), min(shift(s.to), all)}
}

// meets reports whether the two have bytes in common.
func (s span) meets(o span) bool { return max(s.from, o.from) < min(s.to, o.to) }

// spanOfLock parses the last words of a line of fdinfo, "0 EOF" or "4096 8191".
func spanOfLock(from, last string) span {
	s := span{0, math.MaxInt64}
	_, _ = fmt.Sscan(from, &s.from)
	if _, err := fmt.Sscan(last, &s.to); err == nil {
		s.to++
	}
	return s
}

// partSpan is where a range of a partition, given by its directory in /sys, is on its disk.
func partSpan(dir string, s span) span {
	return s.part(512*readNumber(dir+"/start"), 512*readNumber(dir+"/size"))
}

// loopSpan is where a range of a loop device, given by its directory in /sys, is in what it stands
// on.
func loopSpan(dir string, s span) span {
	return s.part(readNumber(dir+"/loop/offset"), readNumber(dir+"/loop/sizelimit"))
}
