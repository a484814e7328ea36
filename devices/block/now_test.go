package block

import (
	"bytes"
	"io"
	"os"
	"testing"
)

// TestMayWait: a file system that does not know RWF_NOWAIT is asked once, and read all
// the same; one that does, or is in memory, reads at once.
func TestMayWait(t *testing.T) {
	f, err := os.Open("/sys/kernel/notes")
	if err != nil {
		t.Skip(err)
	}
	defer f.Close()
	want, err := io.ReadAll(f)
	if err != nil || len(want) < 16 {
		t.Skipf("%d bytes of %s, %v", len(want), f.Name(), err)
	}
	b := &File{f: f, fd: int(f.Fd()), path: f.Name()}
	b.size.Store(int64(len(want)))
	got := make([]byte, 16)
	if b.ReadVecNow([][]byte{got}, 0) || !b.mayWait.Load() {
		t.Errorf("sysfs reads at once; it is known to wait: %v", b.mayWait.Load())
	}
	if n, err := b.ReadVec([][]byte{got}, 0); err != nil || n != len(got) || !bytes.Equal(got, want[:16]) {
		t.Errorf("read %d bytes, %v", n, err)
	}
	if at, err := ReadsAtOnce("/dev/shm"); err != nil || !at {
		t.Errorf("memory reads at once: %v, %v", at, err)
	}
	if at, err := ReadsAtOnce("/sys/kernel"); err == nil {
		t.Errorf("a file in sysfs: %v", at)
	}
}
