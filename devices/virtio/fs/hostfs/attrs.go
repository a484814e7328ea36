package hostfs

import (
	"bytes"
	"strings"

	"golang.org/x/sys/unix"
)

func (fs *FS) getattr(r *request) error { return fs.answerAttr(r, r.node) }

// answerAttr answers with a fuse_attr_out.
func (fs *FS) answerAttr(r *request, n *inode) error {
	st, err := stat(n.fd)
	if err != nil {
		return err
	}
	s, ns := valid(fs.valid)
	r.reply = fs.putAttr(put32(put64(r.reply, s), ns, 0), &st)
	return nil
}

func (fs *FS) setattr(r *request) error {
	n, set := r.node, r.u32(0)
	if n.hidden {
		return unix.EACCES
	}
	if set&(setUID|setGID) != 0 {
		uid, gid := -1, -1
		if set&setUID != 0 {
			uid = toHost(r.u32(76), fs.uid)
		}
		if set&setGID != 0 {
			gid = toHost(r.u32(80), fs.gid)
		}
		if err := unix.Fchownat(n.fd, "", uid, gid, unix.AT_EMPTY_PATH); err != nil {
			return err
		}
	}
	if set&setSize != 0 {
		if err := fs.truncate(r, set); err != nil {
			return err
		}
	}
	if set&setMode != 0 {
		// The link of proc leads to the inode; of a symbolic link there is no mode to change.
		if n.kind == unix.S_IFLNK {
			return unix.EOPNOTSUPP
		}
		if err := unix.Fchmodat(unix.AT_FDCWD, procPath(n.fd), safe(r.u32(68)&0o7777|n.kind), 0); err != nil {
			return err
		}
	}
	if set&(setAtime|setMtime|setAtimeNow|setMtimeNow) != 0 {
		times := []unix.Timespec{
			timespec(set&setAtime, set&setAtimeNow, r.u64(32), r.u32(56)),
			timespec(set&setMtime, set&setMtimeNow, r.u64(40), r.u32(60)),
		}
		if err := unix.UtimesNanoAt(unix.AT_FDCWD, procPath(n.fd), times, 0); err != nil {
			return err
		}
	}
	return fs.answerAttr(r, n)
}

func timespec(set, now uint32, sec uint64, nsec uint32) unix.Timespec {
	switch {
	case now != 0:
		return unix.Timespec{Nsec: unix.UTIME_NOW}
	case set != 0:
		return unix.Timespec{Sec: int64(sec), Nsec: int64(min(nsec, 999_999_999))}
	}
	return unix.Timespec{Nsec: unix.UTIME_OMIT}
}

func (fs *FS) truncate(r *request, set uint32) error {
	size := int64(r.u64(16))
	if size < 0 {
		return unix.EFBIG
	}
	if set&setFH != 0 {
		h, err := fs.useHandle(r.u64(8), r.node)
		if err != nil {
			return err
		}
		defer fs.doneHandle(h)
		if err := fs.dropRights(r.node); err != nil {
			return err
		}
		return unix.Ftruncate(h.fd, size)
	}
	if err := fs.reserve(); err != nil {
		return err
	}
	fd, err := fs.openFile(r.node, unix.O_WRONLY)
	defer func() { fs.unreserve(fd) }()
	if err != nil {
		return err
	}
	if err := fs.dropRights(r.node); err != nil {
		return err
	}
	return unix.Ftruncate(fd, size)
}

// dropRights removes the set-user-ID and set-group-ID bits of a file that is about to be changed:
// the client's new contents would have them. The host's kernel removes capabilities, and the bits
// too unless this process may keep them.
func (fs *FS) dropRights(n *inode) error {
	if !fs.owner {
		return nil
	}
	st, err := stat(n.fd)
	if err != nil {
		return err
	}
	if mode := uint32(st.Mode); safe(mode) != mode&0o7777 {
		return unix.Fchmodat(unix.AT_FDCWD, procPath(n.fd), safe(mode), 0)
	}
	return nil
}

func (fs *FS) statfs(r *request) error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(r.node.fd, &st); err != nil {
		return err
	}
	r.reply = put64(r.reply, st.Blocks, st.Bfree, st.Bavail, st.Files, st.Ffree)
	r.reply = put32(r.reply, uint32(st.Bsize), uint32(st.Namelen), uint32(st.Frsize), 0, 0, 0, 0, 0, 0, 0)
	return nil
}

// Extended attributes: the client sees user.* and security.capability of regular files and
// directories, and sets user.* alone.
const (
	userAttributes = "user."
	fileCapability = "security.capability"

	maxAttribute = 64 << 10 // XATTR_SIZE_MAX and XATTR_LIST_MAX
)

func seenAttribute(name string) bool {
	return strings.HasPrefix(name, userAttributes) || name == fileCapability
}

func (n *inode) hasAttributes() bool {
	return !n.hidden && (n.kind == unix.S_IFREG || n.kind == unix.S_IFDIR)
}

func (fs *FS) setxattr(r *request) error {
	size, flags := r.u32(0), r.u32(4)
	name, err := r.name()
	switch {
	case err != nil:
		return err
	case !strings.HasPrefix(name, userAttributes) || !r.node.hasAttributes():
		return unix.EOPNOTSUPP
	case uint64(size) > uint64(len(r.names)) || size > maxAttribute:
		return unix.EINVAL
	}
	return unix.Setxattr(procPath(r.node.fd), name, r.names[:size], int(flags))
}

func (fs *FS) removexattr(r *request) error {
	name, err := r.name()
	if err != nil {
		return err
	}
	if !seenAttribute(name) || !r.node.hasAttributes() {
		return unix.EOPNOTSUPP
	}
	return unix.Removexattr(procPath(r.node.fd), name)
}

func (fs *FS) getxattr(r *request) error {
	name, err := r.name()
	if err != nil {
		return err
	}
	if !seenAttribute(name) || !r.node.hasAttributes() {
		return unix.ENODATA
	}
	b := make([]byte, maxAttribute)
	n, err := unix.Getxattr(procPath(r.node.fd), name, b)
	if err != nil {
		return err
	}
	return r.answerSized(b[:n])
}

func (fs *FS) listxattr(r *request) error {
	if !r.node.hasAttributes() {
		return r.answerSized(nil)
	}
	b := make([]byte, maxAttribute)
	n, err := unix.Listxattr(procPath(r.node.fd), b)
	if err != nil {
		return err
	}
	var seen []byte
	for name := range bytes.SplitAfterSeq(b[:n], []byte{0}) {
		if seenAttribute(strings.TrimSuffix(string(name), "\x00")) {
			seen = append(seen, name...)
		}
	}
	return r.answerSized(seen)
}

// answerSized answers with a value, or with its length to a client that says that it has no room.
func (r *request) answerSized(value []byte) error {
	switch size := r.u32(0); {
	case size == 0:
		r.reply = put32(r.reply, uint32(len(value)), 0)
	case int64(len(value)) > int64(size):
		return unix.ERANGE
	default:
		r.reply = value
	}
	return nil
}
