package block

import (
	"errors"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestServedByKernel: a file that the kernel's SCSI target, its NVMe target or a USB gadget has
// open without a lock, by the name that another tool wrote or by the kernel's own description.
func TestServedByKernel(t *testing.T) {
	img := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(img, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	info := "Status: ACTIVATED\nTCM FILEIO ID: 0        File: " + img + "  Size: 4096  Mode: O_DSYNC Async: 0\n"
	for _, c := range []struct {
		files map[string]string
		by    string
		lends bool // package lio looks itself
	}{
		{map[string]string{"target/core/fileio_5/theirs/udev_path": img + "\n"}, "as core/fileio_5/theirs", true},
		{map[string]string{"target/core/fileio_5/theirs/info": info}, "as core/fileio_5/theirs", true},
		{map[string]string{"nvmet/subsystems/nqn.a/namespaces/1/device_path": img + "\n",
			"nvmet/subsystems/nqn.a/namespaces/1/enable": "1\n"}, "as nvmet/subsystems/nqn.a/namespaces/1", false},
		{map[string]string{"nvmet/subsystems/nqn.a/namespaces/1/device_path": img + "\n",
			"nvmet/subsystems/nqn.a/namespaces/1/enable": "0\n"}, "", true},
		{map[string]string{"usb_gadget/g/functions/mass_storage.0/lun.0/file": img + "\n"},
			"as usb_gadget/g/functions/mass_storage.0/lun.0", false},
	} {
		dir := t.TempDir()
		defer SetConfigfs(dir)()
		for name, text := range c.files {
			path := filepath.Join(dir, name)
			err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(text), 0o600))
			if err != nil {
				t.Fatal(err)
			}
		}
		f, err := Open(img, Options{})
		if err == nil {
			f.Close()
		}
		if errors.Is(err, ErrLocked) != (c.by != "") || err != nil && !strings.Contains(err.Error(), c.by) {
			t.Errorf("%v: %v", c.files, err)
		}
		f, err = Open(img, Options{Lend: true})
		if err == nil {
			f.Close()
		}
		if (err == nil) != c.lends {
			t.Errorf("%v, lent: %v", c.files, err)
		}
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

// TestMendOfSize: the size that an error suggests is one of a file.
func TestMendOfSize(t *testing.T) {
	for size, want := range map[int64]string{513: "1024", math.MaxInt64 - 512: "9223372036854775296",
		math.MaxInt64: "9223372036854775296"} {
		err := (&File{path: "x", blockSize: 512}).checkSize(size)
		if err == nil || !strings.Contains(err.Error(), "(truncate -s "+want+" makes it one)") {
			t.Errorf("%d: %v", size, err)
		}
	}
}
