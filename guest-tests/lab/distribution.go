package lab

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// Distribution is a whole Debian system that boots with systemd to a login prompt on ttyS0. root
// has no password.
type Distribution struct {
	Root            string // path of an ext4 image: see CopyRoot
	BZImage, Initrd string // paths of the files in its /boot
}

// distributionTools are Debian's packages that it takes to make the distribution.
var distributionTools = []string{"e2fsprogs", "genext2fs", "mmdebstrap", "uidmap"}

// distributionArgs are mmdebstrap's arguments: the essential packages, systemd, and a kernel with
// the initramfs that its installation makes.
var distributionArgs = []string{
	"--variant=essential", "--include=systemd,systemd-sysv,udev,dbus,linux-image-cloud-amd64,initramfs-tools",
	"--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*",
	"--dpkgopt=path-exclude=/usr/share/locale/*",
	`--customize-hook=chroot "$1" passwd -d root`,
	`--customize-hook=echo debian >"$1/etc/hostname"`,
	// debugfs does not follow links.
	`--customize-hook=for f in vmlinuz initrd.img; do ln "$1/boot/$f"-* "$1/boot/$f"; done`,
	"--format=ext2",
}

// distributionSize is the size of the root file system.
const distributionSize = "512M"

func distributionDir(cache string) string {
	return filepath.Join(cache, "distribution-"+hash(fmt.Sprint(distributionArgs, distributionSize)))
}

// Distribution returns the system that MakeDistribution has made.
func (l *Lab) Distribution() (Distribution, error) {
	dir := distributionDir(l.Cache)
	d := Distribution{filepath.Join(dir, "root.ext4"), filepath.Join(dir, "vmlinuz"), filepath.Join(dir, "initrd.img")}
	if _, err := os.Stat(dir); err != nil {
		return d, fmt.Errorf("the lab has no distribution; ./dev distribution makes it: %w", err)
	}
	return d, nil
}

// CopyRoot makes a copy of the root file system to write to.
func (d Distribution) CopyRoot(name string) error { return copySparse(name, d.Root) }

// MakeDistribution makes a small Debian system of this machine's release with mmdebstrap. That
// takes a minute. One that is there is left alone.
func (l *Lab) MakeDistribution(ctx context.Context, progress io.Writer) error {
	unlock, err := lock(ctx, filepath.Join(l.Cache, "lock"), progress)
	if err != nil {
		return err
	}
	defer unlock()
	if _, err := l.Distribution(); err == nil {
		return nil
	}
	s := setup{ctx: ctx, cache: l.Cache, progress: progress}
	if err := s.distribution(); err != nil {
		return fmt.Errorf("make a distribution in %s: %w", l.Cache, err)
	}
	return nil
}

func (s *setup) distribution() error {
	if err := s.need(distributionTools); err != nil {
		return err
	}
	release, mirror, err := s.release()
	if err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(s.cache, "distribution.tmp")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	s.say("making a Debian system of %s", release)
	root := filepath.Join(tmp, "root.ext4")
	// In a session of its own: when mmdebstrap fails it ends its process group.
	args := append([]string{"setsid", "--wait", "mmdebstrap"}, distributionArgs...)
	if _, err := runCtx(s.ctx, "", append(args, release, root, "deb "+mirror+" "+release+" main")...); err != nil {
		return err
	}
	for _, c := range [][]string{
		{"resize2fs", root, distributionSize},
		{"tune2fs", "-O", "has_journal,extent,dir_index", root},
		{"debugfs", "-R", "dump /boot/vmlinuz " + filepath.Join(tmp, "vmlinuz"), root},
		{"debugfs", "-R", "dump /boot/initrd.img " + filepath.Join(tmp, "initrd.img"), root},
	} {
		if c[0], err = hostTool(c[0]); err != nil {
			return err
		}
		if _, err := runCtx(s.ctx, "", c...); err != nil {
			return err
		}
	}
	for _, f := range []string{"vmlinuz", "initrd.img"} { // debugfs ends with 0 even after a failure
		if info, err := os.Stat(filepath.Join(tmp, f)); err != nil {
			return err
		} else if info.Size() == 0 {
			return fmt.Errorf("the system's /boot/%s is empty", f)
		}
	}
	if err := os.Chmod(tmp, 0o755); err != nil {
		return err
	}
	return os.Rename(tmp, distributionDir(s.cache))
}
