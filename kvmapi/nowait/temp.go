package nowait

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// TempDir makes a directory for temporary files, whose name begins with prefix, for the caller to
// remove. A process that is killed cannot do that: the next TempDir with the same prefix removes
// the directories of this user's processes that have ended. A process has its directory locked. A
// directory with another name than os.MkdirTemp's, or another mode, is not one of them.
func TempDir(prefix string) (string, error) {
	parent := os.TempDir()
	entries, _ := os.ReadDir(parent) // a parent that cannot be read may be written
	for _, e := range entries {
		if name, ok := strings.CutPrefix(e.Name(), prefix); ok && name != "" && strings.Trim(name, "0123456789") == "" {
			removeUnlocked(filepath.Join(parent, e.Name()))
		}
	}
	for {
		dir, err := os.MkdirTemp("", prefix)
		if err != nil {
			return "", err
		}
		_, err = lockDir(dir, 0) // as long as the process lives
		if err == nil {
			_, err = os.Stat(dir)
		}
		switch {
		case err == nil:
			return dir, nil
		case !errors.Is(err, fs.ErrNotExist): // else another process removed it before the lock
			return "", errors.Join(err, os.Remove(dir))
		}
	}
}

// removeUnlocked removes a directory of this user's alone that no process has locked.
func removeUnlocked(dir string) {
	fd, err := lockDir(dir, unix.LOCK_NB)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if unix.Fstat(fd, &st) == nil && int(st.Uid) == os.Geteuid() && st.Mode&0o777 == 0o700 {
		_ = os.RemoveAll(dir) // what stays is tried again
	}
}

func lockDir(dir string, how int) (fd int, err error) {
	fd, err = unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	for err = unix.EINTR; err == unix.EINTR; {
		err = unix.Flock(fd, unix.LOCK_EX|how)
	}
	if err != nil {
		unix.Close(fd)
	}
	return fd, err
}
