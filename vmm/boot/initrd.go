package boot

import (
	"fmt"
	"slices"

	"gvm/guestmem"
)

// maxMapped is one past the highest address that pageTables maps: one page of its second level.
const maxMapped = 512 << 30

// initrdLimit gives the addresses where an entry of the kernel takes an initrd.
type initrdLimit struct {
	end     uint64 // its end is at most this
	above4G bool   // or its start is above 4 GiB
	mend    string // besides a smaller initrd, if more memory does not help
}

// pvhInitrd is PVH's: Linux keeps 32 bits of a module's address and size
// (arch/x86/platform/pvh/enlighten.c).
var pvhInitrd = initrdLimit{end: 1 << 32}

// initrdSize returns the memory that the initrds take. The kernel's unpacker looks for the next
// archive at a multiple of 4.
func (ld *loader) initrdSize() (size uint64) {
	for _, f := range ld.cfg.Initrds {
		size = min((size+3)&^3+uint64(f.Size), 1<<62) // more than any guest has, and no overflow
	}
	return size
}

// find returns the place of an initrd of size bytes, as high as it fits, and below 4 GiB if
// possible.
func (lim initrdLimit) find(free *layout, size uint64) (uint64, bool) {
	addr, ok := free.high(size, pageSize, 0, lim.end)
	if !ok && lim.above4G {
		addr, ok = free.high(size, pageSize, 1<<32, maxMapped)
	}
	return addr, ok
}

// fits reports whether there is room for the initrds; it takes none.
func (lim initrdLimit) fits(ld *loader) bool {
	size := ld.initrdSize()
	_, ok := lim.find(&layout{slices.Clone(ld.free.free)}, size)
	return ok || size == 0
}

// initrd reads the initrds into memory.
func (ld *loader) initrd(lim initrdLimit) (addr, size uint64, err error) {
	if size = ld.initrdSize(); size == 0 {
		return 0, 0, nil
	}
	addr, ok := lim.find(&ld.free, size)
	if !ok {
		return 0, 0, ld.initrdError(lim, size)
	}
	at := addr
	for _, f := range ld.cfg.Initrds {
		pad, err := ld.mem.Slice(at, -(at-addr)&3)
		if err != nil {
			return 0, 0, err
		}
		clear(pad)
		at += uint64(len(pad))
		ld.reading(f.Name)
		b, err := ld.mem.Slice(at, uint64(f.Size))
		if err != nil {
			return 0, 0, err
		}
		if err := f.ReadFull(b, 0); err != nil {
			return 0, 0, err
		}
		at += uint64(len(b))
	}
	return addr, size, nil
}

// initrdError explains why the initrds do not fit, and how to make them fit.
func (ld *loader) initrdError(lim initrdLimit, size uint64) error {
	name := ld.cfg.Initrds[0].Name
	if n := len(ld.cfg.Initrds); n > 1 {
		name = fmt.Sprintf("%s and %d more", name, n-1)
	}
	const mib = 1 << 20
	up := func(n uint64) uint64 { return (n + mib - 1) / mib }
	mend := "give a smaller initrd"
	switch full := uint64(guestmem.HoleStart) + size; {
	case ld.moreFits(lim, size):
		mend = "give the guest more memory or a smaller initrd"
	case lim.above4G && size <= maxMapped-guestmem.HoleEnd:
		mend = fmt.Sprintf("give the guest %d MiB of memory or a smaller initrd", up(full))
	case lim.mend != "":
		mend += " or " + lim.mend
	}
	where := ""
	if !lim.above4G {
		where = fmt.Sprintf(" below %d MiB", lim.end/mib)
	}
	return &ImageError{name, fmt.Sprintf("does not fit as initrd: it takes %d MiB in one piece%s, "+
		"and the guest has %d MiB in all, kernel included", up(size), where, ld.mem.Size()/mib), mend}
}

// moreFits reports whether an initrd of size bytes would have a place below 4 GiB in a guest that
// has all of its RAM there.
func (ld *loader) moreFits(lim initrdLimit, size uint64) bool {
	free := slices.Clone(ld.free.free)
	top := ld.mem.Regions()[0].End()
	free = slices.DeleteFunc(free, func(s span) bool { return s.start >= top })
	if n := len(free); n > 0 && free[n-1].end == top {
		free[n-1].end = max(top, guestmem.HoleStart)
	} else if top < guestmem.HoleStart {
		free = append(free, span{top, guestmem.HoleStart})
	}
	_, ok := (&layout{free}).high(size, pageSize, 0, lim.end)
	return ok
}
