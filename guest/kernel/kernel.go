// Package kernel finds the Linux kernel that a user names, with the files that belong to it: its
// modules and its configuration. It also knows which options of the configuration a guest of gvm
// needs (Options).
//
// A name is a file, a directory, or the release of an installed kernel; see Finder.Find. Nothing in
// a tree or a package is executed, and nothing is unpacked to the file system.
package kernel

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"gvm/kvmapi/nowait"
	"gvm/text"
	"gvm/vmm/boot"
)

// Kernel is a kernel and the files that belong to it. Close closes the image.
type Kernel struct {
	Image   *boot.Image
	Release string // as uname -r shows it in the guest; "": unknown
	Modules Modules
	Config  Config // from a file or a package; Embedded reads that of the image
	Cache   string // of the Finder

	path string // of the image, absolute; "": unknown
}

// Modules tells where the modules of a kernel are.
type Modules struct {
	Path string // "": unknown, or none
	Kind ModulesKind

	version string // of the directory below lib/modules in a package
}

// ModulesKind is a form in which modules lie in Modules.Path.
type ModulesKind int

const (
	Installed ModulesKind = iota // a directory such as /lib/modules/6.12.0
	Built                        // a build directory: modules.order has their names
	Packed                       // a package: they are below lib/modules
)

// String describes the form.
func (k ModulesKind) String() string {
	return [...]string{Installed: "installed", Built: "built", Packed: "packed"}[k]
}

// Close closes the image.
func (k *Kernel) Close() error { return k.Image.Close() }

// Host is the name of the kernel that runs on the host.
const Host = "host"

// Finder finds kernels on a host. Its zero value is ready for use.
type Finder struct {
	Root    string // where boot, lib and proc are; "" is /
	Running string // the release of the kernel that runs; "" asks the kernel
	Cache   string // a directory for data out of packages, as boot.CacheDir returns; "": none
}

// Find finds the kernel that a user calls name, which is one of:
//   - a file: a bzImage, a vmlinux, a Debian package (.deb) or an RPM package with one;
//   - a directory: a Linux source tree, a build directory (make O=), or one with a file vmlinuz;
//   - the release of an installed kernel, such as 6.1.0-13-amd64;
//   - Host.
//
// A file or directory is preferred to a release. Errors are *boot.ImageError, or the cause of ctx.
func (f Finder) Find(ctx context.Context, name string) (*Kernel, error) {
	return nowait.Until(ctx, func() string { return name + " was read" },
		func() (*Kernel, error) { return f.find(ctx, name) }, func(k *Kernel) { k.Close() })
}

func (f Finder) find(ctx context.Context, name string) (*Kernel, error) {
	path, running := name, false
	switch st, err := os.Stat(name); {
	case err == nil && st.IsDir():
		if path, err = inDirectory(name); err != nil {
			return nil, err
		}
	case errors.Is(err, fs.ErrNotExist):
		if _, err := os.Readlink(name); err == nil {
			break // a link to nothing, which OpenFile refuses
		}
		running = name == Host
		if path, err = f.Installed(name); err != nil {
			return nil, err
		}
	}
	file, err := boot.OpenFile(ctx, path)
	if err != nil {
		return nil, err
	}
	k, err := f.open(ctx, path, file)
	if err != nil {
		file.Close()
		return nil, err
	}
	k.Cache = f.Cache
	if running && k.Config.Text == nil {
		k.Config = readConfig(filepath.Join(f.root(), "proc/config.gz"))
	}
	return k, nil
}

// open makes a Kernel of an open file, which the Kernel keeps.
func (f Finder) open(ctx context.Context, path string, file *boot.File) (*Kernel, error) {
	open, err := packageOf(file)
	if err != nil {
		return nil, err
	}
	if open != nil {
		k, err := unpack(ctx, file, open)
		if err == nil {
			err = file.Close()
		}
		return k, err
	}
	im, err := boot.NewImage(file)
	if err != nil {
		return nil, err
	}
	k := &Kernel{Image: im, Release: release(im.Release())}
	if path, err = filepath.EvalSymlinks(path); err == nil {
		if path, err = filepath.Abs(path); err == nil {
			k.path = path
			k.beside(path)
		}
	}
	return k, nil
}

// Debug returns the kernel's vmlinux with symbols, and the directory whose vmlinux-gdb.py has the
// kernel's commands for GDB; "" for one that there is not.
func (k *Kernel) Debug() (vmlinux, scripts string) {
	if k.path == "" {
		return "", ""
	}
	tree := treeOf(k.path)
	candidates := []string{filepath.Join(tree, "vmlinux")}
	if tree == "" {
		candidates = nil
		if filepath.Base(k.path) == "vmlinux" {
			candidates = append(candidates, k.path)
		}
		if k.Release != "" { // installed, by Debian's, Fedora's and Arch Linux's places
			candidates = append(candidates, "/usr/lib/debug/boot/vmlinux-"+k.Release,
				"/usr/lib/debug/lib/modules/"+k.Release+"/vmlinux", "/lib/modules/"+k.Release+"/build/vmlinux")
		}
	}
	for _, path := range candidates {
		if !isFile(path) {
			continue
		}
		if isFile(filepath.Join(filepath.Dir(path), "vmlinux-gdb.py")) {
			scripts = filepath.Dir(path)
		}
		return path, scripts
	}
	return "", ""
}

// beside finds the files that belong to the image at an absolute path by its place.
func (k *Kernel) beside(path string) {
	dir, base := filepath.Split(path)
	if tree := treeOf(path); tree != "" {
		k.Config = readConfig(filepath.Join(tree, ".config"))
		if s := release(strings.TrimSpace(head(filepath.Join(tree, "include/config/kernel.release")))); s != "" {
			k.Release = s
		}
		if isFile(filepath.Join(tree, "modules.order")) {
			k.Modules = Modules{Path: filepath.Clean(tree), Kind: Built}
		}
		return
	}
	version, isNamed := strings.CutPrefix(base, "vmlinuz-")
	if base == "vmlinuz" { // in its directory of modules
		if version = filepath.Base(dir); k.Release == "" {
			k.Release = release(version)
		}
		k.Config = readConfig(filepath.Join(dir, "config"))
		if isDir(filepath.Join(dir, "kernel")) {
			k.Modules = Modules{Path: filepath.Clean(dir), Kind: Installed}
		}
		return
	}
	if !isNamed {
		return
	}
	if k.Release == "" {
		k.Release = release(version)
	}
	k.Config = readConfig(filepath.Join(dir, "config-"+version))
	for _, lib := range libModules {
		modules := filepath.Join(dir, "..", lib, k.Release)
		if k.Release == "" || !isDir(modules) {
			continue
		}
		if k.Modules.Path == "" {
			k.Modules = Modules{Path: modules, Kind: Installed}
		}
		if k.Config.Text == nil {
			k.Config = readConfig(filepath.Join(modules, "config"))
		}
	}
}

// libModules are the directories of installed modules, below the root directory.
var libModules = []string{"lib/modules", "usr/lib/modules"}

// release returns s if it can be a release, which becomes a part of paths, else "".
func release(s string) string {
	if s == "." || s == ".." || len(s) > 64 || strings.ContainsFunc(s, func(r rune) bool {
		return r <= ' ' || r > '~' || r == '/'
	}) {
		return ""
	}
	return s
}

func (f Finder) root() string {
	if f.Root == "" {
		return "/"
	}
	return f.Root
}

func (f Finder) running() string {
	if f.Running != "" {
		return f.Running
	}
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}

// images returns the places of the image of an installed kernel.
func (f Finder) images(version string) (paths []string) {
	paths = []string{filepath.Join(f.root(), "boot", "vmlinuz-"+version)}
	for _, lib := range libModules {
		paths = append(paths, filepath.Join(f.root(), lib, version, "vmlinuz"))
	}
	return paths
}

// Installed returns the path of the image of an installed kernel, by the user's word for it: its
// release, or Host.
func (f Finder) Installed(name string) (string, error) {
	version := name
	if name == Host {
		version = f.running()
	}
	if release(version) != "" {
		for _, path := range f.images(version) {
			if _, err := os.Stat(path); err == nil {
				return path, nil
			}
		}
	}
	if name == Host {
		return "", &boot.ImageError{Name: name, What: fmt.Sprintf("is Linux %s, which has no image in %s or %s", version,
			filepath.Join(f.root(), "boot"), filepath.Join(f.root(), libModules[0])),
			Mend: "give a file, a kernel tree or a package"}
	}
	if strings.Contains(name, "/") {
		mend := "check the path"
		if near := text.Nearest(filepath.Base(name), names(filepath.Dir(name), maxHints)); near != "" {
			mend += "; did you mean " + filepath.Join(filepath.Dir(name), near) + "?"
		}
		return "", &boot.ImageError{Name: name, What: "does not exist", Mend: mend}
	}
	releases := f.releases()
	mend := "check the name"
	if near := text.Nearest(name, append(names(".", maxHints), releases...)); near != "" {
		mend += "; did you mean " + near + "?"
	} else if len(releases) > 0 {
		mend += "; installed: " + strings.Join(releases[:min(len(releases), 5)], ", ")
	}
	return "", &boot.ImageError{Name: name,
		What: "does not exist, neither as a file nor as the release of an installed kernel", Mend: mend}
}

// releases returns the releases of the installed kernels, sorted.
func (f Finder) releases() (all []string) {
	for _, path := range f.images("*") {
		found, _ := filepath.Glob(path) // the pattern is valid, unless Root has a special character
		for _, path := range found {
			version, ok := strings.CutPrefix(filepath.Base(path), "vmlinuz-")
			if !ok {
				version = filepath.Base(filepath.Dir(path))
			}
			all = append(all, version)
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// maxHints bounds the names of which an error suggests one.
const maxHints = 1000

// names returns the names in a directory, at most limit.
func names(dir string, limit int) []string {
	d, err := nowait.Open(dir, os.O_RDONLY, 0, nowait.Directory)
	if err != nil {
		return nil
	}
	defer d.Close()
	all, _ := d.Readdirnames(limit) // the names that could be read are enough for a hint
	return all
}

func isFile(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.Mode().IsRegular()
}

func isDir(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.IsDir()
}
