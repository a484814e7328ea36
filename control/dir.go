package control

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Directory is the directory of the sockets of a user's machines. Each machine has two files there:
// NAME.lock, which contains its PID and is locked by it (flock(2)), and NAME.sock. The holder of a name
// may have NAME.vsock there as well. A process locks the directory itself while it creates, removes or
// checks files: shared if it only checks, so that any number of verbs run at the same time.
type Directory struct{ path string }

// Errors of Claim and of a Client.
var (
	ErrName  = errors.New("not a name of a machine")
	ErrInUse = errors.New("in use")
)

const (
	lockSuffix   = ".lock"
	socketSuffix = ".sock"
	vsockSuffix  = ".vsock"
	maxName      = 64
)

// DefaultDirectory is gvm's in $XDG_RUNTIME_DIR, unless that belongs to another user, as it may
// under su; else in /run/user/UID if that belongs to the user; else one for the user in the
// directory for temporary files. It need not exist.
func DefaultDirectory() Directory {
	uid := os.Geteuid()
	if dir := os.Getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(dir) {
		if of, err := owner(dir); err != nil || of == uid {
			return Directory{filepath.Join(dir, "gvm")}
		}
	}
	if dir := "/run/user/" + strconv.Itoa(uid); private(dir, uid) == nil {
		return Directory{filepath.Join(dir, "gvm")}
	}
	return Directory{filepath.Join(os.TempDir(), "gvm-"+strconv.Itoa(uid))}
}

// Foreign returns $XDG_RUNTIME_DIR and its user, if that is another user's, whose machines DefaultDirectory
// does not find.
func Foreign() (dir string, uid int, foreign bool) {
	dir = os.Getenv("XDG_RUNTIME_DIR")
	if !filepath.IsAbs(dir) {
		return dir, 0, false
	}
	uid, err := owner(dir)
	return dir, uid, err == nil && uid != os.Geteuid()
}

// owner returns the user of a directory, or that of the directory above it that does not let this user in.
func owner(dir string) (uid int, err error) {
	var st unix.Stat_t
	for err = unix.Stat(dir, &st); err == unix.EACCES && dir != "/"; err = unix.Stat(dir, &st) {
		dir = filepath.Dir(dir)
	}
	return int(st.Uid), err
}

// Vsock returns the path of the socket for the guest's vsock of a machine, for the holder of its name.
func (d Directory) Vsock(name string) string { return filepath.Join(d.path, name+vsockSuffix) }

// Path returns the directory's path.
func (d Directory) Path() string { return d.path }

// In is the directory at path.
func In(path string) Directory { return Directory{path} }

// CheckName returns an error for an invalid name of a machine. A number is invalid: it would be
// taken for a PID.
func CheckName(name string) error {
	if name == "" || len(name) > maxName || strings.Trim(name, "0123456789") == "" ||
		strings.ContainsRune(".-", rune(name[0])) ||
		strings.Trim(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") != "" {
		return fmt.Errorf("%q is %w: want 1 to %d letters, digits, dots, dashes and underscores that are not a "+
			"number and begin with no dot or dash", name, ErrName, maxName)
	}
	return nil
}

// private checks that path is a directory, not a link to one, that only the user can access.
func private(path string, uid int) error {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return &fs.PathError{Op: "lstat", Path: path, Err: err}
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFDIR:
		return fmt.Errorf("%s is not a directory", path)
	case int(st.Uid) != uid:
		return fmt.Errorf("%s is not this user's, but user %d's: %w; run gvm as that user", path, st.Uid, fs.ErrPermission)
	case st.Mode&0o077 != 0:
		return fmt.Errorf("%s has mode %04o: others can get into it, want 0700", path, st.Mode&0o7777)
	}
	return nil
}

// lock locks the directory, how is LOCK_EX or LOCK_SH. If create is set it makes a missing directory,
// otherwise it returns fs.ErrNotExist. The file is for unlock.
func (d Directory) lock(how int, create bool) (*os.File, error) {
	for {
		if create {
			if err := os.Mkdir(d.path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
				return nil, err
			}
		}
		err := private(d.path, os.Geteuid())
		if errors.Is(err, fs.ErrNotExist) && create {
			continue // the last machine in it has just ended
		}
		if err != nil {
			return nil, err
		}
		f, err := os.OpenFile(d.path, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
		if errors.Is(err, fs.ErrNotExist) && create {
			continue
		}
		if err != nil {
			return nil, err
		}
		err = flock(f, how|unix.LOCK_NB)
		for giveUp := time.Now().Add(lockTimeout); errors.Is(err, unix.EWOULDBLOCK) && time.Now().Before(giveUp); {
			time.Sleep(5 * time.Millisecond)
			err = flock(f, how|unix.LOCK_NB)
		}
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = fmt.Errorf("%s: another process has held its lock for %v: look for a gvm that is stopped (kill -CONT it)",
				d.path, lockTimeout)
		}
		if err != nil {
			f.Close()
			return nil, err
		}
		if same(f, d.path) {
			return f, nil
		}
		f.Close() // it was removed before flock returned
		if !create {
			return nil, &fs.PathError{Op: "lock", Path: d.path, Err: fs.ErrNotExist}
		}
	}
}

// lockTimeout bounds the wait for a directory's lock. Its holders never block.
const lockTimeout = 2 * time.Second

// unlock undoes lock, and removes an empty directory.
func (d Directory) unlock(f *os.File) {
	_ = os.Remove(d.path)
	f.Close()
}

// flock is flock(2), which signals may interrupt.
func flock(f *os.File, how int) error {
	for {
		if err := unix.Flock(int(f.Fd()), how); err != unix.EINTR {
			if err != nil {
				return &fs.PathError{Op: "flock", Path: f.Name(), Err: err}
			}
			return nil
		}
	}
}

// same reports whether path names the file f.
func same(f *os.File, path string) bool {
	a, err := f.Stat()
	if err != nil {
		return false
	}
	b, err := os.Lstat(path)
	return err == nil && os.SameFile(a, b)
}

// claim takes the files of a name for a machine. lock stays open during the machine's life.
func (d Directory) claim(name string) (lock *os.File, l *net.UnixListener, err error) {
	if err := CheckName(name); err != nil {
		return nil, nil, err
	}
	dir, err := d.lock(unix.LOCK_EX, true)
	if err != nil {
		return nil, nil, err
	}
	defer d.unlock(dir)
	path := filepath.Join(d.path, name+lockSuffix)
	if lock, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600); err != nil {
		return nil, nil, err
	}
	if err := flock(lock, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		pid := holder(lock)
		lock.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, nil, err
		}
		return nil, nil, fmt.Errorf("the name %s is %w by process %d", name, ErrInUse, pid)
	}
	held := lock // a return of an error sets lock to nil
	defer func() {
		if err != nil {
			err = errors.Join(err, d.remove(name, machineFiles...), held.Close())
		}
	}()
	if err := d.remove(name, socketSuffix, vsockSuffix); err != nil {
		return nil, nil, err
	}
	if err := lock.Truncate(0); err != nil {
		return nil, nil, err
	}
	if _, err := lock.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0); err != nil {
		return nil, nil, err
	}
	l, err = listen(dir, name+socketSuffix)
	return lock, l, err
}

// holder returns the PID in a lock file, 0 if it has none.
func holder(f *os.File) int {
	b, err := io.ReadAll(io.NewSectionReader(f, 0, 32))
	if err != nil {
		return 0
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return 0
	}
	return pid
}

// socketPath returns a path of a file in an open directory that fits into a socket's address (108
// bytes, unix(7)), even if the path of the directory is long.
func socketPath(dir *os.File, file string) string {
	return fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), file)
}

// listen makes a socket in the directory. Only the user can connect before its mode is set.
func listen(dir *os.File, file string) (*net.UnixListener, error) {
	addr := socketPath(dir, file)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: addr, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false) // the directory's descriptor has another number then
	if err := os.Chmod(addr, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// release undoes claim. Another process that has the lock may have done so before, if it took this one
// for dead: then the name can be a new machine's.
func (d Directory) release(name string, lock *os.File) error {
	defer lock.Close()
	dir, err := d.lock(unix.LOCK_EX, false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer d.unlock(dir)
	if !same(lock, filepath.Join(d.path, name+lockSuffix)) {
		return nil
	}
	return d.remove(name, machineFiles...)
}

// machineFiles are the suffixes of a machine's files.
var machineFiles = []string{socketSuffix, vsockSuffix, lockSuffix}

// remove removes files of a name. The caller holds both locks.
func (d Directory) remove(name string, suffixes ...string) error {
	var errs []error
	for _, suffix := range suffixes {
		if err := os.Remove(filepath.Join(d.path, name+suffix)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Entry is a machine in a Directory.
type Entry struct {
	Name string
	PID  int // 0 if unknown
}

// List returns the live machines, sorted by name, and removes the files of dead ones. A missing
// directory has none.
func (d Directory) List() ([]Entry, error) {
	list, dead, err := d.list(unix.LOCK_SH)
	if err == nil && dead {
		list, _, err = d.list(unix.LOCK_EX)
	}
	return list, err
}

// list returns the live machines, and whether it saw files of dead ones, which it removes under
// LOCK_EX.
func (d Directory) list(how int) (list []Entry, dead bool, err error) {
	dir, err := d.lock(how, false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, err
	}
	defer d.unlock(dir)
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, false, err
	}
	slices.Sort(names)
	for _, file := range names {
		name, ok := strings.CutSuffix(file, lockSuffix)
		if !ok || CheckName(name) != nil {
			continue
		}
		f, err := os.OpenFile(filepath.Join(d.path, file), os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		if err != nil {
			return list, dead, err
		}
		switch err = flock(f, how|unix.LOCK_NB); {
		case errors.Is(err, unix.EWOULDBLOCK):
			list = append(list, Entry{name, holder(f)})
			err = nil
		case err == nil && how == unix.LOCK_EX:
			err = d.remove(name, machineFiles...)
		case err == nil:
			dead = true
		}
		f.Close()
		if err != nil {
			return list, dead, err
		}
	}
	return list, dead, nil
}
