package lio

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	fabric = "vhost" // the directory of vhost-scsi's targets
	core   = "core"  // that of backstores
)

// adapters returns the names in core, and the owners of gvm's.
func (h *host) adapters() (all []string, owners map[owner][]string, err error) {
	all, err = h.dirs(core)
	owners = make(map[owner][]string)
	for _, a := range all {
		if o, _, ok := parseAdapter(a); ok {
			owners[o] = append(owners[o], a)
		}
	}
	return all, owners, err
}

// wwns returns the names of vhost-scsi's targets.
func (h *host) wwns() ([]string, error) {
	all, err := h.dirs(fabric)
	return slices.DeleteFunc(all, func(s string) bool { return s == "discovery_auth" }), err
}

// tpgs returns the tags of a target's portal groups.
func (h *host) tpgs(wwn string) ([]int, error) { return h.numbers(fabric+"/"+wwn, "tpgt_") }

func tpgDir(wwn string, tag int) string { return fmt.Sprintf("%s/%s/tpgt_%d", fabric, wwn, tag) }

// luns returns the LUNs of a portal group, with or without a disk.
func (h *host) luns(tpg string) ([]int, error) { return h.numbers(tpg+"/lun", "lun_") }

func lunDir(tpg string, n int) string { return fmt.Sprintf("%s/lun/lun_%d", tpg, n) }

func (h *host) numbers(path, prefix string) ([]int, error) {
	names, err := h.dirs(path)
	var out []int
	for _, name := range names {
		if s, ok := strings.CutPrefix(name, prefix); ok {
			if n, err := strconv.Atoi(s); err == nil {
				out = append(out, n)
			}
		}
	}
	slices.Sort(out)
	return out, err
}

// image returns the path below a backstore, if known: gvm and other tools write udev_path. The
// kernel's own description has the path that it opened, which for gvm's is that of a descriptor.
func (h *host) image(disk string) string {
	if p, err := h.read(disk + "/udev_path"); err == nil && p != "" {
		return p
	}
	info, err := h.read(disk + "/info")
	if err != nil {
		return ""
	}
	for _, part := range []struct{ before, after string }{{" File: ", "  Size: "}, {" UDEV PATH: ", "  readonly: "}} {
		_, p, ok := strings.Cut(info, part.before)
		if i := strings.LastIndex(p, part.after); ok && i >= 0 && !strings.HasPrefix(p, "/proc/self/") {
			return p[:i]
		}
	}
	return ""
}

// served returns a disk of LIO on the image of p, if any, unless both only read it.
func (h *host) served(p *plan, adapters []string) (disk string, err error) {
	for _, a := range adapters {
		names, err := h.dirs(core + "/" + a)
		if err != nil {
			return "", err
		}
		for _, name := range names {
			disk := core + "/" + a + "/" + name
			other, err := os.Stat(h.image(disk))
			if err != nil || !sameImage(p.stat, other) {
				continue
			}
			info, _ := h.read(disk + "/info")
			if !p.ReadOnly || !strings.Contains(info, " readonly: 1") {
				return disk, nil
			}
		}
	}
	return "", nil
}

// sameImage reports whether two paths lead to the same file or the same device.
func sameImage(a, b fs.FileInfo) bool {
	sa, sb := a.Sys().(*syscall.Stat_t), b.Sys().(*syscall.Stat_t)
	if sa.Mode&unix.S_IFMT == unix.S_IFBLK && sb.Mode&unix.S_IFMT == unix.S_IFBLK {
		return sa.Rdev == sb.Rdev
	}
	return os.SameFile(a, b)
}

// removeLUN removes a LUN, under any name of the link to its disk.
func (h *host) removeLUN(tpg string, n int) error {
	dir := lunDir(tpg, n)
	names, _, err := h.links(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, name := range names {
		err = errors.Join(err, h.remove(h.unlink, dir+"/"+name))
	}
	if err != nil {
		return err
	}
	return h.remove(h.rmdir, dir)
}

// tearDown removes the objects of an owner, in the order that the kernel demands. If an object
// cannot be removed, it goes on with those that do not depend on it. It returns the removed
// objects. A missing object is no error, so it serves for a whole Target, for a part of one, and
// again after a failure.
func (h *host) tearDown(o owner) (removed []string, err error) {
	_, owners, err := h.adapters()
	if err != nil {
		return nil, noRoot(h.root, err)
	}
	wwns, err := h.wwns()
	if err != nil {
		return nil, err
	}
	if slices.Contains(wwns, o.wwn()) {
		if err := h.removeTarget(o.wwn()); err != nil {
			return nil, err
		}
		removed = append(removed, fabric+"/"+o.wwn())
	}
	var errs []error
	remove := func(path string) {
		if err := h.remove(h.rmdir, path); err != nil {
			errs = append(errs, err)
		} else {
			removed = append(removed, path)
		}
	}
	for _, a := range owners[o] {
		disks, err := h.dirs(core + "/" + a)
		if err != nil {
			return removed, err
		}
		for _, d := range disks {
			remove(core + "/" + a + "/" + d)
		}
	}
	if len(errs) > 0 {
		return removed, errors.Join(errs...)
	}
	// The adapters' names say that the vhost directory is gvm's: they go after it.
	if err := h.removeFabric(owners[o]); err != nil {
		return removed, err
	}
	for _, a := range owners[o] {
		remove(core + "/" + a)
	}
	return removed, errors.Join(errs...)
}

// removeTarget takes down a target: of each portal group the disks, the nexus
// and itself, and then the name.
func (h *host) removeTarget(wwn string) error {
	tags, err := h.tpgs(wwn)
	if err != nil {
		return err
	}
	for _, tag := range tags {
		tpg := tpgDir(wwn, tag)
		luns, err := h.luns(tpg)
		for _, n := range luns {
			err = errors.Join(err, h.removeLUN(tpg, n))
		}
		if err != nil {
			return err
		}
		null := func(path string) error { return h.write(path, "NULL") }
		if err := h.remove(null, tpg+"/nexus"); err != nil && !errors.Is(err, unix.ENODEV) { // there is none
			return err
		}
		if err := h.remove(h.rmdir, tpg); err != nil {
			return err
		}
	}
	return h.remove(h.rmdir, fabric+"/"+wwn)
}

// removeFabric removes the vhost directory if it came with gvm and has no target
// left.
func (h *host) removeFabric(mine []string) error {
	if !slices.ContainsFunc(mine, func(a string) bool { _, made, _ := parseAdapter(a); return made }) {
		return nil
	}
	if wwns, err := h.wwns(); err != nil || len(wwns) > 0 {
		return err
	}
	return h.remove(h.rmdir, fabric)
}

// collect removes the objects of dead owners.
func (h *host) collect() (removed []string, err error) {
	_, owners, err := h.adapters()
	if err != nil {
		return nil, noRoot(h.root, err)
	}
	var errs []error
	list := slices.Collect(maps.Keys(owners))
	sort.SliceStable(list, func(i, j int) bool { return list[i].adapter("", false) < list[j].adapter("", false) })
	for _, o := range list {
		alive, err := h.alive(o, owners[o])
		if alive || err != nil {
			errs = append(errs, err)
			continue
		}
		gone, err := h.tearDown(o)
		removed, errs = append(removed, gone...), append(errs, err)
	}
	return removed, errors.Join(errs...)
}

// Collect removes the objects of dead gvm processes, and nothing else. It returns the names of the
// removed objects, below root ("" is DefaultRoot), and of trace instances. On an error it has
// removed the rest all the same.
func Collect(root string) (removed []string, err error) {
	h := newHost(root)
	unlock, err := h.change()
	if err != nil {
		return nil, err
	}
	defer unlock()
	removed, err = h.collect()
	traces, err2 := h.collectTraces()
	return append(removed, traces...), errors.Join(err, err2)
}

// Check returns an error if Provision cannot work: configfs, the target and vhost-scsi must exist
// and be writable. It does not check the backstore, which depends on the image: the kernel loads
// those on demand.
func Check(root string) error { return newHost(root).check() }

func (h *host) check() error {
	unlock, err := h.change()
	if err != nil {
		return err
	}
	defer unlock()
	if _, err := h.list(core); err != nil {
		return noRoot(h.root, err)
	}
	if _, ok := h.configfs.(kernel); ok {
		if err := unix.Access(filepath.Join(h.root, core), unix.W_OK); err != nil {
			return explain(err, h.root)
		}
	}
	if _, err := h.list(fabric); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := h.mkdir(fabric); err != nil {
		return noFabric(err)
	}
	return h.rmdir(fabric)
}
