package block_test

import (
	"errors"
	"os"
	"strings"
	"testing"

	"gvm/devices/block"
)

func TestResize(t *testing.T) {
	for _, tt := range []struct {
		name    string
		outside int64 // the size that another program gives the file first, 0: none
		n       int64
		shrink  bool
		o       block.Options
		want    int64 // 0: refused
		file    int64 // its size afterwards
		text    string
	}{
		{"grow", 0, 2 * mib, false, block.Options{}, 2 * mib, 2 * mib, ""},
		{"same", 0, mib, false, block.Options{}, mib, mib, ""},
		{"same, readonly", 0, mib, false, block.Options{ReadOnly: true}, mib, mib, ""},
		{"shrink", 0, mib / 2, false, block.Options{}, 0, mib,
			"has 1048576 bytes, and would have 524288: the data behind them would be lost, which --shrink allows"},
		{"shrink, meant", 0, mib / 2, true, block.Options{}, mib / 2, mib / 2, ""},
		{"as it is", 0, 0, false, block.Options{}, mib, mib, ""},
		{"as it is, grown", 3 * mib, 0, false, block.Options{}, 3 * mib, 3 * mib, ""},
		{"as it is, grown, readonly", 3 * mib, 0, false, block.Options{ReadOnly: true}, 3 * mib, 3 * mib, ""},
		{"as it is, cut", 4096, 0, false, block.Options{}, 0, 4096, "would be lost"},
		{"as it is, cut, meant", 4096, 0, true, block.Options{}, 4096, 4096, ""},
		{"grown, then less", 3 * mib, 2 * mib, false, block.Options{}, 0, 3 * mib,
			"has 3145728 bytes, and would have 2097152"},
		{"emptied", -1, 0, true, block.Options{}, 0, 0, "is empty"},
		{"odd", 0, mib + 1, false, block.Options{}, 0, mib, "size 1048577 is not a multiple of the block size 512"},
		{"odd by 4096", 0, mib + 512, false, block.Options{BlockSize: 4096}, 0, mib, "not a multiple of the block size 4096"},
		{"odd outside", mib + 512, 0, false, block.Options{BlockSize: 4096}, 0, mib + 512,
			"has 1049088 bytes, not a multiple of the block size 4096"},
		{"negative", 0, -512, true, block.Options{}, 0, mib, "size -512"},
		{"readonly", 0, 2 * mib, false, block.Options{ReadOnly: true}, 0, mib, "is readonly and keeps its 1048576 bytes"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := image(t, "disk.img", "first sector", mib)
			f := open(t, path, tt.o)
			if tt.outside != 0 {
				if err := os.Truncate(path, max(tt.outside, 0)); err != nil {
					t.Fatal(err)
				}
			}
			err := f.Resize(tt.n, tt.shrink, nil)
			if tt.want == 0 && (!errors.Is(err, block.ErrSize) || !strings.Contains(err.Error(), path+": ") ||
				!strings.Contains(err.Error(), tt.text)) {
				t.Errorf("error %v, want ErrSize with %q", err, tt.text)
			}
			want := tt.want
			if want == 0 {
				want = mib
			} else if err != nil {
				t.Error(err)
			}
			if f.Size() != want {
				t.Errorf("size %d, want %d", f.Size(), want)
			}
			if fi, err := os.Stat(path); err != nil || fi.Size() != tt.file {
				t.Errorf("the file has %d bytes, want %d, %v", fi.Size(), tt.file, err)
			}
			if _, err := f.ReadAt(make([]byte, 512), want); err == nil {
				t.Error("a read past the end")
			}
			if _, err := f.ReadAt(make([]byte, 512), want-512); err != nil && tt.outside >= 0 && tt.file >= want {
				t.Errorf("a read of the end: %v", err)
			}
		})
	}
	t.Run("too large", func(t *testing.T) {
		f := open(t, image(t, "disk.img", "", mib), block.Options{})
		if err := f.Resize(1<<62, false, nil); err == nil || f.Size() != mib {
			t.Errorf("size %d, %v", f.Size(), err)
		}
	})
	t.Run("closed", func(t *testing.T) {
		f := open(t, image(t, "disk.img", "", mib), block.Options{})
		f.Close()
		if err := f.Resize(0, false, nil); !errors.Is(err, os.ErrClosed) {
			t.Errorf("%v", err)
		}
	})
}
