package hostfs

import (
	"container/list"
	"strconv"

	"golang.org/x/sys/unix"
)

// key identifies an inode of the host. The descriptor in the table keeps the host from giving the
// number to another file; on file systems where it does not, the time of birth differs.
type key struct {
	dev, ino, mount uint64
	born            unix.StatxTimestamp
}

func keyOf(st *unix.Statx_t) key {
	k := key{dev: deviceOf(st), ino: st.Ino}
	if st.Mask&unix.STATX_MNT_ID != 0 {
		k.mount = st.Mnt_id // a bind mount may be read-only where the other is not
	}
	if st.Mask&unix.STATX_BTIME != 0 {
		k.born = st.Btime
	}
	return k
}

func deviceOf(st *unix.Statx_t) uint64 { return unix.Mkdev(st.Dev_major, st.Dev_minor) }

// inode is a file that the client knows. Its key, kind and hidden do not change.
type inode struct {
	id     uint64 // the client's name of it
	key    key
	kind   uint32 // S_IFMT of its mode
	hidden bool   // in a file system that is not shown

	// FS.mu guards the fields below; fd does not change while the inode is used.
	fd      int    // O_PATH; -1 while it is closed because of Config.Files
	parent  *inode // where it was found last, to open it again; nil for the root
	name    string
	kids    int           // inodes whose parent it is
	unnamed bool          // the client has removed that name: it could not be opened again
	lookups uint64        // references of the client
	uses    int           // requests that are being served, and open files
	idle    *list.Element // in FS.idle
}

// handle is an open file. fd, node and dir do not change.
type handle struct {
	id   uint64
	fd   int
	node *inode
	dir  *dirPosition
	open bool // the client has it
	uses int
}

func procPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

func stat(fd int) (st unix.Statx_t, err error) {
	err = uninterrupted(func() error {
		return unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT,
			unix.STATX_BASIC_STATS|unix.STATX_BTIME|unix.STATX_MNT_ID, &st)
	})
	return st, err
}

// kernelInterface reports whether the file is in a file system that shows or sets the state of the
// host's kernel or its processes, among them this one's memory. If it cannot be told, it is.
func kernelInterface(fd int) bool {
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return true
	}
	switch st.Type {
	case unix.PROC_SUPER_MAGIC, unix.SYSFS_MAGIC, unix.DEBUGFS_MAGIC, unix.TRACEFS_MAGIC, unix.SECURITYFS_MAGIC,
		unix.CGROUP_SUPER_MAGIC, unix.CGROUP2_SUPER_MAGIC, unix.BPF_FS_MAGIC, unix.EFIVARFS_MAGIC,
		unix.PSTOREFS_MAGIC, unix.BINFMTFS_MAGIC, unix.SELINUX_MAGIC, unix.SMACK_MAGIC, unix.NSFS_MAGIC,
		unix.DEVPTS_SUPER_MAGIC, unix.RDTGROUP_SUPER_MAGIC, unix.ANON_INODE_FS_MAGIC, unix.PID_FS_MAGIC,
		unix.AAFS_MAGIC, unix.BINDERFS_SUPER_MAGIC, unix.XENFS_SUPER_MAGIC,
		configfsMagic, fusectlMagic, mqueueMagic, nfsdMagic, rpcPipefsMagic, functionfsMagic, gadgetfsMagic:
		return true
	}
	return false
}

// Magic numbers that package unix does not have.
const (
	configfsMagic   = 0x62656570
	fusectlMagic    = 0x65735543
	mqueueMagic     = 0x19800202 // a new file is a message queue
	nfsdMagic       = 0x6e667364 // a write sets up the NFS server
	rpcPipefsMagic  = 0x67596969
	functionfsMagic = 0x0a647361 // a read waits for a USB host
	gadgetfsMagic   = 0xaee71ee7 // likewise
)

// maxInodes bounds the memory for inodes that a client does not forget.
const maxInodes = 1 << 20

// maxDepth bounds the walk to an inode that was closed. If the host moves directories, the parents
// that are recorded may even be a circle.
const maxDepth = 1024

// use returns the inode of an ID with its descriptor open; it stays so until done.
func (fs *FS) use(id uint64) (*inode, error) {
	fs.mu.Lock()
	n := fs.nodes[id]
	if n == nil {
		fs.mu.Unlock()
		return nil, unix.ESTALE
	}
	fs.take(n)
	fs.mu.Unlock()
	if err := fs.reopen(n, maxDepth); err != nil {
		fs.done(n)
		return nil, err
	}
	return n, nil
}

// take counts a use. The caller holds mu.
func (fs *FS) take(n *inode) {
	n.uses++
	fs.busy(n)
}

// busy takes an inode off the list of those that may be closed. The caller holds mu.
func (fs *FS) busy(n *inode) {
	if n.idle != nil {
		fs.idle.Remove(n.idle)
		n.idle = nil
	}
}

// reopen opens an inode that was closed, and that the caller uses. It is ESTALE if another file has
// its name now.
func (fs *FS) reopen(n *inode, depth int) error {
	fs.mu.Lock()
	fd, parent, name := n.fd, n.parent, n.name
	if fd < 0 && parent != nil {
		fs.take(parent)
	}
	fs.mu.Unlock()
	if fd >= 0 {
		return nil
	}
	if parent == nil || depth == 0 {
		return unix.ESTALE
	}
	defer fs.done(parent)
	if err := fs.reopen(parent, depth-1); err != nil {
		return err
	}
	fd, st, err := fs.openPath(parent, name)
	if err != nil {
		return err
	}
	if keyOf(&st) != n.key || uint32(st.Mode)&unix.S_IFMT != n.kind {
		fs.unreserve(fd)
		return unix.ESTALE
	}
	fs.mu.Lock()
	defer fs.unlock()
	if n.fd >= 0 { // another request was faster
		fs.shut(fd)
	} else {
		n.fd = fd
	}
	return nil
}

// openPath opens the file with a name in a directory that the caller uses, and counts the
// descriptor.
func (fs *FS) openPath(dir *inode, name string) (int, unix.Statx_t, error) {
	if err := fs.reserve(); err != nil {
		return -1, unix.Statx_t{}, err
	}
	fd := -1
	err := uninterrupted(func() (err error) {
		fd, err = unix.Openat(dir.fd, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		return err
	})
	var st unix.Statx_t
	if err == nil {
		st, err = stat(fd)
	}
	if err != nil {
		fs.unreserve(fd)
	}
	return fd, st, err
}

func (fs *FS) done(n *inode) {
	fs.mu.Lock()
	defer fs.unlock()
	n.uses--
	fs.free(n)
}

// free closes an inode that nothing has, and then perhaps its parent. One that only the client has
// may be closed from now on. The caller holds mu.
func (fs *FS) free(n *inode) {
	for n != nil && n.uses == 0 && n.lookups == 0 && n.kids == 0 {
		if fs.nodes[n.id] == n {
			delete(fs.nodes, n.id)
		}
		if fs.byKey[n.key] == n {
			delete(fs.byKey, n.key)
		}
		fs.busy(n)
		fs.shut(n.fd)
		parent := n.parent
		n.fd, n.parent = -1, nil
		if parent != nil {
			parent.kids--
		}
		n = parent
	}
	if n != nil && n != fs.root && n.uses == 0 && n.fd >= 0 && !n.unnamed && n.idle == nil {
		n.idle = fs.idle.PushBack(n)
	}
}

// found records where an inode was found. The caller holds mu.
func (fs *FS) found(n, dir *inode, name string) {
	if n == fs.root || n == dir {
		return
	}
	dir.kids++
	if old := n.parent; old != nil {
		old.kids--
		fs.free(old)
	}
	n.parent, n.name, n.unnamed = dir, name, false
}

// reserve counts a descriptor before it is opened. If there are too many, it closes the inode that
// has not been used for the longest time, whose count the new one has then.
func (fs *FS) reserve() error {
	fs.mu.Lock()
	if fs.files < fs.cfg.Files {
		fs.files++
		fs.mu.Unlock()
		return nil
	}
	first := fs.idle.Front()
	if first == nil {
		fs.mu.Unlock()
		return unix.ENFILE
	}
	n := first.Value.(*inode)
	fs.busy(n)
	fd := n.fd
	n.fd = -1
	fs.mu.Unlock()
	unix.Close(fd)
	return nil
}

// shut has unlock close a descriptor that was counted, if there is one. The caller holds mu.
func (fs *FS) shut(fd int) {
	if fd >= 0 {
		fs.shutting = append(fs.shutting, fd)
	}
}

// unlock releases mu, and then closes: the host may take its time for that.
func (fs *FS) unlock() {
	fds := fs.shutting
	fs.shutting = nil
	fs.mu.Unlock()
	if fds == nil {
		return
	}
	for _, fd := range fds {
		unix.Close(fd)
	}
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.files -= len(fds)
}

// unreserve undoes reserve, and closes the descriptor unless it is negative.
func (fs *FS) unreserve(fd int) {
	if fd >= 0 {
		unix.Close(fd)
	}
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.files--
}

// child returns the file with a name in a directory, as an inode that the caller uses. If the
// client gets it, know counts that.
func (fs *FS) child(dir *inode, name string) (*inode, unix.Statx_t, error) {
	err := checkName(name)
	if err == nil {
		err = dir.shown(unix.S_IFDIR)
	}
	if err != nil {
		return nil, unix.Statx_t{}, err
	}
	fd, st, err := fs.openPath(dir, name)
	if err != nil {
		return nil, st, err
	}
	n, err := fs.adopt(dir, fd, &st)
	if err == nil {
		fs.mu.Lock()
		defer fs.unlock()
		fs.found(n, dir, name)
	}
	return n, st, err
}

// adopt makes the inode of a new O_PATH descriptor, which was counted, or returns the one that the
// client has.
func (fs *FS) adopt(dir *inode, fd int, st *unix.Statx_t) (*inode, error) {
	n := &inode{fd: fd, key: keyOf(st), kind: uint32(st.Mode) & unix.S_IFMT}
	n.hidden = n.key.dev != dir.key.dev && kernelInterface(fd)
	fs.mu.Lock()
	defer fs.unlock()
	if has := fs.byKey[n.key]; has != nil && has.kind == n.kind {
		if has.fd < 0 {
			has.fd = fd
		} else {
			fs.shut(fd)
		}
		fs.take(has)
		return has, nil
	}
	if len(fs.nodes) >= maxInodes {
		fs.shut(fd)
		return nil, unix.ENFILE
	}
	fs.next++
	n.id = fs.next
	fs.nodes[n.id], fs.byKey[n.key] = n, n
	fs.take(n)
	return n, nil
}

// know counts a reference of the client.
func (fs *FS) know(n *inode) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	n.lookups++
}

// shown returns an error unless the inode is of that kind and its contents are shown.
func (n *inode) shown(kind uint32) error {
	switch {
	case n.kind != kind && kind == unix.S_IFDIR:
		return unix.ENOTDIR
	case n.kind != kind && n.kind == unix.S_IFDIR:
		return unix.EISDIR
	case n.kind != kind && n.kind == unix.S_IFLNK:
		return unix.ELOOP
	case n.kind != kind:
		return unix.ENXIO
	case n.hidden:
		return unix.EACCES
	}
	return nil
}

func (fs *FS) forget(r *request) error {
	fs.forgetOne(r.id, r.u64(0))
	return nil
}

func (fs *FS) batchForget(r *request) error {
	for list := r.names; len(list) >= 16; list = list[16:] {
		fs.forgetOne(order.Uint64(list), order.Uint64(list[8:]))
	}
	return nil
}

func (fs *FS) forgetOne(id, lookups uint64) {
	fs.mu.Lock()
	defer fs.unlock()
	if n := fs.nodes[id]; n != nil && n != fs.root {
		n.lookups -= min(lookups, n.lookups)
		fs.free(n)
	}
}

// addHandle gives the client an open file, whose descriptor was reserved.
func (fs *FS) addHandle(n *inode, fd int, dir *dirPosition) uint64 {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.next++
	fs.handles[fs.next] = &handle{id: fs.next, fd: fd, node: n, dir: dir, open: true}
	fs.take(n)
	return fs.next
}

// useHandle returns the open file of an ID if it is the inode's, until doneHandle.
func (fs *FS) useHandle(id uint64, n *inode) (*handle, error) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	h := fs.handles[id]
	if h == nil || h.node != n {
		return nil, unix.EBADF
	}
	h.uses++
	return h, nil
}

func (fs *FS) doneHandle(h *handle) {
	fs.mu.Lock()
	defer fs.unlock()
	h.uses--
	fs.freeHandle(h)
}

// freeHandle closes an open file that neither the client nor a request has. The caller holds mu.
func (fs *FS) freeHandle(h *handle) {
	if h.uses > 0 || h.open {
		return
	}
	fs.shut(h.fd)
	h.node.uses--
	fs.free(h.node)
}

func (fs *FS) release(r *request) error {
	fs.mu.Lock()
	defer fs.unlock()
	h := fs.handles[r.u64(0)]
	if h == nil {
		return unix.EBADF
	}
	delete(fs.handles, h.id)
	h.open = false
	fs.freeHandle(h)
	return nil
}

// checkName checks the name of an entry of a directory.
func checkName(name string) error {
	if len(name) > 255 {
		return unix.ENAMETOOLONG
	}
	if name == "" || name == "." || name == ".." {
		return unix.EINVAL
	}
	for i := range len(name) {
		if name[i] == '/' || name[i] == 0 {
			return unix.EINVAL
		}
	}
	return nil
}
