package hostfs

import (
	"bytes"
	"sync"

	"golang.org/x/sys/unix"
)

// dirPosition is where the client is in an open directory.
type dirPosition struct {
	mu sync.Mutex
	at uint64 // the offset of the descriptor
}

func (fs *FS) opendir(r *request) error {
	if err := r.node.shown(unix.S_IFDIR); err != nil {
		return err
	}
	if err := fs.reserve(); err != nil {
		return err
	}
	fd, err := unix.Open(procPath(r.node.fd), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		fs.unreserve(-1)
		return err
	}
	fs.answerOpen(r, r.node, fd, &dirPosition{})
	return nil
}

// dirent is a struct linux_dirent64.
type dirent struct {
	ino, next uint64 // next is the offset of the entry that follows
	kind      byte
	name      []byte
}

// parseDirent splits an entry off the result of getdents64.
func parseDirent(b []byte) (dirent, []byte) {
	size := order.Uint16(b[16:])
	name, _, _ := bytes.Cut(b[19:size], []byte{0})
	return dirent{order.Uint64(b), order.Uint64(b[8:]), b[18], name}, b[size:]
}

// readdir serves READDIR and READDIRPLUS.
func (fs *FS) readdir(r *request) error {
	h, err := fs.useHandle(r.u64(0), r.node)
	if err != nil {
		return err
	}
	defer fs.doneHandle(h)
	if h.dir == nil {
		return unix.ENOTDIR
	}
	plus := r.opcode == opReaddirplus
	offset, room := r.u64(8), int(min(r.u32(16), maxDirents))
	h.dir.mu.Lock()
	defer h.dir.mu.Unlock()
	buf := make([]byte, room+512) // which holds an entry at least
	if plus {
		buf = buf[:room/4+512] // about as many as the answer does, without their attributes
	}
	for {
		if h.dir.at != offset {
			if _, err := unix.Seek(h.fd, int64(offset), unix.SEEK_SET); err != nil {
				return err
			}
		}
		n, err := unix.Getdents(h.fd, buf)
		h.dir.at = ^uint64(0) // until the last entry is known
		if len(r.reply) > 0 && err != nil {
			return nil // the client asks again
		}
		if err != nil || n == 0 {
			return err
		}
		for rest := buf[:n]; len(rest) > 0; {
			var e dirent
			if e, rest = parseDirent(rest); !fs.putDirent(r, e, plus, room) {
				if len(r.reply) == 0 {
					return unix.EINVAL // no answer would be the end of the directory
				}
				return nil
			}
			offset = e.next
		}
		h.dir.at = offset
	}
}

// putDirent appends a fuse_dirent or fuse_direntplus to the reply, unless it has more than room
// bytes then.
func (fs *FS) putDirent(r *request, e dirent, plus bool, room int) bool {
	size := (direntLen + len(e.name) + 7) &^ 7
	if plus {
		size += entryOutLen
	}
	if len(r.reply)+size > room {
		return false
	}
	dots := string(e.name) == "." || string(e.name) == ".."
	end := len(r.reply) + size
	ino := fs.number(r.node.key.dev, e.ino)
	if r.node == fs.root && dots {
		ino = fs.root.key.ino // directories above the tree are not shown
	}
	if plus {
		entry := make([]byte, entryOutLen) // of no inode: the client looks it up
		if !dots {
			if n, st, err := fs.child(r.node, string(e.name)); err == nil {
				entry = fs.putEntry(nil, n.id, &st)
				fs.know(n)
				fs.done(n)
			}
		}
		r.reply = append(r.reply, entry...)
	}
	r.reply = put32(put64(r.reply, ino, e.next), uint32(len(e.name)), uint32(e.kind))
	r.reply = append(r.reply, e.name...)
	r.reply = append(r.reply, make([]byte, end-len(r.reply))...)
	return true
}
