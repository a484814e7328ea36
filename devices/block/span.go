package block

import (
	"fmt"
	"math"
)

// span is a range of the bytes of a file or device.
type span struct{ from, to int64 }

// whole has every byte that there is, or will be.
var whole = span{0, math.MaxInt64}

// part returns where s, a range of something that begins at byte off of a file or device and has n
// bytes there, all to the end if n is 0, is in that.
func (s span) part(off, n uint64) span {
	shift := func(at int64) int64 { return int64(min(off+uint64(at), math.MaxInt64)) }
	all := whole.to
	if n > 0 {
		all = int64(min(off+n, math.MaxInt64))
	}
	return span{shift(s.from), min(shift(s.to), all)}
}

// meets tells whether the two have bytes in common.
func (s span) meets(o span) bool { return max(s.from, o.from) < min(s.to, o.to) }

// length is that of a lock: 0 to the end, however far that is.
func (s span) length() int64 {
	if s.to == whole.to {
		return 0
	}
	return s.to - s.from
}

// spanOfLock returns what the last words of a line of fdinfo say, "0 EOF" or "4096 8191".
func spanOfLock(from, last string) span {
	s := whole
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
