package lab

import (
	"bufio"
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"sort"
	"strings"

	"github.com/cavaliergopher/cpio"
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
	t := make(tree)
	if err := i.fill(t); err != nil {
		return fmt.Errorf("initramfs: %w", err)
	}
	return t.writeFile(name)
}

func (i Initramfs) fill(t tree) error {
	for _, d := range []string{"dev", "proc", "sys", "tmp", "mnt", "root", "etc", "run"} {
		t.dir(d)
	}
	if err := t.busybox(); err != nil {
		return err
	}
	if len(i.Modules) > 0 {
		mods, err := i.Kernel.modules(i.Modules)
		if err != nil {
			return err
		}
		for n, m := range mods {
			b, err := readModule(filepath.Join(i.Kernel.Modules, m.Path))
			if err != nil {
				return err
			}
			t.file(fmt.Sprintf("modules/%03d-%s.ko", n, m.Name), 0o644, b)
		}
	}
	for _, b := range i.Binaries {
		if err := t.program(i.Root, b); err != nil {
			return err
		}
	}
	t.file("init", 0o755, []byte(initPrologue+i.Init+initEpilogue))
	for guest, host := range i.Files {
		if err := t.copyFile(guest, host); err != nil {
			return err
		}
	}
	return nil
}

// tree is the content of an archive, by path without a leading slash.
type tree map[string]node

type node struct {
	mode cpio.FileMode
	data []byte // of a symbolic link: its target
}

func clean(name string) string { return strings.TrimPrefix(path.Clean("/"+name), "/") }

// dir adds a directory and its parents.
func (t tree) dir(name string) {
	for name = clean(name); name != "." && name != ""; name = path.Dir(name) {
		if _, ok := t[name]; !ok {
			t[name] = node{mode: cpio.TypeDir | 0o755}
		}
	}
}

func (t tree) file(name string, mode os.FileMode, data []byte) {
	name = clean(name)
	t.dir(path.Dir(name))
	t[name] = node{cpio.TypeReg | cpio.FileMode(mode.Perm()), data}
}

func (t tree) link(name, target string) {
	name = clean(name)
	t.dir(path.Dir(name))
	t[name] = node{cpio.TypeSymlink | 0o777, []byte(target)}
}

func (t tree) copyFile(name, host string) error {
	st, err := os.Stat(host)
	if err != nil {
		return err
	}
	b, err := os.ReadFile(host)
	if err != nil {
		return err
	}
	t.file(name, st.Mode(), b)
	return nil
}

// writeTo writes the archive. Its length is a multiple of four, as the kernel requires if another
// archive follows.
func (t tree) writeTo(w io.Writer) error {
	names := make([]string, 0, len(t))
	for n := range t {
		names = append(names, n)
	}
	sort.Strings(names) // a directory before its entries
	var size int64
	count := writerFunc(func(p []byte) (int, error) {
		size += int64(len(p))
		return w.Write(p)
	})
	cw := cpio.NewWriter(count)
	for _, name := range names {
		n := t[name]
		h := &cpio.Header{Name: name, Mode: n.mode, Links: 1, Size: int64(len(n.data))}
		if err := cw.WriteHeader(h); err != nil {
			return err
		}
		if _, err := cw.Write(n.data); err != nil {
			return err
		}
	}
	if err := cw.Close(); err != nil {
		return err
	}
	_, err := w.Write(make([]byte, -size&3))
	return err
}

// writeFile writes the archive under another name and renames it, so that a file of the given name
// is always complete.
func (t tree) writeFile(name string) error {
	f, err := os.CreateTemp(filepath.Dir(name), filepath.Base(name)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	w := bufio.NewWriterSize(f, 1<<20)
	err = errors.Join(t.writeTo(w), w.Flush(), f.Chmod(0o644), f.Close())
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return os.Rename(f.Name(), name)
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// busybox adds /bin/busybox and a link for each of its applets.
func (t tree) busybox() error {
	bb, err := hostTool("busybox")
	if err != nil {
		return err
	}
	if err := t.copyFile("bin/busybox", bb); err != nil {
		return err
	}
	libs, err := libraries("", bb)
	if err != nil {
		return err
	}
	if len(libs) > 0 {
		return fmt.Errorf("%s is not statically linked: install busybox-static", bb)
	}
	applets, err := run("", bb, "--list")
	if err != nil {
		return err
	}
	for _, a := range strings.Fields(string(applets)) {
		if a != "busybox" {
			t.link("bin/"+a, "busybox")
		}
	}
	t.link("sbin", "bin") // the kernel calls /sbin/modprobe, mount /sbin/mount.x
	return nil
}

// program adds a program as /bin/NAME, and its shared libraries.
func (t tree) program(root, name string) error {
	if err := t.copyFile("bin/"+filepath.Base(name), name); err != nil {
		return err
	}
	libs, err := libraries(root, name)
	if err != nil {
		return err
	}
	for guest, host := range libs {
		if err := t.copyFile(guest, host); err != nil {
			return err
		}
	}
	return nil
}

// libDirs are the directories of Debian's dynamic linker. In an initramfs all libraries go to the
// first of them.
var libDirs = []string{"/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib", "/usr/lib", "/lib64",
	"/usr/lib64", "/usr/local/lib"}

// libraries returns the shared libraries and the dynamic linker that a program needs, directly or
// not: paths in an initramfs to paths here.
func libraries(root, name string) (map[string]string, error) {
	libs := make(map[string]string)
	var visit func(name string, dirs []string) error
	visit = func(name string, dirs []string) error {
		f, err := elf.Open(name)
		if err != nil {
			return fmt.Errorf("libraries of %s: %w", name, err)
		}
		defer f.Close()
		for _, p := range f.Progs {
			if p.Type == elf.PT_INTERP {
				b, err := io.ReadAll(p.Open())
				if err != nil {
					return fmt.Errorf("libraries of %s: %w", name, err)
				}
				interp := string(bytes.TrimRight(b, "\x00"))
				libs[clean(interp)] = filepath.Join(root, interp)
			}
		}
		for _, tag := range []elf.DynTag{elf.DT_RPATH, elf.DT_RUNPATH} {
			paths, _ := f.DynString(tag)
			for _, p := range paths {
				for _, d := range strings.Split(p, ":") {
					dirs = append(dirs, strings.ReplaceAll(d, "$ORIGIN", filepath.Dir(name)))
				}
			}
		}
		needed, err := f.ImportedLibraries()
		if err != nil {
			return fmt.Errorf("libraries of %s: %w", name, err)
		}
		for _, n := range needed {
			guest := clean(filepath.Join(libDirs[0], n))
			if _, ok := libs[guest]; ok {
				continue
			}
			host := find(root, n, dirs)
			if host == "" {
				return fmt.Errorf("library %s, which %s needs, is nowhere in %s", n, name, strings.Join(libDirs, ", "))
			}
			libs[guest] = host
			if err := visit(host, dirs); err != nil {
				return err
			}
		}
		return nil
	}
	if err := visit(name, nil); err != nil {
		return nil, err
	}
	return libs, nil
}

// find looks for a library in dirs, then in libDirs under root.
func find(root, name string, dirs []string) string {
	for _, d := range libDirs {
		dirs = append(dirs[:len(dirs):len(dirs)], filepath.Join(root, d))
	}
	for _, d := range dirs {
		p := filepath.Join(d, name)
		if _, err := os.Stat(p); err == nil {
			return p
		}
	}
	return ""
}
