package block

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"gvm/devices/internal/durable/durabletest"
)

// beforeLock calls do once, when the next file is locked, as another process would in that moment.
func beforeLock(t *testing.T, do func()) {
	t.Helper()
	was := setLock
	t.Cleanup(func() { setLock = was })
	setLock = func(fd uintptr, cmd int, l *unix.Flock_t) error {
		setLock = was
		do()
		return was(fd, cmd, l)
	}
}

// TestCreatedAtOnce: of two that make one image at the same time, the loser neither removes the
// other's file nor goes on with one that has no name any more.
func TestCreatedAtOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "new.img")
	var other *os.File
	beforeLock(t, func() {
		var err error
		if other, err = os.OpenFile(path, os.O_RDWR, 0); err != nil {
			t.Fatal(err)
		}
		if err := lock(int(other.Fd()), path, writing, whole); err != nil {
			t.Fatal(err)
		}
	})
	if f, err := Open(path, Options{Size: 1 << 20}); !errors.Is(err, ErrLocked) {
		t.Errorf("the file was taken before its lock: %v, %v", f, err)
	}
	defer other.Close()
	there, err := os.Stat(path)
	if mine, err2 := other.Stat(); err != nil || err2 != nil || !os.SameFile(mine, there) {
		t.Errorf("the other's file is gone: %v, %v", err, err2)
	}

	path = filepath.Join(t.TempDir(), "new.img")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	beforeLock(t, func() { os.Remove(path) })
	f, err := Open(path, Options{Size: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	there, err = os.Stat(path)
	if mine, err2 := f.Stat(); err != nil || err2 != nil || !os.SameFile(mine, there) {
		t.Errorf("a file without a name was taken: %v, %v", err, err2)
	}
}

// TestCreateWhole: an image that is allocated gets its name when it is whole, and replaces no file
// that has come meanwhile.
func TestCreateWhole(t *testing.T) {
	defer func(was func(int, uint32, int64, int64) error) { fallocate = was }(fallocate)
	dir := t.TempDir()
	path := filepath.Join(dir, "new.img")
	fd, lacks := unix.Open(dir, unix.O_TMPFILE|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
	if lacks == nil {
		unix.Close(fd)
	}
	fallocate = func(fd int, mode uint32, off, n int64) error {
		if _, err := os.Lstat(path); (err == nil) != (lacks != nil) {
			t.Errorf("the image that is not whole: %v; files without names: %v", err, lacks)
		}
		return unix.Fallocate(fd, mode, off, n)
	}
	if err := Create(path, 1<<20, true); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Size() != 1<<20 || fi.Mode().Perm()&0o600 != 0o600 {
		t.Errorf("%v, %v", fi, err)
	}
	if lacks == nil {
		path = filepath.Join(dir, "other.img")
		fallocate = func(int, uint32, int64, int64) error { return os.WriteFile(path, []byte("other"), 0o600) }
		err := Create(path, 1<<20, true)
		if b, err2 := os.ReadFile(path); !errors.Is(err, fs.ErrExist) || string(b) != "other" {
			t.Errorf("%v, and the file has %q, %v", err, b, err2)
		}
	}
	fallocate = func(int, uint32, int64, int64) error { return unix.ENOSPC }
	path = filepath.Join(dir, "none.img")
	if err := Create(path, 1<<20, true); !errors.Is(err, unix.ENOSPC) {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what failed has left a file: %v", err)
	}
}

// TestUndo takes back what Open did, and nothing else.
func TestUndo(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "disk.img")
	undo := func() {
		t.Helper()
		f, err := Open(path, Options{Size: 1 << 20})
		if err != nil {
			t.Fatal(err)
		}
		f.Undo()
		f.Close()
	}
	undo()
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file that Open made: %v", err)
	}
	for size, want := range map[int64]int64{0: 0, 4096: 4096, 1 << 20: 1 << 20} {
		if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, size)); err != nil {
			t.Fatal(err)
		}
		undo()
		if fi, err := os.Stat(path); err != nil || fi.Size() != want {
			t.Errorf("a file of %d bytes: %v, %v", size, fi, err)
		}
	}
}

// TestNamesAreDurable: the directory of every file that is made is made durable
// after that, and by then the file is whole.
func TestNamesAreDurable(t *testing.T) {
	dir := t.TempDir()
	img := filepath.Join(dir, "disk.img")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var disk, base *File
	var err error
	for _, step := range []struct {
		name string
		size int64
		do   func()
	}{
		{"disk.img", 1 << 20, func() { disk, err = Open(img, Options{Size: 1 << 20}); must(err) }},
		{"made.img", 1 << 20, func() { must(Create(filepath.Join(dir, "made.img"), 1<<20, false)) }},
		{"empty.img", 1 << 20, func() {
			path := filepath.Join(dir, "empty.img") // as a crash may leave it
			must(os.WriteFile(path, nil, 0o600))
			base, err = Open(path, Options{Size: 1 << 20})
			must(err)
			must(base.Close())
		}},
		{"over", 17 * overlayCluster, func() {
			base, err = Open(img, Options{ReadOnly: true})
			must(err)
			o, err := OpenOverlay(base, filepath.Join(dir, "over"))
			must(err)
			must(o.Close())
		}},
	} {
		if step.name == "over" {
			must(disk.Close())
		}
		seen := durabletest.Watch(t)
		step.do()
		if size, there := seen()[step.name]; !there || size != step.size {
			t.Errorf("%s, of %d bytes: the directory that was made durable has %v", step.name, step.size, seen())
		}
	}
}
