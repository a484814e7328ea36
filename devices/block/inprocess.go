package block

import (
	"os"
	"slices"
	"sync"
)

// use is the part of a file or block device that a File of this process has. Locks do not replace
// these: an image of Options.NoLock may have none, and a lock does not tell the other path.
type use struct {
	of     thing
	path   string // of the File
	access access
	span   span
}

var uses struct {
	sync.Mutex
	list []*use
}

// use registers that b has a range of t, which path leads to, until Close. A second
// use that the first excludes is a *LockedError.
func (b *File) use(t thing, path string, a access, s span) error {
	uses.Lock()
	defer uses.Unlock()
	if u := b.usedBesides(t, a, s); u != nil {
		return &LockedError{Path: path, PID: os.Getpid(), Other: u.path}
	}
	u := &use{t, b.path, a, s}
	uses.list, b.uses = append(uses.list, u), append(b.uses, u)
	return nil
}

// endUses takes back the registrations of use.
func (b *File) endUses() {
	uses.Lock()
	defer uses.Unlock()
	uses.list = slices.DeleteFunc(uses.list, func(u *use) bool { return slices.Contains(b.uses, u) })
	b.uses = nil
}

// usedPath returns the path by which this process has one of the block devices, "" if it has none.
func usedPath(devs []uint64) string {
	uses.Lock()
	defer uses.Unlock()
	for _, u := range uses.list {
		if u.of.rdev != 0 && slices.Contains(devs, u.of.rdev) {
			return u.path
		}
	}
	return ""
}
