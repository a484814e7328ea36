package machine_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvm/devices/block"
	"gvm/guest/embedded/embeddedtest"
	"gvm/machine"
	"gvm/machine/disk"
	"gvm/vmm"
)

func TestDiskNotWritten(t *testing.T) {
	for option, line := range map[string]string{
		"": "writable, write cache on", ",readonly": "write-protected",
		",cache=writethrough": "writable, write cache off", ",cache=unsafe": "writable, write cache on",
		",block_size=4096": "256 blocks of 4096 bytes",
	} {
		t.Run(strings.ReplaceAll(option, ",", " "), func(t *testing.T) {
			t.Parallel()
			img := image(t, 9, 1<<20)
			want := read(t, img)
			words := ""
			if option == ",readonly" {
				words = "write" // where the disk allows it
			}
			if _, out := passes(t, words, img+option); !strings.Contains(out, line) {
				t.Errorf("%s\nlacks %q", out, line)
			}
			if !bytes.Equal(read(t, img), want) {
				t.Error("the image changed")
			}
		})
	}
}

func TestDiskWritten(t *testing.T) {
	for _, tt := range []struct {
		options         string
		size, blockSize int64
	}{
		{"", 1 << 20, 512},
		{",cache=writethrough", 1 << 20, 512},
		{",cache=unsafe,serial=A1", 1 << 20, 512},
		{",block_size=4096", 1 << 20, 4096},
		{",size=3M", 3 << 20, 512},
		{",lun=0,size=3T", 3 << 40, 512}, // past the reach of 32-bit LBAs
	} {
		t.Run(strings.ReplaceAll(tt.options, ",", " "), func(t *testing.T) {
			t.Parallel()
			img := image(t, 17, 1<<20)
			original := read(t, img)
			passes(t, "write", img+tt.options)
			f, err := os.Open(img)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := embeddedtest.CheckDisk(f, tt.size, tt.blockSize, 0, 0); err != nil {
				t.Error(err)
			}
			if fi, err := f.Stat(); err != nil || fi.Size() != tt.size ||
				fi.Sys().(*syscall.Stat_t).Blocks > 8<<20/512 {
				t.Errorf("the image has %d bytes, %+v, %v", fi.Size(), fi.Sys(), err)
			}
			// Everything but the guest's writes is unchanged.
			for _, r := range embeddedtest.Written(tt.size, tt.blockSize) {
				if r.Offset < int64(len(original)) {
					copy(original[r.Offset:], embeddedtest.Pattern(0, 0, r))
				}
			}
			got := make([]byte, len(original))
			if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, original) {
				t.Errorf("bytes changed that the guest did not write, %v", err)
			}
		})
	}
}

// TestDiskCreated makes a disk with size=.
func TestDiskCreated(t *testing.T) {
	t.Parallel()
	img := filepath.Join(t.TempDir(), "new")
	passes(t, "write", img+",size=1G")
	f, err := os.Open(img)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := embeddedtest.CheckDisk(f, 1<<30, 512, 0, 0); err != nil {
		t.Error(err)
	}
	if fi, err := f.Stat(); err != nil || fi.Size() != 1<<30 || fi.Sys().(*syscall.Stat_t).Blocks > 1<<20/512 {
		t.Errorf("%+v, %v", fi.Sys(), err)
	}
}

func TestSeveralDisks(t *testing.T) {
	t.Parallel()
	disks := []struct {
		options string
		lun     uint16
		size    int
		written bool
	}{
		{",lun=1", 1, 1 << 20, true},
		{"", 0, 1<<20 + 4096, true},
		{",lun=300,block_size=4096", 300, 1<<20 + 8192, true},
		{",readonly", 2, 1<<20 + 512, false},
		{",serial=five", 3, 1<<20 + 1024, true},
	}
	var paths, specs []string
	for i, d := range disks {
		paths = append(paths, image(t, byte(31*i), d.size))
		specs = append(specs, paths[i]+d.options)
	}
	report, _ := passes(t, "write", specs...)
	var at []string
	for _, d := range report.Disks {
		address, _, _ := strings.Cut(d, " ")
		at = append(at, address)
	}
	if want := []string{"0:0:0:0", "0:0:0:1", "0:0:0:2", "0:0:0:3", "0:0:0:300"}; !reflect.DeepEqual(at, want) {
		t.Errorf("disks at %q, want %q", at, want)
	}
	for i, d := range disks {
		f, err := os.Open(paths[i])
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		blockSize := int64(512)
		if strings.Contains(d.options, "4096") {
			blockSize = 4096
		}
		err = embeddedtest.CheckDisk(f, int64(d.size), blockSize, 0, d.lun)
		if d.written && err != nil || !d.written && err == nil {
			t.Errorf("disk %d: %v", i, err)
		}
	}
}

// TestOverlay: a guest writes to an overlay, and the image stays unchanged. Two guests share the
// image, and each finds its writes in its own overlay.
func TestOverlay(t *testing.T) {
	t.Parallel()
	golden := image(t, 9, 1<<20)
	before := read(t, golden)
	g := launch(t, "hang", golden+",overlay=on")
	g.expect("hanging", 1)
	file := filepath.Join(t.TempDir(), "overlay")
	for range 2 {
		passes(t, "write", golden+",overlay=on", golden+",overlay="+file+",lun=1")
	}
	if fi, err := os.Stat(file); err != nil || fi.Size() < 1<<20 {
		t.Errorf("the overlay: %v", err)
	}
	if !bytes.Equal(read(t, golden), before) {
		t.Error("the image has changed")
	}
	refused(t, "given twice", golden)
	g.Stop(errStopped, 0)
	g.wait()
	if err := os.WriteFile(golden, append(before, make([]byte, 512)...), 0o600); err != nil {
		t.Fatal(err)
	}
	refused(t, "another size", golden+",overlay="+file)
}

// TestOverlayOfHoles: an overlay over an image of 1 EiB takes only memory for written data, at the
// start and on a running machine.
func TestOverlayOfHoles(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("/dev/shm", "machine-test-") // tmpfs allows files of that size
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	base := filepath.Join(dir, "base")
	if err := block.Create(base, 1<<60, false); err != nil {
		t.Skip(err)
	}
	passes(t, "write", base+",overlay="+dir+"/one")
	g := launch(t, "hang")
	g.expect("hanging", 1)
	change, err := g.AddDisk(t.Context(), parse(t, base+",overlay="+dir+"/two"))
	if err != nil || change.Disk.Size != 1<<60 {
		t.Errorf("%+v, %v", change, err)
	}
}

// TestMemoryDisks: disks without an image work as disks.
func TestMemoryDisks(t *testing.T) {
	t.Parallel()
	passes(t, "write", "mem:2M", "mem:16M,block_size=4096", "temp:2M")
	passes(t, "", "null:3T")
}

// TestProtectionFile: the machine makes protection information for the writes of a guest that knows
// nothing of it, refuses blocks that change afterwards, and checks nothing without IMAGE.pi.
func TestProtectionFile(t *testing.T) {
	t.Parallel()
	file := image(t, 1, 8<<20)
	passes(t, "write", file+",pi=1")
	if fi, err := os.Stat(file + ".pi"); err != nil || fi.Size() <= 4096 {
		t.Fatalf("protection information: %v, %v", fi, err)
	}
	b := read(t, file)
	b[5] ^= 1 // in the first block, which the guest writes and reads
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	g := launch(t, "", file+",pi=1")
	out := g.wait()
	if report, err := embeddedtest.ParseReport(g.screen.text()); err != nil || report.Passed ||
		!strings.Contains(g.screen.text(), "b/10/01") {
		t.Errorf("%+v, %v:\n%s", out, err, g.screen.text())
	}
	refused(t, file+".pi: not the protection information of this disk: it is for blocks of 512 bytes",
		file+",pi=1,block_size=4096")
	if err := os.Remove(file + ".pi"); err != nil {
		t.Fatal(err)
	}
	passes(t, "", file+",pi=1")
	if _, err := os.Stat(file + ".pi"); !os.IsNotExist(err) {
		t.Errorf("a guest that only reads has made it: %v", err)
	}
	passes(t, "write", "mem:8M,pi=1,block_size=4096")
}

// TestAddPipe: adding a disk with a FIFO as its overlay, or as the disk, delays neither the next
// request nor the end.
func TestAddPipe(t *testing.T) {
	t.Parallel()
	img := image(t, 1, 1<<20)
	fifo := img + ".fifo"
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	g := launch(t, "hang")
	g.expect("hanging", 1)
	for _, d := range []string{img + ",overlay=" + fifo, fifo} {
		if _, err := g.AddDisk(t.Context(), parse(t, d)); err == nil || !strings.Contains(err.Error(), "is a pipe") {
			t.Errorf("%s: %v", d, err)
		}
	}
	if n := len(g.Disks()); n != 1 {
		t.Errorf("%d disks", n)
	}
	g.Stop(errStopped, 0)
	if out := g.wait(); !errors.Is(out.Err, errStopped) {
		t.Errorf("%+v", out)
	}
}

// TestErrorStop fills a disk's file system under a guest, which pauses the machine. With more room
// the write is repeated and the guest notices nothing; if the disk is removed the guest gets an
// error; and a machine can be ended meanwhile.
func TestErrorStop(t *testing.T) {
	t.Parallel()
	small := t.TempDir()
	switch err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=16k"); {
	case errors.Is(err, unix.EPERM):
		t.Skipf("needs root, to mount a file system that is soon full: %v", err)
	case err != nil:
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(small, 0); err != nil {
			t.Error(err)
		}
	})
	img := filepath.Join(small, "disk.img")
	for _, tt := range []struct {
		name, policy string
		mend         func(*testing.T, *guest) error
		ending       vmm.Ending // 0: the guest's choice after an error
	}{
		{"room", "stop", func(_ *testing.T, g *guest) error {
			return errors.Join(unix.Mount("tmpfs", small, "tmpfs", unix.MS_REMOUNT, "size=64m"), g.Resume())
		}, vmm.PoweredOff},
		{"removed", "enospc-stop", func(t *testing.T, g *guest) error {
			_, err := g.RemoveDisk(t.Context(), "0")
			return errors.Join(err, g.Resume())
		}, 0},
		{"ended", "stop", func(_ *testing.T, g *guest) error { g.Stop(errStopped, 0); return nil }, vmm.Stopped},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := unix.Mount("tmpfs", small, "tmpfs", unix.MS_REMOUNT, "size=16k"); err != nil {
				t.Fatal(err)
			}
			g, err := begin(t, machine.Spec{Name: "vm", GuestArgs: []string{"write"}},
				img+",size=8M,error="+tt.policy)
			if err != nil {
				t.Fatal(err)
			}
			for !g.Paused() {
				select {
				case <-g.Ended():
					t.Fatalf("the machine does not pause: %+v\n%s", g.wait(), g.screen.text())
				case <-time.After(time.Millisecond):
				}
			}
			if err := tt.mend(t, g); err != nil {
				t.Error(err)
			}
			out := g.wait()
			if tt.ending != 0 && out.Ending != tt.ending || !strings.Contains(g.said(), img+": write at byte ") ||
				!strings.Contains(g.said(), "the machine is paused until: gvm resume vm") {
				t.Errorf("%+v; %s", out, g.said())
			}
			if passed := strings.Contains(g.screen.text(), "\nPASS\n"); passed != (tt.ending == vmm.PoweredOff) {
				t.Errorf("the guest:\n%s", g.screen.text())
			}
			if err := os.Remove(img); err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Error(err)
			}
		})
	}
}

func parse(t *testing.T, s string) disk.Spec {
	t.Helper()
	d, err := disk.Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	return d
}
