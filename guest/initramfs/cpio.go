package initramfs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"sort"
	"strings"

	"golang.org/x/sys/unix"

	"gvm/vmm/boot"
)

// archive is a newc archive: headers in memory, and the contents where they are.
type archive struct {
	parts []part
	size  int64
	files []io.Closer
}

// part is a piece of an archive that ends at end.
type part struct {
	end int64
	*boot.File
}

const (
	trailer = "TRAILER!!!"
	// Linux takes names and targets of this size, NUL included, and skips longer ones
	// (init/initramfs.c).
	maxName = unix.PathMax
	maxSize = math.MaxUint32 // of a file: the field has 8 hexadecimal digits
)

// add appends a file. Every inode number is used once, so no two files are links to one inode.
func (a *archive) add(inode int, e Entry) error {
	content := e.Content
	if e.Mode.Type() == fs.ModeSymlink {
		content = memory(e.Name, []byte(e.Target))
	}
	if content == nil {
		content = memory(e.Name, nil)
	}
	mode, ok := unixMode(e.Mode)
	switch {
	case !ok:
		return fault(e.Name, "is a socket or of an unknown type", "leave it out")
	case strings.Contains(e.Name, "\x00") || strings.Contains(e.Target, "\x00"):
		return fault(e.Name, "has a NUL in its name or target", "remove it")
	case len(e.Name) >= maxName || len(e.Target) >= maxName:
		return fault(e.Name, fmt.Sprintf("has a name or target of more than %d bytes", maxName-1), "shorten it")
	case e.Mode.Type() == fs.ModeSymlink && e.Target == "":
		return fault(e.Name, "is a symbolic link without a target", "give one")
	case content.Size > maxSize:
		return fault(e.Name, fmt.Sprintf("has %d MiB, and %d MiB are the most", content.Size>>20, maxSize>>20),
			"give it as a disk")
	}
	name := e.Name
	if name == trailer {
		name = "./" + name // else it would end the archive
	}
	a.header(inode, mode, e, name, content.Size)
	a.append(content)
	return nil
}

// end appends the mark of the end. Its size is a multiple of 4: another archive may follow.
func (a *archive) end() {
	a.header(0, 0, Entry{}, trailer, 0)
	a.append(memory(trailer, make([]byte, -a.size&3)))
}

// header appends the padding of the file before, and a header. See buffer-format.rst for its
// fields.
func (a *archive) header(inode int, mode uint32, e Entry, name string, size int64) {
	b := bytes.NewBuffer(make([]byte, -a.size&3, 128+len(name)))
	pad := b.Len()
	fmt.Fprintf(b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00", inode, mode, e.UID, e.GID,
		1, 0, size, 0, 0, e.Major, e.Minor, len(name)+1, 0, name)
	b.Write(make([]byte, -(b.Len()-pad)&3))
	a.append(memory(name, b.Bytes()))
}

func (a *archive) append(f *boot.File) {
	if f.Size > 0 {
		a.size += f.Size
		a.parts = append(a.parts, part{a.size, f})
	}
}

// ReadAt implements io.ReaderAt. Each part is read straight into b.
func (a *archive) ReadAt(b []byte, off int64) (n int, err error) {
	for i := sort.Search(len(a.parts), func(i int) bool { return a.parts[i].end > off }); n < len(b); i++ {
		if i == len(a.parts) {
			return n, io.EOF
		}
		p := a.parts[i]
		at := off + int64(n) - (p.end - p.Size)
		piece := b[n:min(int64(len(b)), int64(n)+p.Size-at)]
		if err := p.ReadFull(piece, at); err != nil {
			return n, err
		}
		n += len(piece)
	}
	return n, nil
}

// Close closes the files.
func (a *archive) Close() (err error) {
	for _, f := range a.files {
		err = errors.Join(err, f.Close())
	}
	return err
}

func memory(name string, b []byte) *boot.File {
	return &boot.File{Name: name, ReaderAt: bytes.NewReader(b), Size: int64(len(b))}
}

// unixMode returns st_mode.
func unixMode(m fs.FileMode) (uint32, bool) {
	mode := uint32(m.Perm())
	for _, bit := range []struct {
		is   fs.FileMode
		unix uint32
	}{{fs.ModeSetuid, unix.S_ISUID}, {fs.ModeSetgid, unix.S_ISGID}, {fs.ModeSticky, unix.S_ISVTX}} {
		if m&bit.is != 0 {
			mode |= bit.unix
		}
	}
	types := map[fs.FileMode]uint32{0: unix.S_IFREG, fs.ModeDir: unix.S_IFDIR, fs.ModeSymlink: unix.S_IFLNK,
		fs.ModeNamedPipe: unix.S_IFIFO, fs.ModeDevice: unix.S_IFBLK, fs.ModeDevice | fs.ModeCharDevice: unix.S_IFCHR}
	kind, ok := types[m.Type()]
	return mode | kind, ok
}
