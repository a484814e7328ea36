package nowait_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"gvm/kvmapi/nowait"
)

// TestPreadv reads cached data into few and many buffers, small, large and empty ones, and at the
// end of the file.
func TestPreadv(t *testing.T) {
	data := make([]byte, 200<<10)
	for i := range data {
		data[i] = byte(i ^ i>>8)
	}
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fd := int(f.Fd())
	if _, err := unix.Preadv2(fd, [][]byte{make([]byte, 1)}, 0, unix.RWF_NOWAIT); errors.Is(err, unix.EOPNOTSUPP) {
		t.Skip("the file system of the temporary directory does not know RWF_NOWAIT")
	}
	for _, sizes := range [][]int{{1}, {4096}, {0, 512, 0, 512}, {1, 2, 3, 4, 5, 6, 7, 8}, {1, 2, 3, 4, 5, 6, 7, 8, 9},
		{64 << 10}, {64 << 10, 1}, {130 << 10}} {
		var iov [][]byte
		n := 0
		for _, s := range sizes {
			iov = append(iov, make([]byte, s))
			n += s
		}
		const off = 12345
		got, err := nowait.Preadv(fd, iov, off)
		if err != nil || got != n || !bytes.Equal(bytes.Join(iov, nil), data[off:off+n]) {
			t.Errorf("%v: %d bytes, %v", sizes, got, err)
		}
	}
	if n, err := nowait.Preadv(fd, [][]byte{make([]byte, 100)}, int64(len(data)-10)); n != 10 || err != nil {
		t.Errorf("at the end: %d, %v", n, err)
	}
	if _, err := nowait.Preadv(-1, [][]byte{make([]byte, 100)}, 0); err != unix.EBADF {
		t.Errorf("of no file: %v", err)
	}
	if _, err := nowait.Preadv(fd, [][]byte{make([]byte, 100)}, -1); err != unix.EINVAL {
		t.Errorf("before the file: %v", err)
	}
}

func BenchmarkPreadv(b *testing.B) {
	path := filepath.Join(b.TempDir(), "file")
	if err := os.WriteFile(path, make([]byte, 4096), 0o600); err != nil {
		b.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	fd, iov := int(f.Fd()), [][]byte{make([]byte, 4096)}
	for name, read := range map[string]func() (int, error){
		"nowait": func() (int, error) { return nowait.Preadv(fd, iov, 0) },
		"unix":   func() (int, error) { return unix.Preadv2(fd, iov, 0, unix.RWF_NOWAIT) },
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := read(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
