package hostfs

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// client sends messages to a file system.
type client struct {
	t      testing.TB
	fs     *FS
	unique uint64
}

func open(t testing.TB, cfg Config) *client {
	t.Helper()
	fs, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		fs.Reset()
		if c := fs.Counts(); c.Files != 1 || c.Inodes != 1 || c.Handles != 0 {
			t.Errorf("after a reset: %+v", c)
		}
		fs.Close()
		if c := fs.Counts(); c.Files != 0 {
			t.Errorf("after Close: %+v", c)
		}
	})
	c := &client{t: t, fs: fs}
	c.ok(opInit, 1, put32(nil, 7, 36, 128<<10, ^uint32(0)))
	return c
}

// message makes a message from a structure and what follows it.
func (c *client) message(opcode uint32, node uint64, args []byte, names ...string) []byte {
	c.unique++
	body := args
	for _, name := range names {
		body = append(append(body, name...), 0)
	}
	b := put32(nil, uint32(inHeaderLen+len(body)), opcode)
	b = put32(put64(b, c.unique, node), uint32(os.Getuid()), uint32(os.Getgid()), 1, 0)
	return append(b, body...)
}

// do returns the answer without its header.
func (c *client) do(opcode uint32, node uint64, args []byte, names ...string) ([]byte, error) {
	c.t.Helper()
	out := make([]byte, 1<<17)
	n, err := c.fs.Serve([][]byte{c.message(opcode, node, args, names...)}, [][]byte{out})
	if err != nil {
		c.t.Fatal(err)
	}
	if n == 0 {
		return nil, nil
	}
	if order.Uint32(out) != uint32(n) || order.Uint64(out[8:]) != c.unique {
		c.t.Fatalf("opcode %d: the header of an answer of %d bytes is % x", opcode, n, out[:outHeaderLen])
	}
	if no := -int32(order.Uint32(out[4:])); no != 0 {
		if n != outHeaderLen {
			c.t.Fatalf("opcode %d: an error of %d bytes", opcode, n)
		}
		return nil, syscall.Errno(no)
	}
	return out[outHeaderLen:n], nil
}

func (c *client) ok(opcode uint32, node uint64, args []byte, names ...string) []byte {
	c.t.Helper()
	b, err := c.do(opcode, node, args, names...)
	if err != nil {
		c.t.Fatalf("opcode %d of node %d, %q: %v", opcode, node, names, err)
	}
	return b
}

// walk returns the node at a path.
func (c *client) walk(path string) uint64 {
	c.t.Helper()
	id := uint64(1)
	for name := range strings.SplitSeq(path, "/") {
		id = order.Uint64(c.ok(opLookup, id, nil, name))
	}
	return id
}

// openFile returns a handle.
func (c *client) openFile(opcode uint32, node uint64, flags uint32) uint64 {
	c.t.Helper()
	return order.Uint64(c.ok(opcode, node, put32(nil, flags, 0)))
}

const secret = "the secret of the host"

// outside is a tree and a directory beside it.
type outside struct{ top, tree, dir string }

// newOutside makes a tree with links that lead out of it.
func newOutside(t testing.TB, top string) outside {
	t.Helper()
	o := outside{top, filepath.Join(top, "tree"), filepath.Join(top, "outside")}
	check := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	check(os.MkdirAll(filepath.Join(o.tree, "dir", "sub"), 0o755))
	check(os.Mkdir(o.dir, 0o755))
	check(os.Mkdir(filepath.Join(o.dir, "empty"), 0o755))
	check(os.WriteFile(filepath.Join(o.dir, "canary"), []byte(secret), 0o644))
	check(os.WriteFile(filepath.Join(o.tree, "file"), []byte("of the tree"), 0o644))
	check(os.Symlink("../outside", filepath.Join(o.tree, "link")))
	check(os.Symlink(filepath.Join(o.dir, "canary"), filepath.Join(o.tree, "canary")))
	check(os.Symlink(filepath.Join(o.dir, "dangling"), filepath.Join(o.tree, "dangling")))
	check(os.Symlink("/proc/self/cwd", filepath.Join(o.tree, "magic")))
	check(unix.Mkfifo(filepath.Join(o.tree, "fifo"), 0o644))
	return o
}

// state describes everything outside of the tree that a client could have changed.
func (o outside) state(t testing.TB) string {
	t.Helper()
	var b strings.Builder
	describe := func(path string) {
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&b, "%s: %o %d:%d links %d, %d bytes, %v %v\n", path, st.Mode, st.Uid, st.Gid, st.Nlink, st.Size,
			st.Mtim, st.Ctim)
	}
	describe(o.top)
	err := filepath.WalkDir(o.dir, func(path string, d os.DirEntry, err error) error {
		if err == nil {
			describe(path)
		}
		return err
	})
	text, err2 := os.ReadFile(filepath.Join(o.dir, "canary"))
	if err != nil || err2 != nil {
		t.Fatal(err, err2)
	}
	return b.String() + string(text)
}
