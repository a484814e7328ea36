package sidecar_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"gvm/devices/block"
	"gvm/devices/scsi/sidecar"
)

// tuplesOf opens an image of 1 MiB with its protection information.
func tuplesOf(t *testing.T, path string, o block.Options) (*sidecar.Tuples, error) {
	t.Helper()
	if !o.ReadOnly {
		o.Size = 1 << 20
	}
	f, err := block.Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return sidecar.OpenTuples(f)
}

// TestTuples writes, clears and reads tuples, in a file and in memory.
func TestTuples(t *testing.T) {
	image := filepath.Join(t.TempDir(), "disk")
	inFile, err := tuplesOf(t, image, block.Options{})
	if err != nil {
		t.Fatal(err)
	}
	memory, err := block.OpenMemory(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	defer memory.Close()
	inMemory, err := sidecar.OpenTuples(memory)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []*sidecar.Tuples{inFile, inMemory} {
		all, want := make([]byte, 8*2048), bytes.Repeat([]byte{0xff}, 8*2048)
		check := func(when string) {
			t.Helper()
			if err := p.ReadTuples(all, 0); err != nil || !bytes.Equal(all, want) {
				t.Errorf("%s: %v, or wrong tuples", when, err)
			}
		}
		check("at the beginning")
		if err := errors.Join(p.ClearTuples(0, 2048), p.Flush()); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(image + ".pi"); p == inFile && !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the file is there before the first tuple: %v", err)
		}
		for i := range want[8*100 : 8*1500] {
			want[8*100+i] = byte(i * 7)
		}
		if err := errors.Join(p.WriteTuples(want[8*100:8*1500], 100), p.Flush()); err != nil {
			t.Fatal(err)
		}
		check("written")
		copy(want[8*600:], bytes.Repeat([]byte{0xff}, 8*700))
		if err := p.ClearTuples(600, 700); err != nil {
			t.Fatal(err)
		}
		check("cleared")
		copy(want[8*400:], bytes.Repeat([]byte{0xff}, 8*1648))
		if err := p.ClearTuples(400, 1<<40); err != nil { // too many for zeroes
			t.Fatal(err)
		}
		check("cleared to the end")
		if fi, err := os.Stat(image + ".pi"); p == inFile && (err != nil || fi.Size() != 4096+8*400) {
			t.Errorf("the file is not cut: %+v, %v", fi, err)
		}
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestTuplesKept: the next run has them, also when it only reads.
func TestTuplesKept(t *testing.T) {
	image := filepath.Join(t.TempDir(), "disk")
	for _, o := range []block.Options{{}, {ReadOnly: true}} {
		f, err := block.Open(image, block.Options{Size: 1 << 20, ReadOnly: o.ReadOnly})
		if err != nil {
			t.Fatal(err)
		}
		p, err := sidecar.OpenTuples(f)
		if err != nil {
			t.Fatal(err)
		}
		got, want := make([]byte, 8), []byte{1, 2, 3, 4, 5, 6, 7, 8}
		if !o.ReadOnly {
			if err := p.WriteTuples(want, 2047); err != nil {
				t.Fatal(err)
			}
		} else if err := p.ReadTuples(got, 2047); err != nil || !bytes.Equal(got, want) {
			t.Errorf("% x, %v", got, err)
		} else if err := p.WriteTuples(want, 0); err == nil {
			t.Error("written to a read-only file")
		}
		if err := errors.Join(p.Close(), f.Close()); err != nil {
			t.Error(err)
		}
	}
}

// TestTuplesCut: an image that got smaller and larger again has no old tuples.
func TestTuplesCut(t *testing.T) {
	image := filepath.Join(t.TempDir(), "disk")
	open := func(size int64) (*block.File, *sidecar.Tuples) {
		t.Helper()
		f, err := block.Open(image, block.Options{Size: size})
		if err != nil {
			t.Fatal(err)
		}
		p, err := sidecar.OpenTuples(f)
		if err != nil {
			t.Fatal(err)
		}
		return f, p
	}
	f, p := open(1 << 20)
	if err := errors.Join(p.WriteTuples(bytes.Repeat([]byte{7}, 8*2048), 0), p.Close(), f.Close(),
		os.Truncate(image, 512<<10)); err != nil {
		t.Fatal(err)
	}
	f, p = open(512 << 10)
	if err := errors.Join(p.Close(), f.Close()); err != nil {
		t.Fatal(err)
	}
	f, p = open(1 << 20)
	got := make([]byte, 8*2048)
	if err := p.ReadTuples(got, 0); err != nil || !bytes.Equal(got[:8*1024], bytes.Repeat([]byte{7}, 8*1024)) ||
		!bytes.Equal(got[8*1024:], bytes.Repeat([]byte{0xff}, 8*1024)) {
		t.Errorf("%v, or wrong tuples", err)
	}
	if err := errors.Join(p.Close(), f.Close()); err != nil {
		t.Fatal(err)
	}
}

// TestTuplesOfCrash: the file that a crash leaves between the making of IMAGE.pi and its header has
// no tuples, and is continued.
func TestTuplesOfCrash(t *testing.T) {
	for name, left := range map[string][]byte{"empty": nil, "zeroes": make([]byte, 12)} {
		path := filepath.Join(t.TempDir(), name)
		if err := errors.Join(block.Create(path, 1<<20, false), os.WriteFile(path+".pi", left, 0o600)); err != nil {
			t.Fatal(err)
		}
		got, want := make([]byte, 8), bytes.Repeat([]byte{0xff}, 8)
		for _, readOnly := range []bool{true, false, false, true} {
			f, err := block.Open(path, block.Options{ReadOnly: readOnly})
			if err != nil {
				t.Fatal(err)
			}
			p, err := sidecar.OpenTuples(f)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if err := p.ReadTuples(got, 7); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s: % x, %v; want % x", name, got, err, want)
			}
			if want = []byte{1, 2, 3, 4, 5, 6, 7, 8}; readOnly {
				want = bytes.Clone(got)
			} else if err := p.WriteTuples(want, 7); err != nil {
				t.Error(err)
			}
			if err := errors.Join(p.Close(), f.Close()); err != nil {
				t.Error(err)
			}
		}
	}
}

func TestTuplesRefused(t *testing.T) {
	dir := t.TempDir()
	good := filepath.Join(dir, "good")
	p, err := tuplesOf(t, good, block.Options{BlockSize: 4096})
	if err == nil {
		err = errors.Join(p.WriteTuples(make([]byte, 8), 0), p.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	of4096, err := os.ReadFile(good + ".pi")
	if err != nil {
		t.Fatal(err)
	}
	for name, v := range map[string]struct {
		make func(path string) error
		want string
	}{
		"other block size": {func(path string) error { return os.WriteFile(path, of4096, 0o600) },
			"for blocks of 4096 bytes"},
		"other file": {func(path string) error { return os.WriteFile(path, []byte("notes"), 0o600) },
			"not the protection information"},
		"directory": {func(path string) error { return os.Mkdir(path, 0o700) }, "directory"},
		"link":      {func(path string) error { return os.Symlink(good, path) }, "symbolic links"},
	} {
		path := filepath.Join(dir, name)
		if err := v.make(path + ".pi"); err != nil {
			t.Fatal(err)
		}
		if _, err := tuplesOf(t, path, block.Options{}); err == nil || !strings.Contains(err.Error(), path+".pi") ||
			!strings.Contains(err.Error(), v.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestResizeCutsTuples makes an image smaller and larger again by a File that has nothing to do
// with its protection information: blocks that are new have none.
func TestResizeCutsTuples(t *testing.T) {
	for _, blockSize := range []int{512, 4096} {
		path := filepath.Join(t.TempDir(), "disk")
		open := func() (*block.File, *sidecar.Tuples) {
			f, err := block.Open(path, block.Options{Size: mib, BlockSize: blockSize})
			if err != nil {
				t.Fatal(err)
			}
			tuples, err := sidecar.OpenTuples(f)
			if err != nil {
				t.Fatal(err)
			}
			return f, tuples
		}
		f, tuples := open()
		last := uint64(mib/blockSize - 1)
		for _, block := range []uint64{0, last} {
			if err := tuples.WriteTuples([]byte("12345678"), block); err != nil {
				t.Fatal(err)
			}
		}
		if err := errors.Join(tuples.Close(), f.Close()); err != nil {
			t.Fatal(err)
		}
		plain, err := block.Open(path, block.Options{})
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(plain.Resize(mib/2, true, sidecar.Cut), plain.Resize(mib, false, sidecar.Cut),
			plain.Close()); err != nil {
			t.Fatal(err)
		}
		f, tuples = open()
		first, end := make([]byte, 8), make([]byte, 8)
		if err := errors.Join(tuples.ReadTuples(first, 0), tuples.ReadTuples(end, last)); err != nil {
			t.Fatal(err)
		}
		if string(first) != "12345678" || !bytes.Equal(end, bytes.Repeat([]byte{0xff}, 8)) {
			t.Errorf("blocks of %d: tuples %q and % x, want the first kept and the last gone", blockSize, first, end)
		}
		// So it is where size= makes an image anew beside old protection information.
		if err := errors.Join(tuples.Close(), f.Close(), os.Remove(path)); err != nil {
			t.Fatal(err)
		}
		f, tuples = open()
		if err := tuples.ReadTuples(first, 0); err != nil || !bytes.Equal(first, bytes.Repeat([]byte{0xff}, 8)) {
			t.Errorf("%v, a new image has tuples % x", err, first)
		}
		if err := errors.Join(tuples.Close(), f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	// A file without protection information stays.
	path := filepath.Join(t.TempDir(), "disk")
	notes := bytes.Repeat([]byte("my notes"), 4096)
	if err := errors.Join(os.WriteFile(path, make([]byte, mib), 0o600),
		os.WriteFile(path+".pi", notes, 0o600)); err != nil {
		t.Fatal(err)
	}
	f, err := block.Open(path, block.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Resize(4096, true, sidecar.Cut); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(path + ".pi"); err != nil || !bytes.Equal(got, notes) {
		t.Errorf("%v, %d bytes are left of another file", err, len(got))
	}
	if err := errors.Join(os.Remove(path+".pi"), unix.Mkfifo(path+".pi", 0o600),
		f.Resize(mib, false, sidecar.Cut)); err != nil {
		t.Errorf("beside a FIFO: %v", err)
	}
}

// TestGrowthCutsTuples: an image that another program made smaller, and that grows again by an Open
// without protection information, has none for its new blocks.
func TestGrowthCutsTuples(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	open := func(o block.Options, use func(*sidecar.Tuples) error) {
		t.Helper()
		f, err := block.Open(path, o)
		if err != nil {
			t.Fatal(err)
		}
		if use != nil {
			tuples, err := sidecar.OpenTuples(f)
			if err != nil {
				t.Fatal(err)
			}
			err = errors.Join(use(tuples), tuples.Close())
			if err != nil {
				t.Fatal(err)
			}
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	old := bytes.Repeat([]byte{7}, 8*2048)
	open(block.Options{Size: 1 << 20}, func(p *sidecar.Tuples) error { return p.WriteTuples(old, 0) })
	if err := os.Truncate(path, 512<<10); err != nil {
		t.Fatal(err)
	}
	open(block.Options{Size: 1 << 20, Cut: sidecar.Cut}, nil)
	got, want := make([]byte, 8*2048), bytes.Clone(old)
	copy(want[8*1024:], bytes.Repeat([]byte{0xff}, 8*1024))
	open(block.Options{}, func(p *sidecar.Tuples) error { return p.ReadTuples(got, 0) })
	if !bytes.Equal(got, want) {
		t.Error("new blocks have old tuples")
	}
}
