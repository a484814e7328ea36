package block

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"gvm/kvmapi/nowait"
)

// A disk that gvm writes is written by nothing else, under any name. A lock on the file keeps out
// programs that lock, O_EXCL on a block device everything that claims devices: mounts, swap, device
// mapper, md, and of partitions and their disk the other. Neither sees through a loop device, which
// claims nothing and locks nothing, nor a server of the kernel. So those on a file or device are
// looked for, and of what a partition or loop device stands on the range that it has there is
// locked, so that a gvm that writes it keeps out one that reads the whole, and the other way round.

// claim makes sure of the disk's storage beyond the locks that its own descriptor has.
// A disk that is only read goes on where another writes, with a note.
func (b *File) claim(o Options) error {
	var st unix.Stat_t
	if err := unix.Fstat(b.fd, &st); err != nil {
		return fmt.Errorf("%s: %w", b.path, err)
	}
	by := b.usedBy(&st, o)
	if by != "" && !o.ReadOnly {
		return &LockedError{Path: b.path, By: by}
	}
	if by != "" && o.Note != nil {
		o.Note(fmt.Sprintf("%s: may change while the guest reads it: %s", b.path, by))
	}
	if !b.block {
		return nil
	}
	// Locks are of nodes: this is the one that all have.
	if name := devName(st.Rdev); !nowait.Leads(name, b.f) {
		if err := b.lockBelow(name, thing{rdev: st.Rdev}, whole, accessOf(o.ReadOnly), 0); err != nil {
			return fmt.Errorf("%s: is %w", b.path, err)
		}
	}
	if err := b.lockPartitions(st.Rdev, whole, accessOf(o.ReadOnly), o); err != nil {
		return err
	}
	return b.claimBelow(st.Rdev, whole, accessOf(o.ReadOnly), o, 0)
}

// usedBy returns what has the image that no lock and no claim of it shows, and what to do
// about that; "" if nothing has.
func (b *File) usedBy(st *unix.Stat_t, o Options) string {
	t := thing{dev: st.Dev, ino: st.Ino}
	if b.block {
		t = thing{rdev: st.Rdev}
	}
	// With Lend, package lio looks at LIO itself, after it has removed what dead gvms left.
	if by := t.loops("", whole, o.ReadOnly); by != "" && !(o.Lend && t.lioUser("iblock") != "") {
		return by
	}
	switch {
	case b.block && o.ReadOnly:
		return deviceUser(st.Rdev, true)
	case b.block: // is claimed
		for _, dev := range related(st.Rdev) {
			if by := (thing{rdev: dev}).server(o.Lend); by != "" {
				return by
			}
		}
		return ""
	case t.isSwap():
		return "it is swap; swapoff " + b.path + " first"
	}
	return cmp.Or(t.mounted(o.ReadOnly, b.isEROFS()), t.server(o.Lend))
}

// lockPartitions locks those partitions of a disk that have a part of s. Their disk is locked by no
// partition: to lock a range of it for writing it has to be open for writing, and when that ends
// udev has the kernel read the partition table anew, which takes all partitions away for a moment.
func (b *File) lockPartitions(disk uint64, s span, a access, o Options) error {
	files, _ := filepath.Glob(sysDir(disk) + "/*/partition")
	for _, file := range files {
		dir := filepath.Dir(file)
		if rdev, ok := readDev(dir + "/dev"); ok && partSpan(dir, whole).meets(s) {
			t, name := thing{rdev: rdev}, "/dev/"+filepath.Base(dir)
			if by := t.writer(name, whole, o); by != nil {
				return fmt.Errorf("%s: has the partition %w", b.path, by)
			}
			if err := b.lockBelow(name, t, whole, a, 0); err != nil {
				return fmt.Errorf("%s: has the partition %w", b.path, err)
			}
		}
	}
	return nil
}

// claimBelow locks the things that a block device stands on: of the file or device below a loop
// device, or below the one that a partition is of, the range that s, of the device, is there. A
// loop device that is written claims the device below it. Which ranges a device of device mapper or
// md has is not known: two such devices on one may be used at the same time, but not one that is
// written and a disk that has a known range.
func (b *File) claimBelow(rdev uint64, s span, a access, o Options, depth int) error {
	dir := sysDir(rdev)
	if depth > 16 || s.from >= s.to { // deeper than the kernel goes, or nothing
		return nil
	}
	if disk, ok := diskOf(dir); ok {
		s = partSpan(dir, s)
		if by := (thing{rdev: disk}).writer(devName(disk), s, o); by != nil {
			return fmt.Errorf("%s: is a part of %w", b.path, by)
		}
		return b.claimBelow(disk, s, a, o, depth+1)
	}
	o.Lend = false // package lio looks for users of the disk alone
	below, _ := filepath.Glob(dir + "/slaves/*/dev")
	for _, file := range below {
		lower, ok := readDev(file)
		if !ok {
			continue
		}
		if by := (thing{rdev: lower}).writer(devName(lower), whole, o); by != nil {
			return fmt.Errorf("%s: has a part of %w", b.path, by)
		}
		if err := b.lockBelow(devName(lower), thing{rdev: lower}, whole, a.parts(), 0); err != nil {
			return fmt.Errorf("%s: has a part of %w", b.path, err)
		}
		if err := b.lockPartitions(lower, whole, a.parts(), o); err != nil {
			return err
		}
		if err := b.claimBelow(lower, whole, a.parts(), o, depth+1); err != nil {
			return err
		}
	}
	path, err := os.ReadFile(dir + "/loop/backing_file")
	if err != nil {
		return nil // no loop device
	}
	name := strings.TrimSuffix(string(path), "\n")
	fi, err := os.Stat(name)
	t := thing{}
	if err == nil {
		t = thingOf(fi)
	}
	if err != nil || !t.behind(filepath.Base(realPath(dir))) {
		// The name is gone, is of another mount namespace, or is another file's now.
		if o.ReadOnly || o.NoLock {
			return nil
		}
		return &LockedError{Path: b.path, By: "a loop device on a file that no longer has the name " + name +
			": gvm cannot tell which others write it; take readonly, or lock=off to insist"}
	}
	claim := 0
	if t.rdev != 0 && !o.ReadOnly {
		claim = unix.O_EXCL
	}
	s = loopSpan(dir, s)
	if err := b.lockBelow(name, t, s, a, claim); err != nil {
		return fmt.Errorf("%s: is a loop device on %w", b.path, err)
	}
	by := cmp.Or(t.loops(filepath.Base(realPath(dir)), s, o.ReadOnly), t.mounted(o.ReadOnly, true), t.server(false))
	if by != "" && !o.ReadOnly {
		return fmt.Errorf("%s: is a loop device on %w", b.path, &LockedError{Path: name, By: by})
	}
	if t.rdev == 0 {
		return nil
	}
	if err := b.lockPartitions(t.rdev, s, a, o); err != nil {
		return err
	}
	return b.claimBelow(t.rdev, s, a, o, depth+1)
}

// lockBelow locks a range of t, which name leads to, and claims it with O_EXCL as claim. What the
// user may only read is locked shared, which keeps out those that write all of it; what the user
// may not open is left, as the user may have the device above alone.
func (b *File) lockBelow(name string, t thing, s span, a access, claim int) error {
	if err := b.use(t, name, a, s); err != nil {
		return err
	}
	flags := os.O_RDWR | claim
	if a.shared() {
		flags = os.O_RDONLY | claim
	}
	lower, err := nowait.Open(name, flags, 0, nowait.Regular|nowait.BlockDevice)
	if err != nil && !a.shared() && !(claim != 0 && errors.Is(err, unix.EBUSY)) {
		a = reading
		lower, err = nowait.Open(name, os.O_RDONLY|claim, 0, nowait.Regular|nowait.BlockDevice)
	}
	switch {
	case claim != 0 && errors.Is(err, unix.EBUSY):
		return deviceLocked(name, t.rdev)
	case err != nil:
		return nil
	}
	b.below = append(b.below, lower)
	if fi, err := lower.Stat(); err != nil || thingOf(fi) != t {
		return nil // the name leads elsewhere
	}
	if err := lock(int(lower.Fd()), name, a, s); errors.Is(err, ErrLocked) {
		return err
	}
	return nil
}

// modTime returns when the file changed that a loop device, or a partition of one, stands on, in
// nanoseconds. Of other devices Linux keeps no such time: 0.
func modTime(rdev uint64) int64 {
	for range 16 { // deeper than the kernel goes
		dir := sysDir(rdev)
		if disk, ok := diskOf(dir); ok {
			rdev = disk
			continue
		}
		path, err := os.ReadFile(dir + "/loop/backing_file")
		if err != nil {
			return 0
		}
		fi, err := os.Stat(strings.TrimSuffix(string(path), "\n"))
		if err != nil || !thingOf(fi).behind(filepath.Base(realPath(dir))) {
			return 0
		}
		if rdev = thingOf(fi).rdev; rdev == 0 {
			return fi.ModTime().UnixNano()
		}
	}
	return 0
}

// thing is the object that names lead to: a file, or the device of a node.
type thing struct{ dev, ino, rdev uint64 }

func thingOf(fi fs.FileInfo) thing {
	st := fi.Sys().(*syscall.Stat_t)
	if nowait.KindOf(fi.Mode()) == nowait.BlockDevice {
		return thing{rdev: st.Rdev}
	}
	return thing{dev: st.Dev, ino: st.Ino}
}

// is reports whether a path leads there.
func (t thing) is(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && thingOf(fi) == t
}

// behind reports whether a loop device stands on it. The device itself knows, under
// whatever name it was attached; where it may not be asked, the name has to do.
func (t thing) behind(loop string) bool {
	if fd, err := unix.Open("/dev/"+loop, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); err == nil {
		defer unix.Close(fd)
		if i, err := unix.IoctlLoopGetStatus64(fd); err == nil {
			return t.rdev != 0 && i.Rdevice == t.rdev || t.rdev == 0 && i.Device == t.dev && i.Inode == t.ino
		}
	}
	path, err := os.ReadFile(sysfs + "/block/" + loop + "/loop/backing_file")
	return err == nil && t.is(strings.TrimSuffix(string(path), "\n"))
}

// loops returns the loop device that has a part of s beside the one that is called but, and what to
// do about that; "" if there is none. Of devices that cannot write, a reader sees nothing.
// A device whose last user has gone is taken down by the kernel in its own time, and waited for.
func (t thing) loops(but string, s span, reader bool) string {
	for tries := 0; ; tries++ {
		by, going := t.loop(but, s, reader)
		if by == "" || !going || tries == 25 {
			return by
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// loop is loops at this moment; going says that the device has no user that is known, and
// goes with its last one.
func (t thing) loop(but string, s span, reader bool) (by string, going bool) {
	files, _ := filepath.Glob(sysfs + "/block/loop*/loop/backing_file")
	for _, file := range files {
		dir := filepath.Dir(filepath.Dir(file))
		name := filepath.Base(dir)
		if name == but || reader && isReadOnly(dir) || !loopSpan(dir, whole).meets(s) || !t.behind(name) {
			continue
		}
		by := fmt.Sprintf("loop device /dev/%s is on it", name)
		user := ""
		if rdev, ok := readDev(dir + "/dev"); ok {
			user = deviceUser(rdev, true)
		}
		if user == "" {
			user = t.lioUser("iblock")
		}
		if user != "" {
			return fmt.Sprintf("%s: %s, and then losetup --detach /dev/%s", by, user, name), false
		}
		return fmt.Sprintf("%s; losetup --detach /dev/%s first", by, name), readNumber(dir+"/loop/autoclear") == 1
	}
	return "", false
}

// isSwap reports whether the kernel swaps to the file.
func (t thing) isSwap() bool {
	return slices.ContainsFunc(swaps(), t.is)
}

// mounted returns where a file is mounted without a loop device, and the mend: by EROFS, or by a
// FUSE server such as fuse2fs. Of mounts that cannot write a reader sees nothing. Other mount
// namespaces cost milliseconds, as every process may have one.
func (t thing) mounted(reader, everywhere bool) string {
	if t.rdev != 0 {
		return ""
	}
	return mountedAt(nil, func(m mount) bool {
		return (m.kind == "erofs" || strings.HasPrefix(m.kind, "fuse")) && t.is(m.source)
	}, reader, everywhere)
}

// isEROFS reports whether the image is a file system of EROFS (fs/erofs/erofs_fs.h of Linux).
func (b *File) isEROFS() bool {
	magic := make([]byte, 4)
	_, err := unix.Pread(b.fd, magic, 1024)
	return err == nil && string(magic) == "\xe2\xe1\xf5\xe0"
}

// writer returns the user of a range of a device below or above the disk, which name leads to, that
// claims nothing and locks nothing: a loop device or a server of the kernel. A disk that is only
// read minds none.
func (t thing) writer(name string, s span, o Options) error {
	if o.ReadOnly {
		return nil
	}
	if by := cmp.Or(t.loops("", s, false), t.server(o.Lend)); by != "" {
		return &LockedError{Path: name, By: by}
	}
	return nil
}

// swaps lists the files and devices of swap.
func swaps() (paths []string) {
	for i, line := range lines("/proc/swaps") {
		if f := strings.Fields(line); i > 0 && len(f) > 0 {
			paths = append(paths, unescape(f[0]))
		}
	}
	return paths
}

// configfs is a variable for tests.
var configfs = "/sys/kernel/config"

// lioUser returns the disk that the kernel's SCSI target has on it, of those made by
// plugin, and the mend.
func (t thing) lioUser(plugin string) string {
	disks, _ := filepath.Glob(configfs + "/target/core/" + plugin + "_*/*")
	for _, disk := range disks {
		if path := lioPath(disk); path != "" && t.is(path) {
			return fmt.Sprintf("the kernel's SCSI target serves it, as core/%s; see gvm lio list and gvm lio gc",
				strings.TrimPrefix(disk, configfs+"/target/core/"))
		}
	}
	return ""
}

// servers are the servers of the kernel, besides the SCSI target, which claim no device and lock no
// file.
var servers = []struct{ files, name, mend string }{
	{"nvmet/subsystems/*/namespaces/*/device_path", "NVMe target", "see nvmetcli"},
	{"usb_gadget/*/functions/mass_storage.*/lun.*/file", "USB mass storage", "empty its file first"},
}

// server returns the server of the kernel that has it, and the mend. With lend package lio
// looks at LIO.
func (t thing) server(lend bool) string {
	if by := t.lioUser("*"); by != "" && !lend {
		return by
	}
	for _, s := range servers {
		files, _ := filepath.Glob(configfs + "/" + s.files)
		for _, file := range files {
			dir := filepath.Dir(file)
			path, _ := os.ReadFile(file)
			if b, err := os.ReadFile(dir + "/enable"); err == nil && string(b) == "0\n" {
				continue // has nothing open
			}
			if t.is(strings.TrimSuffix(string(path), "\n")) {
				return fmt.Sprintf("the kernel's %s serves it, as %s; %s", s.name, strings.TrimPrefix(dir, configfs+"/"), s.mend)
			}
		}
	}
	return ""
}

// lioPath is the path that a disk of LIO's stands on: as its maker calls it, or else as the
// kernel's description does ("  File: PATH  Size: N  Mode: …").
func lioPath(disk string) string {
	if b, err := os.ReadFile(disk + "/udev_path"); err == nil && len(b) > 1 {
		return strings.TrimSuffix(string(b), "\n")
	}
	info, _ := os.ReadFile(disk + "/info")
	_, path, ok := strings.Cut(string(info), " File: ")
	if i := strings.LastIndex(path, "  Size: "); ok && i >= 0 {
		return path[:i]
	}
	return ""
}

// deviceUser says what has a block device, its disk or one of its partitions, and what to
// do about that: "" if it is not found. Writers are those that do not only read.
func deviceUser(rdev uint64, writers bool) string {
	devs := related(rdev)
	has := func(path string) bool {
		fi, err := os.Stat(path)
		return err == nil && slices.Contains(devs, thingOf(fi).rdev) && thingOf(fi).rdev != 0
	}
	if by := mountedAt(devs, func(m mount) bool { return has(m.source) }, writers, true); by != "" {
		return by
	}
	for _, path := range swaps() {
		if has(path) {
			return fmt.Sprintf("%s is swap; swapoff %[1]s first", path)
		}
	}
	for _, dev := range devs {
		dirs, _ := filepath.Glob(sysDir(dev) + "/holders/*")
		for _, dir := range dirs {
			name, end := "/dev/"+filepath.Base(dir), ""
			if dm, err := os.ReadFile(dir + "/dm/name"); err == nil {
				name = "/dev/mapper/" + strings.TrimSpace(string(dm))
				end = "; dmsetup remove (or vgchange -an, cryptsetup close) that first"
			} else if _, err := os.Stat(dir + "/md"); err == nil {
				end = "; mdadm --stop that first"
			}
			return fmt.Sprintf("%s is part of %s%s", devName(dev), name, end)
		}
		t := thing{rdev: dev}
		if by := t.loops("", whole, writers); by != "" {
			return by
		}
		if by := t.server(false); by != "" {
			return by
		}
	}
	return ""
}

// deviceLocked is the failure to claim a block device.
func deviceLocked(path string, rdev uint64) *LockedError {
	e := &LockedError{Path: path, By: deviceUser(rdev, false)}
	if e.By != "" {
		return e
	}
	devs := related(rdev)
	if e.Other = usedPath(devs); e.Other != "" {
		e.PID = os.Getpid()
		return e
	}
	e.PID = findOpen(func(st *unix.Stat_t, _ string) bool {
		return st.Mode&unix.S_IFMT == unix.S_IFBLK && slices.Contains(devs, st.Rdev)
	})
	if e.PID == 0 {
		e.By = "the kernel or another process claims it; see lsblk"
	}
	return e
}

// mount is a mounted file system, with the path that its mounter gave for it.
type mount struct{ kind, source string }

// mountedAt returns where a file system of one of the devices, or one whose source has knows, is
// mounted, in this mount namespace or everywhere.
func mountedAt(devs []uint64, has func(mount) bool, writers, everywhere bool) string {
	var files []string
	if everywhere {
		files, _ = filepath.Glob("/proc/[0-9]*/mountinfo")
	}
	seen := map[string]bool{}
	const own = "/proc/self/mountinfo"
	for _, file := range append([]string{own}, files...) {
		ns, err := os.Readlink(filepath.Dir(file) + "/ns/mnt")
		if err != nil || seen[ns] {
			continue
		}
		seen[ns] = true
		for _, line := range lines(file) {
			// 36 35 98:0 / /mnt rw,noatime shared:1 - ext4 /dev/root rw (proc_pid_mountinfo(5)).
			f, rest, ok := strings.Cut(line, " - ")
			at, of := strings.Fields(f), strings.Fields(rest)
			if !ok || len(at) < 6 || len(of) < 3 {
				continue
			}
			readOnly := slices.Contains(strings.Split(of[2], ","), "ro")
			dev, known := parseDev(at[2])
			source := unescape(of[1])
			is := known && slices.Contains(devs, dev) || strings.HasPrefix(source, "/") && has(mount{of[0], source})
			if !is || writers && readOnly {
				continue
			}
			where, mend := unescape(at[4]), "umount"
			if file != own { // where umount finds no mount
				mend = fmt.Sprintf("nsenter -t %s -m umount", filepath.Base(filepath.Dir(file)))
			}
			return fmt.Sprintf("%s is mounted at %s; %s %[2]s first", source, where, mend)
		}
	}
	return ""
}

// related are a block device, the disk that it is a partition of, and its partitions.
func related(rdev uint64) []uint64 {
	dir := sysDir(rdev)
	devs := []uint64{rdev}
	files, _ := filepath.Glob(dir + "/*/partition")
	for _, file := range files {
		if dev, ok := readDev(filepath.Dir(file) + "/dev"); ok {
			devs = append(devs, dev)
		}
	}
	if disk, ok := diskOf(dir); ok {
		devs = append(devs, disk)
	}
	return devs
}

// diskOf returns the disk that a partition, given by its directory in /sys, is of.
func diskOf(dir string) (disk uint64, ok bool) {
	if _, err := os.Stat(dir + "/partition"); err != nil {
		return 0, false
	}
	return readDev(realPath(dir) + "/../dev")
}

// sysfs is a variable for tests.
var sysfs = "/sys"

func sysDir(rdev uint64) string {
	return fmt.Sprintf("%s/dev/block/%d:%d", sysfs, unix.Major(rdev), unix.Minor(rdev))
}

// devName is the name that the kernel gives a block device.
func devName(rdev uint64) string { return "/dev/" + filepath.Base(realPath(sysDir(rdev))) }

func realPath(path string) string {
	if real, err := filepath.EvalSymlinks(path); err == nil {
		return real
	}
	return path
}

// isReadOnly reports whether a device of /sys takes no writes.
func isReadOnly(dir string) bool { return readNumber(dir+"/ro") == 1 }

// readNumber reads a file of /sys with a number; 0 if it cannot be read.
func readNumber(file string) uint64 {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0
	}
	n, _ := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	return n
}

// readDev reads a file of /sys with MAJOR:MINOR.
func readDev(file string) (uint64, bool) {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, false
	}
	return parseDev(strings.TrimSpace(string(b)))
}

func parseDev(s string) (uint64, bool) {
	major, minor, _ := strings.Cut(s, ":")
	a, err := strconv.ParseUint(major, 10, 32)
	b, err2 := strconv.ParseUint(minor, 10, 32)
	return unix.Mkdev(uint32(a), uint32(b)), err == nil && err2 == nil
}

// lines reads a file of /proc; none if it cannot be read.
func lines(file string) []string {
	b, _ := os.ReadFile(file)
	return strings.Split(string(b), "\n")
}

// unescape undoes the \040 of paths in files of /proc.
func unescape(s string) string {
	var out []byte
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				out = append(out, byte(n))
				i += 3
				continue
			}
		}
		out = append(out, s[i])
	}
	return string(out)
}
