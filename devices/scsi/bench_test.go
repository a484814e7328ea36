package scsi_test

import (
	"testing"

	"gvm/devices/block"
	"gvm/devices/scsi"
)

// repeated returns a command that may be submitted again and again, and where its
// status goes.
func repeated(cdb []byte, out bool) (*scsi.Command, *scsi.Status) {
	status := new(scsi.Status)
	c := &scsi.Command{CDB: cdb, Done: func(r scsi.Result) { *status = r.Status }}
	iov := [][]byte{make([]byte, 2048), make([]byte, 2048)}
	if out {
		c.Out = iov
	} else {
		c.In = iov
	}
	return c, status
}

var hot = []struct {
	name string
	cdb  []byte
	out  bool
}{
	{"READ(10)", cdb10(0x28, 0, 8, 8), false},
	{"READ(16)", cdb16(0x88, 0, 8, 8), false},
	{"WRITE(10)", cdb10(0x2a, 0, 8, 8), true},
	{"WRITE(16)", cdb16(0x8a, 0, 8, 8), true},
}

// TestNoAllocation keeps the hot path free of garbage.
func TestNoAllocation(t *testing.T) {
	target := attach(t, scsi.UnitConfig{Backend: block.Null(1 << 20)})
	for _, h := range hot {
		c, status := repeated(h.cdb, h.out)
		if n := testing.AllocsPerRun(100, func() { target.Submit(c) }); n >= 1 || *status != scsi.Good {
			t.Errorf("%s: %v allocations, status %02x", h.name, n, *status)
		}
	}
}

func BenchmarkSubmit(b *testing.B) {
	target := attach(b, scsi.UnitConfig{Backend: block.Null(1 << 20)})
	for _, h := range hot {
		b.Run(h.name, func(b *testing.B) {
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				c, _ := repeated(h.cdb, h.out)
				for pb.Next() {
					target.Submit(c)
				}
			})
		})
	}
}
