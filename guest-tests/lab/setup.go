package lab

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// setup is one run of Setup, which holds the cache's lock.
type setup struct {
	ctx      context.Context
	cache    string
	progress io.Writer
	apt      client
}

func (s *setup) say(format string, args ...any) {
	fmt.Fprintf(s.progress, "lab: "+format+"\n", args...)
}

func (s *setup) all() error {
	start := time.Now()
	// What a killed setup left unfinished.
	stale, err := filepath.Glob(filepath.Join(s.cache, "*.tmp*"))
	if err != nil {
		return err
	}
	for _, d := range stale {
		if err := os.RemoveAll(d); err != nil {
			return err
		}
	}
	if err := s.hostTools(); err != nil {
		return err
	}
	if _, err := os.Stat(qemuPath(s.cache)); err != nil {
		if err := s.qemu(); err != nil {
			return err
		}
	}
	for _, name := range kernelNames {
		if _, err := openKernel(s.cache, name); err == nil {
			continue
		}
		if err := s.kernel(name); err != nil {
			return err
		}
	}
	if err := s.root(); err != nil {
		return err
	}
	s.say("ready in %s after %.0f s", s.cache, time.Since(start).Seconds())
	return nil
}

// kernel fetches a kernel and makes the link to it.
func (s *setup) kernel(name string) error {
	tmp, err := os.MkdirTemp(s.cache, name+".tmp")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	var deb string
	err = s.withLists(func() error {
		pkg, err := s.resolve(name)
		if err != nil {
			return err
		}
		s.say("fetching %s", pkg)
		deb, err = s.download(pkg, tmp)
		return err
	})
	if err != nil {
		return err
	}
	dir := filepath.Join(s.cache, strings.TrimSuffix(filepath.Base(deb), ".deb"))
	if _, err := os.Stat(dir); err != nil {
		s.say("unpacking %s", filepath.Base(deb))
		root := filepath.Join(tmp, "root")
		if _, err := runCtx(s.ctx, "", "dpkg-deb", "-x", deb, root); err != nil {
			return err
		}
		if err := s.finishKernel(root); err != nil {
			return err
		}
		if err := os.Rename(root, dir); err != nil {
			return err
		}
	}
	return s.link(name, filepath.Base(dir))
}

// finishKernel adds what the package does not have: the ELF kernel, and the
// module dependencies, which its installation would have made.
func (s *setup) finishKernel(root string) error {
	bz, err := one(filepath.Join(root, "boot", "vmlinuz-*"))
	if err != nil {
		return err
	}
	if err := unpackKernel(bz, filepath.Join(root, "vmlinux")); err != nil {
		return err
	}
	release := strings.TrimPrefix(filepath.Base(bz), "vmlinuz-")
	if _, err := os.Stat(filepath.Join(root, "usr", "lib", "modules", release)); err == nil {
		// depmod looks under /lib/modules: a merged /usr has lib as a link.
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
