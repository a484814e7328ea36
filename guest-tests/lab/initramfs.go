package lab

import (
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"gvm/guest/initramfs"
)

// Initramfs describes a small initial root file system for a Linux guest:
// busybox, kernel modules, programs of this machine, and a script.
type Initramfs struct {
	// Kernel provides the modules. It may be nil if Modules is empty.
	Kernel *Kernel
	// Modules are names of modules to load before Init runs, in this order, each after those it
	// depends on. A name that is built into Kernel is skipped.
	Modules []string
	// Binaries are paths of programs to put in /bin, with the shared libraries they need. Init must
	// call one by its path, /bin/NAME, if busybox knows the name too: its shell prefers its own.
	Binaries []string
	// Files maps paths in the guest to files on this machine. Their permission bits are kept. A
	// file overrides any other of that path, even /init.
	Files map[string]string
	// Init is a busybox shell script. When it starts, /proc, /sys and /dev
	// (devtmpfs) are mounted and the modules are loaded. If it returns, the
	// guest powers off.
	Init string
	// Root is the root for looking up Binaries' libraries; "" is this machine's root. Paths in
	// Binaries do not start from it.
	Root string
}

// DrainedEnds has shell functions that wait until the console has sent all output before busybox
// ends the guest. Without them the kernel's last message lands amid a line, since printk does not
// queue behind the terminal's buffer, and the end loses the rest. stty waits for the output when it
// sets something (tcsetattr with TCSADRAIN).
const DrainedEnds = `
drain() { stty opost </dev/console 2>/dev/null; }
poweroff() { drain; busybox poweroff "$@"; }
reboot() { drain; busybox reboot "$@"; }
`

const initPrologue = `#!/bin/sh` + DrainedEnds + `
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for m in /modules/*.ko; do
	[ -e "$m" ] || continue
	insmod "$m" || echo "init: cannot load $m"
done
`

const initEpilogue = `
poweroff -f
`

// Build writes the initramfs to the named file, as an uncompressed newc archive.
func (i Initramfs) Build(name string) error {
	b := initramfs.New()
	defer b.Close()
	if err := i.fill(context.Background(), b); err != nil {
		return fmt.Errorf("initramfs: %w", err)
	}
	return writeImage(b, name)
}

func (i Initramfs) fill(ctx context.Context, b *initramfs.Builder) error {
	for _, d := range []string{"dev", "proc", "sys", "tmp", "mnt", "root", "etc", "run"} {
		b.Dir(d, 0o755)
	}
	if err := busybox(ctx, b); err != nil {
		return err
	}
	if len(i.Modules) > 0 {
		if err := i.Kernel.modules(ctx, b, i.Modules); err != nil {
			return err
		}
	}
	for _, path := range i.Binaries {
		root := i.Root
		if !within(path, root) {
			root = "/"
		}
		if err := program(ctx, b, root, path, "/bin/"+filepath.Base(path)); err != nil {
			return err
		}
	}
	b.File("init", 0o755, []byte(initPrologue+i.Init+initEpilogue))
	for guest, host := range i.Files {
		if err := b.HostFile(ctx, guest, host); err != nil {
			return err
		}
	}
	return nil
}

// writeImage writes an initramfs under another name and renames it, so that a file of the given
// name is always complete.
func writeImage(b *initramfs.Builder, name string) error {
	f, err := os.CreateTemp(filepath.Dir(name), filepath.Base(name)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	if err := errors.Join(copyImage(f, b), f.Chmod(0o644), f.Close()); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return os.Rename(f.Name(), name)
}

// copyImage writes an initramfs.
func copyImage(w io.Writer, b *initramfs.Builder) error {
	image, err := b.Image()
	if err != nil {
		return err
	}
	defer image.Close()
	_, err = io.Copy(w, io.NewSectionReader(image, 0, image.Size))
	return err
}

// busybox adds /bin/busybox and a link for each of its applets.
func busybox(ctx context.Context, b *initramfs.Builder) error {
	bb, err := hostTool("busybox")
	if err != nil {
		return err
	}
	f, err := elf.Open(bb)
	if err != nil {
		return err
	}
	defer f.Close()
	if libs, err := f.ImportedLibraries(); len(libs) > 0 || err != nil {
		return fmt.Errorf("%s is not statically linked: install busybox-static", bb)
	}
	if err := b.HostFile(ctx, "bin/busybox", bb); err != nil {
		return err
	}
	applets, err := run("", bb, "--list")
	if err != nil {
		return err
	}
	for _, a := range strings.Fields(string(applets)) {
		if a != "busybox" {
			b.Symlink("bin/"+a, "busybox")
		}
	}
	b.Symlink("sbin", "bin") // the kernel calls /sbin/modprobe, mount /sbin/mount.x
	return nil
}

// program adds a program, under another name, and its shared libraries, which are below root.
func program(ctx context.Context, b *initramfs.Builder, root, path, name string) error {
	path, err := filepath.EvalSymlinks(path) // or the links on the way to it would be added
	if err == nil {
		root, err = filepath.EvalSymlinks(root)
	}
	if err == nil {
		path, err = filepath.Rel(root, path)
	}
	if err != nil {
		return err
	}
	path = "/" + path
	entries, err := initramfs.Host{Root: root}.Closure(ctx, path)
	for _, e := range entries {
		if e.Name == path {
			e.Name = name
		}
		e.UID, e.GID = 0, 0
		b.Add(e)
	}
	return err
}
