package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"gvm/devices/block"
)

func TestImage(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	if err := os.WriteFile(at("disk.qcow2"), append([]byte("QFI\xfb"), make([]byte, 1020)...), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(at("empty.img"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	// A tmpfs, as in the lab, makes a file of any size with holes.
	prealloc, status := "", 2
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	} else if st.Type == unix.TMPFS_MAGIC {
		prealloc, status = " --prealloc", 3
	}
	for _, v := range []struct {
		args   string
		status int
		out    string
		errs   string // part
	}{
		{"image create disk.img 4M", 0, "", ""},
		{"image create disk.img 4M", 2, "", "disk.img: file exists"},
		{"image create full.img 1M 2M", 2, "", "takes PATH SIZE, and got 3 words"},
		{"image create full.img 1M --prealloc", 0, "", ""},
		{"image create odd.img 1000", 2, "", "odd.img: size 1000 is not a multiple of 512; 1024 is"},
		{"image create none/new.img 1M", 2, "", "none/new.img: no such file"},
		{"image create huge.img 4194304T" + prealloc, status, "", "huge.img: "},
		{"image create zero.img 0", 2, "", "zero.img: size 0: want 512 bytes or more"},
		{"image create big.img much", 2, "", "big.img: size \"much\""},
		{"image create big.img 1.5P", 2, "", "big.img: size \"1.5P\": want a number and K, M, G or T, such as 1536T"},
		{"image resize big.img", 2, "", "image resize takes PATH SIZE, and got 1 word\n"},
		{"image create b.qcow2 1M", 2, "",
			"b.qcow2: is the name of a qcow2 image, and gvm makes raw ones: name it b.img, " +
				"or make it with gvm image create --raw"},
		{"image create c.hdd 1M", 2, "", "c.hdd: is the name of a Parallels image"},
		{"image create c.simg 1M", 2, "", "c.simg: is the name of a sparse image of Android's"},
		{"image create disk.img.pi 1M", 2, "", "disk.img.pi: is the name of a file of gvm's protection information"},
		{"image create disk.img.pr 1M", 2, "", "disk.img.pr: is the name of a file of gvm's persistent reservations"},
		{"image create B.VHDX 1M", 2, "", "B.VHDX: is the name of a VHDX image"},
		{"image create disk.img.gz 1M", 2, "", "disk.img.gz: is the name of a gzip file"},
		{"run --disk c.vmdk,size=1M", 2, "", "c.vmdk: is the name of a VMDK image"},
		{"run --disk disk.img,overlay=c.qcow2", 2, "", "c.qcow2: is the name of a qcow2 image"},
		{"image create --raw raw.vdi 1M", 0, "", ""},
		{"image info raw.vdi", 0, "path       " + at("raw.vdi") +
			"\nformat     raw\nsize       1 MiB\nallocated  0 bytes\nin use by  no process\n", ""},
		{"image info disk.img", 0, "path       " + at("disk.img") +
			"\nformat     raw\nsize       4 MiB\nallocated  0 bytes\nin use by  no process\n", ""},
		{"image info full.img", 0, "path       " + at("full.img") +
			"\nformat     raw\nsize       1 MiB\nallocated  1 MiB\nin use by  no process\n", ""},
		{"image info disk.qcow2", 0, "path       " + at("disk.qcow2") +
			"\nformat     qcow2 image\nsize       1 KiB\nallocated  4 KiB\nin use by  no process\n", ""},
		{"image info none.img", 2, "", "none.img: "},
		{"image info .", 2, "", "is a directory"},
		{"image info", 2, "", "image info takes PATH, and got 0 words"},
		{"image resize disk.img 8M", 0, "", ""},
		{"image resize disk.img 2M", 2, "", "the data behind them would be lost, which --shrink allows"},
		{"image resize --shrink disk.img 2M", 0, "", ""},
		{"image resize disk.qcow2 8M", 2, "", "qcow2 image; gvm takes raw images"},
		{"image resize disk.img 1000", 2, "", "not a multiple"},
		{"image resize empty.img 1M", 2, "", "empty.img: is empty; remove it, and make an image with gvm image create\n"},
		{"image create new.img 5000P", 2, "", `new.img: size "5000P": want a number and K, M, G or T` + "\n"},
		{"image create new.img 2000P", 2, "", "want a number and K, M, G or T, such as 2048000T; the largest is 4194304T"},
		{"image convert", 2, "", `unknown command "convert" of gvm image`},
	} {
		r := ask(t, dir, strings.Fields(v.args)...)
		if r.status != v.status || r.out != v.out || !strings.Contains(r.errs, v.errs) ||
			strings.Count(r.errs, "\n") > min(v.status, 1) {
			t.Errorf("%s: status %d, output %q, errors %q; want %d, %q, %q", v.args, r.status, r.out, r.errs,
				v.status, v.out, v.errs)
		}
	}
	list, err := os.ReadDir(dir)
	if err != nil || len(list) != 5 {
		t.Errorf("%v, %v: what failed has left something", list, err)
	}
}

// TestImageInUse: gvm image tells which process has an image, and changes none in use.
func TestImageInUse(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	err := errors.Join(block.Create(at("disk.img"), 2<<20, false), block.Create(at("full.img"), 1<<20, true))
	if err != nil {
		t.Fatal(err)
	}
	p := startGVM(t, dir, guestRun("--disk=disk.img", "--disk=full.img,overlay=full.ovl", "hang")...)
	p.expect("hanging")
	info := func(name string) (i block.Info) {
		t.Helper()
		r := ask(t, dir, "image", "info", "--json", name)
		if err := json.Unmarshal([]byte(r.out), &i); err != nil {
			t.Fatalf("%v: %+v", err, r)
		}
		return i
	}
	pid := p.cmd.Process.Pid
	if i := info("disk.img"); i.Writer != pid || i.Readers || i.Size != 2<<20 {
		t.Errorf("%+v", i)
	}
	if i := info("full.img"); i.Writer != 0 || !i.Readers {
		t.Errorf("%+v", i)
	}
	if i := info("full.ovl"); i.Writer != pid || i.Format != "overlay" || string(i.Base) != at("full.img") ||
		i.Size != 1<<20 {
		t.Errorf("%+v", i)
	}
	r := ask(t, dir, "image", "info", "full.ovl")
	if want := fmt.Sprintf("base       %s\nin use by  process %d, for writing\n", at("full.img"),
		pid); !strings.Contains(r.out, want) {
		t.Errorf("%s lacks %s", r.out, want)
	}
	added := at("added.img")
	if err := block.Create(added, 1<<20, false); err != nil {
		t.Fatal(err)
	}
	if r := ask(t, dir, "disk", "add", fmt.Sprint("gvm-", pid), added); r.status != 0 {
		t.Errorf("%+v", r)
	}
	if i := info("added.img"); i.Writer != pid { // whose broker opened it
		t.Errorf("%+v, of process %d", i, pid)
	}
	wantBad(t, ask(t, dir, "image", "resize", "disk.img", "8M"),
		fmt.Sprintf("disk.img: in use by process %d|gvm disk resize gvm-%[1]d disk.img 8M", pid))
	p.signal(syscall.SIGTERM)
	p.wait()
	wantBad(t, ask(t, dir, "run", "--disk=full.ovl"), "full.ovl: overlay of gvm's; |overlay=")
}
