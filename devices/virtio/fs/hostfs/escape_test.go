package hostfs

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestEscapes tries to leave the tree, as the user of this process and, if that is root, as an
// ordinary user too.
func TestEscapes(t *testing.T) {
	t.Run("this user", testEscapes)
	const again = "HOSTFS_TEST_ORDINARY_USER"
	if os.Getuid() != 0 || os.Getenv(again) != "" {
		return
	}
	t.Run("ordinary user", func(t *testing.T) {
		c := exec.Command("/proc/self/exe", "-test.v", "-test.run=^TestEscapes$/^this_user$")
		c.Dir = "/"
		c.Env = append(os.Environ(), again+"=1", "TMPDIR=/tmp")
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, err := c.CombinedOutput()
		if err != nil || !bytes.Contains(out, []byte("PASS: TestEscapes/this_user/guessed_handle")) {
			t.Errorf("%v\n%s", err, out)
		}
	})
}

func testEscapes(t *testing.T) {
	create := put32(nil, unix.O_RDWR|unix.O_CREAT, 0o644, 0, 0)
	for _, tt := range []struct {
		name string
		try  func(c *client) error
		want error
	}{
		{"lookup of ..", func(c *client) error { return c.try(opLookup, 1, nil, "..") }, unix.EINVAL},
		{"lookup of .. below a directory", func(c *client) error {
			return c.try(opLookup, c.walk("dir"), nil, "..")
		}, unix.EINVAL},
		{"lookup of .", func(c *client) error { return c.try(opLookup, 1, nil, ".") }, unix.EINVAL},
		{"lookup of no name", func(c *client) error { return c.try(opLookup, 1, nil, "") }, unix.EINVAL},
		{"lookup of a path up", func(c *client) error { return c.try(opLookup, 1, nil, "../outside") }, unix.EINVAL},
		{"lookup of a path", func(c *client) error { return c.try(opLookup, 1, nil, "link/canary") }, unix.EINVAL},
		{"lookup of an absolute path", func(c *client) error { return c.try(opLookup, 1, nil, "/etc/passwd") }, unix.EINVAL},
		{"lookup through a link", func(c *client) error {
			return c.try(opLookup, c.walk("link"), nil, "canary")
		}, unix.ENOTDIR},
		{"lookup through a link of the client", func(c *client) error {
			return c.try(opLookup, entry(c.ok(opSymlink, 1, nil, "mine", "../outside")), nil, "canary")
		}, unix.ENOTDIR},
		{"lookup through a magic link", func(c *client) error { return c.try(opLookup, c.walk("magic"), nil, "etc") },
			unix.ENOTDIR},
		{"open of a link", func(c *client) error { return c.try(opOpen, c.walk("canary"), make([]byte, 8)) }, unix.ELOOP},
		{"open of a linked directory", func(c *client) error {
			return c.try(opOpendir, c.walk("link"), make([]byte, 8))
		}, unix.ENOTDIR},
		{"create through a link", func(c *client) error {
			return c.try(opCreate, c.walk("link"), create, "new")
		}, unix.ENOTDIR},
		{"create of ..", func(c *client) error { return c.try(opCreate, 1, create, "../outside/new") }, unix.EINVAL},
		{"create over a link", func(c *client) error { return c.try(opCreate, 1, create, "canary") }, unix.ELOOP},
		{"create over a dangling link", func(c *client) error { return c.try(opCreate, 1, create, "dangling") }, unix.ELOOP},
		{"tmpfile through a link", func(c *client) error {
			return c.try(opTmpfile, c.walk("link"), create, "/")
		}, unix.ENOTDIR},
		{"mkdir through a link", func(c *client) error {
			return c.try(opMkdir, c.walk("link"), make([]byte, 8), "new")
		}, unix.ENOTDIR},
		{"mkdir over a dangling link", func(c *client) error { return c.try(opMkdir, 1, make([]byte, 8), "dangling") },
			unix.EEXIST},
		{"mknod of a device", func(c *client) error {
			return c.try(opMknod, 1, put32(nil, unix.S_IFBLK|0o666, 8<<8, 0, 0), "sda")
		}, unix.EPERM},
		{"unlink through a link", func(c *client) error {
			return c.try(opUnlink, c.walk("link"), nil, "canary")
		}, unix.ENOTDIR},
		{"unlink of a path", func(c *client) error { return c.try(opUnlink, 1, nil, "../outside/canary") }, unix.EINVAL},
		{"rmdir through a link", func(c *client) error {
			return c.try(opRmdir, c.walk("link"), nil, "empty")
		}, unix.ENOTDIR},
		{"rmdir of ..", func(c *client) error { return c.try(opRmdir, c.walk("dir"), nil, "..") }, unix.EINVAL},
		{"rename out of the tree", func(c *client) error {
			return c.try(opRename, 1, put64(nil, c.walk("link")), "file", "file")
		}, unix.ENOTDIR},
		{"rename into the tree", func(c *client) error {
			return c.try(opRename, c.walk("link"), put64(nil, 1), "canary", "stolen")
		}, unix.ENOTDIR},
		{"rename to a path", func(c *client) error {
			return c.try(opRename2, 1, put32(put64(nil, 1), 0, 0), "file", "../file")
		}, unix.EINVAL},
		{"whiteout", func(c *client) error {
			return c.try(opRename2, 1, put32(put64(nil, 1), unix.RENAME_WHITEOUT, 0), "file", "file2")
		}, unix.EINVAL},
		{"link out of the tree", func(c *client) error {
			return c.try(opLink, c.walk("link"), put64(nil, c.walk("file")), "file")
		}, unix.ENOTDIR},
		{"truncate of a link", func(c *client) error {
			return c.try(opSetattr, c.walk("canary"), append(put32(nil, setSize), make([]byte, 84)...))
		}, unix.ELOOP},
		{"chmod of a link", func(c *client) error {
			return c.try(opSetattr, c.walk("canary"), append(put32(nil, setMode), make([]byte, 84)...))
		}, unix.EOPNOTSUPP},
		{"times of a link", func(c *client) error {
			return c.try(opSetattr, c.walk("canary"), append(put32(nil, setAtime|setMtime), make([]byte, 84)...))
		}, nil}, // of the link itself
		{"attribute through a link", func(c *client) error {
			return c.try(opSetxattr, c.walk("canary"), put32(nil, 1, 0), "user.a", "v")
		}, unix.EOPNOTSUPP},
		{"capability", func(c *client) error {
			return c.try(opSetxattr, c.walk("file"), put32(nil, 1, 0), "security.capability", "v")
		}, unix.EOPNOTSUPP},
		{"open of a FIFO", func(c *client) error { return c.try(opOpen, c.walk("fifo"), make([]byte, 8)) }, unix.ENXIO},
		{"create over a FIFO", func(c *client) error { return c.try(opCreate, 1, create, "fifo") }, unix.ENXIO},
		{"guessed node", func(c *client) error { return c.try(opGetattr, 1000, make([]byte, 16)) }, unix.ESTALE},
		{"guessed handle", func(c *client) error {
			h := c.openFile(opOpen, c.walk("file"), 0)
			return c.try(opRead, 1, put64(put32(put64(nil, h, 0), 16, 0), 0, 0))
		}, unix.EBADF},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := newOutside(t, t.TempDir())
			before := o.state(t)
			c := open(t, Config{Dir: o.tree})
			if err := tt.try(c); err != tt.want {
				t.Errorf("%v, want %v", err, tt.want)
			}
			if after := o.state(t); after != before {
				t.Errorf("before:\n%s\nafter:\n%s", before, after)
			}
		})
	}
	t.Run("directories that become links", testSwap)
	t.Run("bits of programs", testRights)
	t.Run("owners", testOwners)
}

func entry(b []byte) uint64 { return order.Uint64(b) }

func (c *client) try(opcode uint32, node uint64, args []byte, names ...string) error {
	c.t.Helper()
	b, err := c.do(opcode, node, args, names...)
	if bytes.Contains(b, []byte(secret)) {
		c.t.Errorf("opcode %d, %q: the answer has the secret", opcode, names)
	}
	return err
}

// testSwap exchanges a directory and a link for each other while the client works below it, with
// too few descriptors to keep it open.
func testSwap(t *testing.T) {
	o := newOutside(t, t.TempDir())
	before := o.state(t)
	c := open(t, Config{Dir: o.tree, Files: 4})
	stop, host := make(chan struct{}), sync.WaitGroup{}
	host.Go(func() {
		a, b := filepath.Join(o.tree, "dir"), filepath.Join(o.tree, "link")
		for {
			select {
			case <-stop:
				return
			default:
				unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE)
			}
		}
	})
	for range 2000 {
		b, err := c.do(opLookup, 1, nil, "dir")
		if err != nil {
			t.Fatal(err)
		}
		dir := entry(b)
		for _, name := range []string{"file", "canary", "dangling", "fifo"} { // let dir be closed
			_ = c.try(opLookup, 1, nil, name)
		}
		_ = c.try(opLookup, dir, nil, "canary")
		_ = c.try(opUnlink, dir, nil, "canary")
		_ = c.try(opMkdir, dir, make([]byte, 8), "new")
		_ = c.try(opRename, 1, put64(nil, dir), "file", "canary")
		_ = c.try(opRename, dir, put64(nil, 1), "canary", "file")
	}
	close(stop)
	host.Wait()
	if after := o.state(t); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

// testRights checks that no file gets the bits that let a program run as its owner.
func testRights(t *testing.T) {
	dir := t.TempDir()
	c := open(t, Config{Dir: dir})
	mode := func(name string, want uint32) {
		t.Helper()
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(dir, name), &st); err != nil || st.Mode&0o7777 != want {
			t.Errorf("%s: mode %o, want %o; %v", name, st.Mode&0o7777, want, err)
		}
		if st.Uid != uint32(os.Getuid()) {
			t.Errorf("%s: belongs to user %d", name, st.Uid)
		}
	}
	b := c.ok(opCreate, 1, put32(nil, unix.O_RDWR, unix.S_IFREG|0o6755, 0, 0), "created")
	mode("created", 0o755)
	setattr := append(put32(nil, setMode), make([]byte, 84)...)
	order.PutUint32(setattr[68:], 0o6711)
	c.ok(opSetattr, entry(b), setattr)
	mode("created", 0o711)
	c.ok(opMknod, 1, put32(nil, unix.S_IFREG|0o6777, 0, 0, 0), "node")
	mode("node", 0o777)
	c.ok(opMkdir, 1, put32(nil, 0o2777, 0), "dir")
	mode("dir", 0o2777)
	// A program of the host loses them, and its capabilities, when it is changed, whatever the client
	// asks for.
	path := filepath.Join(dir, "program")
	capability := put32(nil, 0x02000001, 1<<21, 0, 0, 0) // VFS_CAP_REVISION_2, CAP_SYS_ADMIN
	truncate := func(set uint32, h uint64) []byte {
		return append(put64(put32(nil, set, 0), h, 4), make([]byte, 64)...)
	}
	for name, change := range map[string]func(program, h uint64){
		"write": func(program, h uint64) {
			c.ok(opWrite, program, put64(put32(put64(nil, h, 0), 1, 0), 0, 0), "")
		},
		"truncate":                 func(program, _ uint64) { c.ok(opSetattr, program, truncate(setSize, 0)) },
		"truncate of an open file": func(program, h uint64) { c.ok(opSetattr, program, truncate(setSize|setFH, h)) },
		"open with O_TRUNC": func(program, _ uint64) {
			c.ok(opRelease, program, put64(nil, c.openFile(opOpen, program, unix.O_RDWR|unix.O_TRUNC), 0, 0))
		},
		"create over it": func(uint64, uint64) {
			c.ok(opCreate, 1, put32(nil, unix.O_RDWR|unix.O_TRUNC, 0o644, 0, 0), "program")
		},
		"fallocate": func(program, h uint64) {
			c.ok(opFallocate, program, put32(put64(nil, h, 0, 4096), 0, 0))
		},
		"copy": func(program, h uint64) { c.ok(opCopyFileRange, program, put64(nil, h, 0, program, h, 100, 1, 0)) },
	} {
		if err := errors.Join(os.WriteFile(path, []byte("text"), 0o755), unix.Chmod(path, 0o6755)); err != nil {
			t.Fatal(err)
		}
		if os.Getuid() == 0 {
			if err := unix.Setxattr(path, fileCapability, capability, 0); err != nil && err != unix.EOPNOTSUPP {
				t.Fatal(err)
			}
		}
		program := c.walk("program")
		h := c.openFile(opOpen, program, unix.O_RDWR)
		t.Log(name)
		change(program, h)
		mode("program", 0o755)
		if n, err := unix.Getxattr(path, fileCapability, nil); err == nil {
			t.Errorf("%d bytes of capabilities are left", n)
		}
		c.ok(opRelease, program, put64(nil, h, 0, 0))
	}
}

// testOwners checks that an ordinary user's files are shown as root's if that is wanted, and that a
// file of root's guest belongs to the guest's user.
func testOwners(t *testing.T) {
	dir := t.TempDir()
	c := open(t, Config{Dir: dir, Root: true})
	file := entry(c.ok(opMknod, 1, put32(nil, unix.S_IFREG|0o644, 0, 0, 0), "file"))
	chown := func(uid, gid uint32) error {
		args := append(put32(nil, setUID|setGID), make([]byte, 84)...)
		order.PutUint32(args[76:], uid)
		order.PutUint32(args[80:], gid)
		_, err := c.do(opSetattr, file, args)
		return err
	}
	owners := func() [2]uint32 {
		b := c.ok(opGetattr, file, make([]byte, 16))
		return [2]uint32{order.Uint32(b[16+68:]), order.Uint32(b[16+72:])}
	}
	var want error = unix.EPERM
	if os.Getuid() == 0 {
		want = nil
	}
	if got := owners(); got != [2]uint32{0, 0} {
		t.Errorf("a new file belongs to %d", got)
	}
	if err := chown(0, 0); err != nil {
		t.Errorf("to root: %v", err)
	}
	if err := chown(1234, 4321); err != want {
		t.Errorf("to another user: %v, want %v", err, want)
	}
	if got := owners(); want == nil && got != [2]uint32{1234, 4321} {
		t.Errorf("then it belongs to %d", got)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(dir, "file"), &st); err != nil || want != nil && st.Uid != uint32(os.Getuid()) {
		t.Errorf("user %d, %v", st.Uid, err)
	}
}

// TestKernelInterfaces checks that no file of proc or sysfs can be opened.
func TestKernelInterfaces(t *testing.T) {
	if _, err := Open(Config{Dir: "/proc/self"}); err == nil {
		t.Error("proc can be shared")
	}
	c := open(t, Config{Dir: "/"})
	for _, name := range []string{"proc", "sys"} {
		dir := c.walk(name)
		for opcode, args := range map[uint32][]byte{opLookup: nil, opOpendir: make([]byte, 8), opSetattr: make([]byte, 88),
			opSetxattr: put32(nil, 0, 0)} {
			names := []string{"kernel"}
			if opcode == opSetxattr {
				names = []string{"user.x"}
			}
			if _, err := c.do(opcode, dir, args, names...); err != unix.EACCES && err != unix.EOPNOTSUPP {
				t.Errorf("/%s: opcode %d: %v", name, opcode, err)
			}
		}
	}
}

// TestMountedInterfaces mounts every file system of this kernel that needs no device: all are
// hidden but those that store files.
func TestMountedInterfaces(t *testing.T) {
	stores := []string{"tmpfs", "devtmpfs", "ramfs", "hugetlbfs"}
	cgroups := []string{"cgroup", "cgroup2", "cpuset"} // a mount moves controllers
	list, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	c := open(t, Config{Dir: filepath.Dir(dir)})
	mounted := 0
	for line := range strings.Lines(string(list)) {
		name, ok := strings.CutPrefix(strings.TrimSpace(line), "nodev\t")
		if !ok || slices.Contains(cgroups, name) || unix.Mount("none", dir, name, 0, "") != nil {
			continue
		}
		mounted++
		_, err := c.do(opOpendir, c.walk(filepath.Base(dir)), make([]byte, 8))
		if hidden := err == unix.EACCES; hidden == slices.Contains(stores, name) || err != nil && !hidden {
			t.Errorf("%s: %v", name, err)
		}
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Fatal(err)
		}
	}
	if mounted == 0 {
		t.Skipf("needs to mount: %v", unix.Mount("none", dir, "tmpfs", 0, ""))
	}
	t.Logf("%d file systems", mounted)
}
