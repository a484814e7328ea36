package block_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"gvm/devices/block"
	"gvm/devices/block/blocktest"
)

const cluster = 64 << 10

// overlay opens an overlay on the image at base, and closes it at the end of the
// test if nothing else has.
func overlay(t *testing.T, base, path string) *block.Overlay {
	t.Helper()
	f, err := block.Open(base, block.Options{ReadOnly: true, Raw: true})
	if err != nil {
		t.Fatal(err)
	}
	o, err := block.OpenOverlay(f, path)
	if err != nil {
		f.Close()
		t.Fatal(err)
	}
	t.Cleanup(func() { o.Close() })
	return o
}

// golden makes a base that ends inside a cluster, and returns its contents.
func golden(t *testing.T) (path string, data []byte) {
	t.Helper()
	data = make([]byte, 40*cluster+4096)
	rand.NewChaCha8([32]byte{1}).Read(data)
	path = filepath.Join(t.TempDir(), "golden.img")
	if err := os.WriteFile(path, data, 0o444); err != nil {
		t.Fatal(err)
	}
	return path, data
}

func wantData(t *testing.T, what string, b block.Backend, want []byte) {
	t.Helper()
	got := make([]byte, len(want))
	if n, err := b.ReadAt(got, 0); err != nil || n != len(got) {
		t.Fatalf("%s: read %d bytes, %v", what, n, err)
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("%s: differs at %#x", what, i)
		}
	}
}

func TestOverlay(t *testing.T) {
	for _, path := range []string{"", "overlay"} {
		t.Run("suite "+path, func(t *testing.T) {
			blocktest.TestBackend(t, func() block.Backend {
				at := path
				if at != "" {
					at = filepath.Join(t.TempDir(), path)
				}
				return overlay(t, image(t, "base", "", 2*mib), at)
			})
		})
	}
}

// TestOverlayModel compares random operations with a copy in memory, and the copy with what
// an overlay says that is opened again. The base does not change, and does not
// mind another overlay.
func TestOverlayModel(t *testing.T) {
	base, model := golden(t)
	original := bytes.Clone(model)
	path := filepath.Join(t.TempDir(), "overlay")
	o := overlay(t, base, path)
	r := rand.New(rand.NewPCG(3, 4))
	for i := range 2000 {
		off := r.Int64N(int64(len(model))/512) * 512
		n := min(512*(1+r.Int64N(1<<r.IntN(10))), int64(len(model))-off)
		p := model[off : off+n]
		var err error
		switch r.IntN(8) {
		case 0:
			clear(p)
			err = o.Discard(off, n)
		case 1:
			clear(p)
			err = o.Zero(off, n)
		case 2, 3, 4:
			for i := range p {
				p[i] = byte(r.Uint32())
			}
			_, err = o.WriteVec([][]byte{p[:100], p[100:]}, off)
		case 5:
			_, err = o.WriteVecDurable([][]byte{p}, off)
		default:
			got := make([]byte, n)
			if _, err = o.ReadAt(got, off); err == nil && !bytes.Equal(got, p) {
				t.Fatalf("operation %d: %d bytes at %d are wrong", i, n, off)
			}
		}
		if err != nil {
			t.Fatalf("operation %d, %d bytes at %d: %v", i, n, off, err)
		}
		if i%400 == 399 {
			if err := o.Close(); err != nil { // without a flush, as after SIGKILL
				t.Fatal(err)
			}
			o = overlay(t, base, path)
			wantData(t, "opened again", o, model)
		}
	}
	wantData(t, "another overlay", overlay(t, base, ""), original)
	if now, err := os.ReadFile(base); err != nil || !bytes.Equal(now, original) {
		t.Error("the base has changed")
	}
	if err := o.Discard(cluster/2, 512); err != nil {
		t.Fatal(err)
	}
	for _, off := range []int64{-512, int64(len(model)), 1 << 62} {
		if _, err := o.WriteAt(make([]byte, 512), off); err == nil {
			t.Errorf("a write at %d", off)
		}
		if _, err := o.ReadAt(make([]byte, 512), off); err == nil {
			t.Errorf("a read at %d", off)
		}
		if err := o.Discard(off, 512); err == nil {
			t.Errorf("a discard at %d", off)
		}
		if _, _, err := o.Mapped(off, 512); err == nil {
			t.Errorf("Mapped at %d", off)
		}
	}
}

// TestOverlayTogether has many write to parts of the same clusters at once.
func TestOverlayTogether(t *testing.T) {
	base, want := golden(t)
	o := overlay(t, base, "")
	var all sync.WaitGroup
	for i := range 8 {
		for c := range 40 {
			copy(want[c*cluster+i*8192+512:], bytes.Repeat([]byte{byte(i + 1)}, 4096))
		}
		all.Go(func() {
			for c := range int64(40) {
				if _, err := o.WriteAt(bytes.Repeat([]byte{byte(i + 1)}, 4096), c*cluster+int64(i)*8192+512); err != nil {
					t.Error(err)
				}
				if _, err := o.ReadAt(make([]byte, 2*cluster), max(c-1, 0)*cluster); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	wantData(t, "all together", o, want)
}

// TestOverlayPowerCut: data not flushed may be lost with its bitmap, or without, or
// the other way round, and shows only the data of the flush.
func TestOverlayPowerCut(t *testing.T) {
	base, want := golden(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "overlay")
	o := overlay(t, base, path)
	write := func(c int64, b byte, n int) {
		t.Helper()
		if _, err := o.WriteAt(bytes.Repeat([]byte{b}, n), c*cluster+512); err != nil {
			t.Fatal(err)
		}
	}
	write(1, 1, 4096)
	write(2, 2, 2*cluster)
	if err := o.Discard(10*cluster, cluster); err != nil {
		t.Fatal(err)
	}
	if err := o.Flush(); err != nil {
		t.Fatal(err)
	}
	copy(want[cluster+512:], bytes.Repeat([]byte{1}, 4096))
	copy(want[2*cluster+512:], bytes.Repeat([]byte{2}, 2*cluster))
	clear(want[10*cluster : 11*cluster])
	flushed, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	write(20, 3, 4096)
	write(21, 4, cluster)
	if err := o.Discard(30*cluster, 2*cluster); err != nil {
		t.Fatal(err)
	}
	o.Close()
	latest, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	const bitmap, data = 4096, cluster
	for name, parts := range map[string][3][]byte{ // header and first bitmap; second bitmap; data
		"all of it lost":  {flushed, flushed, flushed},
		"the data lost":   {latest, flushed, flushed},
		"the bitmap lost": {flushed, flushed, latest},
	} {
		t.Run(name, func(t *testing.T) {
			file := bytes.Clone(parts[0][:2*bitmap])
			file = append(file, parts[1][2*bitmap:data]...)
			file = append(file, parts[2][data:]...)
			copy(file[32:68], "00000000-0000-0000-0000-000000000000") // another boot
			seal(file)
			path := filepath.Join(t.TempDir(), "overlay")
			if err := os.WriteFile(path, file, 0o600); err != nil {
				t.Fatal(err)
			}
			wantData(t, "after the power cut", overlay(t, base, path), want)
		})
	}
}

// seal puts a new checksum into an overlay's header.
func seal(file []byte) {
	binary.BigEndian.PutUint32(file[8:], crc32.ChecksumIEEE(file[16:4096]))
}

// TestOverlayRefuses opens files that are no overlay, or another base's.
func TestOverlayRefuses(t *testing.T) {
	base, _ := golden(t)
	path := filepath.Join(t.TempDir(), "overlay")
	if err := overlay(t, base, path).Close(); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	change := func(at int, b byte, sealed bool) []byte {
		f := bytes.Clone(good)
		f[at] ^= b
		if sealed {
			seal(f)
		}
		return f
	}
	for _, v := range []struct {
		name string
		file []byte
		kind error
		text string
	}{
		{"a disk", make([]byte, mib), block.ErrFormat, "not an overlay of gvm's"},
		{"of that size, blank at first", append(make([]byte, len(good)-1), 1), block.ErrFormat,
			"not an overlay of gvm's: name another file"},
		{"of that size, zeroes", make([]byte, len(good)), block.ErrFormat, "not an overlay of gvm's: name another file"},
		{"of that size", append([]byte("QFI"), good[3:]...), block.ErrFormat, "not an overlay of gvm's"},
		{"cut short", good[:len(good)-4096], block.ErrBase, "another size"},
		{"checksum", change(40, 1, false), block.ErrFormat, "damaged header"},
		{"cluster size", change(14, 1, true), block.ErrFormat, "damaged header"},
		{"length of the name", change(68, 0xff, true), block.ErrFormat, "damaged header"},
		{"size", change(20, 1, true), block.ErrBase, "has changed since"},
		{"time", change(30, 1, true), block.ErrBase, "golden.img has changed since"},
	} {
		if err := os.WriteFile(path, v.file, 0o600); err != nil {
			t.Fatal(err)
		}
		f := open(t, base, block.Options{ReadOnly: true, Raw: true})
		o, err := block.OpenOverlay(f, path)
		if err == nil {
			o.Close()
			t.Errorf("%s: opened", v.name)
			continue
		}
		if !errors.Is(err, v.kind) || !strings.Contains(err.Error(), v.text) || !strings.HasPrefix(err.Error(), path+": ") {
			t.Errorf("%s: %v; want %v with %q", v.name, err, v.kind, v.text)
		}
		if now, _ := os.ReadFile(path); !bytes.Equal(now, v.file) {
			t.Errorf("%s: the file was changed", v.name)
		}
	}
	// A crash leaves this between the making of the file and its header.
	for _, size := range []int{0, len(good)} {
		if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, int64(size))); err != nil {
			t.Fatal(err)
		}
		o := overlay(t, base, path)
		o.Undo()
		if fi, err := os.Stat(path); err != nil || fi.Size() != int64(size) {
			t.Errorf("a file of %d bytes that was taken and given back: %v, %v", size, fi, err)
		}
		o.Close()
		overlay(t, base, path).Close()
		overlay(t, base, path).Close()
	}
	os.Remove(path)
	o := overlay(t, base, path)
	_, err = block.OpenOverlay(open(t, base, block.Options{ReadOnly: true, Raw: true}), path)
	if !errors.Is(err, block.ErrLocked) {
		t.Errorf("opened twice: %v", err)
	}
	if got := o.Identity(); got != path {
		t.Errorf("identity %q, want %q", got, path)
	}
	if got := overlay(t, base, "").Identity(); got != base {
		t.Errorf("identity %q, want %q", got, base)
	}
}

// TestOverlayOfHoles is on a base of 1 EiB, all of it holes: what an overlay takes of memory
// and storage is what was written.
func TestOverlayOfHoles(t *testing.T) {
	dir, err := os.MkdirTemp("/dev/shm", "gvm-test-") // tmpfs has files of that size
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	const size = 1 << 60
	base, path := filepath.Join(dir, "base"), filepath.Join(dir, "overlay")
	if err := block.Create(base, size, false); err != nil {
		t.Skip(err)
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	o := overlay(t, base, path)
	at := []int64{0, 5 * cluster, 3<<30 + 512, 1<<45 + cluster - 512, size/2 - 512, size - 1024}
	check := func(o *block.Overlay, what string) {
		t.Helper()
		for i, off := range at {
			want := make([]byte, 4*cluster)
			from := max(0, min(off-cluster, size-int64(len(want))))
			copy(want[off-from:], bytes.Repeat([]byte{byte(i + 1)}, 1024))
			got := make([]byte, len(want))
			if _, err := o.ReadAt(got, from); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s: at %#x: wrong data, %v", what, off, err)
			}
		}
	}
	for i, off := range at {
		if _, err := o.WriteAt(bytes.Repeat([]byte{byte(i + 1)}, 1024), off); err != nil {
			t.Fatal(err)
		}
	}
	if err := o.Flush(); err != nil {
		t.Fatal(err)
	}
	check(o, "written")
	o.Close()
	o = overlay(t, base, path)
	check(o, "opened again")
	o.Close()
	header, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer header.Close()
	head := make([]byte, 4096)
	if _, err := header.ReadAt(head, 0); err != nil {
		t.Fatal(err)
	}
	copy(head[32:], "00000000-0000-0000-0000-000000000000")
	seal(head)
	if _, err := header.WriteAt(head, 0); err != nil {
		t.Fatal(err)
	}
	o = overlay(t, base, path)
	check(o, "after another boot")
	if mapped, n, err := o.Mapped(1<<50, size-1<<50); err != nil || mapped || n < 1<<55 {
		t.Errorf("holes: %v, %d bytes, %v", mapped, n, err)
	}
	if err := o.Discard(0, size); err != nil {
		t.Fatal(err)
	}
	for _, off := range at {
		got := make([]byte, 1024)
		if _, err := o.ReadAt(got, off); err != nil || !bytes.Equal(got, make([]byte, 1024)) {
			t.Errorf("at %#x after Discard: %x…, %v", off, got[:4], err)
		}
	}
	if err := o.Flush(); err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 64<<20 {
		t.Errorf("took %d MiB of memory", n>>20)
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil || st.Blocks*512 > 16<<20 {
		t.Errorf("took %d MiB of storage, %v", st.Blocks*512>>20, err)
	}
}
