package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// rootPackages are the packages of the small Debian system, without their dependencies.
var rootPackages = []string{"base-files", "base-passwd", "bash", "dash", "coreutils", "debianutils", "grep",
	"sed", "procps",
	"util-linux", "mount", "e2fsprogs", "kexec-tools", "sg3-utils", "libiscsi-bin"}

// rootTrim is left out of it: documents, and perl, which only the packages' own scripts use.
var rootTrim = []string{"usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "usr/share/lintian",
	"usr/share/perl",
	"usr/share/perl5", "usr/share/zoneinfo", "usr/lib/x86_64-linux-gnu/gconv", "usr/lib/x86_64-linux-gnu/perl",
	"usr/lib/x86_64-linux-gnu/perl-base", "usr/share/usrmerge", "usr/share/i18n", "usr/lib/udev/hwdb.d"}

// rootInit is /sbin/init of the small Debian system.
const rootInit = `#!/bin/sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=${TERM:-linux}
mountpoint -q /proc || mount -t proc proc /proc
mountpoint -q /sys || mount -t sysfs sysfs /sys
mountpoint -q /dev || mount -t devtmpfs dev /dev
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
if [ -e /init.sh ]; then
	sh /init.sh
else
	setsid -c bash </dev/console >/dev/console 2>&1
fi
sync
mount -o remount,ro / 2>/dev/null
busybox poweroff -f
`

// SwitchRoot is an Initramfs.Init that continues in the file system named by root= on the kernel's
// command line, writable unless it has ro.
const SwitchRoot = `
mode=rw
for word in $(cat /proc/cmdline); do
	case $word in
	root=*) root=${word#root=} ;;
	ro) mode=ro ;;
	esac
done
n=0 # a disk's node is there a little before it opens
until { true <"$root"; } 2>/dev/null || [ $n -ge 200 ]; do sleep 0.1; n=$((n+1)); done
mount -t ext4 -o $mode "$root" /mnt || exec poweroff -f
mount --move /dev /mnt/dev
umount /sys /proc
exec switch_root /mnt /sbin/init
`

// rootVersion is part of the cache's name for the tree and the image. It depends on the definitions
// above, which determine them.
func rootVersion() string {
	return hash(fmt.Sprint(rootPackages, rootTrim, rootInit))
}

// root makes the small Debian system, as a directory and as an image in it.
func (s *setup) root() error {
	dir := filepath.Join(s.cache, "root-"+rootVersion())
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	tmp, err := os.MkdirTemp(s.cache, "root.tmp")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if err := os.Chmod(tmp, 0o755); err != nil {
		return err
	}
	var debs []string
	err = s.withLists(func() (err error) {
		s.say("fetching a small Debian system")
		debs, err = s.closure(tmp, s.apt.options, rootPackages...)
		return err
	})
	if err != nil {
		return err
	}
	s.say("building a small Debian system of %d packages", len(debs))
	tree := filepath.Join(tmp, "tree")
	for _, d := range []string{"bin", "sbin", "lib", "lib64"} { // a merged /usr
		if err := os.MkdirAll(filepath.Join(tree, "usr", d), 0o755); err != nil {
			return err
		}
		if err := os.Symlink("usr/"+d, filepath.Join(tree, d)); err != nil {
			return err
		}
	}
	for _, deb := range debs {
		if err := s.unpackInto(deb, tree); err != nil {
			return err
		}
	}
	if err := finishRoot(tree); err != nil {
		return err
	}
	if err := s.image(tree, filepath.Join(tmp, "root.ext4")); err != nil {
		return err
	}
	if err := os.RemoveAll(filepath.Join(tmp, "apt")); err != nil {
		return err
	}
	return os.Rename(tmp, dir)
}

// closure downloads packages and their dependencies, as apt would install them on an empty system,
// and returns the .deb files. They are in a directory apt of tmp.
func (s *setup) closure(tmp string, options []string, packages ...string) ([]string, error) {
	apt := filepath.Join(tmp, "apt")
	if err := os.MkdirAll(filepath.Join(apt, "archives", "partial"), 0o755); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(apt, "status"), nil, 0o644); err != nil {
		return nil, err
	}
	args := slices.Concat([]string{"apt-get"}, options, []string{
		"-o", "Dir::State::status=" + filepath.Join(apt, "status"), "-o", "Dir::Cache=" + apt, "-o", "Debug::NoLocking=1",
		"-o", "APT::Sandbox::User=",
		"-q", "-y", "--download-only", "--no-install-recommends", "install"}, packages)
	if _, err := runCtx(s.ctx, "", args...); err != nil {
		return nil, err
	}
	return filepath.Glob(filepath.Join(apt, "archives", "*.deb"))
}

// unpackInto unpacks a package over a tree whose /bin and the like are links.
func (s *setup) unpackInto(deb, tree string) error {
	_, err := runCtx(s.ctx, "", "sh", "-c",
		`dpkg-deb --fsys-tarfile "$1" | tar -x -p --keep-directory-symlink --no-same-owner -C "$2"`, "sh", deb, tree)
	if err != nil {
		return fmt.Errorf("unpack %s: %w", filepath.Base(deb), err)
	}
	return nil
}

func finishRoot(tree string) error {
	for _, p := range rootTrim {
		if err := os.RemoveAll(filepath.Join(tree, p)); err != nil {
			return err
		}
	}
	for _, d := range []string{"proc", "sys", "dev", "run", "tmp", "root", "mnt"} {
		if err := os.MkdirAll(filepath.Join(tree, d), 0o755); err != nil {
			return err
		}
	}
	bb, err := hostTool("busybox")
	if err != nil {
		return err
	}
	b, err := os.ReadFile(bb)
	if err != nil {
		return err
	}
	// dash's installation would make its link, but it did not run.
	if err := os.Symlink("dash", filepath.Join(tree, "usr/bin/sh")); err != nil && !os.IsExist(err) {
		return err
	}
	return errors.Join(
		os.WriteFile(filepath.Join(tree, "usr/bin/busybox"), b, 0o755),
		os.WriteFile(filepath.Join(tree, "etc/passwd"), []byte("root:x:0:0:root:/root:/bin/bash\n"), 0o644),
		os.WriteFile(filepath.Join(tree, "etc/group"), []byte("root:x:0:\n"), 0o644),
		os.WriteFile(filepath.Join(tree, "usr/sbin/init"), []byte(rootInit), 0o755),
	)
}

// image makes an ext4 image of a tree, with a quarter and 32 MiB to spare.
func (s *setup) image(tree, name string) error {
	var size int64
	err := filepath.WalkDir(tree, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err == nil {
			size += (info.Size() + 4095) &^ 4095
		}
		return err
	})
	if err != nil {
		return err
	}
	mke2fs, err := hostTool("mke2fs")
	if err != nil {
		return err
	}
	_, err = runCtx(s.ctx, "", mke2fs, "-q", "-F", "-t", "ext4", "-L", "lab", "-E", "root_owner=0:0", "-d", tree,
		name, fmt.Sprintf("%dM", size*5/4>>20+32))
	return err
}

// CopyRootImage makes a writable copy of RootImage whose /init.sh is the given shell script. It
// runs once the guest is up, and the guest powers off when it returns. An empty script leaves a
// shell on the console.
func (l *Lab) CopyRootImage(ctx context.Context, name, script string) error {
	if err := copySparse(name, l.RootImage); err != nil {
		return fmt.Errorf("copy the root image: %w", err)
	}
	if script == "" {
		return nil
	}
	debugfs, err := hostTool("debugfs")
	if err != nil {
		return err
	}
	f, err := os.CreateTemp("", "init.sh")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	if _, err := io.Copy(f, strings.NewReader(script)); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if _, err := runCtx(ctx, "", debugfs, "-w", "-R", "write "+f.Name()+" init.sh", name); err != nil {
		return err
	}
	// debugfs exits with 0 even on errors.
	out, err := runCtx(ctx, "", debugfs, "-R", "cat init.sh", name)
	if err == nil && string(out) != script {
		err = fmt.Errorf("%s: debugfs did not write /init.sh", name)
	}
	return err
}

// copySparse copies a file, and leaves holes for runs of zeros.
func copySparse(to, from string) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	buf, zeros := make([]byte, 1<<20), make([]byte, 1<<20)
	var off int64
	for {
		n, err := io.ReadFull(in, buf)
		if !bytes.Equal(buf[:n], zeros[:n]) {
			if _, err := out.WriteAt(buf[:n], off); err != nil {
				return err
			}
		}
		off += int64(n)
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return out.Truncate(off)
		case err != nil:
			return err
		}
	}
}
