package block

import (
	"errors"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"gvm/text"
)

// Use is a File's use of a range of a file, by its device and inode, or of the device of a node.
type Use struct {
	Dev, Ino, Rdev uint64
	Path           text.Name // of the File
	Access         int
	From, To       int64
}

func (u *use) export() Use {
	return Use{u.of.dev, u.of.ino, u.of.rdev, text.Name(u.path), int(u.access), u.span.from, u.span.to}
}

func (u Use) use() *use {
	return &use{thing{u.Dev, u.Ino, u.Rdev}, string(u.Path), access(u.Access), span{u.From, u.To}}
}

// Uses returns the uses of all Files of this process, for Options.Uses of another one.
func Uses() (list []Use) {
	uses.Lock()
	defer uses.Unlock()
	for _, u := range uses.list {
		list = append(list, u.export())
	}
	return list
}

// Facts are the parts of a File besides its descriptors.
type Facts struct {
	Path, Identity  text.Name
	Size, BlockSize int64
	Found           int64
	Granularity     int64
	Changed         int64
	Boot            string
	ReadOnly        bool
	NoLock          bool
	Block           bool
	Made            bool
	InMemory        bool
	Direct          bool
	Uses            []Use
}

// Export returns a File for Import in another process: the first descriptor is the image's. The
// caller closes b once that process has them; the locks and claims go on with theirs.
func (b *File) Export() (Facts, []*os.File) {
	fc := Facts{
		Path: text.Name(b.path), Identity: text.Name(b.Identity()), Size: b.Size(), BlockSize: b.blockSize,
		Found: b.found, Granularity: b.granularity, Boot: b.boot, ReadOnly: b.readOnly, NoLock: b.noLock,
		Block: b.block, Made: b.made, InMemory: b.inMemory, Direct: b.direct,
	}
	if b.block {
		fc.Changed = b.deviceTime()
	}
	uses.Lock()
	defer uses.Unlock()
	for _, u := range b.uses {
		fc.Uses = append(fc.Uses, u.export())
	}
	files := []*os.File{b.f}
	for _, f := range b.below {
		files = append(files, f.(*os.File))
	}
	return fc, files
}

// Forget ends the File's use of its storage in this process, when its descriptors are another's.
func (b *File) Forget() { b.endUses() }

// Import returns the File that another process has opened, and owns its descriptors. It is an error
// if this process uses the storage already.
func Import(fc Facts, descriptors []*os.File, o Options) (_ *File, err error) {
	f := descriptors[0]
	b := &File{
		f: f, fd: int(f.Fd()), path: string(fc.Path), identity: string(fc.Identity), blockSize: fc.BlockSize,
		found: fc.Found, granularity: fc.Granularity, changed: fc.Changed, boot: fc.Boot, readOnly: fc.ReadOnly,
		noLock: fc.NoLock, block: fc.Block, made: fc.Made, inMemory: fc.InMemory, direct: fc.Direct,
		imported: true, note: o.Note, files: o.Files,
	}
	b.size.Store(fc.Size)
	for _, lower := range descriptors[1:] {
		b.below = append(b.below, lower)
	}
	for _, u := range fc.Uses {
		of := u.use()
		if err := b.use(of.of, b.path, of.access, of.span); err != nil {
			b.Undo()
			return nil, errors.Join(err, b.Close())
		}
	}
	markHolder(b.fd)
	return b, nil
}

// deviceTime is modTime of the File's block device; 0: it is not known.
func (b *File) deviceTime() int64 {
	var st unix.Stat_t
	if b.imported || unix.Fstat(b.fd, &st) != nil {
		return b.changed
	}
	return modTime(st.Rdev)
}

// usedBesides returns the use that excludes one of b, nil if there is none. The caller holds the
// lock of uses.
func (b *File) usedBesides(t thing, a access, s span) *use {
	excludes := func(u *use) bool {
		return u.of == t && u.access.excludes(a) && u.span.meets(s) && !slices.Contains(b.uses, u)
	}
	if i := slices.IndexFunc(uses.list, excludes); i >= 0 {
		return uses.list[i]
	}
	for _, o := range b.others {
		if u := o.use(); excludes(u) {
			return u
		}
	}
	return nil
}
