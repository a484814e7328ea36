// Package jail starts this program again as an ordinary user in a root directory of its own, which
// has the files that the program may use and no others.
//
// Enter is called by root, and only returns if it fails: the process keeps its PID, parent,
// terminal and standard files, and so no other process passes on its signals and its exit status. A
// second process, the janitor, stays outside with root's rights. It holds the lock of the jail's
// directory, and cleans up when the first has ended, by SIGKILL too.
package jail

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"gvm/text"
)

// Check returns the features that this process and this host lack for jails and their limits, each
// with its mend.
func Check() (missing []string) {
	const needed = 1<<unix.CAP_SYS_ADMIN | 1<<unix.CAP_MKNOD // of a container's root often none
	var have [2]unix.CapUserData
	err := unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &have[0])
	switch {
	case os.Geteuid() != 0:
		missing = append(missing, "only root starts one: sudo gvm run --jail; sudo gvm doctor tells more")
	case err != nil || have[0].Effective&needed != needed:
		missing = append(missing, "root has no CAP_SYS_ADMIN or CAP_MKNOD: start gvm outside of the container, "+
			"or give it both")
	}
	fd, err := openStrictly("/", unix.O_PATH)
	if err == nil {
		unix.Close(fd)
	} else {
		missing = append(missing, linkError("gvm run", "--jail", err).Error())
	}
	var l Limits
	if err = l.Add("memory=1G,cpus=1,pids=1"); err == nil {
		err = l.checkControllers()
	}
	if err != nil {
		missing = append(missing, err.Error())
	}
	return missing
}

// Config is a jail and the program in it.
type Config struct {
	Dir      string // an absolute path. On the host it has only run/, the jail's /run
	UID, GID int    // of the program, not root's
	Files    []File
	Devices  []string // character devices of the host below /dev, for the program alone
	Network  bool     // the program keeps the host's network; else it has none
	Limits   Limits
	Program  File     // another program, which this one starts by Inside.Program; without a path none
	Args     []string // of the program, which is this one
	Env      []string
	Parents  map[int]int // the parents of processes that the program cannot see in a jail

	// Prepare is called with root's rights outside of the jail, when the janitor is there; nil: no
	// call. With it the program can have a second janitor change what Prepare has made: see Requests.
	Prepare func() error `json:"-"`
	Images  []string     // of Requests
}

// File is a file or directory of the host, which the jail has at the same path.
type File struct {
	Flag  string // of the command line, for messages
	Path  string
	From  string // where the host has it; empty: at Path
	Write bool
	Make  bool // if there is none, an empty file of the user's is made
}

// UserError is an error that the user of Enter can mend on the command line.
type UserError struct{ Err error }

func (e *UserError) Error() string { return e.Err.Error() }

func (e *UserError) Unwrap() error { return e.Err }

func userError(format string, args ...any) error { return &UserError{fmt.Errorf(format, args...)} }

// Inside describes a jail to the program in it.
type Inside struct {
	Dir     string
	Limits  string      // as they are given
	Parents map[int]int // Config's
	Program int         // the descriptor of Config.Program, for /proc/self/fd of a child; 0: none
	Lock    int         // the descriptor of /run, with a lock that no second machine takes while the janitor is dead
	Janitor int         // the descriptor of the other end of Requests.Pair; 0: none
	Lives   []int       // descriptors whose end wakes the janitors
}

// kept returns the descriptors for the program, but for Lock.
func (in *Inside) kept() []int {
	return slices.DeleteFunc(append([]int{in.Program, in.Janitor}, in.Lives...), func(fd int) bool { return fd == 0 })
}

// insideEnv is the environment variable with Inside.
const insideEnv = "GVM_JAIL"

// Here returns the jail in which Enter has started this program, and keeps its lock; nil: none.
func Here() *Inside {
	var in Inside
	if s, ok := os.LookupEnv(insideEnv); !ok || json.Unmarshal([]byte(s), &in) != nil {
		return nil
	}
	unix.CloseOnExec(in.Lock) // else the sandbox closes it
	for _, fd := range in.kept() {
		unix.CloseOnExec(fd)
	}
	return &in
}

// ownProgram is the file of this process's program.
const ownProgram = "/proc/self/exe"

// runDir is the directory of the jail and of Config.Dir that the program may write.
const runDir = "run"

// lockPatience bounds the wait for the janitor of the machine before.
const lockPatience = 2 * time.Second

// Enter makes the jail, gives up root's rights and starts the program. It returns only errors. The
// caller ends the process after one, since its thread may be in the jail already.
func Enter(c Config) error {
	if err := c.check(); err != nil {
		return err
	}
	program, err := c.openProgram()
	if err != nil {
		return err
	}
	runtime.LockOSThread() // namespaces, root and rights are this thread's until execve ends the others
	hear, err := deaf()
	if err != nil {
		return err
	}
	defer hear()
	lock, err := c.lock()
	if err != nil {
		return err
	}
	defer lock.Close()
	g, err := c.Limits.cgroup(c.Dir)
	if err != nil {
		return err
	}
	var in Inside
	if err := in.startJanitor(c.Dir, lock, []string{g.path}, nil); err != nil {
		return err
	}
	if c.Prepare != nil {
		// Another one, in case the first is killed: objects that Prepare makes would stay.
		if err := in.startSecond(&c, g.path, lock); err != nil {
			return err
		}
		if err := c.Prepare(); err != nil {
			return err
		}
	}
	if err := g.enter(); err != nil {
		return err
	}
	if err := c.makeRun(lock); err != nil {
		return err
	}
	var made outputs
	if err := c.makeRoot(g.path != "", &made); err != nil {
		return errors.Join(err, made.remove())
	}
	if err := c.drop(program); err != nil {
		return errors.Join(err, made.remove())
	}
	var env []string
	if err = closeAtExec(); err == nil {
		in.Program = program
		env, err = c.inside(&in)
	}
	if err == nil {
		hear()
		err = syscall.Exec(ownProgram, c.Args, env)
	}
	switch {
	case errors.Is(err, unix.EAGAIN):
		return userError("--uid %d: this user has as many processes as RLIMIT_NPROC (ulimit -u) allows: raise it", c.UID)
	case errors.Is(err, unix.ENOENT): // its interpreter
		return fmt.Errorf("--jail %s: this gvm needs shared libraries, which a jail does not have: "+
			"build it with CGO_ENABLED=0", c.Dir)
	}
	return fmt.Errorf("--jail %s: start gvm in it: %w", c.Dir, err)
}

// deaf blocks the signals that ask a process to end for this thread, until hear is called: Linux
// gives them to another one, which ends the process also while this one waits for storage that does
// not answer.
func deaf() (hear func(), err error) {
	var ends, old unix.Sigset_t
	for _, s := range []unix.Signal{unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM} {
		ends.Val[0] |= 1 << (s - 1)
	}
	if err := unix.PthreadSigmask(unix.SIG_BLOCK, &ends, &old); err != nil {
		return nil, err
	}
	return func() { _ = unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil) }, nil
}

// closeAtExec has execve close all descriptors but the standard ones.
func closeAtExec() error {
	err := unix.CloseRange(3, 1<<32-1, unix.CLOSE_RANGE_CLOEXEC)
	if err != unix.ENOSYS && err != unix.EINVAL { // before Linux 5.9, and 5.11
		return err
	}
	names, err := os.ReadDir("/proc/self/fd")
	for _, name := range names {
		if fd, _ := strconv.Atoi(name.Name()); fd > 2 {
			unix.CloseOnExec(fd)
		}
	}
	return err
}

// openProgram opens Program, which has no path in the jail, for execve. The descriptor cannot be
// read or written. 0: there is none.
func (c *Config) openProgram() (int, error) {
	if c.Program.Path == "" {
		return 0, nil
	}
	fd, err := unix.Open(c.Program.Path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, userError("%s: %s: %w", c.Program.Flag, c.Program.Path, err)
	}
	return fd, nil
}

// inside completes in, locks /run, keeps the descriptors for the program, and returns its
// environment.
func (c *Config) inside(in *Inside) (env []string, err error) {
	in.Dir, in.Limits, in.Parents = c.Dir, strings.Join(c.Limits.words, ","), c.Parents
	for _, fd := range in.kept() {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, 0); err != nil {
			return nil, err
		}
	}
	in.Lock, err = unix.Open("/"+runDir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err == nil {
		// No flock(2), which vsock needs of the directory of its socket. A lock for writing needs such a
		// descriptor.
		err = unix.FcntlFlock(uintptr(in.Lock), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_RDLCK})
	}
	b, err2 := json.Marshal(in)
	return append(slices.Clip(c.Env), insideEnv+"="+string(b)), errors.Join(err, err2)
}

// check checks all that needs no change of the host.
func (c *Config) check() error {
	if os.Geteuid() != 0 {
		return userError("--jail needs root, whose rights gvm then gives up: run it by sudo")
	}
	const most = 1<<32 - 2
	switch {
	case c.UID < 1 || c.UID > most:
		return userError("--uid %d: want a user from 1 to %d, one for each machine", c.UID, uint32(most))
	case c.GID < 1 || c.GID > most:
		return userError("--gid %d: want a group from 1 to %d", c.GID, uint32(most))
	case !filepath.IsAbs(c.Dir) || filepath.Clean(c.Dir) != c.Dir || c.Dir == "/":
		return userError("--jail %s: want an absolute path without .. and slashes at its end, such as /srv/jail/1",
			text.Word(c.Dir))
	}
	for i, f := range c.Files {
		if err := c.checkPath(f); err != nil {
			return err
		}
		c.Files[i].Path = filepath.Clean(f.Path)
	}
	return nil
}

// ownDirs are the directories of which the jail has its own.
var ownDirs = []string{"/proc", "/sys", "/" + runDir, "/dev"}

// checkPath checks that a file can have its place in the jail.
func (c *Config) checkPath(f File) error {
	if !filepath.IsAbs(f.Path) {
		whole, err := filepath.Abs(f.Path)
		if err != nil {
			whole = "/" + f.Path
		}
		return userError("%s %s: want an absolute path in a jail, such as %s", f.Flag, f.Path, whole)
	}
	path := filepath.Clean(f.Path)
	if path == "/" || below(c.Dir, path) {
		return userError("%s %s: the jail's own directory %s is below it; give a smaller part of it", f.Flag, path, c.Dir)
	}
	for _, own := range ownDirs {
		if path != own && (own == "/dev" || !below(path, own)) {
			continue
		}
		return userError("%s %s: a jail has a %s of its own; give a file in another directory", f.Flag, path, own)
	}
	return nil
}

// below reports whether a path is dir or below it.
func below(path, dir string) bool { return path == dir || strings.HasPrefix(path, dir+"/") }

// lock opens and locks the jail's directory.
func (c *Config) lock() (*os.File, error) {
	fd, err := openStrictly(c.Dir, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		if errors.Is(err, unix.ENOENT) {
			return nil, userError("--jail %s: there is no such directory: mkdir -p -m 755 %s", c.Dir, c.Dir)
		}
		return nil, linkError("--jail", c.Dir, err)
	}
	f := os.NewFile(uintptr(fd), c.Dir)
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil {
		switch {
		case st.Uid != 0:
			err = userError("--jail %s: the directory is user %d's: chown root %s", c.Dir, st.Uid, c.Dir)
		case st.Mode&0o022 != 0:
			err = userError("--jail %s: others may write to the directory: chmod 755 %s", c.Dir, c.Dir)
		case st.Mode&0o001 == 0:
			err = userError("--jail %s: user %d may not enter the directory: chmod 755 %s", c.Dir, c.UID, c.Dir)
		}
	}
	for end := time.Now().Add(lockPatience); err == nil; time.Sleep(5 * time.Millisecond) {
		err = unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			err = isFree(fd)
		}
		if err == nil {
			return f, nil
		}
		if err == unix.EWOULDBLOCK || err == unix.EINTR {
			if time.Now().Before(end) {
				err = nil
				continue
			}
			err = userError("--jail %s: another machine is in this jail; stop it, or give another directory", c.Dir)
		}
	}
	f.Close()
	var user *UserError
	if !errors.As(err, &user) {
		err = fmt.Errorf("--jail %s: %w", c.Dir, err)
	}
	return nil, err
}

// isFree returns EWOULDBLOCK if a machine whose janitor is dead has the jail's /run.
func isFree(dir int) error {
	fd, err := unix.Openat(dir, runDir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil { // makeRun says what else is there
		return nil
	}
	defer unix.Close(fd)
	l := unix.Flock_t{Type: unix.F_WRLCK}
	if err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &l); err != nil {
		return err
	}
	if l.Type != unix.F_UNLCK {
		return unix.EWOULDBLOCK
	}
	return nil
}

// makeRun makes the directory of the control socket.
func (c *Config) makeRun(dir *os.File) error {
	path := filepath.Join(c.Dir, runDir)
	err := unix.Mkdirat(int(dir.Fd()), runDir, 0o700)
	if err == nil {
		err = unix.Fchownat(int(dir.Fd()), runDir, c.UID, c.GID, unix.AT_SYMLINK_NOFOLLOW)
	}
	if err != nil && err != unix.EEXIST {
		return fmt.Errorf("--jail: make %s: %w", path, err)
	}
	var st unix.Stat_t
	if err := unix.Fstatat(int(dir.Fd()), runDir, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("--jail: %s: %w", path, err)
	}
	if st.Mode != unix.S_IFDIR|0o700 || int(st.Uid) != c.UID {
		return userError("--jail %s: %s is not a directory of user %d with mode 0700; remove it, gvm makes it anew",
			c.Dir, path, c.UID)
	}
	return nil
}

// drop checks that the user may use the files and start Program, and gives up root's rights.
func (c *Config) drop(program int) error {
	fail := func(what string, err error) error { return fmt.Errorf("--jail %s: %s: %w", c.Dir, what, err) }
	if err := c.Limits.setrlimits(); err != nil {
		return err
	}
	for capability := uintptr(0); capability < 64; capability++ {
		err := unix.Prctl(unix.PR_CAPBSET_DROP, capability, 0, 0, 0)
		if err == unix.EINVAL { // the kernel has no more
			break
		}
		if err != nil {
			return fail("drop capabilities", err)
		}
	}
	if err := syscall.Setgroups(nil); err != nil {
		return fail("setgroups", err)
	}
	if err := syscall.Setresgid(c.GID, c.GID, c.GID); err != nil {
		return fail("setresgid", err)
	}
	if err := syscall.Setresuid(c.UID, 0, 0); err != nil { // access checks as the real user
		return fail("setresuid", err)
	}
	for _, f := range c.Files {
		if err := c.access(f); err != nil {
			return err
		}
	}
	if unix.Access(ownProgram, unix.X_OK) == unix.EACCES { // execve tells, without the rights to undo makeRoot
		return userError("--uid %d: this user may not run gvm: chmod 755 its program", c.UID)
	}
	if program != 0 {
		if err := unix.Access(fmt.Sprintf("/proc/self/fd/%d", program), unix.X_OK); err != nil {
			return userError("%s: user %d may not run %s: chmod 755 %[3]s", c.Program.Flag, c.UID, c.Program.Path)
		}
	}
	if err := syscall.Setresuid(c.UID, c.UID, c.UID); err != nil {
		return fail("setresuid", err)
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fail("no_new_privs", err)
	}
	return nil
}

// access checks that the user may use a file, before the program tells of it in other words.
func (c *Config) access(f File) error {
	mode, what, mend := uint32(unix.R_OK), "read", "r"
	if f.Write {
		mode, what, mend = unix.R_OK|unix.W_OK, "read and write", "rw"
	}
	if fi, err := os.Stat(f.Path); err == nil && fi.IsDir() {
		mode, what, mend = mode|unix.X_OK, "enter and "+what, mend+"x"
	}
	err := unix.Access(f.Path, mode)
	switch {
	case err == unix.EACCES:
		return userError("%s %s: user %d may not %s it: chown %d %s, or chmod o+%s %s",
			f.Flag, f.Path, c.UID, what, c.UID, f.Path, mend, f.Path)
	case err == unix.EROFS:
		return userError("%s %s: it is on a file system that is read-only", f.Flag, f.Path)
	case err != nil:
		return fmt.Errorf("%s %s: %w", f.Flag, f.Path, err)
	}
	return nil
}

// openStrictly opens a path that has no symbolic link.
func openStrictly(path string, flags int) (int, error) {
	return unix.Openat2(unix.AT_FDCWD, path, &unix.OpenHow{Flags: uint64(flags | unix.O_CLOEXEC),
		Resolve: unix.RESOLVE_NO_SYMLINKS})
}

// linkError describes a failure of openStrictly.
func linkError(flag, path string, err error) error {
	switch {
	case errors.Is(err, unix.ENOSYS):
		return fmt.Errorf("%s %s: a jail needs Linux 5.6 or later (openat2)", flag, path)
	case errors.Is(err, unix.ELOOP):
		target, err := filepath.EvalSymlinks(path)
		if err != nil {
			return userError("%s %s: it is a symbolic link, and leads to no file: %w", flag, path, err)
		}
		return userError("%s %s: a path in a jail has no symbolic links: give %s", flag, path, target)
	}
	if errors.Is(err, unix.ENOENT) {
		return userError("%s %s: %w; check the path, or make it first: a jail makes files for results alone", flag, path,
			err)
	}
	return userError("%s %s: %w", flag, path, err)
}
