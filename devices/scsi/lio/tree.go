package lio

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// DefaultRoot is the directory of the kernel's SCSI target.
const DefaultRoot = "/sys/kernel/config/target"

// entry is a name in a directory.
type entry struct {
	name string
	dir  bool
	link bool
}

// configfs is the set of operations on the target's directory. Paths are below the root.
type configfs interface {
	mkdir(path string) error
	rmdir(path string) error
	symlink(target, path string) error // target is below the root too
	unlink(path string) error
	write(path, text string) error
	read(path string) (string, error)
	readlink(path string) (string, error) // below the root
	list(path string) ([]entry, error)    // by name
	// lock takes an exclusive lock on a directory; unix.EWOULDBLOCK means that another open of it
	// has one.
	lock(path string) (io.Closer, error)
	// locked reports whether one has. Of several that ask at a time none gets the answer for another.
	locked(path string) (bool, error)
}

// kernel is the real configfs, with its root.
type kernel string

func (k kernel) at(path string) string     { return filepath.Join(string(k), path) }
func (k kernel) mkdir(path string) error   { return os.Mkdir(k.at(path), 0o755) }
func (k kernel) rmdir(path string) error   { return unix.Rmdir(k.at(path)) }
func (k kernel) unlink(path string) error  { return unix.Unlink(k.at(path)) }
func (k kernel) symlink(t, p string) error { return os.Symlink(k.at(t), k.at(p)) }

// write makes one write of the text: a store of configfs is one write(2).
func (k kernel) write(path, text string) error {
	f, err := os.OpenFile(k.at(path), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text + "\n")
	return errors.Join(err, f.Close())
}

func (k kernel) read(path string) (string, error) {
	b, err := os.ReadFile(k.at(path))
	return strings.TrimSuffix(string(b), "\n"), err
}

// readlink answers a path below the root: configfs gives links as relative
// paths that start again at its own top.
func (k kernel) readlink(path string) (string, error) {
	to, err := os.Readlink(k.at(path))
	if err != nil {
		return "", err
	}
	name := "/" + filepath.Base(string(k)) + "/"
	if i := strings.LastIndex(to, "../"); i >= 0 {
		to = to[i+2:]
	}
	_, below, _ := strings.Cut(to, name)
	return below, nil
}

func (k kernel) list(path string) ([]entry, error) {
	des, err := os.ReadDir(k.at(path))
	var out []entry
	for _, d := range des {
		out = append(out, entry{d.Name(), d.IsDir(), d.Type()&fs.ModeSymlink != 0})
	}
	return out, err
}

func (k kernel) lock(path string) (io.Closer, error) {
	f, err := os.Open(k.at(path))
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, &fs.PathError{Op: "flock", Path: k.at(path), Err: err}
	}
	return f, nil
}

func (k kernel) locked(path string) (bool, error) {
	f, err := os.Open(k.at(path))
	if err != nil {
		return false, err
	}
	defer f.Close()
	switch err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB); err {
	case nil:
		return false, nil
	case unix.EWOULDBLOCK:
		return true, nil
	default:
		return false, &fs.PathError{Op: "flock", Path: k.at(path), Err: err}
	}
}

// host is the target's directory, with a function that tells living processes from dead ones.
type host struct {
	configfs
	root     string
	running  func(pid int) (start uint64, ok bool)
	patience time.Duration // for objects that are busy because their process is just ending
}

func newHost(root string) *host {
	if root == "" {
		root = DefaultRoot
	}
	return &host{configfs: kernel(root), root: root, running: startTime, patience: 3 * time.Second}
}

// change takes the lock for changes of objects.
func (h *host) change() (unlock func(), err error) {
	for deadline := time.Now().Add(5 * h.patience); ; time.Sleep(10 * time.Millisecond) {
		l, err := h.lock("")
		switch {
		case err == nil:
			return func() { l.Close() }, nil
		case !errors.Is(err, unix.EWOULDBLOCK):
			return nil, noRoot(h.root, err)
		case time.Now().After(deadline):
			return nil, fail(ErrBusy, nil, "%s: locked by another gvm for %v: see gvm lio list", h.root, 5*h.patience)
		}
	}
}

// remove does op, again and again while its object is busy: the kernel closes a
// dead process's /dev/vhost-scsi a moment after its locks.
func (h *host) remove(op func(string) error, path string) error {
	for deadline := time.Now().Add(h.patience); ; time.Sleep(10 * time.Millisecond) {
		err := op(path)
		switch {
		case err == nil, errors.Is(err, fs.ErrNotExist):
			return nil
		case !errors.Is(err, unix.EBUSY) || time.Now().After(deadline):
			return explain(err, filepath.Join(h.root, path))
		}
	}
}

// dirs returns the names of the directories in path; none where path is not.
func (h *host) dirs(path string) ([]string, error) {
	es, err := h.list(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var names []string
	for _, e := range es {
		if e.dir {
			names = append(names, e.name)
		}
	}
	return names, err
}

// links returns the symbolic links in path, and their targets.
func (h *host) links(path string) (names, targets []string, err error) {
	es, err := h.list(path)
	for _, e := range es {
		if !e.link {
			continue
		}
		to, err := h.readlink(path + "/" + e.name)
		if err != nil {
			return nil, nil, err
		}
		names, targets = append(names, e.name), append(targets, to)
	}
	return names, targets, err
}
