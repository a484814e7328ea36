package hostfs

import (
	"bytes"

	"golang.org/x/sys/unix"
)

// name takes the next name from the arguments.
func (r *request) name() (string, error) {
	i := bytes.IndexByte(r.names, 0)
	if i < 0 {
		return "", unix.EINVAL
	}
	name := string(r.names[:i])
	r.names = r.names[i+1:]
	return name, nil
}

// newName takes the name of an entry that a request makes or removes, and checks the directory.
func (r *request) newName() (string, error) {
	name, err := r.name()
	if err == nil {
		err = checkName(name)
	}
	if err == nil {
		err = r.node.shown(unix.S_IFDIR)
	}
	return name, err
}

func (fs *FS) lookup(r *request) error {
	name, err := r.name()
	if err != nil {
		return err
	}
	n, st, err := fs.child(r.node, name)
	if err == unix.ENOENT && fs.keeps() {
		r.reply = fs.putEntry(r.reply, 0, &st) // the client may remember that there is none
		return nil
	}
	if err != nil {
		return err
	}
	fs.answerEntry(r, n, &st)
	return nil
}

// answerEntry answers with an inode from child, which the client knows from now on.
func (fs *FS) answerEntry(r *request, n *inode, st *unix.Statx_t) {
	fs.know(n)
	fs.done(n)
	r.reply = fs.putEntry(r.reply, n.id, st)
}

// putEntry appends a fuse_entry_out.
func (fs *FS) putEntry(b []byte, id uint64, st *unix.Statx_t) []byte {
	s, ns := valid(fs.valid)
	return fs.putAttr(put32(put64(b, id, 0, s, s), ns, ns), st)
}

// putAttr appends a fuse_attr.
func (fs *FS) putAttr(b []byte, st *unix.Statx_t) []byte {
	ino := st.Ino
	if ino != 0 {
		ino = fs.number(deviceOf(st), ino)
	}
	b = put64(b, ino, st.Size, st.Blocks,
		uint64(st.Atime.Sec), uint64(st.Mtime.Sec), uint64(st.Ctime.Sec))
	return put32(b, st.Atime.Nsec, st.Mtime.Nsec, st.Ctime.Nsec, uint32(st.Mode), st.Nlink,
		toClient(st.Uid, fs.uid), toClient(st.Gid, fs.gid),
		uint32(unix.Mkdev(st.Rdev_major, st.Rdev_minor)), st.Blksize, 0)
}

// toClient and toHost translate an owner, of which own is the one that the client has as 0.
func toClient(id, own uint32) uint32 {
	if id == own {
		return 0
	}
	return id
}

func toHost(id, own uint32) int {
	if id == 0 {
		return int(own)
	}
	return int(id)
}

// number returns an inode number for the client, to which all is one file system: programs take a
// directory for a loop that has the number of one above it.
func (fs *FS) number(dev, ino uint64) uint64 {
	if dev == fs.root.key.dev {
		return ino
	}
	fs.mu.Lock()
	defer fs.mu.Unlock()
	i, ok := fs.devices[dev]
	if !ok {
		i = uint64(len(fs.devices) + 1)
		fs.devices[dev] = i
	}
	return ino ^ i<<48
}

// safe returns a mode without the bits that would give a program on the host rights.
func safe(mode uint32) uint32 {
	if mode&unix.S_IFMT != unix.S_IFDIR {
		mode &^= unix.S_ISUID | unix.S_ISGID
	}
	return mode & 0o7777
}

// settle gives a new file, open at fd in any way, its owner and its mode: this process's umask and
// user had no part in the client's request.
func (fs *FS) settle(r *request, fd int, mode uint32) error {
	st, err := stat(fd)
	if err != nil {
		return err
	}
	if fs.owner {
		gid := int(r.gid)
		if parent, err := stat(r.node.fd); err == nil && parent.Mode&unix.S_ISGID != 0 {
			gid = -1 // it has the directory's
		}
		if err := unix.Fchownat(fd, "", int(r.uid), gid, unix.AT_EMPTY_PATH); err != nil {
			return err
		}
	}
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		return nil
	}
	mode = safe(mode&0o7777 | uint32(st.Mode)&unix.S_IFMT)
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		mode |= uint32(st.Mode) & unix.S_ISGID
	}
	return unix.Fchmodat(unix.AT_FDCWD, procPath(fd), mode, 0)
}

// make answers a request for a new entry, after mk has made it. If anything fails after that, the
// entry is removed.
func (fs *FS) make(r *request, name string, mode uint32, mk func() error) error {
	if err := mk(); err != nil {
		return err
	}
	n, st, err := fs.child(r.node, name)
	if err == nil {
		if err = fs.settle(r, n.fd, mode); err == nil {
			st, err = stat(n.fd)
		}
		if err != nil {
			fs.done(n)
		}
	}
	if err != nil {
		flags := 0
		if mode&unix.S_IFMT == unix.S_IFDIR {
			flags = unix.AT_REMOVEDIR
		}
		_ = unix.Unlinkat(r.node.fd, name, flags)
		return err
	}
	fs.answerEntry(r, n, &st)
	return nil
}

func (fs *FS) mkdir(r *request) error {
	name, err := r.newName()
	if err != nil {
		return err
	}
	mode := r.u32(0)&0o7777 | unix.S_IFDIR
	return fs.make(r, name, mode, func() error { return unix.Mkdirat(r.node.fd, name, mode&0o777) })
}

func (fs *FS) mknod(r *request) error {
	name, err := r.newName()
	if err != nil {
		return err
	}
	mode := r.u32(0)
	switch mode & unix.S_IFMT {
	case 0, unix.S_IFREG, unix.S_IFIFO, unix.S_IFSOCK:
	default:
		return unix.EPERM // a device would be the host's
	}
	return fs.make(r, name, mode, func() error { return unix.Mknodat(r.node.fd, name, mode&unix.S_IFMT|mode&0o777, 0) })
}

func (fs *FS) symlink(r *request) error {
	name, err := r.newName()
	if err != nil {
		return err
	}
	target, err := r.name()
	if err != nil {
		return err
	}
	return fs.make(r, name, unix.S_IFLNK, func() error { return unix.Symlinkat(target, r.node.fd, name) })
}

func (fs *FS) link(r *request) error {
	name, err := r.newName()
	if err != nil {
		return err
	}
	old, err := fs.use(r.u64(0))
	if err != nil {
		return err
	}
	defer fs.done(old)
	if old.hidden {
		return unix.EXDEV
	}
	// With AT_SYMLINK_FOLLOW the link of proc leads to the inode, and no further if that is a
	// symbolic link.
	err = unix.Linkat(unix.AT_FDCWD, procPath(old.fd), r.node.fd, name, unix.AT_SYMLINK_FOLLOW)
	if err != nil {
		return err
	}
	n, st, err := fs.child(r.node, name)
	if err != nil {
		return err
	}
	fs.answerEntry(r, n, &st)
	return nil
}

func (fs *FS) unlink(r *request) error { return fs.remove(r, 0) }
func (fs *FS) rmdir(r *request) error  { return fs.remove(r, unix.AT_REMOVEDIR) }

func (fs *FS) remove(r *request, flags int) error {
	name, err := r.newName()
	if err != nil {
		return err
	}
	defer fs.unname(r.node, name)()
	return unix.Unlinkat(r.node.fd, name, flags)
}

// unname is called before a name of a file is removed, and the function that it returns after that.
// The client may use the file further. If this is the name by which it would be opened again, its
// descriptor stays open.
func (fs *FS) unname(dir *inode, name string) func() {
	fd, st, err := fs.openPath(dir, name)
	if err != nil {
		return func() {}
	}
	n, err := fs.adopt(dir, fd, &st)
	if err != nil {
		return func() {}
	}
	fs.mu.Lock()
	defer fs.mu.Unlock()
	n.unnamed = n.unnamed || n.parent == dir && n.name == name
	return func() { fs.done(n) }
}

// rename serves RENAME, and RENAME2, which has flags.
func (fs *FS) rename(r *request) error {
	flags := uint32(0)
	if r.opcode == opRename2 {
		flags = r.u32(8)
	}
	if flags&^(unix.RENAME_NOREPLACE|unix.RENAME_EXCHANGE) != 0 {
		return unix.EINVAL // RENAME_WHITEOUT makes a device
	}
	from, err := r.newName()
	if err != nil {
		return err
	}
	dir, err := fs.use(r.u64(0))
	if err != nil {
		return err
	}
	defer fs.done(dir)
	source := r.node
	r.node = dir
	to, err := r.newName()
	if err != nil {
		return err
	}
	defer fs.unname(dir, to)()
	if err := unix.Renameat2(source.fd, from, dir.fd, to, uint(flags)); err != nil {
		return err
	}
	fs.find(dir, to)
	if flags&unix.RENAME_EXCHANGE != 0 {
		fs.find(source, from)
	}
	return nil
}

// find records the new name of a file.
func (fs *FS) find(dir *inode, name string) {
	if n, _, err := fs.child(dir, name); err == nil {
		fs.done(n)
	}
}

func (fs *FS) readlink(r *request) error {
	if r.node.kind != unix.S_IFLNK {
		return unix.EINVAL
	}
	b := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(r.node.fd, "", b)
	if err != nil {
		return err
	}
	r.reply = b[:n]
	return nil
}
