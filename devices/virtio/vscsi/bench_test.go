package vscsi

import (
	"fmt"
	"testing"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/scsi/scsitest"
	"gvm/devices/virtio"
	"gvm/devices/virtio/virtqtest"
)

// nullPath is a device with depth reads of 4096 bytes in flight.
type nullPath struct {
	d     *virtqtest.Driver
	segs  []virtqtest.Seg
	depth int
}

func newNullPath(t testing.TB, target Target, depth int) *nullPath {
	return pathOn(newRig(t, Config{Target: target}, virtio.FeatureEventIdx|virtio.FeatureIndirectDesc), depth)
}

func pathOn(r *rig, depth int) *nullPath {
	d := r.q[2]
	hdr, resp, data := d.Alloc(51), d.Alloc(108), d.Alloc(4096)
	copy(d.Bytes(hdr, 51), header(linuxLUN(0), 1, 0, rw10(0x28, 0, 8)...))
	return &nullPath{d, []virtqtest.Seg{
		{Addr: hdr, Len: 51},
		{Addr: resp, Len: 108, Write: true},
		{Addr: data, Len: 4096, Write: true},
	}, depth}
}

func (n *nullPath) run() {
	for range n.depth {
		n.d.AddIndirect(0, n.segs...)
	}
	if _, err := n.d.Publish(); err != nil {
		panic(err)
	}
	for range n.depth {
		if _, written, err := n.d.Wait(); err != nil || written != 4204 {
			panic(err)
		}
	}
}

var raceDetector bool

// nullTargets are one that answers at once, and the real one on storage that
// does nothing.
func nullTargets(t testing.TB) map[string]Target {
	u, err := scsi.NewUnit(scsi.UnitConfig{Backend: block.Null(1 << 30), Serial: "NULL"})
	if err != nil {
		t.Fatal(err)
	}
	tgt := scsi.NewTarget()
	if err := tgt.Attach(0, u); err != nil {
		t.Fatal(err)
	}
	if err := scsitest.Ready(tgt, 0); err != nil {
		t.Fatal(err)
	}
	return map[string]Target{"fake": &fake{submit: good}, "null": tgt}
}

func TestNoAllocations(t *testing.T) {
	if raceDetector {
		t.Skip("the race detector allocates")
	}
	for name, target := range nullTargets(t) {
		n := newNullPath(t, target, 8)
		if a := testing.AllocsPerRun(500, n.run); a != 0 {
			t.Errorf("%s: %v allocations for 8 requests", name, a)
		}
	}
}

// BenchmarkNullPath is one read of 4 KiB through both eventfds.
func BenchmarkNullPath(b *testing.B) {
	for _, name := range []string{"fake", "null"} {
		for _, depth := range []int{1, 8, 32, 128} {
			b.Run(fmt.Sprintf("%s/depth%d", name, depth), func(b *testing.B) {
				n := newNullPath(b, nullTargets(b)[name], depth)
				b.ReportAllocs()
				for i := 0; i < b.N; i += depth {
					n.run()
				}
			})
		}
	}
}
