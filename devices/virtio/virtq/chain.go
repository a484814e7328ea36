package virtq

import (
	"io"
	"time"
)

// Chain is one request of the driver: bytes that the device reads and those that it may
// write. Every byte of both lies in guest RAM. Chains are recycled: nothing of
// one is used after it was given back to the queue.
type Chain struct {
	Out, In Buffer // device-readable, device-writable
	// User is the device's own. It stays with the recycled chain, so that the
	// state of a request is made once and not for every request.
	User any
	// Taken is when the worker of the queue took the chain, by inspect.Clock, if it measures this one,
	// which stands for Weight chains; else 0.
	Taken  time.Duration
	Weight uint64

	head     uint16
	live     bool
	segs     [][]byte // the segments that Out and In divide
	writable uint64   // bytes of In at the start
}

// large reports whether the chain has room for more than keepSegs segments.
func (c *Chain) large() bool {
	return cap(c.segs) > keepSegs || cap(c.Out.views) > 2*keepSegs || cap(c.In.views) > 2*keepSegs
}

// Buffer is a run of bytes scattered in guest RAM, consumed from the front by
// Read, Write and Take. The guest may change the bytes at any time: what is
// checked is read once, and the copy is used.
type Buffer struct {
	segs  [][]byte // the rest, none of them empty
	n     int      // bytes left
	views [][]byte // backing of the slices that Take handed out
}

func (b *Buffer) set(segs [][]byte, n int) {
	b.segs, b.n, b.views = segs, n, b.views[:0]
}

// Len returns the bytes that are left.
func (b *Buffer) Len() int { return b.n }

// Read copies from the buffer. At its end it returns io.EOF.
func (b *Buffer) Read(p []byte) (int, error) {
	done := 0
	for done < len(p) && b.n > 0 {
		k := copy(p[done:], b.segs[0])
		b.skip(k)
		done += k
	}
	if done == 0 && len(p) > 0 {
		return 0, io.EOF
	}
	return done, nil
}

// Write copies into the buffer. When p does not fit, what fits is written and
// the error is io.ErrShortWrite.
func (b *Buffer) Write(p []byte) (int, error) {
	done := 0
	for done < len(p) && b.n > 0 {
		k := copy(b.segs[0], p[done:])
		b.skip(k)
		done += k
	}
	if done < len(p) {
		return done, io.ErrShortWrite
	}
	return done, nil
}

// Take removes the first n bytes, or all when fewer are left, and returns them
// where they lie, without a copy. The slices are valid until the chain is
// given back.
func (b *Buffer) Take(n int) [][]byte {
	start := len(b.views)
	for n > 0 && b.n > 0 {
		k := min(n, len(b.segs[0]))
		b.views = append(b.views, b.segs[0][:k:k])
		b.skip(k)
		n -= k
	}
	return b.views[start:len(b.views):len(b.views)]
}

// skip drops k bytes, not more than the first segment has.
func (b *Buffer) skip(k int) {
	b.n -= k
	if k == len(b.segs[0]) {
		b.segs = b.segs[1:]
	} else {
		b.segs[0] = b.segs[0][k:]
	}
}
