package block

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// fakeDisk is the system's side of a transfer, with its moods: it is interrupted
// at every second call, moves at most 700 bytes and, when fussy, refuses more
// than one buffer as O_DIRECT refuses unaligned ones.
type fakeDisk struct {
	data  []byte
	fussy bool
	calls int
}

func (d *fakeDisk) do(read bool) transfer {
	return func(_ int, iov [][]byte, off int64) (int, error) {
		if d.calls++; d.calls%2 == 0 {
			return 0, unix.EINTR
		}
		if d.fussy && (len(iov) > 1 || len(iov[0])%512 != 0) {
			return 0, unix.EINVAL
		}
		n, most := 0, 700
		if d.fussy {
			most = 512
		}
		for _, p := range iov {
			p = p[:min(len(p), most-n)]
			if read {
				n += copy(p, d.data[off+int64(n):])
			} else {
				n += copy(d.data[off+int64(n):], p)
			}
		}
		return n, nil
	}
}

// TestMove has the whole transfer arrive with calls that move a part.
func TestMove(t *testing.T) {
	for _, fussy := range []bool{false, true} {
		want := make([]byte, 8192)
		for i := range want {
			want[i] = byte(i*7 + i/256)
		}
		d := &fakeDisk{data: make([]byte, 3*8192), fussy: fussy}
		b := &File{path: "fake", direct: fussy}
		b.size.Store(int64(len(d.data)))
		iov := [][]byte{want[:100], want[100:101], want[101:5000], want[5000:]}
		if n, err := b.move("pwritev", d.do(false), iov, 8192, false); n != len(want) || err != nil {
			t.Errorf("write = %d, %v", n, err)
		}
		if !bytes.Equal(d.data[8192:16384], want) || slices.Max(d.data[:8192]) != 0 || slices.Max(d.data[16384:]) != 0 {
			t.Errorf("fussy %v: wrong data written", fussy)
		}
		got := make([]byte, len(want))
		if n, err := b.move("preadv", d.do(true), [][]byte{got[:3000], got[3000:]}, 8192, true); n != len(want) ||
			err != nil {
			t.Errorf("read = %d, %v", n, err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("fussy %v: wrong data read", fussy)
		}
	}
}

func TestMoveErrors(t *testing.T) {
	b := &File{path: "fake"}
	b.size.Store(8192)
	stop := func(after int, end error) transfer {
		return func(int, [][]byte, int64) (int, error) {
			if after--; after < 0 {
				return 0, end
			}
			return 512, nil
		}
	}
	for _, v := range []struct {
		read bool
		end  error
		want error
	}{{true, nil, io.ErrUnexpectedEOF}, {false, nil, io.ErrShortWrite}, {true, unix.EIO, unix.EIO},
		{false, unix.ENOSPC, unix.ENOSPC}, {true, unix.EINVAL, unix.EINVAL}} {
		if n, err := b.move("op", stop(2, v.end), [][]byte{make([]byte, 4096)}, 0, v.read); n != 1024 ||
			!errors.Is(err, v.want) {
			t.Errorf("%+v: %d, %v", v, n, err)
		}
	}
	for _, off := range []int64{-512, 8192 - 512, 8192, 1 << 62} {
		if n, err := b.move("op", stop(9, nil), [][]byte{make([]byte, 1024)}, off, false); n != 0 || err == nil {
			t.Errorf("1024 bytes at %d of 8192: %d, %v", off, n, err)
		}
	}
}

// TestLostData checks that no flush succeeds after one that failed: the kernel
// would say so, although it has dropped the data.
func TestLostData(t *testing.T) {
	b, err := Open(t.TempDir()+"/disk.img", Options{Size: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if err := b.Flush(); err != nil {
		t.Fatal(err)
	}
	good := b.fd
	b.fd = -1 // fdatasync fails
	if err := b.Flush(); !errors.Is(err, unix.EBADF) {
		t.Errorf("first flush: %v", err)
	}
	b.fd = good
	if err := b.Flush(); !errors.Is(err, unix.EBADF) || !strings.Contains(err.Error(), "an earlier flush lost data") {
		t.Errorf("second flush: %v", err)
	}
	if n, err := b.WriteVecDurable([][]byte{make([]byte, 512)}, 0); n != 0 || err == nil {
		t.Errorf("durable write: %d, %v", n, err)
	}
	if n, err := b.WriteAt(make([]byte, 512), 0); n != 512 || err != nil {
		t.Errorf("plain write: %d, %v", n, err)
	}
}
