package hostfs

import (
	"bytes"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// FuzzServe sends messages, most of them of the right form, and checks that they neither change nor
// show anything outside of the tree. Each message takes some bytes of the input: its opcode, the
// node, values for its structure, and names.
func FuzzServe(f *testing.F) {
	dir := "/dev/shm"
	if _, err := os.Stat(dir); err != nil {
		dir = f.TempDir()
	}
	names := []string{"dir", "file", "link", "canary", "dangling", "magic", "fifo", "..", ".", "", "new", "../outside",
		"link/canary", "/etc/passwd", "user.a", "security.capability", "sub"}
	f.Add([]byte{opLookup, 0, 1, 2, opLookup, 1, 1, 3, opSetattr, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 0})
	f.Add([]byte{opCreate, 0, 3, 3, 1, 4, opMkdir, 0, 3, 1, 10, opRename, 0, 2, 2, 1, 8, opOpendir, 0, 0, 0,
		opReaddirplus, 0, 5, 0, 4, 0, 0, 0})
	f.Add([]byte{opSymlink, 0, 2, 10, 11, opLookup, 1, 1, 3, opUnlink, 1, 1, 3, opLink, 1, 2, 1, 1,
		opRename2, 1, 2, 0, 2, 3, 10})
	f.Fuzz(func(t *testing.T, data []byte) {
		top, err := os.MkdirTemp(dir, "hostfs")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(top)
		o := newOutside(t, top)
		before := o.state(t)
		fs, err := Open(Config{Dir: o.tree, Files: 8, ReadOnly: len(data)%8 == 7})
		if err != nil {
			t.Fatal(err)
		}
		next := func() (b int) {
			if len(data) > 0 {
				b, data = int(data[0]), data[1:]
			}
			return b
		}
		c := &client{t: t, fs: fs}
		ids := []uint64{1}
		values := []uint64{0, 1, 2, 0o777, 4096, 1 << 40, 1<<63 - 1, ^uint64(0), 0x8000_8001_0000_0041,
			unix.S_IFREG | 0o6755, unix.S_IFCHR<<32 | unix.S_IFCHR}
		for i := 0; len(data) > 0 && i < 64; i++ {
			opcode := uint32(next() % (len(ops) + 1))
			if opcode == opSyncfs {
				continue // the host would be busy for long
			}
			id := ids[next()%len(ids)]
			var args []byte
			if int(opcode) < len(ops) {
				for len(args)+8 <= ops[opcode].args {
					args = put64(args, values[next()%len(values)])
				}
			}
			if opcode == opFallocate {
				order.PutUint64(args[16:], 4096) // no more storage
			}
			var given []string
			for range next() % 3 {
				given = append(given, names[next()%len(names)])
			}
			b, err := c.do(opcode, id, args, given...)
			if bytes.Contains(b, []byte(secret)) {
				t.Fatalf("opcode %d, %q: the answer has the secret", opcode, given)
			}
			if err != nil || len(b) < 8 {
				continue
			}
			switch opcode {
			case opLookup, opMkdir, opMknod, opSymlink, opLink, opCreate, opTmpfile:
				ids = append(ids, entry(b))
				values = append(values, entry(b))
			case opOpen, opOpendir:
				values = append(values, entry(b))
			}
			if opcode == opCreate || opcode == opTmpfile {
				values = append(values, entry(b[entryOutLen:]))
			}
		}
		fs.Close()
		if c := fs.Counts(); c.Files != 0 {
			t.Errorf("after Close: %+v", c)
		}
		if after := o.state(t); after != before {
			t.Errorf("before:\n%s\nafter:\n%s", before, after)
		}
	})
}
