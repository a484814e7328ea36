package block_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"gvm/devices/block"
)

// holdEnv has a process of the test binary open the image that it names, for reading if that begins
// with "read ", and hold it until its standard input ends.
const holdEnv = "GVM_TEST_HOLD"

// hiddenEnv has that process not show its descriptors to its user.
const hiddenEnv = "GVM_TEST_HIDDEN"

// sysfsEnv names its directory in place of /sys.
const sysfsEnv = "GVM_TEST_SYSFS"

func TestMain(m *testing.M) {
	if path := os.Getenv(holdEnv); path != "" {
		if dir := os.Getenv(sysfsEnv); dir != "" {
			block.SetSysfs(dir)
		}
		if os.Getenv(hiddenEnv) != "" {
			if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
				os.Stdout.WriteString(err.Error() + "\n")
				os.Exit(1)
			}
		}
		path, readOnly := strings.CutPrefix(path, "read ")
		f, err := block.Open(path, block.Options{ReadOnly: readOnly, NoLock: true})
		if err != nil {
			os.Stdout.WriteString(err.Error() + "\n")
			os.Exit(1)
		}
		os.Stdout.WriteString("open\n")
		_, _ = io.Copy(io.Discard, os.Stdin)
		f.Close()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// holder returns a process that opens what names an image as holdEnv does.
func holder(t *testing.T, what string, env ...string) *exec.Cmd {
	c := exec.CommandContext(t.Context(), "/proc/self/exe")
	c.Env = append(append(os.Environ(), holdEnv+"="+what), env...)
	return c
}

// otherHas has another process open what names an image as holdEnv does, until close is called. It
// returns the PID.
func otherHas(t *testing.T, what string, env ...string) (pid int, close func()) {
	t.Helper()
	c := holder(t, what, env...)
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	close = func() {
		in.Close()
		_ = c.Wait()
	}
	if line != "open\n" {
		close()
		t.Fatalf("another process: %s: %q, %v", what, line, err)
	}
	return c.Process.Pid, close
}

// pair is a use of storage by one process, and another's, and whether they exclude each other.
type pair struct {
	has, wants string
	conflict   bool
}

func tryPairs(t *testing.T, pairs ...pair) {
	t.Helper()
	for _, v := range pairs {
		pid, end := otherHas(t, v.has)
		path, readOnly := strings.CutPrefix(v.wants, "read ")
		o := block.Options{ReadOnly: readOnly, NoLock: true} // which is no override
		f, err := block.Open(path, o)
		if err == nil {
			f.Close()
		}
		who := fmt.Sprintf("in use by process %d (", pid)
		if (err != nil) != v.conflict || v.conflict && !strings.Contains(err.Error(), who) {
			t.Errorf("one has %s, another wants %s: %v; want a conflict: %t", v.has, v.wants, err, v.conflict)
		}
		end()
		if f, err = block.Open(path, o); err != nil {
			t.Errorf("%s, when no other has it: %v", v.wants, err)
			continue
		}
		f.Close()
	}
}

// TestRanges: a range that one gvm has, by any name, another does not write, and one that it writes
// no other has; parts of a file or disk that do not overlap are different storage.
func TestRanges(t *testing.T) {
	needs(t, "losetup", "addpart")
	img := image(t, "disk.img", "", 32*mib)
	one := loop(t, img, "--sizelimit", "1M")
	two := loop(t, img, "--offset", "1M", "--sizelimit", "1M")
	file := image(t, "other.img", "", 32*mib)
	disk := loop(t, file, "--partscan")
	p1, p2 := partition(t, disk, 1, 2048, 2048), partition(t, disk, 2, 4096, 2048)
	node := func(of string) string {
		path := filepath.Join(t.TempDir(), "node")
		mknod(t, of, path)
		return path
	}
	again, diskAgain := node(p1), node(disk)
	tryPairs(t, []pair{
		{"read " + img, one, true}, // the base of an overlay
		{"read " + img, two, true},
		{one, "read " + img, true},
		{two, "read " + img, true},
		{"read " + img, "read " + one, false},
		{"read " + one, two, false},
		{two, "read " + one, false},
		{one, two, false},
		{"read " + one, "read " + one, false},
		{"read " + file, p1, true},
		{p2, "read " + file, true},
		{p1, p2, false},
		{"read " + p1, p2, false},
		{"read " + disk, p1, true},
		{p2, "read " + disk, true},
		{"read " + p1, disk, true},
		{disk, "read " + p2, true},
		{"read " + p1, again, true},
		{again, "read " + p1, true},
		{"read " + disk, diskAgain, true},
		{diskAgain, "read " + disk, true},
		{"read " + diskAgain, p2, true},
	}...)
	// In one process likewise.
	base := open(t, file, block.Options{ReadOnly: true})
	refused(t, p1, "given twice")
	base.Close()
	a := open(t, p1, block.Options{})
	open(t, p2, block.Options{}).Close()
	_, err := block.Open(file, block.Options{ReadOnly: true})
	if err == nil || !strings.Contains(err.Error(), "given twice: "+p1) {
		t.Errorf("the file below a partition that is written: %v", err)
	}
	a.Close()
	// Without a file below, as of a disk, there are the nodes.
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	for i, of := range []string{p1, p2} {
		mknod(t, of, disk+"p"+strconv.Itoa(i+1))
	}
	tryPairs(t, []pair{
		{"read " + disk, p1, true},
		{p2, "read " + disk, true},
		{p1, p2, false},
		{"read " + p1, p2, false},
		{"read " + p1, disk, true},
		{disk, "read " + p2, true},
		{"read " + p1, again, true},
		{again, "read " + p1, true},
		{"read " + disk, diskAgain, true},
		{diskAgain, "read " + p1, true},
		{"read " + diskAgain, again, true},
	}...)
}

// mknod makes another node of a device, until the test ends, unless there is one.
func mknod(t *testing.T, of, path string) {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(of, &st); err != nil {
		t.Fatal(err)
	}
	switch err := unix.Mknod(path, unix.S_IFBLK|0o600, int(st.Rdev)); err {
	case nil:
		t.Cleanup(func() { os.Remove(path) })
	case unix.EEXIST: // the kernel's
	default:
		t.Fatal(err)
	}
}

// TestParts: of a device of device mapper or md, gvm does not know which parts of the devices below
// it has. Two such devices on one are different storage. One that is written excludes every disk
// that has a part of the device or file below, and one that is read those that write it.
func TestParts(t *testing.T) {
	needs(t, "losetup", "addpart")
	img := image(t, "disk.img", "", 32*mib)
	disk := loop(t, img, "--partscan")
	part := partition(t, disk, 1, 2048, 2048)
	one, two := loop(t, image(t, "one", "", mib)), loop(t, image(t, "two", "", mib))
	raid := loop(t, image(t, "raid", "", mib))
	dir := fakeSysfs(t, map[string][]string{one: {disk}, two: {disk}, raid: {one}})
	defer block.SetSysfs(dir)()
	t.Setenv(sysfsEnv, dir)
	tryPairs(t, []pair{
		{one, two, false},
		{"read " + one, two, false},
		{two, "read " + one, false},
		{"read " + img, one, true}, // the base of an overlay
		{one, "read " + img, true},
		{"read " + img, raid, true},
		{raid, "read " + img, true},
		{"read " + disk, one, true},
		{raid, "read " + disk, true},
		{"read " + part, one, true},
		{one, "read " + part, true},
		{part, one, true},
		{one, part, true},
		{part, "read " + one, true},
		{"read " + one, part, true},
		{"read " + one, "read " + img, false},
		{"read " + part, "read " + one, false},
	}...)
	// In one process likewise.
	base := open(t, img, block.Options{ReadOnly: true})
	refused(t, one, img+": given twice")
	base.Close()
	w := open(t, one, block.Options{})
	open(t, two, block.Options{}).Close()
	if _, err := block.Open(img, block.Options{ReadOnly: true}); err == nil ||
		!strings.Contains(err.Error(), "given twice: "+one) {
		t.Errorf("the file below a device that is written: %v", err)
	}
	w.Close()
}

// fakeSysfs returns a directory like /sys in which loop devices are devices of device mapper or md
// on others.
func fakeSysfs(t *testing.T, slaves map[string][]string) string {
	t.Helper()
	dir := t.TempDir()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(errors.Join(os.MkdirAll(dir+"/dev/block", 0o700), os.Mkdir(dir+"/block", 0o700)))
	for _, in := range []string{"/dev/block/", "/block/"} {
		entries, err := os.ReadDir("/sys" + in)
		check(err)
		for _, e := range entries {
			name, err := filepath.EvalSymlinks("/sys" + in + e.Name())
			check(err)
			if _, ok := slaves["/dev/"+filepath.Base(name)]; ok {
				name = dir + "/" + filepath.Base(name)
			}
			check(os.Symlink(name, dir+in+e.Name()))
		}
	}
	for dev, below := range slaves {
		own := dir + "/" + filepath.Base(dev)
		check(os.MkdirAll(own+"/slaves", 0o700))
		number, err := os.ReadFile("/sys/block/" + filepath.Base(dev) + "/dev")
		check(errors.Join(err, os.WriteFile(own+"/dev", number, 0o600)))
		for _, lower := range below {
			check(os.Symlink(dir+"/block/"+filepath.Base(lower), own+"/slaves/"+filepath.Base(lower)))
		}
	}
	return dir
}

// TestHolders: a device that device mapper or md has is named with its user, and how to end that.
func TestHolders(t *testing.T) {
	needs(t, "losetup")
	for _, tt := range []struct{ holder, file, text, want string }{
		{"dm-0", "dm/name", "vg-data\n",
			"/dev/mapper/vg-data; dmsetup remove (or vgchange -an, cryptsetup close) that first"},
		{"md127", "md/level", "raid1\n", "/dev/md127; mdadm --stop that first"},
	} {
		lower := loop(t, image(t, "lower", "", mib))
		dir := fakeSysfs(t, map[string][]string{lower: {}})
		holder := filepath.Join(dir, filepath.Base(lower), "holders", tt.holder, tt.file)
		err := errors.Join(os.MkdirAll(filepath.Dir(holder), 0o700), os.WriteFile(holder, []byte(tt.text), 0o600))
		if err != nil {
			t.Fatal(err)
		}
		undo := block.SetSysfs(dir)
		want := lower + ": may change while the guest reads it: " + lower + " is part of " + tt.want
		if note := reads(t, lower); note != want {
			t.Errorf("noted %q, want %q", note, want)
		}
		// The kernel has it with O_EXCL.
		f, err := os.OpenFile(lower, os.O_RDONLY|unix.O_EXCL, 0)
		if err != nil {
			t.Fatal(err)
		}
		refused(t, lower, lower+" is part of "+tt.want)
		f.Close()
		undo()
	}
}
