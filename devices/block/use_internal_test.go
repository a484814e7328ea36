package block

import (
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestServedByLIO: a file that another tool has the kernel's SCSI target serve, by the name that the
// tool wrote or by the kernel's own description.
func TestServedByLIO(t *testing.T) {
	was := lioCore
	t.Cleanup(func() { lioCore = was })
	img := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(img, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"udev_path": img + "\n",
		"info":      "Status: ACTIVATED\nTCM FILEIO ID: 0        File: " + img + "  Size: 4096  Mode: O_DSYNC Async: 0\n",
	} {
		lioCore = t.TempDir() + "/"
		disk := filepath.Join(lioCore, "fileio_5", "theirs")
		err := errors.Join(os.MkdirAll(disk, 0o700), os.WriteFile(filepath.Join(disk, name), []byte(text), 0o600))
		if err != nil {
			t.Fatal(err)
		}
		f, err := Open(img, Options{})
		if err == nil {
			f.Close()
		}
		if !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), "serves it, as core/fileio_5/theirs") {
			t.Errorf("%s: %v", name, err)
		}
		if f, err = Open(img, Options{Lend: true}); err != nil {
			t.Errorf("%s, lent: %v", name, err)
			continue
		}
		f.Close()
	}
}

// TestLockErrors has every error by which a file system or a kernel says that it has no such locks.
func TestLockErrors(t *testing.T) {
	was := setLock
	t.Cleanup(func() { setLock = was })
	img := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(img, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	side, err := os.Create(filepath.Join(t.TempDir(), "disk.img.pi"))
	if err != nil {
		t.Fatal(err)
	}
	defer side.Close()
	for errno, none := range map[unix.Errno]bool{
		unix.ENOLCK: true, unix.EOPNOTSUPP: true, unix.ENOSYS: true, unix.EINVAL: true, unix.EIO: false,
	} {
		setLock = func(uintptr, int, *unix.Flock_t) error { return errno }
		_, err := Open(img, Options{})
		if !errors.Is(err, errno) && !none || errors.Is(err, ErrNoLocks) != none ||
			none && !strings.Contains(err.Error(), "lock=off") {
			t.Errorf("%v: %v", errno, err)
		}
		var notes []string
		f, err := Open(img, Options{ReadOnly: true, Note: func(s string) { notes = append(notes, s) }})
		if (err == nil) != none || none && (len(notes) != 1 || !strings.Contains(notes[0], "has no locks")) {
			t.Errorf("%v, read-only: %v, notes %q", errno, err, notes)
		}
		if err == nil {
			if err := Lock(side, side.Name(), false); err != nil {
				t.Errorf("%v, IMAGE.pi: %v", errno, err)
			}
			f.Close()
		}
		if f, err = Open(img, Options{NoLock: true}); (err == nil) != none {
			t.Errorf("%v, lock=off: %v", errno, err)
		}
		if err == nil {
			f.Close()
		}
	}
	setLock = was
	f, err := Open(img, Options{NoLock: true})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	other, err := os.OpenFile(img, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := lock(int(other.Fd()), img, reading, whole); !errors.Is(err, ErrLocked) {
		t.Errorf("lock=off where locks work: the image can be locked: %v", err)
	}
	f.Close()
	if err := lock(int(other.Fd()), img, reading, whole); err != nil {
		t.Fatal(err)
	}
	if f, err := Open(img, Options{NoLock: true}); !errors.Is(err, ErrLocked) {
		t.Errorf("lock=off of an image that another has: %v, %v", f, err)
	}
}

// TestSuffixes: every format of other programs has an ending that CheckName knows.
func TestSuffixes(t *testing.T) {
	names := slices.Collect(maps.Values(suffixes))
	for _, f := range slices.Concat(formats, trailers) {
		if !slices.Contains(names, f.name) && !strings.HasSuffix(f.name, " of gvm's") {
			t.Errorf("no ending of a name is that of a %s", f.name)
		}
	}
}
