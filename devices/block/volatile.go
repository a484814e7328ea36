package block

import (
	"errors"
	"io"
	"math/rand/v2"
	"sync"
)

// sector is the unit that storage writes as a whole or not at all.
const sector = 512

// errPowerCut is the error of a Volatile without power.
var errPowerCut = errors.New("no power")

// Volatile is storage in memory with a write cache that a power cut loses, for tests
// of the data that is durable when.
type Volatile struct {
	mu     sync.Mutex
	medium *Mem
	cached map[int64][][]byte // by sector: data newer than on the medium, the oldest first
	off    bool
}

// NewVolatile returns size bytes of zeroes, size being a multiple of 512.
func NewVolatile(size int64) *Volatile {
	return &Volatile{medium: NewMem(size), cached: map[int64][][]byte{}}
}

// PowerCut ends all operations, and leaves of each sector the data that was on the medium or
// any of the contents that the cache has had for it since, as r will have it.
func (v *Volatile) PowerCut(r *rand.Rand) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.off = true
	for at, contents := range v.cached {
		if i := r.IntN(len(contents)+1) - 1; i >= 0 {
			copy(v.medium.data[at*sector:], contents[i])
		}
	}
	clear(v.cached)
}

// Medium returns the contents after PowerCut.
func (v *Volatile) Medium() *Mem { return v.medium }

// Size returns the size in bytes.
func (v *Volatile) Size() int64 { return v.medium.Size() }

// each calls do for every sector of n bytes at off, with where it is among them.
func (v *Volatile) each(off, n int64, do func(at int64, from int64)) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	switch {
	case v.off:
		return errPowerCut
	case off < 0 || n < 0 || off%sector != 0 || n%sector != 0 || off > v.Size() || n > v.Size()-off:
		return io.ErrUnexpectedEOF
	}
	for from := int64(0); from < n; from += sector {
		do((off+from)/sector, from)
	}
	return nil
}

// ReadAt reads the newest contents.
func (v *Volatile) ReadAt(p []byte, off int64) (int, error) {
	err := v.each(off, int64(len(p)), func(at, from int64) {
		to := p[from : from+sector]
		if c := v.cached[at]; len(c) > 0 {
			copy(to, c[len(c)-1])
		} else {
			copy(to, v.medium.data[at*sector:])
		}
	})
	return done(p, err)
}

// WriteAt writes to the cache.
func (v *Volatile) WriteAt(p []byte, off int64) (int, error) {
	err := v.each(off, int64(len(p)), func(at, from int64) {
		v.cached[at] = append(v.cached[at], append([]byte(nil), p[from:from+sector]...))
	})
	return done(p, err)
}

// WriteVecDurable writes to the medium.
func (v *Volatile) WriteVecDurable(iov [][]byte, off int64) (int, error) {
	var p []byte
	for _, b := range iov {
		p = append(p, b...)
	}
	err := v.each(off, int64(len(p)), func(at, from int64) {
		delete(v.cached, at)
		copy(v.medium.data[at*sector:], p[from:from+sector])
	})
	return done(p, err)
}

// Flush writes the newest contents to the medium.
func (v *Volatile) Flush() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.off {
		return errPowerCut
	}
	for at, contents := range v.cached {
		copy(v.medium.data[at*sector:], contents[len(contents)-1])
	}
	clear(v.cached)
	return nil
}

// DiscardGranularity returns 4096.
func (v *Volatile) DiscardGranularity() int64 { return 4096 }

// Discard writes zeroes to the cache.
func (v *Volatile) Discard(off, n int64) error {
	return v.each(off, n, func(at, _ int64) { v.cached[at] = append(v.cached[at], make([]byte, sector)) })
}

// done is the result of an operation on p that is done as a whole or not at all.
func done(p []byte, err error) (int, error) {
	if err != nil {
		return 0, err
	}
	return len(p), nil
}
