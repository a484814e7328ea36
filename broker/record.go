package broker

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"gvm/text"
)

// recordNames bounds the records of one second.
const recordNames = 100

// coreName is the file of a record with the guest's memory.
const coreName = "vmcore"

// textFiles are the other files of a record.
var textFiles = []string{"end", "console", "log", "state.json", "stacks"}

// Record is a directory for a machine's end, in one that the user has named. It is made on demand,
// once, and has files of fixed names. The broker makes them for a machine that may open no files:
// that one gets descriptors, and no right to the user's directory.
type Record struct {
	Machine string // its name; set before the record is made

	in     string  // the user's directory
	client *Client // of a machine with a broker, or nil

	mu     sync.Mutex
	parent *os.File // the user's directory (O_PATH): another one at its path is not the user's
	dir    *os.File // the record's (O_PATH); nil: not made
	path   string   // of that
	core   *os.File // of the guest's memory; nil: not made, complete or removed
	cored  bool     // a core was made
	named  bool     // the core has its name: the file system has no O_TMPFILE
}

// NewRecord returns a record in a directory of the user's, for the caller to close.
func NewRecord(in string) (*Record, error) {
	fd, err := unix.Open(in, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: in, Err: err}
	}
	return &Record{in: in, parent: os.NewFile(uintptr(fd), in)}, nil
}

// Close closes the user's directory. The record stays.
func (r *Record) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.parent.Close()
}

// broker returns the client of the broker that makes the record; nil: this process does.
func (r *Record) broker() *Client {
	if r.client != nil && r.client.isShut() {
		return r.client
	}
	return nil
}

// Directory makes the record's directory, once, and returns its path.
func (r *Record) Directory() (string, error) {
	if c := r.broker(); c != nil {
		a, err := c.call(message{Op: recordDirectory}, nil)
		return string(a.Path), err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	err := r.make()
	return r.path, err
}

// make makes the directory. The caller holds mu.
func (r *Record) make() error {
	if r.dir != nil {
		return nil
	}
	base := time.Now().UTC().Format("20060102T150405Z-") + r.Machine
	name, err := base, error(nil)
	for i := range recordNames {
		if i > 0 {
			name = fmt.Sprintf("%s-%d", base, i+1)
		}
		if err = unix.Mkdirat(int(r.parent.Fd()), name, 0o777); err != unix.EEXIST {
			break
		}
	}
	path := filepath.Join(r.in, name)
	if err != nil {
		return &fs.PathError{Op: "mkdir", Path: path, Err: err}
	}
	fd, err := unix.Openat(int(r.parent.Fd()), name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: path, Err: err}
	}
	r.dir, r.path = os.NewFile(uintptr(fd), path), path
	return nil
}

// Create makes files of the record: end, console, log, state.json or stacks, each once. After an
// error the caller has none.
func (r *Record) Create(names ...string) (files []*os.File, err error) {
	if c := r.broker(); c != nil {
		m := message{Op: recordFiles}
		for _, name := range names {
			m.Paths = append(m.Paths, text.Name(name))
		}
		files, _, err = c.recordFiles(m, len(names))
		return files, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, name := range names {
		var f *os.File
		if !slices.Contains(textFiles, name) {
			err = &fs.PathError{Op: "open", Path: name, Err: fmt.Errorf("%w: no file of a record", unix.EACCES)}
		} else if err = r.make(); err == nil {
			f, err = r.open(name, unix.O_CREAT|unix.O_EXCL, 0o666)
		}
		if err != nil {
			closeAll(files)
			return nil, err
		}
		files = append(files, f)
	}
	return files, nil
}

// open opens a new file in the directory. The caller holds mu.
func (r *Record) open(name string, flag int, mode uint32) (*os.File, error) {
	path, at := filepath.Join(r.path, name), name
	if flag == unix.O_TMPFILE {
		at = "."
	}
	fd, err := unix.Openat(int(r.dir.Fd()), at, flag|unix.O_WRONLY|unix.O_CLOEXEC, mode)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// Core makes the file for the guest's memory, once. If the file system can make it without a name,
// it gets its name by LinkCore; else named is set, and RemoveCore removes one that is not complete.
func (r *Record) Core() (f *os.File, named bool, err error) {
	if c := r.broker(); c != nil {
		files, named, err := c.recordFiles(message{Op: recordCore}, 1)
		if err != nil {
			return nil, false, err
		}
		return files[0], named, nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.make(); err != nil {
		return nil, false, err
	}
	if r.cored {
		return nil, false, &fs.PathError{Op: "open", Path: filepath.Join(r.path, coreName), Err: unix.EEXIST}
	}
	if f, err = r.open(coreName, unix.O_TMPFILE, 0o600); err != nil {
		r.named = true
		if f, err = r.open(coreName, unix.O_CREAT|unix.O_EXCL, 0o600); err != nil {
			return nil, false, err
		}
	}
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, false, errors.Join(&fs.PathError{Op: "dup", Path: f.Name(), Err: err}, f.Close())
	}
	r.core, r.cored = os.NewFile(uintptr(fd), f.Name()), true
	return f, r.named, nil
}

// LinkCore says that the guest's memory is complete, and gives the file its name.
func (r *Record) LinkCore() error {
	if c := r.broker(); c != nil {
		_, err := c.call(message{Op: linkCore}, nil)
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.core == nil {
		return fs.ErrClosed
	}
	if !r.named {
		from := fmt.Sprintf("/proc/self/fd/%d", r.core.Fd())
		if err := unix.Linkat(unix.AT_FDCWD, from, int(r.dir.Fd()), coreName, unix.AT_SYMLINK_FOLLOW); err != nil {
			return &fs.PathError{Op: "link", Path: r.core.Name(), Err: err}
		}
	}
	err := r.core.Close()
	r.core = nil
	return err
}

// RemoveCore removes the file of the guest's memory, unless it is complete.
func (r *Record) RemoveCore() error {
	if c := r.broker(); c != nil {
		_, err := c.call(message{Op: removeCore}, nil)
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.core == nil {
		return nil
	}
	var mine, there unix.Stat_t
	err := unix.Fstat(int(r.core.Fd()), &mine)
	if r.named && err == nil && unix.Fstatat(int(r.dir.Fd()), coreName, &there, unix.AT_SYMLINK_NOFOLLOW) == nil &&
		there.Dev == mine.Dev && there.Ino == mine.Ino {
		err = unix.Unlinkat(int(r.dir.Fd()), coreName, 0)
	}
	if err != nil {
		err = &fs.PathError{Op: "unlink", Path: r.core.Name(), Err: err}
	}
	err = errors.Join(err, r.core.Close())
	r.core = nil
	return err
}
