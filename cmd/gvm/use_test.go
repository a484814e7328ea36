package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"gvm/devices/block/blocktest"
	"gvm/guest/embedded"
)

// TestDiskInUseByHost: a guest does not write to a disk that the host has mounted, and the file
// system stays intact.
func TestDiskInUseByHost(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, for loop devices")
	}
	dir := t.TempDir()
	img, mnt := filepath.Join(dir, "fs.img"), filepath.Join(dir, "mnt")
	sh := func(line string) string {
		t.Helper()
		c := exec.Command("sh", "-c", line)
		c.Dir = dir
		out, err := c.CombinedOutput()
		if err != nil {
			t.Skipf("%s: %v: %s", line, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	dev := sh("mkdir mnt && truncate -s 16M fs.img && mkfs.ext4 -q -F fs.img && losetup --find --show fs.img")
	t.Cleanup(func() { _ = exec.Command("losetup", "--detach", dev).Run() })
	sh("mount " + dev + " mnt && echo kept >mnt/file")
	t.Cleanup(func() { _ = unix.Unmount(mnt, 0) })
	for _, disk := range []string{dev, img, dev + ",cache=unsafe", img + ",lock=off"} {
		wantBad(t, ask(t, dir, "run", "--disk", disk, "--guest-arg", "write"), "in use|mounted at "+mnt+"|umount")
	}
	wantBad(t, ask(t, dir, "image", "resize", img, "32M"), "in use|mounted at "+mnt)
	if r := ask(t, dir, "image", "info", dev); r.status != 0 || !strings.Contains(r.out, "mounted at "+mnt) {
		t.Errorf("image info: %d %s%s", r.status, r.out, r.errs)
	}
	r := ask(t, dir, "run", "--disk", dev+",readonly")
	if r.status != 0 || !strings.Contains(r.errs, "may change while the guest reads it") ||
		!strings.Contains(r.out, "\nPASS\r\n") {
		t.Errorf("readonly: status %d: %s%s", r.status, r.out, r.errs)
	}

	name := fmt.Sprintf("use-%d", os.Getpid())
	p := startGVM(t, dir, guestRun("--name="+name, "hang")...)
	p.expect("hanging")
	wantBad(t, ask(t, dir, "disk", "add", name, img), "in use|mounted at "+mnt)
	p.signal(syscall.SIGTERM)
	p.wait()

	sh("umount mnt && e2fsck -f -n " + dev)
	blocktest.AwaitUnclaimed(t, dev)
	// While a guest has the device, the host does not mount it.
	p = startGVM(t, dir, guestRun("--disk="+dev, "hang")...)
	p.expect("hanging")
	if err := exec.Command("mount", dev, mnt).Run(); err == nil {
		t.Error("the host mounted a guest's disk")
	}
	wantBad(t, ask(t, dir, "run", "--disk", img), "in use by process "+fmt.Sprint(p.cmd.Process.Pid))
	p.signal(syscall.SIGTERM)
	p.wait()
	if r := ask(t, dir, "run", "--disk", dev, "--guest-arg", "write"); r.status != 0 {
		t.Errorf("after it: status %d: %s%s", r.status, r.out, r.errs)
	}
}

// TestNoLocks runs gvm without file locks, as on some network file systems.
func TestNoLocks(t *testing.T) {
	gvm := func(args ...string) result {
		c := command(t, args...)
		c.Env = append(c.Env, refusedEnv+"=locks")
		for _, name := range []string{"disk", "two", "three"} {
			if err := os.WriteFile(filepath.Join(c.Dir, name), make([]byte, 1<<20), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return gvmRuns(t, c)
	}
	run := func(args ...string) result { return gvm(append([]string{"run"}, args...)...) }
	wantBad(t, run("--disk", "disk"), "disk: the file system has no locks|no locks available|lock=off")
	wantBad(t, gvm("image", "resize", "disk", "2M"), "disk: the file system has no locks|lock=off")
	wantBad(t, gvm("image", "resize", "--lock=maybe", "disk", "2M"), "--lock maybe: want on or off")
	for _, args := range []string{"image resize --lock=off disk 2M", "image info disk"} {
		if r := gvm(strings.Fields(args)...); r.status != 0 || r.errs != "" {
			t.Errorf("%s: status %d: %s", args, r.status, r.errs)
		}
	}
	if r := run("--disk", "disk,overlay=disk.ovl"); r.status != exitUsage ||
		!strings.Contains(r.errs, "disk.ovl: the file system has no locks (no") {
		t.Errorf("overlay: status %d: %s%s", r.status, r.out, r.errs)
	}
	trace, err := filepath.Abs("testdata/a.trace")
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range []string{"replay " + trace, "bench guest --write --time=1ms --rounds=1 --qemu=none"} {
		if r := gvm(strings.Fields(args)...); strings.Contains(r.errs, "no locks") || r.status > exitDiffers {
			t.Errorf("%s: status %d: %s", args, r.status, r.errs)
		}
	}
	for disks, notes := range map[string][]string{ // a guest for all of the same notes
		"disk,readonly two,overlay=on":                                     {"disk", "two"},
		"disk,lock=off two,pi=1,lock=off three,overlay=three.ovl,lock=off": nil,
	} {
		var args []string
		for disk := range strings.FieldsSeq(disks) {
			args = append(args, "--disk", disk)
		}
		r := run(args...)
		if r.status != 0 || !strings.Contains(r.out, "\nPASS\r\n") || strings.Count(r.errs, "\n") != len(notes) {
			t.Errorf("%s: status %d: %s%s", disks, r.status, r.out, r.errs)
		}
		for _, name := range notes {
			if !strings.Contains(r.errs, name+": the file system has no locks") {
				t.Errorf("%s: no note of %s: %s", disks, name, r.errs)
			}
		}
	}
}

// TestInputEnds: --timeout and signals end a gvm that reads a file of its command line from a pipe
// without an end or without data.
func TestInputEnds(t *testing.T) {
	t.Parallel()
	for _, args := range []string{"run --kernel fifo", "run --kernel kernel --initrd fifo", "run --strict --allow fifo",
		"kunit --kernel kernel --strict --allow fifo", "kunit --kernel fifo", "test --kernel fifo", "test --allow fifo",
		"test --repeat 2 --allow fifo"} {
		for _, endless := range []bool{false, true} {
			if endless && strings.Contains(args, "--allow") {
				continue // too large
			}
			for how, want := range map[string]int{"timeout": exitTimeout, "signal": 143} {
				words := strings.Fields(args)
				if how == "timeout" {
					words = append(words, "--timeout=100ms")
				}
				if words[0] == "test" {
					words = append(words, "--", "sh")
				}
				f, dir := openFIFO(t)
				if err := os.WriteFile(filepath.Join(dir, "kernel"), embedded.Image, 0o600); err != nil {
					t.Fatal(err)
				}
				const some = 4
				taken := make(chan error, 1)
				go func() { // ends when f is closed
					for n := 0; ; n++ {
						if n == some {
							taken <- nil // more than a pipe holds, so gvm has read
						}
						if _, err := f.Write(make([]byte, 64<<10)); err != nil || n == some && !endless {
							return
						}
					}
				}()
				p := startGVM(t, dir, words...)
				if how == "signal" {
					<-taken
					p.signal(syscall.SIGTERM)
				}
				// No guest ran: nothing is said of its console.
				if r := p.wait(); r.status != want || !strings.Contains(r.errs, " while fifo was read\n") ||
					strings.Contains(r.errs, "no test ran") {
					t.Errorf("%s, endless %v, %s: status %d: %s", args, endless, how, r.status, r.errs)
				}
				if err := f.Close(); err != nil {
					t.Error(err)
				}
			}
		}
	}
}
