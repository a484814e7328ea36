package lab

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// Symbols returns the path of the vmlinux with symbols and types of the cloud kernel. It fetches
// that from Debian's debug package, some 300 MB, if the cache lacks it.
func (l *Lab) Symbols(ctx context.Context, progress io.Writer) (string, error) {
	dir := filepath.Join(l.Cache, "symbols-"+l.Cloud.Release)
	path := filepath.Join(dir, "vmlinux")
	if _, err := os.Stat(path); err == nil { // whole, and in the lab, whose cache is read-only, without a lock
		return path, nil
	}
	unlock, err := lock(ctx, filepath.Join(l.Cache, "lock"), progress)
	if err != nil {
		return "", err
	}
	defer unlock()
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	s := setup{ctx: ctx, cache: l.Cache, progress: progress}
	tmp, err := os.MkdirTemp(l.Cache, "symbols.tmp")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	pkg := "linux-image-" + l.Cloud.Release + "-dbg"
	var deb string
	s.say("fetching %s", pkg)
	if err := s.withLists(func() (err error) {
		deb, err = s.download(s.apt, pkg, tmp)
		return err
	}); err != nil {
		return "", err
	}
	s.say("unpacking %s", filepath.Base(deb))
	const unpack = `dpkg-deb --fsys-tarfile "$0" | tar -x -C "$1" --strip-components=5 "./usr/lib/debug/boot/vmlinux-$2"`
	if _, err := runCtx(ctx, "", "sh", "-c", unpack, deb, tmp, l.Cloud.Release); err != nil {
		return "", err
	}
	if err := os.Mkdir(dir, 0o755); err != nil && !os.IsExist(err) {
		return "", err
	}
	if err := os.Rename(filepath.Join(tmp, "vmlinux-"+l.Cloud.Release), path); err != nil {
		return "", fmt.Errorf("the vmlinux of %s: %w", pkg, err)
	}
	return path, nil
}
