// Escapes tries, in a guest, to leave the directories of the host that the guest shares:
//
//	escapes RW RO OUTSIDE
//
// RW and RO are the shares, writable and read-only, and OUTSIDE is a directory beside RW on the
// host with a file of each attempt, named by its number, that begins with "secret". It prints a
// line for each attempt, "NUMBER NAME: refused" or its result. A name with a slash is none of them:
// Linux sends none.
package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// tree has the directories, and the name of the attempt's file in outside.
type tree struct{ rw, ro, outside, victim string }

// shared returns a path in the writable share.
func (t *tree) shared(name ...string) string {
	return filepath.Join(append([]string{t.rw}, name...)...)
}

// secret reads a file, and fails if it could.
func secret(path string) error {
	b, err := os.ReadFile(path)
	if err == nil {
		err = fmt.Errorf("read %q", b)
	}
	return err
}

// attempts have the error that refuses each. Without one, only the host can tell that it was in
// vain.
var attempts = []struct {
	name string
	try  func(t *tree) error
	want error
}{
	{"absolute link", func(t *tree) error {
		return errors.Join(os.Symlink(filepath.Join(t.outside, t.victim), t.shared("mine")), secret(t.shared("mine")))
	}, unix.ENOENT},
	{"relative link", func(t *tree) error {
		return errors.Join(os.Symlink("../outside/"+t.victim, t.shared("mine2")), secret(t.shared("mine2")))
	}, unix.ENOENT},
	{"absolute link of the host", func(t *tree) error { return secret(t.shared("absolute", t.victim)) }, unix.ENOENT},
	{"relative link of the host", func(t *tree) error { return secret(t.shared("relative", t.victim)) }, unix.ENOENT},
	{"..", func(t *tree) error { return secret(t.rw + "/../outside/" + t.victim) }, unix.ENOENT},
	{".. often", func(t *tree) error {
		return secret(t.rw + "/dir" + strings.Repeat("/..", 40) + t.outside + "/" + t.victim)
	}, unix.ENOENT},
	{".. from the working directory", func(t *tree) error {
		return errors.Join(os.Chdir(t.shared("dir")), secret("../../outside/"+t.victim))
	}, unix.ENOENT},
	{"50 links", func(t *tree) error {
		last := "../outside/" + t.victim
		for i := range 50 {
			name := fmt.Sprint("chain", i)
			if err := os.Symlink(last, t.shared(name)); err != nil {
				return err
			}
			last = name
		}
		return secret(t.shared(last))
	}, unix.ELOOP},
	{"hard link into the tree", func(t *tree) error {
		return unix.Linkat(unix.AT_FDCWD, t.shared("relative", t.victim), unix.AT_FDCWD, t.shared("stolen"),
			unix.AT_SYMLINK_FOLLOW)
	}, unix.ENOENT},
	{"hard link out of the tree", func(t *tree) error {
		return os.Link(t.shared("file"), filepath.Join(t.rw, "..", "linked"))
	}, unix.EXDEV},
	{"rename out of the tree", func(t *tree) error {
		return os.Rename(t.shared("file"), filepath.Join(t.rw, "..", "moved"))
	}, unix.EXDEV},
	{"rename from one tree to the other", func(t *tree) error {
		return os.Rename(t.shared("file"), filepath.Join(t.ro, "file"))
	}, unix.EXDEV},
	{"exchange with ..", func(t *tree) error {
		return unix.Renameat2(unix.AT_FDCWD, t.shared("dir"), unix.AT_FDCWD, t.rw+"/..", unix.RENAME_EXCHANGE)
	}, unix.EBUSY},
	{"own root in proc", func(t *tree) error {
		return secret(filepath.Join("/proc/self/root", t.outside, t.victim))
	}, unix.ENOENT},
	{"link to the root in proc", func(t *tree) error {
		return errors.Join(os.Symlink("/proc/1/root", t.shared("magic")), secret(t.shared("magic", t.outside, t.victim)))
	}, unix.ENOENT},
	{".. of a descriptor", func(t *tree) error {
		fd, err := unix.Open(t.rw, unix.O_PATH, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return secret(fmt.Sprintf("/proc/self/fd/%d/../outside/%s", fd, t.victim))
	}, unix.ENOENT},
	{"bind mount", func(t *tree) error {
		return errors.Join(os.Mkdir(t.shared("bind"), 0o755),
			unix.Mount(filepath.Dir(t.rw), t.shared("bind"), "", unix.MS_BIND, ""), secret(t.shared("bind/outside", t.victim)))
	}, unix.ENOENT},
	{"mount of a path", func(t *tree) error {
		return unix.Mount(t.outside, t.shared("dir"), "virtiofs", 0, "")
	}, unix.EINVAL},
	{"block device", func(t *tree) error {
		return unix.Mknod(t.shared("disk"), unix.S_IFBLK|0o666, int(unix.Mkdev(8, 0)))
	}, unix.EPERM},
	{"memory as a device", func(t *tree) error {
		return unix.Mknod(t.shared("mem"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 1)))
	}, unix.EPERM},
	{"set-user-ID", func(t *tree) error { return unix.Chmod(t.shared("file"), 0o6755) }, nil},
	{"new file with set-user-ID", func(t *tree) error {
		fd, err := unix.Open(t.shared("program"), unix.O_CREAT|unix.O_WRONLY, 0o6755)
		return errors.Join(err, unix.Close(fd))
	}, nil},
	{"file capability", func(t *tree) error {
		rights := "\x01\x00\x00\x02\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff" // VFS_CAP_REVISION_2
		return unix.Setxattr(t.shared("file"), "security.capability", []byte(rights), 0)
	}, unix.EOPNOTSUPP},
	{"trusted attribute", func(t *tree) error {
		return unix.Setxattr(t.shared("dir"), "trusted.overlay.redirect", []byte("/outside"), 0)
	}, unix.EOPNOTSUPP},
	{"guessed handles", guessHandles, unix.ESTALE},
	{"unnamed file linked out", func(t *tree) error {
		fd, err := unix.Open(t.rw, unix.O_TMPFILE|unix.O_RDWR, 0o644)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Linkat(unix.AT_FDCWD, fmt.Sprint("/proc/self/fd/", fd), unix.AT_FDCWD, t.rw+"/../unnamed",
			unix.AT_SYMLINK_FOLLOW)
	}, unix.EXDEV},
	{"truncate through a link", func(t *tree) error {
		return os.Truncate(t.shared("relative", t.victim), 0)
	}, unix.ENOENT},
	{"create through a link", func(t *tree) error {
		return os.WriteFile(t.shared("absolute", "new"), nil, 0o644)
	}, unix.ENOENT},
	{"socket of the host", func(t *tree) error {
		c, err := net.Dial("unix", t.shared("socket"))
		if err == nil {
			c.Close()
		}
		return err
	}, unix.ECONNREFUSED},
	{"FIFO of the host", func(t *tree) error {
		f, err := os.OpenFile(t.shared("fifo"), os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = f.WriteString("guest")
		return err
	}, nil},
	{"link exchanged meanwhile", exchanged, unix.ENOENT},
	{".. of a directory that the host moves out", func(t *tree) error {
		err := errors.Join(os.Chdir(t.shared("moves")), os.WriteFile(t.shared("move"), nil, 0o644))
		for err == nil {
			if _, err := os.Stat(t.shared("moves")); errors.Is(err, fs.ErrNotExist) {
				break
			}
		}
		return errors.Join(err, secret("../"+t.victim))
	}, unix.ENOENT},
	{"write to the read-only tree", func(t *tree) error { return os.WriteFile(filepath.Join(t.ro, "file"), nil, 0o644) },
		unix.EROFS},
	{"write after a mount as writable", func(t *tree) error {
		return errors.Join(unix.Mount("", t.ro, "", unix.MS_REMOUNT, ""),
			os.WriteFile(filepath.Join(t.ro, "file"), nil, 0o644))
	}, unix.EROFS},
	// The last: from now on the guest has a directory of that name.
	{"the guest's own directory", func(t *tree) error {
		return errors.Join(os.Mkdir(t.outside, 0o755), os.WriteFile(t.shared("relative", t.victim), []byte("guest"), 0o644),
			os.WriteFile(t.shared("absolute", "new"), nil, 0o644))
	}, nil},
}

// guessHandles opens files by the handles of node IDs, with the generation of the tree's root.
func guessHandles(t *tree) error {
	h, _, err := unix.NameToHandleAt(unix.AT_FDCWD, t.rw, 0)
	if err != nil {
		return err
	}
	mount, err := unix.Open(t.rw, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer unix.Close(mount)
	err = unix.ESTALE
	for id := range 300 {
		b := append([]byte(nil), h.Bytes()...) // the upper half of the ID, then the lower one: fuse_encode_fh
		b[4], b[5] = byte(id), byte(id>>8)
		fd, open := unix.OpenByHandleAt(mount, unix.NewFileHandle(h.Type(), b), unix.O_RDONLY|unix.O_NONBLOCK)
		if open != nil {
			if !errors.Is(open, unix.ESTALE) && !errors.Is(open, unix.ELOOP) && !errors.Is(open, unix.ENXIO) {
				err = open
			}
			continue
		}
		text := make([]byte, 100)
		n, _ := unix.Read(fd, text)
		unix.Close(fd)
		if n > 0 && strings.Contains(string(text[:n]), "secret") {
			return fmt.Errorf("read %q of node %d", text[:n], id)
		}
	}
	return err
}

// exchanged reads through a name that the host makes a directory and a link out of the tree in
// turns, until it has seen both twice.
func exchanged(t *tree) error {
	for seen := [2]int{}; seen[0] < 2 || seen[1] < 2; {
		b, err := os.ReadFile(t.shared("exchanged", t.victim))
		switch {
		case string(b) == "inside":
			seen[0]++
		case err != nil:
			seen[1]++
		default:
			return fmt.Errorf("read %q", b)
		}
		if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("2"), 0); err != nil {
			return err
		}
	}
	return unix.ENOENT
}

func main() {
	runtime.LockOSThread()
	t := &tree{rw: os.Args[1], ro: os.Args[2], outside: os.Args[3]}
	for i, a := range attempts {
		t.victim = fmt.Sprint(i + 1)
		result := "refused"
		if err := a.try(t); !errors.Is(err, a.want) {
			result = fmt.Sprintf("%v, want %v", err, a.want)
		}
		fmt.Printf("%d %s: %s\n", i+1, a.name, result)
	}
}
