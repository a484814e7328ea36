package virtq_test

import (
	"runtime"
	"testing"

	"gvm/devices/virtio/virtq"
	"gvm/devices/virtio/virtqtest"
	"gvm/guestmem"
)

// TestQueueKeepsLittle has all chains of a queue as long as chains can be, once: the memory that
// the queue keeps of them afterwards is little.
func TestQueueKeepsLittle(t *testing.T) {
	const size = 256
	d, err := virtqtest.New(guestmem.Heap(base, 4<<20), base, size, virtq.FeatureIndirectDesc)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	q, err := virtq.New(d.Mem, d.Layout, virtq.FeatureIndirectDesc, 0)
	if err != nil {
		t.Fatal(err)
	}
	a := d.Alloc(4096)
	segs := make([]virtqtest.Seg, size)
	for i := range segs {
		segs[i] = in(a+uint64(i), 1)
	}
	held := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	burst := func(segs []virtqtest.Seg) {
		t.Helper()
		for range size {
			if _, ok := d.AddIndirect(0, segs...); !ok {
				t.Fatal("no free descriptors")
			}
		}
		d.Publish()
		var chains []*virtq.Chain
		for range size {
			c := mustNext(t, q)
			c.In.Take(len(segs))
			chains = append(chains, c)
		}
		for _, c := range chains {
			push(q, c, 0)
		}
		for range size {
			if _, _, ok := d.Used(); !ok {
				t.Fatal("not used")
			}
		}
	}
	burst(segs[:1])
	before := held()
	burst(segs)
	after := held()
	// With segments and views, 24 bytes each, the burst has some 3 MiB.
	if grown := int64(after) - int64(before); grown > 512<<10 {
		t.Errorf("the queue has grown by %d bytes for ever", grown)
	}
	runtime.KeepAlive(q)
}
