package hostfs

import (
	"cmp"
	"math"

	"golang.org/x/sys/unix"

	"gvm/devices/iovec"
)

// passed are the flags of open that reach the host. O_DIRECT does not: the client's buffers have
// any alignment.
const passed = unix.O_ACCMODE | unix.O_APPEND | unix.O_TRUNC | unix.O_SYNC | unix.O_DSYNC

// openFile opens a regular file. Its type is checked, and cannot change below a descriptor. The
// open does not wait for a lease to be given back. A file that a machine has as a disk is not
// opened for writing.
func (fs *FS) openFile(n *inode, flags int) (int, error) {
	if err := n.shown(unix.S_IFREG); err != nil {
		return -1, err
	}
	truncates := flags&unix.O_TRUNC != 0
	if truncates && flags&unix.O_ACCMODE == unix.O_RDONLY {
		flags = flags&^unix.O_ACCMODE | unix.O_RDWR
	}
	fd, err := unix.Open(procPath(n.fd), flags&passed&^unix.O_TRUNC|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil || flags&unix.O_ACCMODE == unix.O_RDONLY {
		return fd, err
	}
	if isDisk(fd) {
		err = unix.ETXTBSY
	}
	if err == nil && truncates {
		if err = fs.dropRights(n); err == nil {
			err = unix.Ftruncate(fd, 0)
		}
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// isDisk reports whether a machine has an open file as a disk, or a part of it by a loop device, or
// writes its results there. Package block locks the byte mark of those, and package main all bytes;
// other locks of parts are other programs' affair.
func isDisk(fd int) bool {
	const mark = math.MaxInt64 - 3
	l := unix.Flock_t{Type: unix.F_WRLCK, Start: mark, Len: 1}
	err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &l)
	const openFileDescription = -1
	return err == nil && l.Type != unix.F_UNLCK && l.Pid == openFileDescription && (l.Start == 0 || l.Start == mark)
}

func (fs *FS) open(r *request) error {
	flags := int(r.u32(0))
	writes := flags&unix.O_ACCMODE != unix.O_RDONLY || flags&unix.O_TRUNC != 0
	if writes && fs.cfg.ReadOnly {
		return unix.EROFS
	}
	if err := fs.reserve(); err != nil {
		return err
	}
	fd, err := fs.openFile(r.node, flags)
	if err != nil {
		fs.unreserve(fd)
		return err
	}
	fs.answerOpen(r, r.node, fd, nil)
	return nil
}

// answerOpen answers with a fuse_open_out.
func (fs *FS) answerOpen(r *request, n *inode, fd int, dir *dirPosition) {
	flags := uint32(0)
	if fs.keeps() {
		flags = keepCache
		if dir != nil {
			flags |= cacheDir
		}
	}
	r.reply = put32(put64(r.reply, fs.addHandle(n, fd, dir)), flags, 0)
}

// create makes and opens a regular file. If there is one already, it is opened as open does: the
// host makes nothing through a symbolic link, and opens no FIFO.
func (fs *FS) create(r *request) error {
	name, err := r.newName()
	if err != nil {
		return err
	}
	flags, mode := int(r.u32(0)), r.u32(4)
	if err := fs.reserve(); err != nil {
		return err
	}
	fd, err := unix.Openat(r.node.fd, name,
		flags&passed&^unix.O_TRUNC|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, mode&0o777)
	made := err == nil
	if made {
		err = fs.settle(r, fd, mode)
	}
	var n *inode
	var st unix.Statx_t
	if err == nil || err == unix.EEXIST && flags&unix.O_EXCL == 0 {
		n, st, err = fs.child(r.node, name)
	}
	if err == nil && !made {
		fd, err = fs.openFile(n, flags)
	}
	if err != nil {
		fs.unreserve(fd)
		if n != nil {
			fs.done(n)
		}
		if made {
			_ = unix.Unlinkat(r.node.fd, name, 0)
		}
		return err
	}
	fs.answerCreate(r, n, &st, fd)
	return nil
}

func (fs *FS) answerCreate(r *request, n *inode, st *unix.Statx_t, fd int) {
	handle := fs.addHandle(n, fd, nil)
	fs.answerEntry(r, n, st)
	r.reply = put32(put64(r.reply, handle), 0, 0)
}

// tmpfile makes a file that has no name.
func (fs *FS) tmpfile(r *request) error {
	if err := r.node.shown(unix.S_IFDIR); err != nil {
		return err
	}
	flags, mode := int(r.u32(0)), r.u32(4)
	if err := fs.reserve(); err != nil {
		return err
	}
	fd, err := unix.Open(procPath(r.node.fd), flags&passed&^unix.O_TRUNC|unix.O_TMPFILE|unix.O_CLOEXEC, mode&0o777)
	if err == nil {
		err = fs.settle(r, fd, mode)
	}
	if err == nil {
		err = fs.reserve()
	}
	if err != nil {
		fs.unreserve(fd)
		return err
	}
	path, err := unix.Open(procPath(fd), unix.O_PATH|unix.O_CLOEXEC, 0)
	st, err2 := stat(fd)
	if err = cmp.Or(err, err2); err != nil {
		fs.unreserve(fd)
		fs.unreserve(path)
		return err
	}
	n, err := fs.adopt(r.node, path, &st)
	if err != nil {
		fs.unreserve(fd)
		return err
	}
	fs.mu.Lock()
	n.unnamed = true
	fs.mu.Unlock()
	fs.answerCreate(r, n, &st, fd)
	return nil
}

// file returns the open regular file of a request whose structure begins with its ID.
func (fs *FS) file(r *request) (*handle, error) {
	h, err := fs.useHandle(r.u64(0), r.node)
	if err == nil && h.dir != nil {
		fs.doneHandle(h)
		return nil, unix.EISDIR
	}
	return h, err
}

// clip returns the beginning of iov, at most n bytes and as much as one system call takes.
func clip(iov [][]byte, n uint32) [][]byte {
	iov = iovec.Cut(nil, iov, 0, int(min(n, maxData)))
	return iov[:min(len(iov), maxIovs)]
}

func (fs *FS) read(r *request) error {
	h, err := fs.file(r)
	if err != nil {
		return err
	}
	defer fs.doneHandle(h)
	if int64(r.u64(8)) < 0 {
		return unix.EINVAL
	}
	if int64(iovec.Len(r.out)) < int64(min(r.u32(16), maxData)) {
		return unix.EINVAL
	}
	r.direct, err = unix.Preadv(h.fd, clip(r.out, r.u32(16)), int64(r.u64(8)))
	return err
}

func (fs *FS) write(r *request) error {
	h, err := fs.file(r)
	if err != nil {
		return err
	}
	defer fs.doneHandle(h)
	if int64(r.u64(8)) < 0 || int64(iovec.Len(r.data)) < int64(r.u32(16)) {
		return unix.EINVAL
	}
	if err := fs.dropRights(r.node); err != nil {
		return err
	}
	n, err := unix.Pwritev(h.fd, clip(r.data, r.u32(16)), int64(r.u64(8)))
	if err != nil {
		return err
	}
	r.reply = put32(r.reply, uint32(n), 0)
	return nil
}

// flush is the close of a descriptor: errors of writes that the host has put off show here.
func (fs *FS) flush(r *request) error {
	h, err := fs.file(r)
	if err != nil {
		return err
	}
	defer fs.doneHandle(h)
	fd, err := unix.FcntlInt(uintptr(h.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

func (fs *FS) fsync(r *request) error {
	h, err := fs.useHandle(r.u64(0), r.node)
	if err != nil {
		return err
	}
	defer fs.doneHandle(h)
	if r.u32(8)&fsyncData != 0 {
		return unix.Fdatasync(h.fd)
	}
	return unix.Fsync(h.fd)
}

func (fs *FS) fallocate(r *request) error {
	h, err := fs.file(r)
	if err != nil {
		return err
	}
	defer fs.doneHandle(h)
	if err := fs.dropRights(r.node); err != nil {
		return err
	}
	return unix.Fallocate(h.fd, r.u32(24), int64(r.u64(8)), int64(r.u64(16)))
}

// lseek serves the searches for holes and data; the client knows the rest.
func (fs *FS) lseek(r *request) error {
	h, err := fs.file(r)
	if err != nil {
		return err
	}
	defer fs.doneHandle(h)
	whence := r.u32(16)
	if whence != unix.SEEK_DATA && whence != unix.SEEK_HOLE {
		return unix.EINVAL
	}
	at, err := unix.Seek(h.fd, int64(r.u64(8)), int(whence))
	if err != nil {
		return err
	}
	r.reply = put64(r.reply, uint64(at))
	return nil
}

// maxCopy bounds one copy_file_range. The client asks again for the rest.
const maxCopy = 16 << 20

func (fs *FS) copyFileRange(r *request) error {
	from, err := fs.file(r)
	if err != nil {
		return err
	}
	defer fs.doneHandle(from)
	n, err := fs.use(r.u64(16))
	if err != nil {
		return err
	}
	defer fs.done(n)
	to, err := fs.useHandle(r.u64(24), n)
	if err != nil {
		return err
	}
	defer fs.doneHandle(to)
	if err := fs.dropRights(n); err != nil {
		return err
	}
	in, out := int64(r.u64(8)), int64(r.u64(32))
	count, err := unix.CopyFileRange(from.fd, &in, to.fd, &out, int(min(r.u64(40), maxCopy)), 0)
	if err != nil {
		return err
	}
	r.reply = put32(r.reply, uint32(count), 0)
	return nil
}
