package lab

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// stock is a row of the table of the lab's kernels.
type stock struct {
	name string // for Lab.Kernel, the lab command's flag and GVM_TEST_L1
	// packages are tried in order: a metapackage, or the beginning of a package's name.
	packages []string
	suites   []string // releases of Debian that have it; nil is the system's own
}

var stocks = []stock{
	{"debian", []string{"linux-image-amd64"}, nil},
	{"cloud", []string{"linux-image-cloud-amd64"}, nil},
	{"5.10", []string{"linux-image-5.10-amd64"}, []string{"bullseye"}},
	{"6.12", []string{"linux-image-6.12-amd64"}, nil},
	// Backports change: any newer 7.x is the next best.
	{"7.3", []string{"linux-image-7.3-amd64", "linux-image-7-amd64"}, []string{"trixie-backports"}},
}

// link is the name of the link in the cache to the kernel's directory.
func (s stock) link() string { return s.packages[0] }

// Versions returns the names of kernels that Lab.Kernel takes besides debian and cloud, which are
// those of the system's release.
func Versions() (names []string) {
	for _, s := range stocks {
		if s.name[0] >= '0' && s.name[0] <= '9' {
			names = append(names, s.name)
		}
	}
	return names
}

// Kernel returns the kernel with a name: debian, cloud, or one of Versions.
func (l *Lab) Kernel(name string) (*Kernel, error) {
	for i, s := range stocks {
		if s.name == name {
			return l.kernels[i], nil
		}
	}
	return nil, fmt.Errorf("the lab has no kernel %q; it has debian, cloud, %s", name, strings.Join(Versions(), ", "))
}

// kernel fetches a kernel and makes the link to it.
func (s *setup) kernel(k stock) error {
	tmp, err := os.MkdirTemp(s.cache, k.link()+".tmp")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	var debs []string
	if k.suites != nil {
		s.say("fetching the package lists of %s", strings.Join(k.suites, ", "))
		options, err := s.suites(filepath.Join(tmp, "lists"), k.suites)
		if err != nil {
			return err
		}
		debs, err = s.fetch(client{options}, k.packages, tmp)
		if err != nil {
			return err
		}
	} else if err := s.withLists(func() (err error) {
		debs, err = s.fetch(s.apt, k.packages, tmp)
		return err
	}); err != nil {
		return err
	}
	dir := filepath.Join(s.cache, strings.TrimSuffix(filepath.Base(debs[0]), ".deb"))
	if _, err := os.Stat(dir); err != nil {
		root := filepath.Join(tmp, "root")
		for _, deb := range debs {
			s.say("unpacking %s", filepath.Base(deb))
			if _, err := runCtx(s.ctx, "", "dpkg-deb", "-x", deb, root); err != nil {
				return err
			}
		}
		if err := s.finishKernel(root); err != nil {
			return err
		}
		if err := os.Rename(root, dir); err != nil {
			return err
		}
	}
	return s.link(k.link(), filepath.Base(dir))
}

// fetch downloads the packages of the first available kernel of names: the image's own comes first.
func (s *setup) fetch(apt client, names []string, dir string) (debs []string, err error) {
	var image string
	for _, name := range names {
		if image, err = s.resolve(apt, name); err == nil {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	parts, err := s.parts(apt, image)
	if err != nil {
		return nil, err
	}
	for _, pkg := range append([]string{image}, parts...) {
		s.say("fetching %s", pkg)
		deb, err := s.download(apt, pkg, dir)
		if err != nil {
			return nil, err
		}
		debs = append(debs, deb)
	}
	return debs, nil
}

// finishKernel adds the files that the packages lack: the ELF kernel, and the module dependencies,
// which an installation would have made.
func (s *setup) finishKernel(root string) error {
	bz, release, err := image(root)
	if err != nil {
		return err
	}
	if err := unpackKernel(bz, filepath.Join(root, "vmlinux")); err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(root, "usr", "lib", "modules", release)); err == nil {
		// depmod searches /lib/modules: a merged /usr has lib as a link.
		if err := os.Symlink("usr/lib", filepath.Join(root, "lib")); err != nil && !os.IsExist(err) {
			return err
		}
	}
	if _, err := os.Stat(filepath.Join(root, "lib", "modules", release, "modules.dep")); err == nil {
		return nil
	}
	depmod, err := hostTool("depmod")
	if err != nil {
		return err
	}
	_, err = runCtx(s.ctx, "", depmod, "-b", root, release)
	return err
}

// image finds the bzImage of a kernel unpacked below root, and its release: in /boot, or, since
// Debian's Linux 7.0, beside the modules.
func image(root string) (bz, release string, err error) {
	if bz, err = one(filepath.Join(root, "boot", "vmlinuz-*")); err == nil {
		return bz, strings.TrimPrefix(filepath.Base(bz), "vmlinuz-"), nil
	}
	if bz, err := one(filepath.Join(root, "usr", "lib", "modules", "*", "vmlinuz")); err == nil {
		return bz, filepath.Base(filepath.Dir(bz)), nil
	}
	return "", "", err
}

func openKernel(cache string, s stock) (*Kernel, error) {
	dir, err := filepath.EvalSymlinks(filepath.Join(cache, s.link()))
	if err != nil {
		return nil, err
	}
	k := &Kernel{Package: s.link(), VMLinux: filepath.Join(dir, "vmlinux")}
	if k.BZImage, k.Release, err = image(dir); err != nil {
		return nil, err
	}
	k.Modules = filepath.Join(dir, "lib", "modules", k.Release)
	if _, err := os.Stat(k.Modules); err != nil {
		k.Modules = filepath.Join(dir, "usr", "lib", "modules", k.Release)
	}
	for _, p := range []string{k.VMLinux, filepath.Join(k.Modules, "modules.builtin")} {
		if _, err := os.Stat(p); err != nil {
			return nil, err
		}
	}
	return k, nil
}
