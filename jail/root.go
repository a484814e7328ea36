package jail

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// harmless are the flags of all mounts of the jail without devices.
const harmless = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

// makeRoot makes the jail's root directory, in which this thread then is: a tmpfs that becomes
// read-only, with the mount points of everything else. It is mounted over Config.Dir, in a mount
// namespace that ends with its last process.
func (c *Config) makeRoot(cgroup bool, made *outputs) error {
	flags := unix.CLONE_NEWNS | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS
	if cgroup {
		flags |= unix.CLONE_NEWCGROUP
	}
	if !c.Network {
		flags |= unix.CLONE_NEWNET
	}
	fail := func(what string, err error) error { return fmt.Errorf("--jail %s: %s: %w", c.Dir, what, err) }
	if err := unix.Unshare(flags); err != nil {
		return fail("namespaces", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fail("make mounts private", err)
	}
	// A mount is made of one that is in this namespace, and of the one on top at its path.
	slices.SortFunc(c.Files, func(a, b File) int { return strings.Compare(a.Path, b.Path) })
	var binds []bind
	for _, f := range append([]File{{Flag: "--jail", Path: filepath.Join(c.Dir, runDir), Write: true}}, c.Files...) {
		fd, err := openStrictly(cmp.Or(f.From, f.Path), unix.O_PATH)
		if err == unix.ENOENT && f.Make {
			fd, err = made.make(f.Path, c.UID, c.GID)
		}
		if err != nil {
			return linkError(f.Flag, f.Path, err)
		}
		defer unix.Close(fd)
		b := bind{f, fd, filepath.Join(c.Dir, f.Path), unix.Stat_t{}}
		if err := unix.Fstat(fd, &b.st); err != nil {
			return fail(f.Path, err)
		}
		binds = append(binds, b)
	}
	binds[0].to = filepath.Join(c.Dir, runDir)
	defer unix.Umask(unix.Umask(0o022))
	if err := unix.Mount("tmpfs", c.Dir, "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "mode=755,size=1m"); err != nil {
		return fail("mount tmpfs", err)
	}
	if err := c.makeSystem(cgroup); err != nil {
		return err
	}
	for _, b := range binds {
		if err := b.mount(); err != nil {
			return fail("mount "+b.Path, err)
		}
	}
	if err := c.linkRun(); err != nil {
		return fail("link its "+runDir, err)
	}
	if err := unix.Mount("", c.Dir, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NOEXEC,
		""); err != nil {
		return fail("make the root read-only", err)
	}
	if err := unix.Chdir(c.Dir); err != nil {
		return fail("chdir", err)
	}
	switch err := unix.PivotRoot(".", "."); err {
	case nil:
		err = unix.Unmount(".", unix.MNT_DETACH) // the old root, which is on top
		if err != nil {
			return fail("unmount the old root", err)
		}
	case unix.EINVAL: // the root is the initial ramfs, which stays below
		if err := errors.Join(unix.Mount(".", "/", "", unix.MS_MOVE, ""), unix.Chroot(".")); err != nil {
			return fail("move the root", err)
		}
	default:
		return fail("pivot_root", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return fail("chdir", err)
	}
	return nil
}

// linkRun makes a link to the jail's /run at the path of that on the host, so that a socket or file
// there has one path inside and outside. A directory of the user's is not on the way: no file of
// the jail is above Dir, and below /run there is no link.
func (c *Config) linkRun() error {
	if !c.LinksRun() {
		return nil
	}
	at := filepath.Join(c.Dir, c.Dir)
	if err := os.MkdirAll(at, 0o755); err != nil {
		return err
	}
	up := strings.Repeat("../", strings.Count(c.Dir, "/")) // this thread still has another root directory
	err := unix.Symlink(up+runDir, filepath.Join(at, runDir))
	if err == unix.EEXIST { // a file of the command line is there
		return nil
	}
	return err
}

// LinksRun reports whether the jail has Dir/run at that path too.
func (c *Config) LinksRun() bool {
	return !slices.ContainsFunc(ownDirs, func(own string) bool { return below(c.Dir, own) })
}

// bind is a file of the host that is mounted in the jail.
type bind struct {
	File
	fd int
	to string
	st unix.Stat_t
}

func (b *bind) mount() error {
	directory := b.st.Mode&unix.S_IFMT == unix.S_IFDIR
	if directory {
		if err := os.MkdirAll(b.to, 0o755); err != nil {
			return err
		}
	} else if err := makeFile(b.to); err != nil {
		return err
	}
	from := fmt.Sprintf("/proc/self/fd/%d", b.fd)
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC}
	if b.st.Mode&unix.S_IFMT == unix.S_IFBLK {
		attr.Attr_set &^= unix.MOUNT_ATTR_NODEV
	}
	if !b.Write {
		attr.Attr_set |= unix.MOUNT_ATTR_RDONLY
	}
	if directory { // with the mounts below it, which remounting does not change
		if err := unix.Mount(from, b.to, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return err
		}
		err := unix.MountSetattr(unix.AT_FDCWD, b.to, unix.AT_RECURSIVE, &attr)
		if err != unix.ENOSYS {
			return err
		}
		// Before Linux 5.12 the jail does not have those.
		if err := unix.Unmount(b.to, unix.MNT_DETACH); err != nil {
			return err
		}
	}
	if err := unix.Mount(from, b.to, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	// The attributes of these have the numbers of mount(2)'s flags.
	return unix.Mount("", b.to, "", unix.MS_REMOUNT|unix.MS_BIND|uintptr(attr.Attr_set), "")
}

// makeFile makes an empty file, unless there is one, and the directories above it.
func makeFile(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return f.Close()
}

// outputs are the files that Enter has made outside of the jail.
type outputs []output

type output struct {
	dir  int // descriptor; execve closes it
	name string
}

// make makes an empty file of a user's, and opens it. No link leads it elsewhere.
func (o *outputs) make(path string, uid, gid int) (fd int, err error) {
	dir, err := openStrictly(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return -1, err
	}
	name := filepath.Base(path)
	fd, err = unix.Openat(dir, name, unix.O_RDONLY|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, 0o666)
	if err != nil {
		unix.Close(dir)
		return -1, err
	}
	*o = append(*o, output{dir, name})
	return fd, unix.Fchown(fd, uid, gid)
}

// remove removes the files.
func (o outputs) remove() (err error) {
	for _, f := range o {
		if e := unix.Unlinkat(f.dir, f.name, 0); e != nil {
			err = errors.Join(err, fmt.Errorf("remove %s: %w", f.name, e))
		}
	}
	return err
}

// makeSystem mounts the kernel's file systems, and makes the devices.
func (c *Config) makeSystem(cgroup bool) error {
	for _, m := range []struct {
		dir, kind, data string
		needed          bool
	}{
		// Of other users' processes the program sees nothing.
		{"proc", "proc", "hidepid=invisible", true},
		{"sys", "sysfs", "", true}, // which loop devices use an image, and the limits of block devices
		{"sys/fs/cgroup", "cgroup2", "", cgroup},
	} {
		if !m.needed {
			continue
		}
		dir := filepath.Join(c.Dir, m.dir)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		err := unix.Mount(m.kind, dir, m.kind, harmless, m.data)
		if err == unix.EINVAL && m.data != "" {
			err = unix.Mount(m.kind, dir, m.kind, harmless, "hidepid=2") // before Linux 5.8
		}
		if err == nil {
			err = unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|harmless, "")
		}
		if err != nil {
			return fmt.Errorf("--jail %s: mount /%s: %w", c.Dir, m.dir, err)
		}
	}
	for _, name := range append([]string{"/dev/null"}, c.Devices...) {
		var st unix.Stat_t
		if err := unix.Stat(name, &st); err == unix.ENOENT {
			continue // the program has a message for that
		} else if err != nil {
			return fmt.Errorf("--jail %s: %s: %w", c.Dir, name, err)
		}
		path := filepath.Join(c.Dir, name)
		err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755),
			unix.Mknod(path, unix.S_IFCHR|0o600, int(st.Rdev)), unix.Chown(path, c.UID, c.GID))
		if err != nil {
			return fmt.Errorf("--jail %s: make the device %s: %w", c.Dir, name, err)
		}
	}
	return nil
}
