package sidecar_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvm/devices/block"
	"gvm/devices/internal/durable/durabletest"
	"gvm/devices/scsi/sidecar"
)

const mib = 1 << 20

// open opens path and closes it at the end of the test.
func open(t *testing.T, path string, o block.Options) *block.File {
	t.Helper()
	f, err := block.Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// image makes an image of 1 MiB.
func image(t *testing.T, name string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, make([]byte, mib), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestSideFilesAreNotDisks: a file that gvm keeps beside an image is not taken as a disk, and is
// not put in place of one.
func TestSideFilesAreNotDisks(t *testing.T) {
	img := image(t, "disk.img")
	disk := open(t, img, block.Options{})
	tuples, err := sidecar.OpenTuples(disk)
	if err != nil {
		t.Fatal(err)
	}
	defer tuples.Close()
	if err := tuples.WriteTuples(make([]byte, 8), 0); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(img+".pi", 8192); err != nil {
		t.Fatal(err)
	}
	if _, err := block.Open(img+".pi", block.Options{}); !errors.Is(err, block.ErrLocked) ||
		!strings.Contains(err.Error(), "given twice") {
		t.Errorf("IMAGE.pi, in use, as a disk: %v", err)
	}
	tuples.Close()
	if _, err := block.Open(img+".pi", block.Options{}); !errors.Is(err, block.ErrFormat) {
		t.Errorf("IMAGE.pi as a disk: %v", err)
	}

	keeper := sidecar.NewReservations(disk)
	if err := keeper.Save([]byte("GVM-PR\x00\x01" + strings.Repeat("s", 504))); err != nil {
		t.Fatal(err)
	}
	if _, err := block.Open(img+".pr", block.Options{}); !errors.Is(err, block.ErrFormat) {
		t.Errorf("IMAGE.pr as a disk: %v", err)
	}
	if err := keeper.Save(nil); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{img + ".pr", img + ".pr.tmp"} {
		if err := os.WriteFile(name, []byte("data of another disk"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := keeper.Save([]byte("GVM-PR\x00\x01state")); err == nil {
		t.Error("IMAGE.pr, which is something else, was replaced")
	}
	if err := keeper.Save(nil); err == nil {
		t.Error("IMAGE.pr, which is something else, was removed")
	}
	if b, _ := os.ReadFile(img + ".pr"); string(b) != "data of another disk" {
		t.Errorf("%s.pr was written over: %q", img, b)
	}
	if err := errors.Join(os.Remove(img+".pr"), keeper.Save([]byte("GVM-PR\x00\x01state"))); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(img + ".pr.tmp"); string(b) != "data of another disk" {
		t.Errorf("%s.pr.tmp was written over: %q", img, b)
	}
}

// TestOpensWithoutWaiting: no FIFO makes any open wait.
func TestOpensWithoutWaiting(t *testing.T) {
	base := image(t, "base.img")
	for _, name := range []string{base + ".pi", base + ".pr", base + ".pr.tmp"} {
		if err := unix.Mkfifo(name, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for what, do := range map[string]func() error{
		"IMAGE.pi": func() error {
			f := open(t, base, block.Options{})
			defer f.Close()
			_, err := sidecar.OpenTuples(f)
			return err
		},
		"IMAGE.pi, readonly": func() error {
			f := open(t, base, block.Options{ReadOnly: true})
			defer f.Close()
			_, err := sidecar.OpenTuples(f)
			return err
		},
		"IMAGE.pr": func() error {
			f := open(t, base, block.Options{})
			defer f.Close()
			_, err := sidecar.NewReservations(f).Load()
			return err
		},
		"IMAGE.pr of a guest's": func() error {
			f := open(t, base, block.Options{})
			defer f.Close()
			return sidecar.NewReservations(f).Save([]byte("GVM-PR\x00\x01state"))
		},
	} {
		t.Run(what, func(t *testing.T) {
			done := make(chan error, 1)
			go func() { done <- do() }()
			select {
			case err := <-done:
				if err == nil {
					t.Error("a FIFO was taken")
				}
			case <-time.After(time.Minute):
				t.Error("waits for a FIFO")
				for _, name := range []string{base + ".pi", base + ".pr"} {
					if f, err := os.OpenFile(name, os.O_RDWR|unix.O_NONBLOCK, 0); err == nil {
						defer f.Close() // let it go
					}
				}
			}
		})
	}
}

// TestNamesAreDurable: the directory of every file that is made, replaced or removed is made
// durable after that, and by then the file is whole.
func TestNamesAreDurable(t *testing.T) {
	img := image(t, "disk.img")
	disk := open(t, img, block.Options{})
	for _, step := range []struct {
		name string
		size int64 // -1: it is gone
		do   func() error
	}{
		{"disk.img.pi", 12, func() error {
			tuples, err := sidecar.OpenTuples(disk)
			if err != nil {
				return err
			}
			return errors.Join(tuples.WriteTuples(nil, 0), tuples.Close())
		}},
		{"disk.img.pr", 9, func() error { return sidecar.NewReservations(disk).Save([]byte("GVM-PR\x00\x01s")) }},
		{"disk.img.pr", -1, func() error { return sidecar.NewReservations(disk).Save(nil) }},
	} {
		seen := durabletest.Watch(t)
		if err := step.do(); err != nil {
			t.Fatal(err)
		}
		dir := seen()
		size, there := dir[step.name]
		if dir == nil || there != (step.size >= 0) || there && size != step.size {
			t.Errorf("%s, of %d bytes: the directory that was made durable has %v", step.name, step.size, dir)
		}
	}
}
