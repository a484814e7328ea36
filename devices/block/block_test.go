package block_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvm/devices/block"
	"gvm/devices/block/blocktest"
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

// image makes a file of n bytes that starts with head.
func image(t *testing.T, name, head string, n int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(head), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, n); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestBackends(t *testing.T) {
	file := func(t *testing.T, o block.Options) block.Backend {
		o.Size = 2 * mib
		return open(t, filepath.Join(t.TempDir(), "disk.img"), o)
	}
	t.Run("File", func(t *testing.T) {
		blocktest.TestBackend(t, func() block.Backend { return file(t, block.Options{}) })
	})
	t.Run("Direct", func(t *testing.T) {
		blocktest.TestBackend(t, func() block.Backend { return file(t, block.Options{Direct: true}) })
	})
	t.Run("Mem", func(t *testing.T) {
		blocktest.TestBackend(t, func() block.Backend { return block.NewMem(2 * mib) })
	})
	t.Run("Memory", func(t *testing.T) {
		blocktest.TestBackend(t, func() block.Backend {
			f, err := block.OpenMemory(2 * mib)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { f.Close() })
			return f
		})
	})
	t.Run("Temporary", func(t *testing.T) {
		dir := t.TempDir()
		t.Setenv("TMPDIR", dir)
		blocktest.TestBackend(t, func() block.Backend {
			f, err := block.OpenTemporary(2*mib, nil)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { f.Close() })
			if files, err := os.ReadDir(dir); len(files) > 0 || err != nil {
				t.Errorf("%v, %v: want no file with a name", files, err)
			}
			return f
		})
	})
	t.Run("Volatile", func(t *testing.T) {
		blocktest.TestBackend(t, func() block.Backend { return block.NewVolatile(2 * mib) })
	})
	t.Run("Faulty", func(t *testing.T) {
		blocktest.TestBackend(t, func() block.Backend { return block.NewFaulty(block.NewMem(2 * mib)) })
	})
	t.Run("plain", func(t *testing.T) {
		// A backend with nothing but the four methods.
		blocktest.TestBackend(t, func() block.Backend { return struct{ block.Backend }{block.NewMem(2 * mib)} })
	})
}

func TestOpenSize(t *testing.T) {
	t.Run("create", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "new.img")
		f := open(t, path, block.Options{Size: 3 << 40})
		fi, err := os.Stat(path)
		if err != nil || f.Size() != 3<<40 || fi.Size() != 3<<40 {
			t.Fatalf("size %d, %v", f.Size(), err)
		}
		if used := fi.Sys().(*syscall.Stat_t).Blocks; used > 8 {
			t.Errorf("a new image has %d blocks in use, want a sparse one", used)
		}
	})
	t.Run("grow", func(t *testing.T) {
		path := image(t, "disk.img", "first sector", mib)
		if f := open(t, path, block.Options{Size: 2 * mib}); f.Size() != 2*mib {
			t.Errorf("size %d", f.Size())
		}
		data, err := os.ReadFile(path)
		if err != nil || !bytes.HasPrefix(data, []byte("first sector")) || len(data) != 2*mib {
			t.Errorf("after growing: %d bytes, %v, data kept: %v", len(data), err, bytes.HasPrefix(data, []byte("first sector")))
		}
	})
	t.Run("failed creation leaves nothing", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "new.img")
		if _, err := block.Open(path, block.Options{Size: 1 << 62}); err == nil {
			t.Fatal("an image of 4 EiB was created")
		}
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the file is still there: %v", err)
		}
	})
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	vdi := strings.Repeat("\x00", 0x40) + "\x7f\x10\xda\xbe"
	tests := []struct {
		name string
		path string
		o    block.Options
		kind error
		text string // part of the message
	}{
		{"missing", filepath.Join(dir, "none"), block.Options{}, fs.ErrNotExist, "give a size to create it"},
		{"missing, readonly", filepath.Join(dir, "none"), block.Options{ReadOnly: true, Size: mib}, fs.ErrNotExist,
			"no such file"},
		{"directory", dir, block.Options{}, block.ErrNotDisk, "is a directory"},
		{"fifo", fifo, block.Options{}, block.ErrNotDisk, "is a pipe"},
		{"character device", "/dev/null", block.Options{}, block.ErrNotDisk, "is a character device"},
		{"empty", image(t, "e", "", 0), block.Options{}, block.ErrSize, "is empty"},
		{"odd size", image(t, "o", "", mib+1), block.Options{}, block.ErrSize, "truncate -s 1049088"},
		{"odd for 4096", image(t, "o4", "", mib+512), block.Options{BlockSize: 4096}, block.ErrSize, "block size 4096"},
		{"odd size asked", filepath.Join(dir, "none"), block.Options{Size: 1000}, block.ErrSize,
			"size 1000 is not a multiple"},
		{"larger than asked", image(t, "l", "", 2*mib), block.Options{Size: mib}, block.ErrSize, "never made smaller"},
		{"smaller, readonly", image(t, "s", "", mib), block.Options{Size: 2 * mib, ReadOnly: true}, block.ErrSize,
			"cannot grow readonly"},
		{"qcow2", image(t, "disk.qcow2", "QFI\xfb\x00\x00\x00\x03", mib), block.Options{}, block.ErrFormat,
			"disk.qcow2: qcow2 image; gvm takes raw images: qemu-img convert -O raw "},
		{"vmdk", image(t, "d", "KDMV", mib), block.Options{}, block.ErrFormat, "VMDK image"},
		{"vmdk descriptor", image(t, "d", "# Disk DescriptorFile\n", 512), block.Options{}, block.ErrFormat, "VMDK image"},
		{"fixed vhd", image(t, "d", strings.Repeat("\x00", mib-512)+"conectix", mib), block.Options{}, block.ErrFormat,
			"VHD image"},
		{"android sparse", image(t, "d", "\x3a\xff\x26\xed", mib), block.Options{}, block.ErrFormat, "simg2img"},
		{"new by another format's name", filepath.Join(dir, "new.QCow2"), block.Options{Size: mib}, block.ErrFormat,
			"new.QCow2: is the name of a qcow2 image"},
		{"empty, by another format's name", image(t, "e.vdi", "", 0), block.Options{Size: mib}, block.ErrFormat,
			"e.vdi: is the name of a VDI image"},
		{"vhdx", image(t, "d", "vhdxfile", mib), block.Options{}, block.ErrFormat, "VHDX image"},
		{"vdi", image(t, "d", vdi, mib), block.Options{ReadOnly: true}, block.ErrFormat, "VDI image"},
		{"qcow2 to grow", image(t, "grow", "QFI\xfb", mib), block.Options{Size: 2 * mib}, block.ErrFormat, "qcow2 image"},
		{"qcow2 of odd size", image(t, "odd", "QFI\xfb", 1000), block.Options{}, block.ErrFormat, "qcow2 image"},
		{"gzip", image(t, "d.gz", "\x1f\x8b\x08\x00", mib), block.Options{}, block.ErrFormat, "gzip -dc "},
		{"xz", image(t, "d.xz", "\xfd7zXZ\x00", mib), block.Options{}, block.ErrFormat, "xz -dc "},
		{"bzip2", image(t, "d.bz2", "BZh91AY&SY", mib), block.Options{}, block.ErrFormat, "bzip2 file; decompress"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			before, _ := os.Stat(tt.path)
			f, err := block.Open(tt.path, tt.o)
			if err == nil {
				f.Close()
				t.Fatal("opened")
			}
			if after, _ := os.Stat(tt.path); before == nil && after != nil || before != nil && after.Size() != before.Size() {
				t.Error("the file was made or changed")
			}
			if !errors.Is(err, tt.kind) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("error %q, want %v with %q", err, tt.kind, tt.text)
			}
			if !strings.HasPrefix(err.Error(), tt.path+": ") || strings.Contains(err.Error(), "\n") ||
				strings.Contains(err.Error(), "%!") {
				t.Errorf("error %q: want one line that starts with the path", err)
			}
		})
	}
	t.Run("raw on demand", func(t *testing.T) {
		open(t, image(t, "d.gz", "\x1f\x8b\x08\x00", mib), block.Options{Raw: true})
	})
}

func TestLock(t *testing.T) {
	path := image(t, "disk.img", "", mib)
	ro := func() (*block.File, error) { return block.Open(path, block.Options{ReadOnly: true}) }
	a, err := ro()
	if err != nil {
		t.Fatal(err)
	}
	b, err := ro()
	if err != nil {
		t.Fatalf("two readers: %v", err)
	}
	_, err = block.Open(path, block.Options{})
	var locked *block.LockedError
	if !errors.As(err, &locked) || !errors.Is(err, block.ErrLocked) || locked.PID != os.Getpid() {
		t.Fatalf("writer beside readers: %v, want locked by %d", err, os.Getpid())
	}
	a.Close()
	b.Close()
	w := open(t, path, block.Options{})
	if _, err = ro(); !errors.Is(err, block.ErrLocked) {
		t.Errorf("reader beside a writer: %v", err)
	}
	if _, err = block.Open(path, block.Options{Size: 2 * mib}); !errors.Is(err, block.ErrLocked) ||
		!strings.Contains(err.Error(), "given twice") {
		t.Errorf("two writers: %v", err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Size() != mib {
		t.Errorf("a refused open changed the size to %d", fi.Size())
	}
	w.Close()
	if w, err = block.Open(path, block.Options{}); err != nil {
		t.Fatalf("after Close: %v", err)
	}
	w.Close()
}

// TestLockHolderUnseen: the error names a process whose descriptors the user may not see, as that
// of a gvm in its sandbox.
func TestLockHolderUnseen(t *testing.T) {
	path := image(t, "disk.img", "", mib)
	parent := filepath.Dir(filepath.Dir(path))                                          // of t.TempDir
	if err := errors.Join(os.Chmod(path, 0o666), os.Chmod(parent, 0o755)); err != nil { // for another user
		t.Fatal(err)
	}
	for _, read := range []string{"", "read "} {
		pid, end := otherHas(t, read+path, hiddenEnv+"=1")
		if os.Getuid() != 0 {
			if _, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid)); err == nil {
				t.Error("the holder shows its descriptors")
			}
		}
		c := holder(t, path)
		if os.Getuid() == 0 {
			c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		}
		out, err := c.Output()
		want := fmt.Sprintf("%s: in use by process %d (exe); end that first\n", path, pid)
		if err == nil || string(out) != want {
			t.Errorf("%sthere: %v, %q, want %q", read, err, out, want)
		}
		end()
	}
}

// TestLockOtherProcess starts this test binary again to hold a lock.
func TestLockOtherProcess(t *testing.T) {
	if path := os.Getenv("LOCK_IMAGE"); path != "" {
		open(t, path, block.Options{})
		fmt.Println("locked")
		io.Copy(io.Discard, os.Stdin)
		return
	}
	path := image(t, "disk.img", "", mib)
	cmd := exec.Command(os.Args[0], "-test.run=^TestLockOtherProcess$")
	cmd.Env = append(os.Environ(), "LOCK_IMAGE="+path)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, len("locked\n"))); err != nil {
		t.Fatal(err)
	}
	_, err = block.Open(path, block.Options{})
	want := fmt.Sprintf("%s: in use by process %d (block.test); end that first", path, cmd.Process.Pid)
	if !errors.Is(err, block.ErrLocked) || err.Error() != want {
		t.Errorf("error %q, want %q", err, want)
	}
	in.Close()
	io.Copy(io.Discard, out)
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	open(t, path, block.Options{})
}

// TestTruncated checks that data which is gone is an error, never zeroes.
func TestTruncated(t *testing.T) {
	path := image(t, "disk.img", "", mib)
	f := open(t, path, block.Options{})
	if err := os.Truncate(path, mib/2); err != nil {
		t.Fatal(err)
	}
	if n, err := f.ReadAt(make([]byte, 8192), mib/2-4096); n != 4096 || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("ReadAt = %d, %v, want 4096, unexpected EOF", n, err)
	}
}

// needHoles skips where the file system of the temporary directory has no holes. It asks the
// kernel for that: an f that says so without reason fails the test.
func needHoles(t *testing.T, f *block.File) {
	t.Helper()
	probe, err := os.Create(filepath.Join(t.TempDir(), "probe"))
	if err != nil {
		t.Fatal(err)
	}
	defer probe.Close()
	err = unix.Fallocate(int(probe.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096)
	if errors.Is(err, unix.EOPNOTSUPP) {
		t.Skip("the file system of the temporary directory has no holes")
	}
	if err != nil || f.DiscardGranularity() == 0 {
		t.Fatalf("punch a hole: %v; granularity %d", err, f.DiscardGranularity())
	}
}

func TestDiscardFreesSpace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.img")
	f := open(t, path, block.Options{Size: 8 * mib})
	needHoles(t, f)
	if _, err := f.WriteAt(bytes.Repeat([]byte{7}, 8*mib), 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Flush(); err != nil {
		t.Fatal(err)
	}
	blocks := func() int64 {
		fi, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		return fi.Sys().(*syscall.Stat_t).Blocks
	}
	full := blocks()
	if err := f.Discard(mib, 6*mib); err != nil {
		t.Fatal(err)
	}
	if got := full - blocks(); got != 6*mib/512 {
		t.Errorf("discard of 6 MiB freed %d blocks, want %d", got, 6*mib/512)
	}
}

func TestReadOnlyFile(t *testing.T) {
	path := image(t, "disk.img", "", mib)
	f := open(t, path, block.Options{ReadOnly: true})
	if _, err := f.WriteAt(make([]byte, 512), 0); err == nil {
		t.Error("a write to a readonly image succeeded")
	}
	if g := f.DiscardGranularity(); g != 0 {
		t.Errorf("readonly image offers discard, granularity %d", g)
	}
}

func TestIdentity(t *testing.T) {
	path := image(t, "disk.img", "", mib)
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	if got := open(t, link, block.Options{ReadOnly: true}).Identity(); got != path {
		t.Errorf("Identity() = %q, want %q", got, path)
	}
}

func TestFaulty(t *testing.T) {
	fill := func(b block.Backend) {
		if _, err := b.WriteAt(bytes.Repeat([]byte{1}, 8192), 0); err != nil {
			t.Fatal(err)
		}
	}
	t.Run("nth", func(t *testing.T) {
		f := block.NewFaulty(block.NewMem(mib), block.Fault{Op: block.OpFlush, Nth: 2, Err: syscall.EIO})
		for i, want := range []error{nil, syscall.EIO, nil} {
			if err := f.Flush(); err != want {
				t.Errorf("flush %d: %v, want %v", i+1, err, want)
			}
		}
	})
	t.Run("range and short", func(t *testing.T) {
		m := block.NewMem(mib)
		fill(m)
		f := block.NewFaulty(m, block.Fault{Op: block.OpWrite, Off: 4096, Len: 512, Short: 1024, Err: syscall.ENOSPC})
		if _, err := f.WriteAt(make([]byte, 4096), 0); err != nil {
			t.Errorf("write before the range: %v", err)
		}
		if _, err := f.WriteAt(make([]byte, 512), 4608); err != nil {
			t.Errorf("write after the range: %v", err)
		}
		fill(m)
		if n, err := f.WriteAt(bytes.Repeat([]byte{2}, 4096), 3072); n != 1024 || err != syscall.ENOSPC {
			t.Errorf("write into the range = %d, %v, want 1024, ENOSPC", n, err)
		}
		got := make([]byte, 2)
		if _, err := m.ReadAt(got, 4095); err != nil || !bytes.Equal(got, []byte{2, 1}) {
			t.Errorf("around the short write: %v, %v, want 2, 1", got, err)
		}
	})
	t.Run("hang", func(t *testing.T) {
		hang := make(chan struct{})
		f := block.NewFaulty(block.NewMem(mib), block.Fault{Op: block.OpRead, Nth: 1, Hang: hang, Delay: time.Microsecond})
		done := make(chan error)
		go func() {
			_, err := f.ReadAt(make([]byte, 512), 0)
			done <- err
		}()
		if err := f.Flush(); err != nil { // goes past the one that hangs
			t.Error(err)
		}
		select {
		case <-done:
			t.Error("the read did not hang")
		default:
		}
		close(hang)
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestNull(t *testing.T) {
	b := block.Null(mib)
	p := []byte{1, 2, 3}
	if n, err := block.ReadVec(b, [][]byte{p}, 0); n != 3 || err != nil || !bytes.Equal(p, make([]byte, 3)) {
		t.Errorf("ReadVec = %d, %v, data %v", n, err, p)
	}
	if n, err := block.WriteVecDurable(b, [][]byte{p}, 0); n != 3 || err != nil || b.Size() != mib || b.Flush() != nil {
		t.Errorf("WriteVecDurable = %d, %v", n, err)
	}
}

// TestBlockDevice runs the acceptance suite on a loop device where the system
// lets us make one.
func TestBlockDevice(t *testing.T) {
	for _, direct := range []bool{false, true} {
		name := map[bool]string{false: "buffered", true: "direct"}[direct]
		t.Run(name, func(t *testing.T) {
			control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
			if err != nil {
				t.Skipf("no loop device can be set up here: %v", err)
			}
			control.Close()
			blocktest.TestBackend(t, func() block.Backend {
				out, err := exec.Command("losetup", "--find", "--show", image(t, "disk.img", "", 2*mib)).Output()
				if err != nil {
					t.Fatalf("losetup: %v", err)
				}
				dev := strings.TrimSpace(string(out))
				t.Cleanup(func() {
					if err := exec.Command("losetup", "--detach", dev).Run(); err != nil {
						t.Errorf("losetup --detach %s: %v", dev, err)
					}
				})
				b := open(t, dev, block.Options{Direct: direct})
				if _, err := block.Open(dev, block.Options{}); !errors.Is(err, block.ErrLocked) {
					t.Errorf("second open: %v", err)
				}
				if _, err := block.Open(dev, block.Options{Size: mib, ReadOnly: true}); err == nil {
					t.Error("opened a block device with another size")
				}
				if err := b.Resize(4*mib, false, nil); !errors.Is(err, block.ErrSize) || b.Size() != 2*mib {
					t.Errorf("a block device was given another size: %v", err)
				}
				if err := b.Resize(0, false, nil); err != nil || b.Size() != 2*mib {
					t.Errorf("size %d as it is, %v", b.Size(), err)
				}
				return b
			})
		})
	}
}

// BenchmarkFile is 4 KiB in two buffers from the page cache.
func BenchmarkFile(b *testing.B) {
	f, err := block.Open(filepath.Join(b.TempDir(), "disk.img"), block.Options{Size: mib})
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	iov := [][]byte{make([]byte, 2048), make([]byte, 2048)}
	for name, do := range map[string]func([][]byte, int64) (int, error){"write": f.WriteVec, "read": f.ReadVec} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for range b.N {
				if _, err := do(iov, 4096); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// TestNoFileInDev: a mistyped device makes no file, which would be in the host's memory.
func TestNoFileInDev(t *testing.T) {
	path := "/dev/gvm-no-such-device"
	_, err := block.Open(path, block.Options{Size: 1 << 20})
	if !errors.Is(err, block.ErrNotDisk) || !strings.Contains(err.Error(), "no such device") {
		t.Errorf("with a size: %v", err)
	}
	_, err = block.Open(path, block.Options{})
	if !errors.Is(err, fs.ErrNotExist) || strings.Contains(err.Error(), "give a size") {
		t.Errorf("without a size: %v", err)
	}
	if err := block.Create("/dev/null", 1<<20, false); !errors.Is(err, fs.ErrExist) {
		t.Errorf("in place of a device: %v", err)
	}
	const null = "/dev/null: is a character device, and gvm makes no file in /dev; name a file elsewhere"
	if err := block.CheckName("/dev/null"); !errors.Is(err, block.ErrNotDisk) || err.Error() != null {
		t.Errorf("the name of a device: %v", err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it is there: %v", err)
		_ = os.Remove(path)
	}
	shared := fmt.Sprintf("/dev/shm/gvm-test-%d", os.Getpid())
	f, err := block.Open(shared, block.Options{Size: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Close(), os.Remove(shared)); err != nil {
		t.Error(err)
	}
}
