package agent

import (
	"errors"
	"fmt"
	"os"
	"path"

	"golang.org/x/sys/unix"

	"gvm/guest/agent/wire"
)

// mountShares mounts directories of the host, the root first. It makes the command's directory
// where the root has none, as in /tmp: in the guest's memory.
func mountShares(cmd *wire.Command) error {
	for _, s := range cmd.Mounts {
		dir := string(s.Dir)
		err := os.MkdirAll(dir, 0o755)
		switch {
		case s.Root:
			if err = useRoot(s.Tag); err == nil {
				_ = os.MkdirAll(string(cmd.Dir), 0o755) // its use says why
			}
		case err == nil && s.ReadOnly:
			err = unix.Mount(s.Tag, dir, "virtiofs", unix.MS_RDONLY, "")
		case err == nil:
			err = unix.Mount(s.Tag, dir, "virtiofs", 0, "")
		}
		if errors.Is(err, unix.ENODEV) {
			err = fmt.Errorf("%w: the kernel has no CONFIG_VIRTIO_FS, or no CONFIG_OVERLAY_FS", err)
		}
		if err != nil {
			return fmt.Errorf("mount the host's %s: %w", dir, err)
		}
	}
	return nil
}

// useRoot makes a directory of the host the root, below an overlay in memory.
func useRoot(tag string) error {
	const lower, upper, root = "/gvm/lower", "/gvm/upper", "/gvm/root"
	for _, dir := range []string{lower, upper, root} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if err := errors.Join(unix.Mount(tag, lower, "virtiofs", unix.MS_RDONLY, ""),
		unix.Mount("tmpfs", upper, "tmpfs", 0, "mode=0755")); err != nil {
		return err
	}
	if err := errors.Join(os.Mkdir(upper+"/data", 0o755), os.Mkdir(upper+"/work", 0o755)); err != nil {
		return err
	}
	if err := unix.Mount("overlay", root, "overlay", 0,
		"lowerdir="+lower+",upperdir="+upper+"/data,workdir="+upper+"/work"); err != nil {
		return err
	}
	for _, dir := range []string{"/proc", "/sys", "/dev"} {
		_ = os.Mkdir(path.Join(root, dir), 0o755)
		_ = unix.Mount(dir, path.Join(root, dir), "", unix.MS_MOVE, "") // a kernel may not have it
	}
	if err := errors.Join(os.Chdir(root), unix.Mount(".", "/", "", unix.MS_MOVE, ""), unix.Chroot("."),
		os.Chdir("/")); err != nil {
		return err
	}
	for _, m := range mounts {
		if m.dir == "/tmp" || m.dir == "/run" {
			mountAll([]mount{m})
		}
	}
	return nil
}
