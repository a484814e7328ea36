package block_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvm/devices/block"
	"gvm/devices/block/blocktest"
)

// run runs a command that prepares a test.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// needs skips a test where loop devices cannot be made or a program is missing.
func needs(t *testing.T, programs ...string) {
	t.Helper()
	c, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil || os.Geteuid() != 0 {
		t.Skipf("needs root and loop devices: %v", err)
	}
	c.Close()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skip(err)
		}
	}
}

// loop attaches a loop device to path until the test ends.
func loop(t *testing.T, path string, more ...string) string {
	t.Helper()
	dev := run(t, "losetup", append([]string{"--find", "--show", path}, more...)...)
	t.Cleanup(func() { detach(t, dev) })
	return dev
}

// detach waits until the loop device is gone, which is after its last user.
func detach(t *testing.T, dev string) {
	_ = exec.Command("losetup", "--detach", dev).Run()
	dir := "/sys/block/" + filepath.Base(dev) + "/loop"
	for range 1000 {
		if _, err := os.Stat(dir); err != nil {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("%s is still attached", dev)
}

// partition makes a partition of a loop device, in sectors, and returns a node of it.
func partition(t *testing.T, dev string, n, start, sectors int) string {
	t.Helper()
	run(t, "addpart", dev, strconv.Itoa(n), strconv.Itoa(start), strconv.Itoa(sectors))
	name := filepath.Base(dev)
	b, err := os.ReadFile(fmt.Sprintf("/sys/block/%s/%[1]sp%d/dev", name, n))
	if err != nil {
		t.Fatal(err)
	}
	var major, minor uint32
	if _, err := fmt.Sscanf(string(b), "%d:%d", &major, &minor); err != nil {
		t.Fatal(err)
	}
	node := filepath.Join(t.TempDir(), fmt.Sprintf("part%d", n))
	if err := unix.Mknod(node, unix.S_IFBLK|0o600, int(unix.Mkdev(major, minor))); err != nil {
		t.Fatal(err)
	}
	return node
}

// mount mounts dev until the test ends.
func mount(t *testing.T, dev string) string {
	t.Helper()
	dir := t.TempDir()
	run(t, "mount", dev, dir)
	t.Cleanup(func() { run(t, "umount", dir) })
	return dir
}

// keepMounts starts a process that keeps all mounts in a namespace of its own until the test ends.
func keepMounts(t *testing.T) (pid int) {
	t.Helper()
	c := exec.Command("cat")
	c.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); _ = c.Wait() })
	return c.Process.Pid
}

// ext4 is an image of a file system.
func ext4(t *testing.T) string {
	path := image(t, "fs.img", "", 16*mib)
	run(t, "mkfs.ext4", "-q", "-F", path)
	return path
}

// emptyEROFS returns an EROFS file system with an empty root directory
// (Documentation/filesystems/erofs.rst and fs/erofs/erofs_fs.h of Linux).
func emptyEROFS() string {
	const rootInode = 64 // of 32 bytes each
	b := make([]byte, 8<<10)
	super, root := b[1024:], b[rootInode*32:]
	binary.LittleEndian.PutUint32(super, 0xe0f5e1e2) // magic
	super[12] = 12                                   // blkszbits
	binary.LittleEndian.PutUint16(super[14:], rootInode)
	binary.LittleEndian.PutUint64(super[16:], 1) // inos
	binary.LittleEndian.PutUint32(super[36:], 2) // blocks
	binary.LittleEndian.PutUint16(root[4:], unix.S_IFDIR|0o755)
	binary.LittleEndian.PutUint16(root[6:], 2) // i_nlink
	return string(b)
}

// mountEROFS mounts an image without a loop device, which mount(8) would attach first.
func mountEROFS(t *testing.T, path, dir string) {
	t.Helper()
	needs(t, "nsenter")
	switch err := unix.Mount(path, dir, "erofs", unix.MS_RDONLY, ""); err {
	case nil:
	case unix.ENODEV, unix.ENOTBLK:
		t.Skipf("this kernel has no EROFS, or none on files (Linux 6.12): %v", err)
	default:
		t.Fatal(err)
	}
}

// refused wants Open of path for writing to say that it is in use, by what texts name.
func refused(t *testing.T, path string, texts ...string) {
	t.Helper()
	f, err := block.Open(path, block.Options{})
	if err == nil {
		f.Close()
		t.Errorf("%s: opened for writing although it is in use: want %q", path, texts)
		return
	}
	if !errors.Is(err, block.ErrLocked) || strings.Contains(err.Error(), "\n") {
		t.Errorf("%s: %v", path, err)
	}
	for _, text := range append(texts, path) {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("%s: the message %q lacks %q", path, err, text)
		}
	}
}

// reads wants Open of path for reading to go on, and returns its notes.
func reads(t *testing.T, path string) string {
	t.Helper()
	var notes []string
	f, err := block.Open(path, block.Options{ReadOnly: true, Note: func(s string) { notes = append(notes, s) }})
	if err != nil {
		t.Errorf("%s readonly: %v", path, err)
		return ""
	}
	f.Close()
	return strings.Join(notes, "\n")
}

// TestInUseByHost: a guest does not write a disk that the host writes, under any name.
func TestInUseByHost(t *testing.T) {
	needs(t, "losetup", "mkfs.ext4")
	t.Run("mounted", func(t *testing.T) {
		img := ext4(t)
		dev := loop(t, img)
		open(t, dev, block.Options{}).Close()
		dir := mount(t, dev)
		refused(t, dev, "mounted at "+dir, "umount")
		var st unix.Stat_t
		if err := unix.Stat(dev, &st); err != nil {
			t.Fatal(err)
		}
		node := filepath.Join(t.TempDir(), "node")
		if err := unix.Mknod(node, unix.S_IFBLK|0o600, int(st.Rdev)); err != nil {
			t.Fatal(err)
		}
		refused(t, node, "mounted at "+dir)
		refused(t, img, dev, "mounted at "+dir, "losetup --detach "+dev)
		if note := reads(t, dev); !strings.Contains(note, "mounted at "+dir) {
			t.Errorf("readonly, mounted: noted %q", note)
		}
		if note := reads(t, img); !strings.Contains(note, "mounted at "+dir) {
			t.Errorf("readonly, behind a mounted loop device: noted %q", note)
		}
	})
	t.Run("mounted in another namespace", func(t *testing.T) {
		needs(t, "nsenter")
		dev := loop(t, ext4(t))
		dir := mount(t, dev)
		pid := keepMounts(t)
		run(t, "umount", dir)
		refused(t, dev, "mounted at "+dir, "nsenter -t ", " -m umount "+dir+" first")
		run(t, "nsenter", "-t", strconv.Itoa(pid), "-m", "umount", dir)
		blocktest.AwaitUnclaimed(t, dev)
		open(t, dev, block.Options{}).Close()
		run(t, "mount", dev, dir) // what Cleanup unmounts
	})
	t.Run("loop", func(t *testing.T) {
		img := image(t, "disk.img", "", mib)
		link, bound := img+".link", filepath.Join(t.TempDir(), "bound.img")
		if err := os.Link(img, link); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(bound, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		run(t, "mount", "--bind", img, bound)
		t.Cleanup(func() { run(t, "umount", bound) })
		dev := loop(t, img)
		for _, name := range []string{img, link, bound} {
			refused(t, name, dev, "losetup --detach "+dev)
		}
		// The name that the kernel has for it may be gone.
		if err := os.Rename(img, img+".moved"); err != nil {
			t.Fatal(err)
		}
		refused(t, link, dev)
		if err := os.Remove(img + ".moved"); err != nil {
			t.Fatal(err)
		}
		refused(t, link, dev)
		refused(t, dev, "no longer has the name", "lock=off")
		reads(t, dev)
		open(t, dev, block.Options{NoLock: true}).Close()
		detach(t, dev)
		open(t, link, block.Options{})
		for _, name := range []string{link, bound} {
			refused(t, name, "given twice")
		}
	})
	t.Run("served without a claim", func(t *testing.T) {
		img := image(t, "disk.img", "", mib)
		dev := loop(t, img, "--partscan")
		one := dev // the only one, where no partition can be made
		if _, err := exec.LookPath("addpart"); err == nil {
			one = partition(t, dev, 1, 8, 8)
		}
		dir := t.TempDir()
		defer block.SetConfigfs(dir)()
		disk := filepath.Join(dir, "target/core/fileio_5/theirs")
		if err := os.MkdirAll(disk, 0o700); err != nil {
			t.Fatal(err)
		}
		for _, path := range []string{dev, one, img} {
			if err := os.WriteFile(disk+"/udev_path", []byte(path+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			refused(t, dev, "core/fileio_5/theirs")
			refused(t, one, "core/fileio_5/theirs")
			if note := reads(t, dev); path != img && !strings.Contains(note, "core/fileio_5/theirs") {
				t.Errorf("readonly, with %s served: noted %q", path, note)
			}
		}
	})
	t.Run("read-only loop", func(t *testing.T) {
		img := image(t, "disk.img", "", mib)
		dev := loop(t, img, "--read-only")
		refused(t, img, dev)
		if note := reads(t, img); note != "" {
			t.Errorf("noted %q of two that read", note)
		}
		if _, err := block.Open(dev, block.Options{}); err == nil {
			t.Error("a read-only loop device was opened for writing")
		}
		if note := reads(t, dev); note != "" {
			t.Errorf("noted %q of a read-only loop device", note)
		}
	})
	t.Run("image of a gvm", func(t *testing.T) {
		img := image(t, "disk.img", "", mib)
		dev := loop(t, img)
		twin := loop(t, img)
		refused(t, dev, twin) // two devices on one file
		detach(t, twin)
		w := open(t, dev, block.Options{})
		refused(t, dev, "given twice")
		refused(t, img)
		w.Close()
		detach(t, dev)
		w = open(t, img, block.Options{})
		dev = loop(t, img, "--partscan")
		refused(t, dev, img)
		if _, err := exec.LookPath("addpart"); err == nil {
			refused(t, partition(t, dev, 1, 8, 8), img)
		}
		w.Close()
		open(t, dev, block.Options{}).Close()
	})
	t.Run("parts of a file", func(t *testing.T) {
		img := image(t, "disk.img", "", 3*mib)
		one, two := loop(t, img, "--sizelimit", "1M"), loop(t, img, "--offset", "1M", "--sizelimit", "1M")
		open(t, one, block.Options{})
		open(t, two, block.Options{}).Close()
		both := loop(t, img, "--offset", "512K")
		refused(t, two, both)
		refused(t, both)
	})
	t.Run("loop on loop", func(t *testing.T) {
		lower := loop(t, ext4(t))
		upper := loop(t, lower)
		refused(t, lower, upper)
		dir := mount(t, lower)
		refused(t, upper, lower, "mounted at "+dir)
	})
	t.Run("partition", func(t *testing.T) {
		needs(t, "addpart")
		img := image(t, "disk.img", "", 32*mib)
		dev := loop(t, img, "--partscan")
		one, two := partition(t, dev, 1, 2048, 20480), partition(t, dev, 2, 24576, 20480)
		run(t, "mkfs.ext4", "-q", "-F", one)
		dir := mount(t, one)
		refused(t, one, "mounted at "+dir)
		refused(t, dev, "mounted at "+dir)
		refused(t, img, dev)
		w := open(t, two, block.Options{})
		refused(t, dev)
		w.Close()
		run(t, "umount", dir)
		blocktest.AwaitUnclaimed(t, one)
		a, b := open(t, one, block.Options{}), open(t, two, block.Options{})
		refused(t, dev, "given twice")
		a.Close()
		b.Close()
		w = open(t, dev, block.Options{})
		refused(t, one, "given twice")
		w.Close()
		run(t, "mount", one, dir) // what Cleanup unmounts
	})
	t.Run("loop on a partition", func(t *testing.T) {
		needs(t, "addpart")
		dev := loop(t, image(t, "disk.img", "", 32*mib), "--partscan")
		one, two := partition(t, dev, 1, 2048, 20480), partition(t, dev, 2, 24576, 20480)
		onOne := loop(t, one)
		for _, upper := range []string{onOne, loop(t, onOne)} { // the second is on the first
			run(t, "mkfs.ext4", "-q", "-F", upper)
			dir := mount(t, upper)
			refused(t, dev, onOne, "losetup --detach "+onOne)
			refused(t, one, onOne, "losetup --detach "+onOne)
			open(t, two, block.Options{}).Close()
			reads(t, dev)
			run(t, "umount", dir)
			run(t, "mount", upper, dir) // for Cleanup
		}
	})
	t.Run("loop on a disk with partitions", func(t *testing.T) {
		needs(t, "addpart")
		dev := loop(t, image(t, "disk.img", "", 32*mib), "--partscan")
		one, two := partition(t, dev, 1, 2048, 20480), partition(t, dev, 2, 24576, 20480)
		part := loop(t, dev, "--offset", "1M", "--sizelimit", "10M")
		refused(t, one, part, "losetup --detach "+part)
		open(t, two, block.Options{}).Close()
		reads(t, one)
		refused(t, loop(t, one), part, "losetup --detach "+part)
	})
	t.Run("device mapper", func(t *testing.T) {
		needs(t, "dmsetup")
		dev := loop(t, image(t, "disk.img", "", mib))
		name := "gvm-test-" + filepath.Base(dev)
		table := "0 2048 linear " + dev + " 0"
		if out, err := exec.Command("dmsetup", "create", name, "--table", table).CombinedOutput(); err != nil {
			t.Skipf("no device mapper here: %s", out)
		}
		t.Cleanup(func() { run(t, "dmsetup", "remove", name) })
		refused(t, dev, name)
	})
	t.Run("file mounted without a loop device", func(t *testing.T) {
		path := image(t, "erofs.img", emptyEROFS(), mib)
		link := filepath.Join(filepath.Dir(path), "link")
		if err := os.Link(path, link); err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		mountEROFS(t, path, dir)
		t.Cleanup(func() { run(t, "umount", dir) })
		refused(t, path, dir, "umount")
		refused(t, link, dir, "umount")
		if notes := reads(t, path); strings.Contains(notes, dir) {
			t.Errorf("a mount that cannot write is noted: %s", notes)
		}
		refused(t, loop(t, link), dir, "umount")
	})
	t.Run("file mounted without a loop device in another namespace", func(t *testing.T) {
		path := image(t, "erofs.img", emptyEROFS(), mib)
		dir := t.TempDir()
		mountEROFS(t, path, dir)
		keepMounts(t)
		run(t, "umount", dir)
		refused(t, path, "mounted at "+dir, "nsenter -t ", " -m umount "+dir+" first")
	})
	t.Run("swap", func(t *testing.T) {
		needs(t, "mkswap", "swapon")
		path := filepath.Join(t.TempDir(), "swap")
		if err := os.WriteFile(path, make([]byte, mib), 0o600); err != nil {
			t.Fatal(err)
		}
		run(t, "mkswap", path)
		if out, err := exec.Command("swapon", path).CombinedOutput(); err != nil {
			t.Skipf("no swap here: %s", out)
		}
		refused(t, path, "swap", "swapoff")
		run(t, "swapoff", path)
		dev := loop(t, path)
		run(t, "swapon", dev)
		t.Cleanup(func() { run(t, "swapoff", dev) })
		refused(t, dev, "swap", "swapoff")
	})
}

// TestOverlayOnDevice: an overlay on a block device is continued on it as it was. Where gvm cannot
// tell, it says so.
func TestOverlayOnDevice(t *testing.T) {
	needs(t, "losetup", "addpart")
	img := image(t, "disk.img", "", 8*mib)
	dev := loop(t, img, "--partscan")
	file := filepath.Join(t.TempDir(), "overlay")
	begin := func(base string) (notes string, err error) {
		t.Helper()
		f := open(t, base, block.Options{ReadOnly: true, Note: func(s string) { notes += s + "\n" }})
		o, err := block.OpenOverlay(f, file)
		if err == nil {
			err = o.Close()
		} else {
			f.Close()
		}
		return notes, err
	}
	quiet := func(base string) {
		t.Helper()
		if notes, err := begin(base); err != nil || notes != "" {
			t.Errorf("%s: %v, notes %q", base, err, notes)
		}
	}
	noted := func(base string) {
		t.Helper()
		if notes, err := begin(base); err != nil || !strings.Contains(notes, file+": ") ||
			!strings.Contains(notes, base+" has changed since") {
			t.Errorf("%s: %v, notes %q", base, err, notes)
		}
	}
	for _, base := range []string{dev, partition(t, dev, 1, 2048, 2048)} {
		quiet(base)
		quiet(base)
		w := open(t, base, block.Options{})
		if _, err := w.WriteAt([]byte("changed"), 4096); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(w.Flush(), w.Close()); err != nil {
			t.Fatal(err)
		}
		if notes, err := begin(base); !errors.Is(err, block.ErrBase) ||
			!strings.Contains(err.Error(), base+" has changed since") {
			t.Errorf("%s, changed: %v, notes %q", base, err, notes)
		}
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
	}
	// An overlay of an earlier gvm has no time of its device.
	quiet(dev)
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	clear(b[24:32])
	seal(b)
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	noted(dev)
	quiet(dev)
	// A device with no file below it, as this loop device from now on, has no time.
	if err := errors.Join(os.Remove(img), os.Remove(file)); err != nil {
		t.Fatal(err)
	}
	quiet(dev)
	noted(dev)
}

// TestOpensWithoutWaiting: no FIFO makes any open wait.
func TestOpensWithoutWaiting(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	base := image(t, "base.img", "", mib)
	for what, do := range map[string]func() error{
		"overlay": func() error {
			f := open(t, base, block.Options{ReadOnly: true})
			defer f.Close()
			_, err := block.OpenOverlay(f, fifo)
			return err
		},
		"image":  func() error { _, err := block.Open(fifo, block.Options{}); return err },
		"info":   func() error { _, err := block.Inspect(fifo); return err },
		"create": func() error { return block.Create(fifo, mib, false) },
	} {
		t.Run(what, func(t *testing.T) {
			done := make(chan error, 1)
			go func() { done <- do() }()
			select {
			case err := <-done:
				if err == nil {
					t.Error("a FIFO was taken")
				}
			case <-time.After(20 * time.Second):
				t.Error("waits for a FIFO")
				if f, err := os.OpenFile(fifo, os.O_RDWR|unix.O_NONBLOCK, 0); err == nil {
					defer f.Close() // let it go
				}
			}
		})
	}
}
