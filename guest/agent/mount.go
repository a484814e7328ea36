package agent

import (
	"os"

	"golang.org/x/sys/unix"
)

// mount is a file system of the kernel's. Each may be missing in a kernel.
type mount struct {
	fs, dir, options string
	flags            uintptr
}

const plain = unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NODEV

var mounts = []mount{
	{"proc", "/proc", "", plain},
	{"sysfs", "/sys", "", plain},
	{"devtmpfs", "/dev", "mode=0755", unix.MS_NOSUID},
	{"devpts", "/dev/pts", "gid=5,mode=620,ptmxmode=666", unix.MS_NOSUID | unix.MS_NOEXEC},
	{"tmpfs", "/dev/shm", "mode=1777", unix.MS_NOSUID | unix.MS_NODEV},
	{"tmpfs", "/tmp", "mode=1777", unix.MS_NOSUID | unix.MS_NODEV},
	{"tmpfs", "/run", "mode=0755", unix.MS_NOSUID | unix.MS_NODEV},
	{"cgroup2", "/sys/fs/cgroup", "", plain},
	{"bpf", "/sys/fs/bpf", "mode=0700", plain},
	{"debugfs", "/sys/kernel/debug", "", plain},
	{"tracefs", "/sys/kernel/tracing", "", plain},
	{"securityfs", "/sys/kernel/security", "", plain},
	{"configfs", "/sys/kernel/config", "", plain},
}

// mountAll mounts those of list that the kernel has. A tmpfs is not mounted over a directory that
// is in memory already: it would hide the files of the initramfs.
func mountAll(list []mount) {
	for _, m := range list {
		os.MkdirAll(m.dir, 0o755) // fails below file systems that the kernel does not have
		if m.fs == "tmpfs" && (mounted(m.dir, unix.TMPFS_MAGIC) && m.dir != "/dev/shm" ||
			mounted(m.dir, unix.RAMFS_MAGIC)) {
			if m.options == "mode=1777" {
				os.Chmod(m.dir, os.ModeSticky|0o777)
			}
			continue
		}
		unix.Mount(m.fs, m.dir, m.fs, m.flags, m.options)
	}
	for name, target := range map[string]string{
		"/dev/fd": "/proc/self/fd", "/dev/stdin": "fd/0", "/dev/stdout": "fd/1", "/dev/stderr": "fd/2",
	} {
		os.Symlink(target, name)
	}
}

// mounted reports whether dir is in a file system of the type.
func mounted(dir string, magic int64) bool {
	var st unix.Statfs_t
	return unix.Statfs(dir, &st) == nil && st.Type == magic
}
