// Package hostfs serves a directory tree of the host by the FUSE protocol. The client is a guest's
// kernel, and hostile: it may send any message, and change the memory of a message meanwhile.
//
// The tree is a trust boundary. Each inode that the client knows has an O_PATH descriptor, and a
// name is looked up below such a descriptor of a directory: one component, never "." or "..", never
// through a symbolic link. So no path is ever resolved for the client, which resolves symbolic
// links itself, in its own root. Only regular files and directories are opened; FIFOs, sockets and
// devices are shown. The file systems that are interfaces of the host's kernel, such as proc, are
// empty.
//
// Permissions are checked by the client's kernel, from the attributes (default_permissions), and
// then by the host's for this process. Set-user-ID and set-group-ID bits, devices and file
// capabilities, which would give a program on the host rights, cannot be made.
package hostfs

import (
	"container/list"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"gvm/kvmapi/nowait"

	"gvm/devices/iovec"
)

// Config is the configuration of a file system.
type Config struct {
	Dir      string // the root of the tree
	ReadOnly bool   // every request that changes something fails with EROFS
	// Root shows the files of an ordinary user who runs this program as root's, to a guest in which
	// root works for that user. It changes nothing for a program that root runs.
	Root bool
	// Valid is for how long the client may use names and attributes before it asks again; 0 is a
	// second. If it is more than a minute, the client keeps data from one open to the next too.
	Valid time.Duration
	// Files bounds the descriptors, for inodes and open files; 0 is half of RLIMIT_NOFILE. Beyond,
	// inodes are closed, and found again by their names. The client gets ENFILE if all are in use.
	Files int
}

// FS is a tree that is served. Its methods may be called from any goroutine.
type FS struct {
	cfg   Config
	valid time.Duration
	root  *inode
	owner bool // this process may give files away

	uid, gid uint32 // that the client has as 0, if Config.Root holds; else 0

	mu      sync.Mutex // guards the fields below, and the counts of inodes and handles
	nodes   map[uint64]*inode
	byKey   map[key]*inode
	handles map[uint64]*handle
	next    uint64            // the last ID of a node or handle; IDs are not used again
	devices map[uint64]uint64 // the number of each file system of the host but the root's
	files   int               // descriptors
	idle    list.List         // inodes that may be closed, the last used at the end
	calls   uint64            // requests served

	shutting []int // descriptors that unlock closes
}

// DefaultFiles returns half of RLIMIT_NOFILE.
func DefaultFiles() (int, error) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0, fmt.Errorf("read the limit of open files: %w", err)
	}
	return int(min(limit.Cur, 1<<31) / 2), nil
}

// Open opens the tree at cfg.Dir.
func Open(cfg Config) (*FS, error) {
	if cfg.Files == 0 {
		var err error
		if cfg.Files, err = DefaultFiles(); err != nil {
			return nil, err
		}
	}
	if cfg.Valid == 0 {
		cfg.Valid = time.Second
	}
	fd, err := unix.Open(cfg.Dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nowait.OpenError(cfg.Dir, err)
	}
	st, err := stat(fd)
	if err == nil && kernelInterface(fd) {
		err = errors.New("it shows the state of the kernel, and is not shared; name another")
	}
	if err == nil {
		err = unix.Access(procPath(fd), unix.R_OK|unix.X_OK)
	}
	if err != nil {
		unix.Close(fd)
		return nil, nowait.OpenError(cfg.Dir, err)
	}
	fs := &FS{cfg: cfg, valid: cfg.Valid, owner: os.Geteuid() == 0, devices: map[uint64]uint64{}, files: 1,
		root: &inode{id: 1, fd: fd, key: keyOf(&st), kind: uint32(st.Mode) & unix.S_IFMT, lookups: 1}}
	if cfg.Root && !fs.owner {
		fs.uid, fs.gid = uint32(os.Geteuid()), uint32(os.Getegid())
	}
	fs.forgetAll()
	return fs, nil
}

// Close closes the tree. Requests that are still being served, by a host that does not answer, keep
// what they use.
func (fs *FS) Close() {
	fs.Reset()
	fs.mu.Lock()
	defer fs.unlock()
	fs.root.lookups = 0
	fs.free(fs.root)
}

// Reset forgets the client: its inodes and open files.
func (fs *FS) Reset() {
	fs.mu.Lock()
	defer fs.unlock()
	for _, h := range fs.handles {
		h.open = false
		fs.freeHandle(h)
	}
	for _, n := range fs.nodes {
		n.lookups = 0
	}
	fs.root.lookups = 1
	for _, n := range fs.nodes {
		if dir := n.parent; dir != nil { // perhaps of a request from before another reset
			n.parent = nil
			dir.kids--
			fs.free(dir)
		}
		fs.free(n)
	}
	fs.forgetAll()
}

func (fs *FS) forgetAll() {
	fs.nodes, fs.byKey = map[uint64]*inode{1: fs.root}, map[key]*inode{fs.root.key: fs.root}
	fs.handles = map[uint64]*handle{}
	fs.next = max(fs.next, 1)
}

// Counts are numbers of a file system for people.
type Counts struct {
	Inodes, Handles int    // that the client has
	Files, MaxFiles int    // descriptors
	Requests        uint64 // served
}

// Counts returns the present numbers.
func (fs *FS) Counts() Counts {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	return Counts{len(fs.nodes), len(fs.handles), fs.files, fs.cfg.Files, fs.calls}
}

// Bounds of messages: the arguments of a request without the data of a write, and the data of one
// read or write, which init_out announces.
const (
	maxArgs = 128 << 10
	maxData = 1 << 20
	maxIovs = 1024 // IOV_MAX
)

// maxDirents bounds the answer to one request for entries of a directory.
const maxDirents = 64 << 10

// request is a request. The memory of data and out is the client's, which may change it.
type request struct {
	opcode     uint32
	unique, id uint64 // id is of the inode
	uid, gid   uint32
	args       []byte // a copy
	names      []byte // the part of args that follows the structure
	data       [][]byte
	out        [][]byte // room for the answer without its header
	reply      []byte   // the answer without its header
	direct     int      // bytes that were written to out instead
	node       *inode
}

func (r *request) u32(off int) uint32 { return order.Uint32(r.args[off:]) }
func (r *request) u64(off int) uint64 { return order.Uint64(r.args[off:]) }

// Errors of messages that have no answer.
var (
	errShort = errors.New("FUSE message is shorter than its header")
	errRoom  = errors.New("no room for the answer to a FUSE message")
)

// Serve serves the request in the buffers in, and writes the answer to the buffers out. It returns
// the number of bytes written, 0 for a request that has no answer. An error says that in and out
// are no FUSE message; every other mistake of the client is answered with an error number.
func (fs *FS) Serve(in, out [][]byte) (int, error) {
	head := make([]byte, inHeaderLen)
	size := iovec.Len(in)
	if iovec.Gather(head, in) < inHeaderLen {
		return 0, errShort
	}
	r := request{opcode: order.Uint32(head[4:]), unique: order.Uint64(head[8:]), id: order.Uint64(head[16:]),
		uid: order.Uint32(head[24:]), gid: order.Uint32(head[28:])}
	var row op
	if int64(r.opcode) < int64(len(ops)) {
		row = ops[r.opcode]
	}
	room := iovec.Len(out)
	if row.optional && room == 0 {
		return 0, nil
	}
	if !row.unanswered && room < outHeaderLen {
		return 0, errRoom
	}
	n := size - inHeaderLen
	if r.opcode == opWrite && n > row.args {
		r.data = iovec.Cut(nil, in, inHeaderLen+row.args, n-row.args)
		n = row.args
	}
	var err error
	switch {
	case row.run == nil:
		err = unix.ENOSYS
	case n > maxArgs:
		err = unix.E2BIG
	case n < row.args:
		err = unix.EINVAL
	case row.changes && fs.cfg.ReadOnly:
		err = unix.EROFS
	default:
		r.args = make([]byte, n)
		iovec.Gather(r.args, iovec.Cut(nil, in, inHeaderLen, n))
		r.names = r.args[row.args:]
		if !row.unanswered {
			r.out = iovec.Cut(nil, out, outHeaderLen, room-outHeaderLen)
		}
		err = fs.run(row, &r)
	}
	if row.unanswered {
		return 0, nil
	}
	if err == nil && len(r.reply) > room-outHeaderLen {
		err = unix.EIO
	}
	var no syscall.Errno
	if err != nil {
		if r.reply, r.direct = nil, 0; !errors.As(err, &no) || no == 0 {
			no = unix.EIO
		}
	}
	total := outHeaderLen + len(r.reply) + r.direct
	answer := put64(put32(make([]byte, 0, outHeaderLen+len(r.reply)), uint32(total), uint32(-int32(no))), r.unique)
	iovec.Scatter(out, append(answer, r.reply...))
	return total, nil
}

func (fs *FS) run(row op, r *request) error {
	if !row.anyNode {
		n, err := fs.use(r.id)
		if err != nil {
			return err
		}
		defer fs.done(n)
		r.node = n
	}
	fs.mu.Lock()
	fs.calls++
	fs.mu.Unlock()
	return uninterrupted(func() error {
		try := *r
		err := row.run(fs, &try)
		if err != unix.EINTR {
			*r = try
		}
		return err
	})
}

// uninterrupted calls f again while a signal interrupts it, which is this process's and not the
// client's. f has done nothing then.
func uninterrupted(f func() error) (err error) {
	for range 100 {
		if err = f(); err != unix.EINTR {
			break
		}
	}
	return err
}

// op is a kind of request.
type op struct {
	args       int  // length of its structure
	changes    bool // it changes the tree
	anyNode    bool // it is not about an inode
	unanswered bool
	optional   bool // the client may have no room for an answer
	run        func(*FS, *request) error
}

var ops = [...]op{
	opLookup:        {run: (*FS).lookup},
	opForget:        {args: 8, anyNode: true, unanswered: true, run: (*FS).forget},
	opGetattr:       {args: 16, run: (*FS).getattr},
	opSetattr:       {args: 88, changes: true, run: (*FS).setattr},
	opReadlink:      {run: (*FS).readlink},
	opSymlink:       {changes: true, run: (*FS).symlink},
	opMknod:         {args: 16, changes: true, run: (*FS).mknod},
	opMkdir:         {args: 8, changes: true, run: (*FS).mkdir},
	opUnlink:        {changes: true, run: (*FS).unlink},
	opRmdir:         {changes: true, run: (*FS).rmdir},
	opRename:        {args: 8, changes: true, run: (*FS).rename},
	opLink:          {args: 8, changes: true, run: (*FS).link},
	opOpen:          {args: 8, run: (*FS).open},
	opRead:          {args: 40, run: (*FS).read},
	opWrite:         {args: 40, changes: true, run: (*FS).write},
	opStatfs:        {run: (*FS).statfs},
	opRelease:       {args: 24, anyNode: true, run: (*FS).release},
	opFsync:         {args: 16, run: (*FS).fsync},
	opSetxattr:      {args: 8, changes: true, run: (*FS).setxattr},
	opGetxattr:      {args: 8, run: (*FS).getxattr},
	opListxattr:     {args: 8, run: (*FS).listxattr},
	opRemovexattr:   {changes: true, run: (*FS).removexattr},
	opFlush:         {args: 24, run: (*FS).flush},
	opInit:          {args: 16, anyNode: true, run: (*FS).init},
	opOpendir:       {args: 8, run: (*FS).opendir},
	opReaddir:       {args: 40, run: (*FS).readdir},
	opReleasedir:    {args: 24, anyNode: true, run: (*FS).release},
	opFsyncdir:      {args: 16, run: (*FS).fsync},
	opCreate:        {args: 16, changes: true, run: (*FS).create},
	opInterrupt:     {args: 8, anyNode: true, optional: true, run: (*FS).interrupt},
	opDestroy:       {anyNode: true, run: (*FS).destroy},
	opBatchForget:   {args: 8, anyNode: true, unanswered: true, run: (*FS).batchForget},
	opFallocate:     {args: 32, changes: true, run: (*FS).fallocate},
	opReaddirplus:   {args: 40, run: (*FS).readdir},
	opRename2:       {args: 16, changes: true, run: (*FS).rename},
	opLseek:         {args: 24, run: (*FS).lseek},
	opCopyFileRange: {args: 56, changes: true, run: (*FS).copyFileRange},
	opSyncfs:        {args: 8, run: (*FS).syncfs},
	opTmpfile:       {args: 16, changes: true, run: (*FS).tmpfile},
}

// init answers INIT, the first request of a client.
func (fs *FS) init(r *request) error {
	major, minor := r.u32(0), r.u32(4)
	if major > protocolMajor { // the client tries again with this major version
		r.reply = append(put32(nil, protocolMajor, protocolMinor), make([]byte, initOutLen-8)...)
		return nil
	}
	if major < protocolMajor || minor < minorAtLeast {
		return unix.EPROTO
	}
	fs.Reset()
	offers := uint32(asyncRead | atomicTruncate | bigWrites | autoInvalData | doReaddirplus | readdirplusAuto |
		asyncDIO | parallelDirops | maxPages | handleKillpriv2)
	if fs.keeps() {
		offers |= cacheSymlinks
	}
	// No bit of the second word: with FUSE_INIT_EXT unset the client reads none.
	r.reply = put32(r.reply, protocolMajor, min(minor, protocolMinor), r.u32(8), r.u32(12)&offers)
	r.reply = put32(r.reply, 0, maxData, 1) // max_background and congestion_threshold: the client's; max_write, time_gran
	r.reply = put32(r.reply, maxData/4096)  // max_pages and map_alignment
	r.reply = append(r.reply, make([]byte, initOutLen-len(r.reply))...)
	return nil
}

// keeps reports whether the client keeps data that it has read after the file is closed.
func (fs *FS) keeps() bool { return fs.valid > time.Minute }

func (fs *FS) destroy(*request) error {
	fs.Reset()
	return nil
}

// interrupt refuses INTERRUPT, after which the client sends no more. It would end the wait for a
// lock or for the other end of a FIFO. No request waits for such: locks are the client's, and only
// regular files and directories are opened. Others wait for storage, which does not end earlier,
// and an answer before that would give memory back to the client that the host still reads or
// writes.
func (fs *FS) interrupt(*request) error { return unix.ENOSYS }

func (fs *FS) syncfs(r *request) error {
	if err := r.node.shown(unix.S_IFDIR); err != nil {
		return err
	}
	if err := fs.reserve(); err != nil {
		return err
	}
	fd, err := unix.Open(procPath(r.node.fd), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	defer func() { fs.unreserve(fd) }()
	if err != nil {
		return err
	}
	return unix.Syncfs(fd)
}
