package block_test

import (
	"errors"
	"path/filepath"
	"syscall"
	"testing"

	"gvm/devices/block"
)

// TestMapped finds the data in a sparse file, as GET LBA STATUS wants to know.
func TestMapped(t *testing.T) {
	f := open(t, filepath.Join(t.TempDir(), "disk.img"), block.Options{Size: 4 * mib})
	needHoles(t, f)
	if _, err := f.WriteAt(make([]byte, 64<<10), mib); err != nil {
		t.Fatal(err)
	}
	faulty := block.NewFaulty(f, block.Fault{Op: block.OpRead, Off: 3 * mib, Len: 512, Err: syscall.EIO})
	for _, v := range []struct {
		off, n int64
		mapped bool
		length int64
	}{
		{0, 4 * mib, false, mib},
		{0, 512, false, 512},
		{mib, 3 * mib, true, 64 << 10},
		{mib + 4096, 512, true, 512},
		{mib + 64<<10, mib, false, mib},
	} {
		mapped, length, err := faulty.Mapped(v.off, v.n)
		if mapped != v.mapped || length != v.length || err != nil {
			t.Errorf("Mapped(%d, %d) = %v, %d, %v; want %v, %d", v.off, v.n, mapped, length, err, v.mapped, v.length)
		}
	}
	if _, _, err := faulty.Mapped(3*mib, 512); !errors.Is(err, syscall.EIO) {
		t.Errorf("a fault: %v", err)
	}
	if mapped, n, err := block.NewFaulty(block.NewMem(mib)).Mapped(0, 4096); !mapped || n != 4096 || err != nil {
		t.Errorf("a backend that does not know: %v, %d, %v", mapped, n, err)
	}
}
