package block

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"gvm/devices/iovec"
	"gvm/kvmapi/nowait"
)

// Overlay is storage that reads as its base until it is written: the base, which
// is opened for reading, never changes, and writes go to a second
// file. Many may stand on one base at the same time.
//
// The file has a header, two bitmaps with a bit for each cluster, and the
// clusters at the place that they have in the base, so that holes are the only
// map. A set bit says that the cluster is the file's. The first bitmap is
// written before a write returns, and is true as long as the host's page cache
// lives, even if this process is killed. The second one is written when a flush
// has made the data durable, and is what counts after the host has gone down:
// by then clusters may be lost that the first one has.
type Overlay struct {
	base, top *File
	named     bool // top has a name, and stays
	begun     bool // top was blank
	size      int64
	clusters  int64
	at        [2]int64 // of the bitmaps in top
	words     int64    // of 4 bytes, in each
	data      int64    // of the clusters in top

	// Clusters that the base has become top's under mu, so that parts of one that
	// are written at the same time meet.
	mu  sync.Mutex
	own *clusterSet

	flushing sync.Mutex
}

const (
	overlayMagic   = "GVMOVL1\n"
	overlayCluster = 64 << 10
	overlayHeader  = 4096
)

// ErrBase is the kind of failure of OpenOverlay that says that an overlay does not
// belong to the base as it is.
var ErrBase = errors.New("another base")

// overlayInfo is the header: the base it was made for, and the boot of the host that
// its first bitmap is true in.
type overlayInfo struct {
	Size, BaseTime int64 // of the base: bytes, and when it changed in nanoseconds, 0 if not known
	Boot           [36]byte
	Base           string // absolute path, for people
}

func (i *overlayInfo) encode() []byte {
	b := append([]byte(overlayMagic), make([]byte, 8)...)
	be := binary.BigEndian
	for _, n := range []int64{i.Size, i.BaseTime} {
		b = be.AppendUint64(b, uint64(n))
	}
	b = append(b, i.Boot[:]...)
	name := i.Base[:min(len(i.Base), overlayHeader-len(b)-2)]
	b = be.AppendUint16(b, uint16(len(name)))
	b = append(b, name...)
	b = append(b, make([]byte, overlayHeader-len(b))...)
	be.PutUint32(b[8:], crc32.ChecksumIEEE(b[16:]))
	be.PutUint32(b[12:], overlayCluster)
	return b
}

var errDamaged = errors.New("has a damaged header: take a copy of it from before, or remove the overlay to begin anew")

// decodeOverlay reads a header.
func decodeOverlay(b []byte) (i overlayInfo, err error) {
	be := binary.BigEndian
	switch {
	case len(b) != overlayHeader || !bytes.HasPrefix(b, []byte(overlayMagic)):
		return i, errors.New("is not an overlay of gvm's: name another file")
	case be.Uint32(b[8:]) != crc32.ChecksumIEEE(b[16:]) || be.Uint32(b[12:]) != overlayCluster:
		return i, errDamaged
	}
	for n, p := range []*int64{&i.Size, &i.BaseTime} {
		*p = int64(be.Uint64(b[16+8*n:]))
	}
	copy(i.Boot[:], b[32:])
	n := int(be.Uint16(b[68:]))
	if i.Size < 0 || i.Size > 1<<62 || n > overlayHeader-70 {
		return i, errDamaged
	}
	i.Base = string(b[70 : 70+n])
	return i, nil
}

// OpenOverlay returns an overlay on base, which is open for reading. Path is the
// file of the writes: it is created if it does not exist, and else continued,
// if it belongs to the base as it is. With an empty path it is a file without a
// name in the directory for temporary files, which ends with the process. The
// overlay closes the base; OpenOverlay does not when it fails.
func OpenOverlay(base *File, path string) (_ *Overlay, err error) {
	fi, err := base.f.Stat()
	if err != nil {
		return nil, err
	}
	o := &Overlay{base: base, named: path != "", size: base.Size()}
	if o.size > 1<<62 {
		return nil, badImage(ErrSize, base.path, "has %d bytes, more than an overlay can stand on", o.size)
	}
	want := overlayInfo{Size: o.size, BaseTime: fi.ModTime().UnixNano(), Base: base.Identity()}
	if base.block { // the time is the node's
		want.BaseTime = base.deviceTime()
	}
	o.clusters = (o.size + overlayCluster - 1) / overlayCluster
	o.words = (o.clusters + 31) / 32
	o.own = newClusterSet(o.clusters)
	round := func(n, to int64) int64 { return (n + to - 1) / to * to }
	o.at[0] = overlayHeader
	o.at[1] = o.at[0] + round(4*o.words, 4096)
	o.data = round(o.at[1]+4*o.words, overlayCluster)

	if o.top, err = openTop(path, o.data+o.clusters*overlayCluster, base); err != nil {
		return nil, err
	}
	copy(want.Boot[:], o.top.boot) // one without a name ends before the boot does
	defer func() {
		if err != nil {
			if !o.named {
				err = nowait.TempError("file", err)
			}
			o.Undo()
			o.top.Close()
		}
	}()
	head := make([]byte, overlayHeader)
	if _, err := o.top.ReadAt(head, 0); err != nil {
		return nil, err
	}
	if bytes.Count(head, []byte{0}) == len(head) && o.top.isBlank() { // new, or its maker crashed
		o.begun = true
		if o.named && o.top.found > 0 { // else Open has done that
			if err := o.top.Files().Sync(o.top.f, o.top.Identity()); err != nil {
				return nil, fmt.Errorf("%s: %w", path, err)
			}
		}
		return o, o.begin(want, false)
	}
	have, err := decodeOverlay(head)
	if err != nil {
		return nil, badImage(ErrFormat, path, "%v", err)
	}
	unsure := base.block && have.BaseTime == 0
	if have.Size != want.Size || have.BaseTime != want.BaseTime && !unsure {
		return nil, badImage(ErrBase, path, "was made on %s as it was then, of %d bytes; %s has changed since, or is "+
			"another: remove the overlay to begin anew", have.Base, have.Size, base.path)
	}
	if unsure && base.note != nil {
		base.note(fmt.Sprintf("%s: was made on %s, and Linux does not tell whether %s has changed since: if it has,"+
			" remove the overlay to begin anew", path, have.Base, base.path))
	}
	same := have.Boot == want.Boot
	if err := o.load(same); err != nil {
		return nil, err
	}
	return o, o.begin(want, same)
}

// openTemporary returns a sparse file of n bytes without a name in the directory for temporary
// files: it is gone with this process, however that ends. The name is for messages.
func openTemporary(name string, n int64, files Files) (*File, error) {
	f, err := filesOr(files).Temporary()
	if err != nil {
		return nil, err
	}
	if err := f.Truncate(n); err != nil {
		f.Close()
		return nil, nowait.TempError("file", err)
	}
	b := unnamed(f, n)
	b.path = filepath.Join(os.TempDir(), name)
	return b, nil
}

// openTop opens the file of an overlay on base with n bytes.
func openTop(path string, n int64, base *File) (*File, error) {
	if path == "" {
		return openTemporary("overlay", n, base.files)
	}
	return Open(path, Options{Size: n, Overlay: true, NoLock: base.noLock, Files: base.files})
}

// checkTop refuses a file that is no overlay of n bytes.
func checkTop(path string, n int64) error {
	fi, err := os.Stat(path)
	if err != nil || fi.Size() == n || fi.Size() == 0 {
		return nil
	}
	f, _, err := openFile(path, Options{ReadOnly: true})
	if err != nil {
		return err
	}
	defer f.Close()
	head := make([]byte, len(overlayMagic))
	_, _ = io.ReadFull(f, head)
	if string(head) != overlayMagic {
		return badImage(ErrFormat, path, "exists, and is not an overlay of gvm's: name another file")
	}
	return badImage(ErrBase, path,
		"belongs to a base of another size, or was cut short: give that base, or remove the overlay to begin anew")
}

// isBlank reports whether the file is nothing but a hole, as one is that gvm has just made.
func (b *File) isBlank() bool {
	_, err := unix.Seek(b.fd, 0, unix.SEEK_DATA)
	return b.found == 0 || errors.Is(err, unix.ENXIO)
}

// begin writes the header of this boot, when all before it is durable: a header
// with this boot makes the first bitmap count. In the same boot it is as it should be.
func (o *Overlay) begin(i overlayInfo, same bool) error {
	if err := o.Flush(); err != nil {
		return err
	}
	if !same {
		if err := o.restore(); err != nil {
			return err
		}
	}
	if _, err := o.top.WriteAt(i.encode(), 0); err != nil {
		return err
	}
	return o.top.Flush()
}

// restore copies the second bitmap over the first.
func (o *Overlay) restore() error {
	err := o.extents(o.at[0], func(off, n int64) error {
		err := o.top.Discard(off, n)
		if errors.Is(err, errors.ErrUnsupported) {
			_, err = o.top.WriteAt(make([]byte, n), off)
		}
		return err
	})
	if err == nil {
		err = o.own.leaves(o.clusters, func(word int64, leaf *clusterLeaf) error {
			return o.put(0, word, leaf.bytes())
		})
	}
	if err != nil {
		return err
	}
	return o.top.Flush()
}

// put writes a part of a bitmap, from a word on.
func (o *Overlay) put(bitmap int, word int64, b []byte) error {
	b = b[:min(int64(len(b)), 4*(o.words-word))]
	_, err := o.top.WriteAt(b, o.at[bitmap]+4*word)
	return err
}

// extents calls do for the parts of a bitmap that are not holes, whole words of 64 KiB at most.
func (o *Overlay) extents(at int64, do func(off, n int64) error) error {
	for off, end := at, at+4*o.words; off < end; {
		mapped, n, err := o.top.Mapped(off, end-off)
		if err != nil {
			return err
		}
		if n &^= 3; n == 0 {
			mapped, n = true, 4
		}
		if mapped {
			n = min(n, 64<<10)
			if err := do(off, n); err != nil {
				return err
			}
		}
		off += n
	}
	return nil
}

// load reads the bitmap that counts: the first one in the boot that wrote it.
func (o *Overlay) load(same bool) error {
	for i, at := range o.at {
		if i == 0 && !same {
			continue
		}
		err := o.extents(at, func(off, n int64) error {
			b := make([]byte, n)
			if _, err := o.top.ReadAt(b, off); err != nil {
				return err
			}
			for ; len(b) > 0; b, off = b[4:], off+4 {
				word := binary.LittleEndian.Uint32(b)
				if word == 0 {
					continue
				}
				n := (off - at) / 4
				leaf := o.own.make(32 * n)
				leaf.words[n%leafWords].Or(word)
				if i == 0 {
					leaf.dirty.Store(true) // for all that is known here
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// take makes clusters from first to before end top's, whose data is there. The
// caller holds mu.
func (o *Overlay) take(first, end int64) error {
	for c := first; c < end; {
		leaf := o.own.make(c)
		begin, b := c/32, []byte(nil)
		var masks [leafWords]uint32
		for ; c < end && c/32/leafWords == begin/leafWords; c++ {
			masks[c/32%leafWords] |= 1 << (c % 32)
		}
		for word := begin; word <= (c-1)/32; word++ {
			b = binary.LittleEndian.AppendUint32(b, leaf.words[word%leafWords].Load()|masks[word%leafWords])
		}
		if err := o.put(0, begin, b); err != nil {
			return err
		}
		for i, mask := range masks {
			if mask != 0 {
				leaf.words[i].Or(mask)
			}
		}
		leaf.dirty.Store(true)
	}
	return nil
}

// run returns the end of the range from off on, at most end, of which all clusters
// are top's or none is.
func (o *Overlay) run(off, end int64) (top bool, to int64) {
	top, c := o.own.same(off/overlayCluster, (end+overlayCluster-1)/overlayCluster)
	return top, min(c*overlayCluster, end)
}

// check refuses ranges that are not inside.
func (o *Overlay) check(off, n int64) error {
	if off < 0 || n < 0 || off > o.size || n > o.size-off {
		return fmt.Errorf("overlay on %s: %d bytes at %d: past the end at %d", o.base.path, n, off, o.size)
	}
	return nil
}

// Size returns the size of the base.
func (o *Overlay) Size() int64 { return o.size }

// Base returns the image that the overlay stands on.
func (o *Overlay) Base() *File { return o.base }

// Identity is that of the file with a name, so that a disk keeps its serial number
// from run to run.
func (o *Overlay) Identity() string {
	if o.named {
		return o.top.Identity()
	}
	return o.base.Identity()
}

// Undo removes a file that OpenOverlay made, and empties one that was blank, for a guest that never
// had it.
func (o *Overlay) Undo() {
	switch {
	case o.top.made:
		_ = o.top.Files().Discard(o.top.f, o.top.path)
	case o.begun:
		_ = errors.Join(o.top.f.Truncate(0), o.top.f.Truncate(o.top.found))
	}
}

// Close closes both files. It does not flush.
func (o *Overlay) Close() error { return errors.Join(o.top.Close(), o.base.Close()) }

// ReadAt implements io.ReaderAt.
func (o *Overlay) ReadAt(p []byte, off int64) (int, error) { return o.ReadVec([][]byte{p}, off) }

// WriteAt implements io.WriterAt.
func (o *Overlay) WriteAt(p []byte, off int64) (int, error) { return o.WriteVec([][]byte{p}, off) }

// ReadVec reads each run of clusters from the file that has it.
func (o *Overlay) ReadVec(iov [][]byte, off int64) (int, error) {
	total := int64(iovec.Len(iov))
	if err := o.check(off, total); err != nil {
		return 0, err
	}
	done := int64(0)
	for done < total {
		top, to := o.run(off+done, off+total)
		part := iovec.Cut(nil, iov, int(done), int(to-off-done))
		var n int
		var err error
		if top {
			n, err = o.top.ReadVec(part, o.data+off+done)
		} else {
			n, err = o.base.ReadVec(part, off+done)
		}
		if done += int64(n); err != nil {
			return int(done), err
		}
	}
	return int(done), nil
}

// ReadVecNow implements Prompt.
func (o *Overlay) ReadVecNow(iov [][]byte, off int64) bool {
	f, off := o.only(iov, off)
	return f != nil && f.ReadVecNow(iov, off)
}

// WriteVecNow implements Prompt. Data of the base would have to be copied first.
func (o *Overlay) WriteVecNow(iov [][]byte, off int64) bool {
	f, off := o.only(iov, off)
	return f == o.top && f.WriteVecNow(iov, off)
}

// only returns the file that has the whole range, nil if parts of it are in either,
// and where.
func (o *Overlay) only(iov [][]byte, off int64) (*File, int64) {
	total := int64(iovec.Len(iov))
	if total == 0 || o.check(off, total) != nil {
		return nil, 0
	}
	switch top, to := o.run(off, off+total); {
	case to < off+total:
		return nil, 0
	case top:
		return o.top, o.data + off
	}
	return o.base, off
}

// WriteVec writes to top, and copies the rest of its clusters from the base.
func (o *Overlay) WriteVec(iov [][]byte, off int64) (int, error) {
	return o.write(iov, off, o.top.WriteVec)
}

func (o *Overlay) write(iov [][]byte, off int64, do func([][]byte, int64) (int, error)) (int, error) {
	total := int64(iovec.Len(iov))
	if err := o.check(off, total); err != nil {
		return 0, err
	}
	done := int64(0)
	for done < total {
		top, to := o.run(off+done, off+total)
		part := iovec.Cut(nil, iov, int(done), int(to-off-done))
		var n int
		var err error
		if top {
			n, err = do(part, o.data+off+done)
		} else {
			n, err = o.first(part, off+done, to-off-done, do)
		}
		if done += int64(n); err != nil {
			return int(done), err
		}
	}
	return int(done), nil
}

// first writes n bytes to clusters that were the base's a moment ago: the parts of
// the first and the last one around them are copied from there.
func (o *Overlay) first(iov [][]byte, off, n int64, do func([][]byte, int64) (int, error)) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	begin, end := off/overlayCluster*overlayCluster, min((off+n+overlayCluster-1)/overlayCluster*overlayCluster, o.size)
	for _, edge := range [][2]int64{{begin, off}, {off + n, end}} {
		if edge[0] == edge[1] || o.own.has(edge[0]/overlayCluster) {
			continue
		}
		b := make([]byte, edge[1]-edge[0])
		if _, err := o.base.ReadAt(b, edge[0]); err != nil {
			return 0, err
		}
		if _, err := o.top.WriteAt(b, o.data+edge[0]); err != nil {
			return 0, err
		}
	}
	if _, err := do(iov, o.data+off); err != nil {
		return 0, err // the clusters stay the base's
	}
	return int(n), o.take(begin/overlayCluster, (end+overlayCluster-1)/overlayCluster)
}

// WriteVecDurable writes iov and flushes: the bitmap has to be durable too.
func (o *Overlay) WriteVecDurable(iov [][]byte, off int64) (int, error) {
	n, err := o.WriteVec(iov, off)
	if err == nil {
		err = o.Flush()
	}
	return n, err
}

// Flush makes the data durable, and then the bitmap that says so.
func (o *Overlay) Flush() (err error) {
	o.flushing.Lock()
	defer o.flushing.Unlock()
	// The bitmap as it is before the data is flushed, in pieces that follow one another.
	type piece struct {
		word int64
		b    []byte
	}
	var pieces []piece
	var leaves []*clusterLeaf
	_ = o.own.leaves(o.clusters, func(word int64, leaf *clusterLeaf) error {
		if !leaf.dirty.Swap(false) {
			return nil
		}
		leaves = append(leaves, leaf)
		if last := len(pieces) - 1; last >= 0 && pieces[last].word+int64(len(pieces[last].b)/4) == word {
			pieces[last].b = append(pieces[last].b, leaf.bytes()...)
		} else {
			pieces = append(pieces, piece{word, leaf.bytes()})
		}
		return nil
	})
	defer func() {
		if err != nil {
			for _, leaf := range leaves {
				leaf.dirty.Store(true)
			}
		}
	}()
	if err := o.top.Flush(); err != nil || len(pieces) == 0 {
		return err
	}
	for _, p := range pieces {
		if err := o.put(1, p.word, p.b); err != nil {
			return err
		}
	}
	return o.top.Flush()
}

// DiscardGranularity is the size of a cluster: of one that is the base's, a part is
// written.
func (o *Overlay) DiscardGranularity() int64 {
	if o.top.DiscardGranularity() == 0 {
		return 0
	}
	return overlayCluster
}

// Discard makes holes in top, which hide the base. Holes of the base stay its.
func (o *Overlay) Discard(off, n int64) error { return o.clear(off, n, o.top.Discard, true) }

// Zero writes zeroes to top.
func (o *Overlay) Zero(off, n int64) error { return o.clear(off, n, o.top.Zero, false) }

// clear makes a range read as zeroes: of whole clusters by do, of parts by a write. With
// holes, clusters of the base that read as zeroes are left alone.
func (o *Overlay) clear(off, n int64, do func(off, n int64) error, holes bool) error {
	if err := o.check(off, n); err != nil {
		return err
	}
	end := off + n
	first, last := min((off+overlayCluster-1)/overlayCluster*overlayCluster, end), end
	if end != o.size {
		last = max(end/overlayCluster*overlayCluster, first)
	}
	for _, edge := range [][2]int64{{off, first}, {last, end}} {
		var err error
		switch {
		case edge[0] == edge[1]:
		case o.own.has(edge[0] / overlayCluster):
			err = do(o.data+edge[0], edge[1]-edge[0])
		case holes && o.hole(edge[0], edge[1]-edge[0]) == edge[1]-edge[0]:
		default:
			_, err = o.WriteAt(make([]byte, edge[1]-edge[0]), edge[0])
		}
		if err != nil {
			return err
		}
	}
	for off := first; off < last; {
		top, to := o.run(off, last)
		if holes && !top {
			switch n := o.hole(off, to-off); {
			case n == to-off:
				off = to
				continue
			case n >= overlayCluster:
				off += n / overlayCluster * overlayCluster
				continue
			}
			to = o.dataEnd(off, to)
		}
		if err := o.clearClusters(off, to, do); err != nil {
			return err
		}
		off = to
	}
	return nil
}

// hole returns how many bytes of a range of the base, from its start on, are a hole.
func (o *Overlay) hole(off, n int64) int64 {
	mapped, n, err := o.base.Mapped(off, n)
	if mapped || err != nil {
		return 0
	}
	return n
}

// dataEnd returns the end of the cluster, and at most end, in which the data of the base
// ends that the cluster at off has.
func (o *Overlay) dataEnd(off, end int64) int64 {
	switch mapped, n, err := o.base.Mapped(off, end-off); {
	case err != nil:
		return end
	case !mapped: // a hole that is smaller than the cluster
		return min(off+overlayCluster, end)
	default:
		return min((off+n+overlayCluster-1)/overlayCluster*overlayCluster, end)
	}
}

// clearClusters clears whole clusters, which are top's from then on.
func (o *Overlay) clearClusters(off, end int64, do func(off, n int64) error) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if err := do(o.data+off, end-off); err != nil {
		return err
	}
	return o.take(off/overlayCluster, (end+overlayCluster-1)/overlayCluster)
}

// Mapped asks the file that has the cluster.
func (o *Overlay) Mapped(off, n int64) (mapped bool, size int64, err error) {
	if err := o.check(off, n); err != nil {
		return false, 0, err
	}
	top, to := o.run(off, off+n)
	if top {
		return o.top.Mapped(o.data+off, to-off)
	}
	return o.base.Mapped(off, to-off)
}

var _ interface {
	Backend
	Vectored
	Syncer
	Discarder
	Zeroer
	Mapper
	Identified
} = (*Overlay)(nil)
