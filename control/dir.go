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

	"gvm/kvmapi/nowait"
)

// Directory is the directory of the sockets of a user's machines. Each machine has a directory NAME
// there, with the files lock, which contains its PID and is locked by it (flock(2)), and sock. The
// holder of the name may have vsock there as well. A process locks the Directory itself,
// exclusively while it creates files, shared while it looks at those of others, and removes those
// of dead machines: any number of verbs run at the same time.
type Directory struct{ path string }

// Errors of Claim and of a Client.
var (
	ErrName  = errors.New("not a name of a machine")
	ErrInUse = errors.New("in use")
)

// A machine's files.
const (
	lockFile   = "lock"
	socketFile = "sock"
	vsockFile  = "vsock"
)

// Separators between the name of a machine and that of its file. Until version 0.2 a machine of a
// gvm without directories for machines is found, too.
const (
	inside = "/"
	beside = "." // of an older gvm
)

const maxName = 64

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

// Foreign returns $XDG_RUNTIME_DIR and its user, if that is another user's, whose machines
// DefaultDirectory does not find.
func Foreign() (dir string, uid int, foreign bool) {
	dir = os.Getenv("XDG_RUNTIME_DIR")
	if !filepath.IsAbs(dir) {
		return dir, 0, false
	}
	uid, err := owner(dir)
	return dir, uid, err == nil && uid != os.Geteuid()
}

// owner returns the user of a directory, or that of the directory above it that does not let this
// user in.
func owner(dir string) (uid int, err error) {
	var st unix.Stat_t
	for err = unix.Stat(dir, &st); err == unix.EACCES && dir != "/"; err = unix.Stat(dir, &st) {
		dir = filepath.Dir(dir)
	}
	return int(st.Uid), err
}

// Machine returns the path of the directory of a machine.
func (d Directory) Machine(name string) string { return filepath.Join(d.path, name) }

// Vsock returns the path of the socket for the guest's vsock of a machine, for the holder of its
// name.
func (d Directory) Vsock(name string) string { return d.file(name, inside, vsockFile) }

// file returns the path of a machine's file. place is inside or beside.
func (d Directory) file(name, place, file string) string { return d.Machine(name) + place + file }

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
		return fmt.Errorf("%s is not a directory; remove it", path)
	case int(st.Uid) != uid:
		return fmt.Errorf("%s is not this user's, but user %d's: %w; run gvm as that user", path, st.Uid, fs.ErrPermission)
	case st.Mode&0o077 != 0:
		return fmt.Errorf("%s has mode %04o: others can get into it, want 0700", path, st.Mode&0o7777)
	}
	return nil
}

// lock locks the directory, how is LOCK_EX or LOCK_SH, and waits up to limit for other processes.
// If create is set it makes a missing directory, otherwise it returns fs.ErrNotExist. The file is
// for unlock.
func (d Directory) lock(how int, create bool, limit time.Duration) (*os.File, error) {
	for {
		if create {
			if err := os.Mkdir(d.path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
				return nil, d.unusable(err)
			}
		}
		err := private(d.path, os.Geteuid())
		if errors.Is(err, fs.ErrNotExist) && create {
			continue // the last machine in it has just ended
		}
		if err != nil {
			return nil, d.unusable(err)
		}
		f, err := os.OpenFile(d.path, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
		if errors.Is(err, fs.ErrNotExist) && create {
			continue
		}
		if err != nil {
			return nil, d.unusable(err)
		}
		err = flock(f, how|unix.LOCK_NB)
		for giveUp := time.Now().Add(limit); errors.Is(err, unix.EWOULDBLOCK) && time.Now().Before(giveUp); {
			time.Sleep(5 * time.Millisecond)
			err = flock(f, how|unix.LOCK_NB)
		}
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = fmt.Errorf("%s: another process has held its lock for %v: look for a gvm that is stopped (kill -CONT it)",
				d.path, limit)
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

// unusable adds the mend to an error of the system about the directory's path.
func (d Directory) unusable(err error) error {
	if e := (*fs.PathError)(nil); errors.As(err, &e) {
		return fmt.Errorf("%s: %w; set XDG_RUNTIME_DIR to a directory of this user's", d.path, e.Err)
	}
	return err
}

// lockTimeout bounds the wait for a directory's lock, but at the end of a machine, which does not
// wait: a holder never blocks, but may be stopped.
const lockTimeout = 2 * time.Second

// unlock undoes lock, and removes an empty directory, if no other process has it locked: that one
// does.
func (d Directory) unlock(f *os.File) {
	if flock(f, unix.LOCK_EX|unix.LOCK_NB) == nil && same(f, d.path) {
		_ = os.Remove(d.path)
	}
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
	dir, err := d.lock(unix.LOCK_EX, true, lockTimeout)
	if err != nil {
		return nil, nil, err
	}
	defer d.unlock(dir)
	older, err := d.look(name, beside)
	if err != nil {
		return nil, nil, err
	}
	if older != nil {
		return nil, nil, older.inUse()
	}
	if lock, err = d.lockName(name); err != nil {
		return nil, nil, err
	}
	held := lock // a return of an error sets lock to nil
	defer func() {
		if err != nil {
			err = errors.Join(err, d.remove(name, inside), held.Close())
		}
	}()
	if err := d.unlink(name, inside, socketFile, vsockFile); err != nil { // of a dead machine
		return nil, nil, err
	}
	if err := lock.Truncate(0); err != nil {
		return nil, nil, err
	}
	if _, err := lock.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0); err != nil {
		return nil, nil, err
	}
	l, err = listen(dir, name+inside+socketFile)
	return lock, l, err
}

// lockName makes the directory of a machine and the lock in it. A machine that ends may remove its
// own at any time.
func (d Directory) lockName(name string) (*os.File, error) {
	for {
		if err := os.Mkdir(d.Machine(name), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
		err := private(d.Machine(name), os.Geteuid())
		var f *os.File
		if err == nil {
			f, err = nowait.Open(d.file(name, inside, lockFile), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600, nowait.Regular)
		}
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		err = flock(f, unix.LOCK_EX|unix.LOCK_NB)
		if err == nil && same(f, f.Name()) {
			return f, nil
		}
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = Entry{name, holder(f)}.inUse()
		}
		f.Close()
		if err != nil {
			return nil, err
		}
	}
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

// release undoes claim. Another process that has the lock may have done so before, if it took this
// one for dead: then the name can be a new machine's. This process may be in a sandbox, without a
// right to lock or remove the Directory; then its last machine leaves it empty.
func (d Directory) release(name string, lock *os.File) error {
	defer lock.Close()
	// The lock of claim is that of all processes of the machine. This one is a process's own.
	own := unix.Flock_t{Type: unix.F_WRLCK}
	if unix.FcntlFlock(lock.Fd(), unix.F_SETLK, &own) != nil {
		return nil // the other releases it
	}
	var err error
	if same(lock, d.file(name, inside, lockFile)) { // and as long as it is, no other process can have the name
		err = d.remove(name, inside)
	}
	if dir, e := d.lock(unix.LOCK_SH, false, 0); e == nil {
		_, e = d.look(name, inside) // the user may have removed the lock
		err = errors.Join(err, e)
		d.unlock(dir)
	}
	return err
}

// remove removes the files of a name, and its directory unless there are others in it, such as the
// sockets of programs for ports of the guest. The caller holds the name's lock, or the Directory's
// of a dead one.
func (d Directory) remove(name, place string) error {
	err := d.unlink(name, place, socketFile, vsockFile, lockFile)
	if place == inside {
		_ = unix.Rmdir(d.Machine(name))
	}
	return err
}

// unlink removes files of a name.
func (d Directory) unlink(name, place string, files ...string) error {
	var errs []error
	for _, file := range files {
		path := d.file(name, place, file)
		switch err := unix.Unlink(path); err {
		case nil, unix.ENOENT, unix.EISDIR: // EISDIR: a.lock, a machine beside a
		default:
			errs = append(errs, &fs.PathError{Op: "remove", Path: path, Err: err})
		}
	}
	return errors.Join(errs...)
}

// Entry is a machine in a Directory.
type Entry struct {
	Name string
	PID  int // 0 if unknown
}

func (e Entry) inUse() error {
	return fmt.Errorf("the name %s is %w by process %d", e.Name, ErrInUse, e.PID)
}

// List returns the live machines, sorted by name, and removes the files of dead ones. A missing
// directory has none.
func (d Directory) List() ([]Entry, error) {
	dir, err := d.lock(unix.LOCK_SH, false, lockTimeout)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer d.unlock(dir)
	files, err := dir.ReadDir(-1)
	if err != nil {
		return nil, err
	}
	var list []Entry
	for _, file := range files {
		name, place, ok := file.Name(), inside, file.IsDir()
		if !ok {
			place = beside
			name, ok = strings.CutSuffix(name, beside+lockFile)
		}
		if !ok || CheckName(name) != nil {
			continue
		}
		e, err := d.look(name, place)
		if err != nil {
			return list, err
		}
		if e != nil {
			list = append(list, *e)
		}
	}
	slices.SortFunc(list, func(a, b Entry) int { return strings.Compare(a.Name, b.Name) })
	return list, nil
}

// look returns the machine of a name if it lives, and else removes its files. The caller holds the
// Directory's lock, so that no process takes the name meanwhile; others may look, and remove the
// same.
func (d Directory) look(name, place string) (*Entry, error) {
	f, err := nowait.Open(d.file(name, place, lockFile), os.O_RDWR|unix.O_NOFOLLOW, 0, nowait.Regular|nowait.Directory)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.EISDIR) {
		return nil, d.remove(name, place)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	err = flock(f, unix.LOCK_SH|unix.LOCK_NB)
	switch {
	case errors.Is(err, unix.EWOULDBLOCK):
		return &Entry{name, holder(f)}, nil
	case err != nil:
		return nil, err
	}
	return nil, d.remove(name, place)
}
