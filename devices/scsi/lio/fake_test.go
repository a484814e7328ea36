package lio

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// fake is configfs with the kernel's SCSI target as far as this package uses it: directories that
// come with files and groups, that cannot be removed while they have children of ours or are linked
// to, and files whose stores check. Its answers are those of Linux 6.1 and 6.12.
type fake struct {
	t     *testing.T
	nodes map[string]*node // by path, without the root
	locks map[string]bool
	ops   int                   // changes so far
	hook  func(op string) error // of the change that comes next, before it
}

type node struct {
	made bool   // by mkdir or symlink, not by the kernel
	link string // of a symbolic link: the path
	file bool
	text string
	busy bool // a process has the endpoint
}

func newFake(t *testing.T) *fake {
	f := &fake{t: t, nodes: map[string]*node{"": {}}, locks: map[string]bool{}}
	f.add("core", "")
	f.add("core/alua/lu_gps/default_lu_gp", "")
	return f
}

// add makes an entry of the kernel's: a file with text, or a directory.
func (f *fake) add(p, text string) {
	for d := path.Dir(p); d != "."; d = path.Dir(d) {
		if f.nodes[d] == nil {
			f.nodes[d] = &node{}
		}
	}
	f.nodes[p] = &node{text: text, file: text != ""}
}

// change counts an operation that changes something, and may fail it.
func (f *fake) change(op, p string) error {
	f.ops++
	if f.hook != nil {
		return f.hook(op + " " + p)
	}
	return nil
}

func fault(op, p string, errno error) error { return &fs.PathError{Op: op, Path: p, Err: errno} }

func (f *fake) mkdir(p string) error {
	if err := f.change("mkdir", p); err != nil {
		return err
	}
	switch {
	case f.nodes[p] != nil:
		return fault("mkdir", p, unix.EEXIST)
	case path.Dir(p) != "." && f.nodes[path.Dir(p)] == nil:
		return fault("mkdir", p, unix.ENOENT)
	}
	files := map[string]string{}
	groups := []string{}
	match := func(pattern string) bool { ok, _ := path.Match(pattern, p); return ok }
	switch {
	case p == "vhost":
		files["version"], groups = "v0.1", []string{"discovery_auth"}
	case match("core/fileio_*"), match("core/iblock_*"):
		files["hba_info"] = "HBA Index: 1"
	case match("core/*/*"):
		for _, name := range []string{"control", "enable", "info", "udev_path", "attrib/block_size", "attrib/is_nonrot",
			"attrib/emulate_pr", "attrib/emulate_3pc",
			"attrib/emulate_write_cache", "attrib/optimal_sectors", "attrib/max_write_same_len",
			"attrib/max_unmap_lba_count", "attrib/max_unmap_block_desc_count", "attrib/unmap_granularity",
			"attrib/emulate_tpu", "attrib/emulate_tpws", "attrib/unmap_zeroes_data",
			"alua/default_tg_pt_gp/alua_access_type",
			"wwn/vendor_id", "wwn/product_id", "wwn/revision", "wwn/company_id", "wwn/vpd_unit_serial"} {
			files[name] = "0"
		}
	case match("vhost/naa.????????????????"):
		files["param/cmd_completion_affinity"] = "-1"
	case match("vhost/*/tpgt_*"):
		files["nexus"], groups = "none", []string{"lun", "acls"}
	case match("vhost/*/tpgt_*/lun/lun_*"):
		files["statistics/scsi_port/indx"] = "1"
	default:
		return fault("mkdir", p, unix.EPERM)
	}
	f.nodes[p] = &node{made: true}
	for name, text := range files {
		f.add(p+"/"+name, text)
	}
	for _, g := range groups {
		f.add(p+"/"+g, "")
	}
	return nil
}

func (f *fake) below(p string) []string {
	var out []string
	for n := range f.nodes {
		if strings.HasPrefix(n, p+"/") {
			out = append(out, n)
		}
	}
	return out
}

func (f *fake) rmdir(p string) error {
	if err := f.change("rmdir", p); err != nil {
		return err
	}
	n := f.nodes[p]
	switch {
	case n == nil:
		return fault("rmdir", p, unix.ENOENT)
	case !n.made:
		return fault("rmdir", p, unix.EPERM)
	case n.busy:
		return fault("rmdir", p, unix.EBUSY)
	}
	for _, b := range f.below(p) {
		if f.nodes[b].made {
			return fault("rmdir", p, unix.ENOTEMPTY)
		}
	}
	for _, other := range f.nodes {
		if other.link == p {
			return fault("rmdir", p, unix.EBUSY)
		}
	}
	for _, b := range append(f.below(p), p) {
		delete(f.nodes, b)
	}
	return nil
}

func (f *fake) symlink(target, p string) error {
	if err := f.change("symlink", p); err != nil {
		return err
	}
	if f.nodes[target+"/enable"].text != "1" {
		return fault("symlink", p, unix.ENODEV)
	}
	f.nodes[p] = &node{made: true, link: target}
	return nil
}

func (f *fake) unlink(p string) error {
	if err := f.change("unlink", p); err != nil {
		return err
	}
	if f.nodes[p] == nil || f.nodes[p].link == "" {
		return fault("unlink", p, unix.ENOENT)
	}
	delete(f.nodes, p)
	return nil
}

func (f *fake) write(p, text string) error {
	if err := f.change("write", p); err != nil {
		return err
	}
	n := f.nodes[p]
	if n == nil || !n.file {
		return fault("write", p, unix.ENOENT)
	}
	dir := path.Dir(p)
	switch base := path.Base(p); {
	case base == "nexus" && text == "NULL":
		for _, b := range f.below(dir) {
			if f.nodes[b].link != "" {
				return fault("write", p, unix.EBUSY)
			}
		}
		if n.text == "none" {
			return fault("write", p, unix.ENODEV)
		}
		text = "none"
	case base == "enable" && f.nodes[dir+"/control"].text == "0":
		return fault("write", p, unix.EINVAL)
	case base == "control":
		f.nodes[dir+"/info"].text = "Status: DEACTIVATED\n        TCM FILEIO ID: 0        File: X  Size: 1"
	case path.Base(dir) == "attrib" && f.nodes[path.Dir(dir)+"/enable"].text != "1":
		f.t.Errorf("%s is written before enable", p)
	}
	n.text = text
	return nil
}

func (f *fake) read(p string) (string, error) {
	n := f.nodes[p]
	switch {
	case n == nil || !n.file:
		return "", fault("read", p, unix.ENOENT)
	case path.Base(p) == "nexus" && n.text == "none":
		return "", fault("read", p, unix.ENODEV)
	case path.Base(p) == "udev_path" && n.text == "0":
		return "", nil
	}
	return n.text, nil
}

func (f *fake) readlink(p string) (string, error) { return f.nodes[p].link, nil }

func (f *fake) list(p string) ([]entry, error) {
	if f.nodes[p] == nil {
		return nil, fault("readdir", p, unix.ENOENT)
	}
	var out []entry
	for _, name := range slices.Sorted(maps.Keys(f.nodes)) {
		if path.Dir(name) == p && name != "" {
			n := f.nodes[name]
			out = append(out, entry{path.Base(name), !n.file && n.link == "", n.link != ""})
		}
	}
	return out, nil
}

type fakeLock struct {
	f *fake
	p string
}

func (l fakeLock) Close() error { delete(l.f.locks, l.p); return nil }

func (f *fake) lock(p string) (io.Closer, error) {
	if f.locks[p] {
		return nil, fault("flock", p, unix.EWOULDBLOCK)
	}
	if f.nodes[p] == nil {
		return nil, fault("flock", p, unix.ENOENT)
	}
	f.locks[p] = true
	return fakeLock{f, p}, nil
}

func (f *fake) locked(p string) (bool, error) {
	if f.nodes[p] == nil {
		return false, fault("flock", p, unix.ENOENT)
	}
	return f.locks[p], nil
}

// snapshot is the whole tree as text.
func (f *fake) snapshot() string {
	var b strings.Builder
	for _, p := range slices.Sorted(maps.Keys(f.nodes)) {
		n := f.nodes[p]
		fmt.Fprintf(&b, "%s %s %q\n", p, n.link, n.text)
	}
	return b.String()
}

var errInjected = errors.New("injected")
