package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"

	"gvm/guest/embedded/embeddedtest"
)

// passes runs the embedded guest and returns its report and console.
func passes(t *testing.T, args ...string) (embeddedtest.Report, string) {
	t.Helper()
	r := gvmRuns(t, command(t, args...))
	out := lines(r.out)
	report, err := embeddedtest.ParseReport(out)
	if err != nil || !report.Passed || r.status != 0 || r.errs != "" {
		t.Fatalf("status %d, %v\n%s%s", r.status, err, out, r.errs)
	}
	return report, out
}

func TestDiskNotWritten(t *testing.T) {
	for _, option := range []string{"", ",readonly", ",cache=writethrough", ",cache=unsafe", ",block_size=4096"} {
		t.Run(strings.ReplaceAll(option, ",", " "), func(t *testing.T) {
			t.Parallel()
			img := image(t, "disk", 9, 1<<20)
			want, err := os.ReadFile(img)
			if err != nil {
				t.Fatal(err)
			}
			args := []string{"run", "--disk", img + option}
			if option == ",readonly" {
				args = append(args, "--guest-arg", "write") // where the disk allows it
			}
			_, out := passes(t, args...)
			if got, err := os.ReadFile(img); err != nil || !bytes.Equal(got, want) {
				t.Errorf("the image changed, %v", err)
			}
			line := map[string]string{"": "writable, write cache on", ",readonly": "write-protected",
				",cache=writethrough": "writable, write cache off",
				",cache=unsafe":       "writable, write cache on",
				",block_size=4096":    "256 blocks of 4096 bytes"}[option]
			if !strings.Contains(out, line) {
				t.Errorf("%s\nlacks %q", out, line)
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
			img := image(t, "disk", 17, 1<<20)
			original, err := os.ReadFile(img)
			if err != nil {
				t.Fatal(err)
			}
			passes(t, "run", "--disk", img+tt.options, "--guest-arg", "write")
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
	passes(t, "run", "--disk", img+",size=1G", "--guest-arg", "write")
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
	args := []string{"run", "--guest-arg", "write"}
	paths := make([]string, len(disks))
	for i, d := range disks {
		paths[i] = image(t, "disk", byte(31*i), d.size)
		args = append(args, "--disk", paths[i]+d.options)
	}
	report, _ := passes(t, args...)
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
	golden := image(t, "golden", 9, 1<<20)
	before, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	p := startGVM(t, "", guestRun("--disk="+golden+",overlay=on", "spin")...)
	p.expect("spinning")
	file := filepath.Join(t.TempDir(), "overlay")
	for range 2 {
		passes(t, guestRun("--disk="+golden+",overlay=on", "--disk="+golden+",overlay="+file+",lun=1", "write")...)
	}
	if fi, err := os.Stat(file); err != nil || fi.Size() < 1<<20 {
		t.Errorf("the overlay: %v", err)
	}
	if now, err := os.ReadFile(golden); err != nil || !bytes.Equal(now, before) {
		t.Errorf("the image has changed, %v", err)
	}
	wantBad(t, gvmRuns(t, command(t, "run", "--disk", golden)), "in use by process "+fmt.Sprint(p.cmd.Process.Pid))
	p.signal(syscall.SIGTERM)
	p.wait()
	if err := os.WriteFile(golden, append(before, make([]byte, 512)...), 0o600); err != nil {
		t.Fatal(err)
	}
	wantBad(t, gvmRuns(t, command(t, "run", "--disk", golden+",overlay="+file)), "another size")
}

// TestMemoryDisks: disks without an image work as disks.
func TestMemoryDisks(t *testing.T) {
	t.Parallel()
	passes(t, guestRun("--disk=mem:2M", "--disk=mem:16M,block_size=4096", "write")...)
	passes(t, guestRun("--disk=null:3T")...)
}

// TestFullFileSystem: a file for which there is no room gives one line that names it, and leaves no
// empty file.
func TestFullFileSystem(t *testing.T) {
	full := t.TempDir()
	if err := syscall.Mount("tmpfs", full, "tmpfs", 0, "size=64k"); err != nil {
		t.Skipf("mounting a tmpfs: %v", err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(full, 0) })
	if err := os.WriteFile(filepath.Join(full, "fill"), make([]byte, 1<<20), 0o600); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("filling: %v", err)
	}
	img := image(t, "disk", 3, 1<<20)
	for _, tt := range []struct {
		args, tmp, want string
		lines           int
	}{
		{"--trace " + full + "/tr", "", "trace " + full + "/tr: ", 1},
		{"--disk " + img + ",overlay=" + full + "/ovl", "", full + "/ovl: no space left", 1},
		{"--disk " + img + ",overlay=on", full, "temporary file in " + full + ": " +
			"no space left on device; set TMPDIR", 2},
		{"--disk " + img + ",overlay=on", full + "/none", "temporary file in " + full + "/none: no such file", 2},
	} {
		c := command(t, append([]string{"run"}, strings.Fields(tt.args)...)...)
		if tt.tmp != "" {
			c.Env = append(c.Environ(), "TMPDIR="+tt.tmp)
		}
		r := gvmRuns(t, c)
		if r.status == 0 || !strings.Contains(r.errs, tt.want) || strings.Count(r.errs, "\n") > tt.lines ||
			strings.Contains(r.errs, "invalid argument") {
			t.Errorf("%s: status %d, %q; want %q", tt.args, r.status, r.errs, tt.want)
		}
	}
	c := command(t, "bench", "disk")
	c.Env = append(c.Environ(), "TMPDIR="+full+"/none")
	if r := gvmRuns(t, c); r.status != 2 || !strings.Contains(r.errs, "set TMPDIR to") {
		t.Errorf("bench disk: %+v", r)
	}
	if list, err := os.ReadDir(full); err != nil || len(list) != 1 {
		t.Errorf("left behind: %v, %v", list, err)
	}
}
