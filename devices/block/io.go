package block

import (
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"

	"gvm/devices/iovec"
	"gvm/kvmapi/nowait"
)

// iovMax is the most buffers that one system call takes (IOV_MAX).
const iovMax = 1024

// maxBytes is the most that one system call moves: MAX_RW_COUNT of Linux is
// 2 GiB less a page. A request of a disk is smaller.
const maxBytes = 1 << 30

// transfer is one of preadv and pwritev, with its flags: the seam for another
// way to do I/O.
type transfer func(fd int, iov [][]byte, off int64) (int, error)

func readv(fd int, iov [][]byte, off int64) (int, error)  { return unix.Preadv(fd, iov, off) }
func writev(fd int, iov [][]byte, off int64) (int, error) { return unix.Pwritev(fd, iov, off) }
func writevSync(fd int, iov [][]byte, off int64) (int, error) {
	return unix.Pwritev2(fd, iov, off, unix.RWF_DSYNC)
}

// ReadAt implements io.ReaderAt. Bytes that are gone because someone truncated
// the file are io.ErrUnexpectedEOF, not zeroes.
func (b *File) ReadAt(p []byte, off int64) (int, error) { return b.ReadVec([][]byte{p}, off) }

// WriteAt implements io.WriterAt. It never makes the image larger.
func (b *File) WriteAt(p []byte, off int64) (int, error) { return b.WriteVec([][]byte{p}, off) }

// ReadVec fills iov from off on.
func (b *File) ReadVec(iov [][]byte, off int64) (int, error) {
	return b.move("preadv", readv, iov, off, true)
}

// WriteVec writes iov at off.
func (b *File) WriteVec(iov [][]byte, off int64) (int, error) {
	return b.move("pwritev", writev, iov, off, false)
}

// isInMemory reports whether a file is in a file system that keeps its files in memory,
// which reads and writes without waiting, and does not always know RWF_NOWAIT.
func isInMemory(fd int) bool {
	var st unix.Statfs_t
	return unix.Fstatfs(fd, &st) == nil && (st.Type == unix.TMPFS_MAGIC || st.Type == unix.RAMFS_MAGIC)
}

// ReadsAtOnce reports whether a file in dir can be read without a wait where the page cache
// has its data. Else each read of a File there goes over a thread that may wait.
func ReadsAtOnce(dir string) (bool, error) {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return false, fmt.Errorf("a file in %s: %w", dir, err)
	}
	defer unix.Close(fd)
	b := &File{fd: fd, path: dir, inMemory: isInMemory(fd)}
	b.size.Store(512)
	block := [][]byte{make([]byte, 512)}
	if _, err := b.WriteVec(block, 0); err != nil {
		return false, err
	}
	return b.ReadVecNow(block, 0), nil
}

// ReadVecNow implements Prompt: it reads from the page cache alone (RWF_NOWAIT).
func (b *File) ReadVecNow(iov [][]byte, off int64) bool {
	n := iovec.Len(iov)
	switch {
	case b.direct || b.mayWait.Load() || len(iov) > iovMax || off < 0 || off > b.Size()-int64(n):
		return false
	case b.inMemory:
		got, err := unix.Preadv(b.fd, iov, off)
		return err == nil && got == n
	}
	got, err := nowait.Preadv(b.fd, iov, off)
	if err == unix.EOPNOTSUPP {
		b.mayWait.Store(true)
	}
	return err == nil && got == n
}

// WriteVecNow implements Prompt: a write goes to the page cache. It waits only
// while the host holds up all who write, because too much of its memory is dirty; few
// file systems can tell that before.
func (b *File) WriteVecNow(iov [][]byte, off int64) bool {
	n := iovec.Len(iov)
	if b.direct || len(iov) > iovMax || off < 0 || off > b.Size()-int64(n) {
		return false
	}
	got, err := unix.Pwritev(b.fd, iov, off)
	return err == nil && got == n
}

// WriteVecDurable writes iov at off and returns when it is on stable storage
// (RWF_DSYNC).
func (b *File) WriteVecDurable(iov [][]byte, off int64) (int, error) {
	if err := b.damaged(); err != nil {
		return 0, err
	}
	n, err := b.move("pwritev2", writevSync, iov, off, false)
	switch {
	case errors.Is(err, errors.ErrUnsupported): // a file system that lacks the flag
		if n, err = b.WriteVec(iov, off); err == nil {
			err = b.Flush()
		}
	case err != nil:
		// The kernel tells of a failed write-back once, and it may have been
		// the write-back of other data.
		b.damage(err)
	}
	return n, err
}

// Flush makes every write that has returned durable (fdatasync). After one
// failure all later ones fail: the kernel drops pages that it could not write
// and reports success the next time, although the data is gone.
func (b *File) Flush() error {
	if err := b.damaged(); err != nil {
		return err
	}
	for {
		err := unix.Fdatasync(b.fd)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			err = fmt.Errorf("fdatasync %s: %w", b.path, err)
			b.damage(err)
		}
		return err
	}
}

// failure makes every error one type, as atomic.Value wants.
type failure struct{ err error }

func (b *File) damage(err error) { b.lost.CompareAndSwap(nil, failure{err}) }

func (b *File) damaged() error {
	if f, ok := b.lost.Load().(failure); ok {
		return fmt.Errorf("an earlier flush lost data: %w", f.err)
	}
	return nil
}

// move does the whole of iov with as many calls of do as it takes: a call may
// be interrupted, take 1024 buffers at most, or stop short.
func (b *File) move(name string, do transfer, iov [][]byte, off int64, read bool) (int, error) {
	total := iovec.Len(iov)
	if size := b.Size(); off < 0 || off > size || int64(total) > size-off {
		return 0, fmt.Errorf("%s %s: %d bytes at %d: past the end at %d", name, b.path, total, off, size)
	}
	done := 0
	for done < total {
		part := iov
		if done > 0 || len(iov) > iovMax || total > maxBytes {
			part = window(iov, done)
		}
		n, err := do(b.fd, part, off+int64(done))
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EINVAL && b.direct:
			// Not aligned: the rest goes through a buffer that is.
			n, err = b.bounce(do, iov, done, total, off, read)
			return done + n, b.wrap(name, err)
		case err != nil:
			return done, b.wrap(name, err)
		case n == 0 && read:
			return done, b.wrap(name, io.ErrUnexpectedEOF)
		case n == 0:
			return done, b.wrap(name, io.ErrShortWrite)
		}
		done += n
	}
	return done, nil
}

func (b *File) wrap(name string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s %s: %w", name, b.path, err)
}

// window returns the buffers of iov from byte skip on that one call can take.
func window(iov [][]byte, skip int) [][]byte {
	var w [][]byte
	room := maxBytes
	for _, p := range iov {
		if skip >= len(p) {
			skip -= len(p)
			continue
		}
		p, skip = p[skip:], 0
		if len(w) == iovMax || room == 0 {
			break
		}
		if len(p) > room {
			p = p[:room]
		}
		room -= len(p)
		w = append(w, p)
	}
	return w
}

// bounceSize is the aligned buffer's: a multiple of every block size.
const bounceSize = 1 << 20

// bounce moves iov from byte done on through a page-aligned buffer, for
// O_DIRECT.
func (b *File) bounce(do transfer, iov [][]byte, done, total int, off int64, read bool) (int, error) {
	buf, err := unix.Mmap(-1, 0, min(bounceSize, (total-done+4095)&^4095), unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return 0, err
	}
	defer unix.Munmap(buf)
	moved := 0
	for done+moved < total {
		p := buf[:min(len(buf), total-done-moved)]
		w := window(iov, done+moved)
		if !read {
			n := 0
			for _, q := range w {
				n += copy(p[n:], q)
			}
			p = p[:n]
		}
		n, err := do(b.fd, [][]byte{p}, off+int64(done+moved))
		if err == unix.EINTR {
			continue
		}
		if err == nil && n == 0 {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return moved, err
		}
		if read {
			rest := p[:n]
			for _, q := range w {
				rest = rest[copy(q, rest):]
			}
			n -= len(rest)
		}
		moved += n
	}
	return moved, nil
}
