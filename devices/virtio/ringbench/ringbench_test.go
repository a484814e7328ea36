package ringbench

import (
	"strings"
	"testing"
	"time"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/virtio/vscsi"
)

// counted is a backend that counts the bytes it moves, and fails behind the first good
// bytes.
type counted struct {
	*block.Mem
	read, written, good int64
}

func (c *counted) ReadAt(p []byte, off int64) (int, error)  { return c.ReadVec([][]byte{p}, off) }
func (c *counted) WriteAt(p []byte, off int64) (int, error) { return c.WriteVec([][]byte{p}, off) }

func (c *counted) ReadVec(iov [][]byte, off int64) (int, error) {
	if off >= c.good {
		return 0, scsi.TargetFailure
	}
	n, err := c.Mem.ReadVec(iov, off)
	c.read += int64(n)
	return n, err
}

func (c *counted) WriteVec(iov [][]byte, off int64) (int, error) {
	n, err := c.Mem.WriteVec(iov, off)
	c.written += int64(n)
	return n, err
}

func (c *counted) ReadVecNow(iov [][]byte, off int64) bool {
	_, err := c.ReadVec(iov, off)
	return err == nil
}

func (c *counted) WriteVecNow(iov [][]byte, off int64) bool {
	_, err := c.WriteVec(iov, off)
	return err == nil
}

func device(t *testing.T, b block.Backend, queues int) *vscsi.Device {
	t.Helper()
	u, err := scsi.NewUnit(scsi.UnitConfig{Backend: b, Serial: "BENCH"})
	if err != nil {
		t.Fatal(err)
	}
	target := scsi.NewTarget()
	if err := target.Attach(0, u); err != nil {
		t.Fatal(err)
	}
	d, err := vscsi.New(vscsi.Config{Target: target, Queues: queues})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// TestRun compares the report with the backend's calls.
func TestRun(t *testing.T) {
	const size = 1 << 20
	for _, write := range []bool{false, true} {
		b := &counted{Mem: block.NewMem(size), good: size}
		dev := device(t, b, 1)
		for _, depth := range []int{1, 3, 256} {
			b.read, b.written = 0, 0
			l := Load{Queues: 1, Depth: depth, Size: 8 << 10, Write: write, BlockSize: 512, Blocks: size / 512,
				Time: 20 * time.Millisecond}
			r, err := Run(dev, l)
			if err != nil {
				t.Fatal(err)
			}
			moved, other := b.read, b.written
			if write {
				moved, other = other, moved
			}
			if r.Requests < uint64(depth) || moved != int64(r.Requests)*int64(l.Size) || other != 0 {
				t.Errorf("write %v, depth %d: %d requests, %d bytes read, %d written", write, depth, r.Requests, b.read, b.written)
			}
			told := uint64(0)
			for _, b := range r.Latency.Buckets() {
				told += b.Count
			}
			if r.Elapsed < l.Time || r.CPU <= 0 || told != r.Requests {
				t.Errorf("write %v, depth %d: %v elapsed, %v CPU, %d latencies of %d",
					write, depth, r.Elapsed, r.CPU, told, r.Requests)
			}
			a, b, c := r.Latency.Quantile(0), r.Latency.Quantile(0.5), r.Latency.Quantile(1)
			if a <= 0 || a > b || b > c || c > 2*r.Elapsed {
				t.Errorf("write %v, depth %d: latencies %v, %v, %v of %v", write, depth, a, b, c, r.Elapsed)
			}
		}
	}
}

func TestQueues(t *testing.T) {
	dev := device(t, block.Null(1<<20), 3)
	r, err := Run(dev, Load{Queues: 3, Depth: 4, Size: 4096, BlockSize: 512, Blocks: 8, Time: time.Millisecond})
	if err != nil || r.Requests < 12 {
		t.Errorf("%d requests, %v", r.Requests, err)
	}
}

func TestMistakes(t *testing.T) {
	b := &counted{Mem: block.NewMem(1 << 20), good: 512 << 10}
	dev := device(t, b, 2)
	good := Load{Queues: 1, Depth: 1, Size: 4096, BlockSize: 512, Blocks: 2048, Time: time.Millisecond}
	for _, tt := range []struct {
		change func(*Load)
		want   string
	}{
		{func(l *Load) { l.Queues = 3 }, "3 queues"},
		{func(l *Load) { l.Queues = 0 }, "0 queues"},
		{func(l *Load) { l.Depth = 257 }, "depth 257"},
		{func(l *Load) { l.Size = 700 }, "700 bytes"},
		{func(l *Load) { l.Blocks = 7 }, "7 blocks"},
		{func(l *Load) { l.Time = time.Second }, "status 0x02"}, // some request comes behind the good bytes
	} {
		l := good
		tt.change(&l)
		if _, err := Run(dev, l); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%+v: %v, want %q", l, err, tt.want)
		}
	}
}
