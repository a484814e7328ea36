package backend

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
	"sync/atomic"

	"golang.org/x/sys/unix"

	"gvm/devices/scsi"
)

// Overlay is storage that reads as its base until it is written: the base, which
// is opened for reading, never changes, and what is written goes to a second
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
	size      int64
	at        [2]int64 // of the bitmaps in top
	data      int64    // of the clusters in top

	// Clusters that the base has become top's under mu, so that parts of one that
	// are written at the same time meet. Bits are set, and never cleared.
	mu   sync.Mutex
	bits []atomic.Uint32

	flushing sync.Mutex
	durable  []uint32 // the second bitmap
}

const (
	overlayMagic   = "GVMOVL1\n"
	overlayCluster = 64 << 10
	overlayHeader  = 4096
)

// ErrBase is the kind of failure of OpenOverlay that says that an overlay does not
// belong to the base as it is.
var ErrBase = errors.New("another base")

// overlayInfo is the header: what it was made for, and the boot of the host that
// its first bitmap is true in.
type overlayInfo struct {
	Size, BaseTime int64 // of the base: bytes, nanoseconds
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

// decodeOverlay reads a header.
func decodeOverlay(b []byte) (i overlayInfo, err error) {
	be := binary.BigEndian
	switch {
	case len(b) != overlayHeader || !bytes.HasPrefix(b, []byte(overlayMagic)):
		return i, errors.New("is not an overlay of gvm's")
	case be.Uint32(b[8:]) != crc32.ChecksumIEEE(b[16:]) || be.Uint32(b[12:]) != overlayCluster:
		return i, errors.New("has a damaged header")
	}
	for n, p := range []*int64{&i.Size, &i.BaseTime} {
		*p = int64(be.Uint64(b[16+8*n:]))
	}
	copy(i.Boot[:], b[32:])
	n := int(be.Uint16(b[68:]))
	if i.Size < 0 || i.Size > 1<<62 || n > overlayHeader-70 {
		return i, errors.New("has a damaged header")
	}
	i.Base = string(b[70 : 70+n])
	return i, nil
}

// OpenOverlay returns an overlay on base, which is open for reading. Path is the
// file of what is written: it is created if it does not exist, and else continued,
// if it belongs to the base as it is. With an empty path it is a file without a
// name in the directory for temporary files, which ends with the process. The
// overlay closes the base; OpenOverlay does not when it fails.
func OpenOverlay(base *File, path string) (_ *Overlay, err error) {
	fi, err := base.f.Stat()
	if err != nil {
		return nil, err
	}
	o := &Overlay{base: base, named: path != "", size: base.Size()}
	want := overlayInfo{Size: o.size, BaseTime: fi.ModTime().UnixNano(), Base: base.Identity()}
	if base.block {
		want.BaseTime = 0 // it is the node's
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, err
	}
	copy(want.Boot[:], boot)
	clusters := (o.size + overlayCluster - 1) / overlayCluster
	words := (clusters + 31) / 32
	o.bits, o.durable = make([]atomic.Uint32, words), make([]uint32, words)
	round := func(n, to int64) int64 { return (n + to - 1) / to * to }
	o.at[0] = overlayHeader
	o.at[1] = o.at[0] + round(4*words, 4096)
	o.data = round(o.at[1]+4*words, overlayCluster)

	if o.top, err = openTop(path, o.data+clusters*overlayCluster, base.noLock); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			o.top.Close()
		}
	}()
	head := make([]byte, overlayHeader)
	if _, err := o.top.ReadAt(head, 0); err != nil {
		return nil, err
	}
	if bytes.Count(head, []byte{0}) == len(head) { // a new one, or one that never began
		return o, o.begin(want)
	}
	have, err := decodeOverlay(head)
	if err != nil {
		return nil, badImage(ErrFormat, path, "%v", err)
	}
	if have.Size != want.Size || have.BaseTime != want.BaseTime {
		return nil, badImage(ErrBase, path, "was made on %s as it was then, of %d bytes; %s has changed since, or is another: remove the overlay to begin anew", have.Base, have.Size, base.path)
	}
	if err := o.load(have.Boot == want.Boot); err != nil {
		return nil, err
	}
	return o, o.begin(want)
}

// openTop opens the file of an overlay with n bytes.
func openTop(path string, n int64, noLock bool) (*File, error) {
	if path == "" {
		fd, err := unix.Open(os.TempDir(), unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return nil, fmt.Errorf("%s: file without a name: %w", os.TempDir(), err)
		}
		f := os.NewFile(uintptr(fd), filepath.Join(os.TempDir(), "overlay"))
		if err := f.Truncate(n); err != nil {
			f.Close()
			return nil, err
		}
		return unnamed(f, n), nil
	}
	if fi, err := os.Stat(path); err == nil && fi.Size() != n {
		f, _, err := openFile(path, Options{ReadOnly: true})
		if err != nil {
			return nil, err
		}
		head := make([]byte, len(overlayMagic))
		_, _ = io.ReadFull(f, head)
		f.Close()
		if string(head) != overlayMagic {
			return nil, badImage(ErrFormat, path, "exists, and is not an overlay of gvm's")
		}
		return nil, badImage(ErrBase, path, "belongs to a base of another size, or was cut short")
	}
	return Open(path, Options{Size: n, Raw: true, NoLock: noLock})
}

// begin writes the header of this boot, when all before it is durable: a header
// with this boot makes the first bitmap count.
func (o *Overlay) begin(i overlayInfo) error {
	if err := o.Flush(); err != nil {
		return err
	}
	if _, err := o.top.WriteAt(o.bitmap(func(n int) uint32 { return o.bits[n].Load() }), o.at[0]); err != nil {
		return err
	}
	if err := o.top.Flush(); err != nil {
		return err
	}
	if _, err := o.top.WriteAt(i.encode(), 0); err != nil {
		return err
	}
	return o.top.Flush()
}

// bitmap returns a bitmap as it lies in the file.
func (o *Overlay) bitmap(word func(int) uint32) []byte {
	b := make([]byte, 0, 4*len(o.bits))
	for i := range o.bits {
		b = binary.LittleEndian.AppendUint32(b, word(i))
	}
	return b
}

// load reads the bitmap that counts: the first one in the boot that wrote it.
func (o *Overlay) load(same bool) error {
	for i, at := range o.at {
		b := make([]byte, 4*len(o.bits))
		if _, err := o.top.ReadAt(b, at); err != nil {
			return err
		}
		for n := range o.bits {
			switch word := binary.LittleEndian.Uint32(b[4*n:]); i {
			case 0:
				if same {
					o.bits[n].Store(word)
				}
			case 1:
				o.durable[n] = word
				o.bits[n].Or(word)
			}
		}
	}
	return nil
}

// has says whether the cluster is top's.
func (o *Overlay) has(cluster int64) bool {
	return o.bits[cluster/32].Load()&(1<<(cluster%32)) != 0
}

// take makes clusters from first to before end top's, whose data is there. The
// caller holds mu.
func (o *Overlay) take(first, end int64) error {
	for c := first; c < end; {
		word, mask := c/32, uint32(0)
		for ; c < end && c/32 == word; c++ {
			mask |= 1 << (c % 32)
		}
		var b [4]byte
		binary.LittleEndian.PutUint32(b[:], o.bits[word].Load()|mask)
		if _, err := o.top.WriteAt(b[:], o.at[0]+4*word); err != nil {
			return err
		}
		o.bits[word].Or(mask)
	}
	return nil
}

// run returns the end of the range from off on, at most end, of which all clusters
// are top's or none is.
func (o *Overlay) run(off, end int64) (top bool, to int64) {
	c := off / overlayCluster
	top = o.has(c)
	for c++; c*overlayCluster < end && o.has(c) == top; c++ {
	}
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

// Identity is that of the file with a name, so that a unit keeps its serial number
// from run to run.
func (o *Overlay) Identity() string {
	if o.named {
		return o.top.Identity()
	}
	return o.base.Identity()
}

// Close closes both files. It does not flush.
func (o *Overlay) Close() error { return errors.Join(o.top.Close(), o.base.Close()) }

// ReadAt implements io.ReaderAt.
func (o *Overlay) ReadAt(p []byte, off int64) (int, error) { return o.ReadVec([][]byte{p}, off) }

// WriteAt implements io.WriterAt.
func (o *Overlay) WriteAt(p []byte, off int64) (int, error) { return o.WriteVec([][]byte{p}, off) }

// ReadVec reads each run of clusters from the file that has it.
func (o *Overlay) ReadVec(iov [][]byte, off int64) (int, error) {
	total := length(iov)
	if err := o.check(off, total); err != nil {
		return 0, err
	}
	done := int64(0)
	for done < total {
		top, to := o.run(off+done, off+total)
		part := cut(iov, done, to-off-done)
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

// ReadVecNow implements scsi.Prompt.
func (o *Overlay) ReadVecNow(iov [][]byte, off int64) bool {
	f, off := o.only(iov, off)
	return f != nil && f.ReadVecNow(iov, off)
}

// WriteVecNow implements scsi.Prompt. What the base has would have to be copied first.
func (o *Overlay) WriteVecNow(iov [][]byte, off int64) bool {
	f, off := o.only(iov, off)
	return f == o.top && f.WriteVecNow(iov, off)
}

// only returns the file that has the whole range, nil if parts of it are in either,
// and where.
func (o *Overlay) only(iov [][]byte, off int64) (*File, int64) {
	total := length(iov)
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

// WriteVec writes to top, and takes there what was the base's.
func (o *Overlay) WriteVec(iov [][]byte, off int64) (int, error) {
	return o.write(iov, off, o.top.WriteVec)
}

func (o *Overlay) write(iov [][]byte, off int64, do func([][]byte, int64) (int, error)) (int, error) {
	total := length(iov)
	if err := o.check(off, total); err != nil {
		return 0, err
	}
	done := int64(0)
	for done < total {
		top, to := o.run(off+done, off+total)
		part := cut(iov, done, to-off-done)
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
		if edge[0] == edge[1] || o.has(edge[0]/overlayCluster) {
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
func (o *Overlay) Flush() error {
	o.flushing.Lock()
	defer o.flushing.Unlock()
	now, changed := make([]uint32, len(o.bits)), false
	for i := range now {
		now[i] = o.bits[i].Load()
		changed = changed || now[i] != o.durable[i]
	}
	if err := o.top.Flush(); err != nil || !changed {
		return err
	}
	if _, err := o.top.WriteAt(o.bitmap(func(n int) uint32 { return now[n] }), o.at[1]); err != nil {
		return err
	}
	if err := o.top.Flush(); err != nil {
		return err
	}
	o.durable = now
	return nil
}

// DiscardGranularity is the size of a cluster: of one that is the base's, a part is
// written.
func (o *Overlay) DiscardGranularity() int64 {
	if o.top.DiscardGranularity() == 0 {
		return 0
	}
	return overlayCluster
}

// Discard makes holes in top, which hide the base.
func (o *Overlay) Discard(off, n int64) error { return o.clear(off, n, o.top.Discard) }

// Zero writes zeroes to top.
func (o *Overlay) Zero(off, n int64) error { return o.clear(off, n, o.top.Zero) }

// clear makes a range read as zeroes: of whole clusters by do, of parts by a write.
func (o *Overlay) clear(off, n int64, do func(off, n int64) error) error {
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
		case o.has(edge[0] / overlayCluster):
			err = do(o.data+edge[0], edge[1]-edge[0])
		default:
			_, err = o.WriteAt(make([]byte, edge[1]-edge[0]), edge[0])
		}
		if err != nil {
			return err
		}
	}
	if first == last {
		return nil
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if err := do(o.data+first, last-first); err != nil {
		return err
	}
	return o.take(first/overlayCluster, (last+overlayCluster-1)/overlayCluster)
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
	scsi.Backend
	scsi.Vectored
	scsi.Syncer
	scsi.Discarder
	scsi.Zeroer
	scsi.Mapper
	scsi.Identified
} = (*Overlay)(nil)

// length returns how many bytes iov holds.
func length(iov [][]byte) (n int64) {
	for _, p := range iov {
		n += int64(len(p))
	}
	return n
}

// cut returns n bytes of iov from byte skip on.
func cut(iov [][]byte, skip, n int64) [][]byte {
	var out [][]byte
	for _, p := range iov {
		if skip >= int64(len(p)) {
			skip -= int64(len(p))
			continue
		}
		p, skip = p[skip:], 0
		p = p[:min(int64(len(p)), n)]
		if n -= int64(len(p)); len(p) > 0 {
			out = append(out, p)
		}
	}
	return out
}
