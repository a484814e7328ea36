// Package initramfs makes an initial root file system for a Linux guest in memory: an archive in
// the newc format (Documentation/driver-api/early-userspace/buffer-format.rst) that package machine
// takes as an initrd. The contents of files are read straight into guest memory.
//
//	b := initramfs.New()
//	defer b.Close()
//	err := b.HostFile(ctx, "/init", "/proc/self/exe")
//	…
//	files, err := initramfs.Host{}.Closure(ctx, "/usr/bin/git") // with its libraries
//	b.Add(files...)
//	b.File("/etc/hostname", 0o644, []byte("guest\n"))
//	mods, err := initramfs.Modules(ctx, k, "virtio_pci", "virtio_scsi", "sd_mod", "ext4")
//	paths := b.AddModules(mods) // load them in this order
//	file, err := b.Image()
//	…
//	spec.Initrds = append(spec.Initrds, file)
package initramfs

import (
	"context"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"gvm/kvmapi/nowait"
	"gvm/vmm/boot"
)

// Entry is a file of an initramfs, of any type.
type Entry struct {
	// Name is a path from the root directory, with any bytes but NUL. Its parents are followed through
	// the symbolic links of the initramfs, in whichever order these are added.
	Name string
	// Mode is the type, and the permissions with setuid, setgid and sticky.
	Mode         fs.FileMode
	UID, GID     uint32
	Major, Minor uint32     // of a device
	Target       string     // of a symbolic link
	Content      *boot.File // of a regular file; nil: it is empty. The Builder closes it.
}

// Builder collects the files of an initramfs. A later entry replaces an earlier one of the same
// name. Directories that are missing are made, with mode 0755. Faults are reported by Image.
type Builder struct{ entries []Entry }

// New returns an empty Builder.
func New() *Builder { return &Builder{} }

// Add adds entries.
func (b *Builder) Add(entries ...Entry) { b.entries = append(b.entries, entries...) }

// Dir adds a directory that belongs to root. A symbolic link to a directory is followed.
func (b *Builder) Dir(name string, mode fs.FileMode) {
	b.Add(Entry{Name: name, Mode: fs.ModeDir | mode})
}

// File adds a regular file that belongs to root. The content is not copied.
func (b *Builder) File(name string, mode fs.FileMode, content []byte) {
	b.Add(Entry{Name: name, Mode: mode, Content: memory(name, content)})
}

// Symlink adds a symbolic link.
func (b *Builder) Symlink(name, target string) {
	b.Add(Entry{Name: name, Mode: fs.ModeSymlink | 0o777, Target: target})
}

// HostFile adds a regular file of the host, with its permissions, as a file of root. It stays open
// until the initramfs is closed; reads fail once ctx is done. Errors are *boot.ImageError, or the
// cause of ctx.
func (b *Builder) HostFile(ctx context.Context, name, hostPath string) error {
	e, err := hostFile(ctx, name, hostPath)
	if err == nil {
		e.UID, e.GID = 0, 0
		b.Add(e)
	}
	return err
}

// hostFile opens a regular file of the host.
func hostFile(ctx context.Context, name, hostPath string) (Entry, error) {
	st, err := os.Stat(hostPath)
	switch {
	case err == nil && !st.Mode().IsRegular():
		return Entry{}, &boot.ImageError{Name: hostPath, What: "is " + nowait.KindOf(st.Mode()).String(),
			Mend: "give a regular file"}
	case err == nil && st.Size() == 0:
		return hostEntry(name, st), nil
	}
	f, err := boot.OpenFile(ctx, hostPath)
	if err != nil {
		return Entry{}, err
	}
	if st == nil { // it has just been made
		f.Close()
		return Entry{}, &boot.ImageError{Name: hostPath, What: "is changed by another program", Mend: "try again"}
	}
	e := hostEntry(name, st)
	e.Content = f
	return e, nil
}

// hostEntry returns the entry of a file of the host, without its content.
func hostEntry(name string, st fs.FileInfo) Entry {
	sys := st.Sys().(*syscall.Stat_t)
	return Entry{Name: name, Mode: st.Mode(), UID: sys.Uid, GID: sys.Gid}
}

// Close closes the files that Image has not taken.
func (b *Builder) Close() {
	for _, e := range b.entries {
		if e.Content != nil {
			e.Content.Close()
		}
	}
	b.entries = nil
}

// Image returns the archive, which takes over the files of the Builder and closes them when it is
// closed. The Builder is empty then. Errors are *boot.ImageError.
func (b *Builder) Image() (*boot.File, error) {
	nodes, err := b.nodes()
	if err != nil {
		return nil, err
	}
	a := &archive{}
	for i, n := range nodes {
		if err := a.add(i+1, n); err != nil {
			return nil, err
		}
	}
	a.end()
	for _, e := range b.entries {
		if e.Content != nil {
			a.files = append(a.files, e.Content)
		}
	}
	b.entries = nil
	return &boot.File{Name: "the initramfs", ReaderAt: a, Size: a.size}, nil
}

// fault reports an entry that an initramfs cannot have.
func fault(name, what, mend string) error {
	return &boot.ImageError{Name: fmt.Sprintf("%q in the initramfs", name), What: what, Mend: mend}
}

// maxEntries bounds an initramfs: each takes some memory of gvm and of the guest.
const maxEntries = 1 << 20

// nodes returns the entries by their names without symbolic links, parents first, each name once.
func (b *Builder) nodes() ([]Entry, error) {
	if len(b.entries) > maxEntries {
		return nil, fault("/", fmt.Sprintf("has %d files below it, and %d are the most", len(b.entries), maxEntries),
			"give fewer files")
	}
	tree, err := b.links()
	if err != nil {
		return nil, err
	}
	nodes := map[string]Entry{}
	for _, e := range b.entries {
		given := e.Name
		if e.Mode.IsDir() {
			e.Name, err = tree.resolve(e.Name)
		} else {
			e.Name, err = tree.place(e.Name)
		}
		if err != nil {
			return nil, err
		}
		if e.Name == "" { // the root directory is there
			if !e.Mode.IsDir() {
				return nil, fault(given, "is the root directory", "give it a name")
			}
			continue
		}
		if old, ok := nodes[e.Name]; ok && old.Mode.IsDir() != e.Mode.IsDir() {
			return nil, fault(given, "is both a directory and another file", "give them different names")
		}
		nodes[e.Name] = e
	}
	for name := range nodes {
		for at := parent(name); at != ""; at = parent(at) {
			if n, ok := nodes[at]; ok {
				if n.Mode.IsDir() {
					break
				}
				return nil, fault(at, fmt.Sprintf("is the directory of %q and another file", name), "give them different names")
			}
			nodes[at] = Entry{Name: at, Mode: fs.ModeDir | 0o755}
		}
	}
	all := make([]Entry, 0, len(nodes))
	for _, name := range slices.Sorted(maps.Keys(nodes)) {
		all = append(all, nodes[name])
	}
	return all, nil
}

// links are targets of symbolic links by their names. Such names, here and in the archive, begin
// without a slash, and no part of them is a symbolic link, "", "." or "..".
type links map[string]string

const maxHops = 40 // MAXSYMLINKS of Linux

// follow returns the name of the file that a path from the root directory leads to: it begins with
// a slash, and has no symbolic links. target returns the target of the link at such a name, "" for
// a file that is none.
func follow(name string, target func(at string) (string, error)) (string, error) {
	at, todo := "/", strings.Split(name, "/")
	for hops := 0; len(todo) > 0; {
		part := todo[0]
		todo = todo[1:]
		switch part {
		case "", ".":
			continue
		case "..":
			at = path.Dir(at)
			continue
		}
		next := path.Join(at, part)
		to, err := target(next)
		if err != nil {
			return "", err
		}
		if to == "" {
			at = next
			continue
		}
		if hops++; hops > maxHops {
			return "", unix.ELOOP
		}
		if to[0] == '/' {
			at = "/"
		}
		todo = append(strings.Split(to, "/"), todo...)
	}
	return at, nil
}

// links finds the names of the symbolic links. The place of one may depend on others, so it repeats
// until no place changes.
func (b *Builder) links() (links, error) {
	type link struct{ given, at string }
	var all []link
	targets := map[string]string{}
	for _, e := range b.entries {
		if e.Mode.Type() == fs.ModeSymlink {
			targets[e.Name] = e.Target
			all = append(all, link{e.Name, strings.TrimPrefix(path.Clean("/"+e.Name), "/")})
		}
	}
	for range maxHops {
		tree, stable := make(links, len(all)), true
		for _, l := range all {
			tree[l.at] = targets[l.given]
		}
		for i, l := range all {
			at, err := tree.place(l.given)
			if err != nil {
				return nil, err
			}
			stable = stable && at == l.at
			all[i].at = at
		}
		if stable {
			return tree, nil
		}
	}
	return nil, fault(all[0].given, "and other symbolic links do not end", "remove the loop")
}

// place returns the name of a file: symbolic links on the way to it are followed.
func (t links) place(name string) (string, error) {
	dir, base := path.Split(strings.TrimRight(name, "/"))
	if base == "" || base == "." || base == ".." {
		return t.resolve(name)
	}
	dir, err := t.resolve(dir)
	if err != nil {
		return "", err
	}
	return path.Join(dir, base), nil
}

// resolve returns the name of the file that a path leads to.
func (t links) resolve(name string) (string, error) {
	at, err := follow(name, func(at string) (string, error) { return t[at[1:]], nil })
	if err != nil {
		return "", fault(name, "has too many symbolic links on its way", "remove the loop")
	}
	return at[1:], nil
}

// parent returns the directory of a name, "" for the root directory.
func parent(name string) string {
	return name[:max(strings.LastIndexByte(name, '/'), 0)]
}
