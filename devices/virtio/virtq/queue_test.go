package virtq_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand"
	"slices"
	"testing"

	"gvm/devices/virtio/virtq"
	"gvm/devices/virtio/virtqtest"
	"gvm/guestmem"
)

const (
	base   = 0x10000
	memLen = 1 << 20
	both   = virtq.FeatureEventIdx | virtq.FeatureIndirectDesc
)

func newPair(t testing.TB, size uint16, features uint64) (*virtqtest.Driver, *virtq.Queue) {
	t.Helper()
	d, err := virtqtest.New(guestmem.Heap(base, memLen), base, size, features)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	q, err := virtq.New(d.Mem, d.Layout, features, 0)
	if err != nil {
		t.Fatal(err)
	}
	return d, q
}

func out(addr uint64, n uint32) virtqtest.Seg { return virtqtest.Seg{Addr: addr, Len: n} }

func in(addr uint64, n uint32) virtqtest.Seg { return virtqtest.Seg{Addr: addr, Len: n, Write: true} }

func desc(addr uint64, n uint32, flags, next uint16) virtqtest.Desc {
	return virtqtest.Desc{Addr: addr, Len: n, Flags: flags, Next: next}
}

func mustNext(t testing.TB, q *virtq.Queue) *virtq.Chain {
	t.Helper()
	c, ok, err := q.Next()
	if err != nil || !ok {
		t.Fatalf("Next: ok %v, error %v", ok, err)
	}
	return c
}

func mustPublish(t testing.TB, d *virtqtest.Driver) (kicked bool) {
	t.Helper()
	kicked, err := d.Publish()
	if err != nil {
		t.Fatal(err)
	}
	return kicked
}

func TestNewChecksLayout(t *testing.T) {
	mem := guestmem.Heap(base, memLen)
	const end = base + memLen
	good := virtq.Layout{Size: 8, Desc: base, Driver: base + 0x1000, Device: base + 0x2000}
	for _, tt := range []struct {
		name string
		l    virtq.Layout
		rule string // "" for a layout that is right
	}{
		{"good", good, ""},
		{"size 1", virtq.Layout{Size: 1, Desc: base, Driver: base + 18, Device: base + 32}, ""},
		{"last bytes of RAM", virtq.Layout{Size: 8, Desc: end - 0x1000, Driver: end - 24, Device: end - 0x800}, ""},
		{"largest", virtq.Layout{Size: 32768, Desc: base, Driver: base + 0x80000, Device: base + 0xa0000}, ""},
		{"size 0", virtq.Layout{Size: 0, Desc: base, Driver: base + 0x1000, Device: base + 0x2000}, "virtio 1.3, 2.7"},
		{"size 6", virtq.Layout{Size: 6, Desc: base, Driver: base + 0x1000, Device: base + 0x2000}, "virtio 1.3, 2.7"},
		{"size 65535", virtq.Layout{Size: 65535, Desc: base, Driver: base + 0x1000, Device: base + 0x2000},
			"virtio 1.3, 2.7"},
		{"desc unaligned", virtq.Layout{Size: 8, Desc: base + 8, Driver: base + 0x1000, Device: base + 0x2000},
			"virtio 1.3, 2.7.1"},
		{"avail unaligned", virtq.Layout{Size: 8, Desc: base, Driver: base + 0x1001, Device: base + 0x2000},
			"virtio 1.3, 2.7.1"},
		{"used unaligned", virtq.Layout{Size: 8, Desc: base, Driver: base + 0x1000, Device: base + 0x2002},
			"virtio 1.3, 2.7.1"},
		{"desc below RAM", virtq.Layout{Size: 8, Desc: base - 16, Driver: base + 0x1000, Device: base + 0x2000},
			"virtio 1.3, 2.7"},
		{"desc past RAM", virtq.Layout{Size: 8, Desc: end - 112, Driver: base + 0x1000, Device: base + 0x2000},
			"virtio 1.3, 2.7"},
		{"avail past RAM", virtq.Layout{Size: 8, Desc: base, Driver: end - 20, Device: base + 0x2000}, "virtio 1.3, 2.7"},
		{"used past RAM", virtq.Layout{Size: 8, Desc: base, Driver: base + 0x1000, Device: end - 68}, "virtio 1.3, 2.7"},
		{"address wraps", virtq.Layout{Size: 8, Desc: 1<<64 - 16, Driver: base + 0x1000, Device: base + 0x2000},
			"virtio 1.3, 2.7"},
	} {
		_, err := virtq.New(mem, tt.l, both, 0)
		var g *virtq.GuestError
		switch {
		case tt.rule == "" && err != nil:
			t.Errorf("%s: %v", tt.name, err)
		case tt.rule != "" && (!errors.As(err, &g) || g.Rule != tt.rule):
			t.Errorf("%s: error %v, want rule %s", tt.name, err, tt.rule)
		}
	}
}

// TestRules breaks one rule after the other and sees each found, kept, and
// gone after a reset.
func TestRules(t *testing.T) {
	const size = 8
	// Two regions with a hole between them, for buffers that cross.
	newMem := func() *guestmem.Memory {
		a, b := guestmem.Heap(base, memLen).Regions()[0], guestmem.Heap(0x400000, 0x2000).Regions()[0]
		mem, err := guestmem.Of(a, b)
		if err != nil {
			t.Fatal(err)
		}
		return mem
	}
	const (
		N, W, I = virtq.DescFNext, virtq.DescFWrite, virtq.DescFIndirect
		table   = base + 0x8000
		buf     = base + 0x10000
	)
	for _, tt := range []struct {
		name     string
		features uint64
		poke     func(d *virtqtest.Driver)
		rule     string
	}{
		{"idx jumps by size+1", both, func(d *virtqtest.Driver) { d.SetAvailIdx(size + 1) }, "virtio 1.3, 2.7.6.1"},
		{"idx goes back", both, func(d *virtqtest.Driver) { d.SetAvailIdx(0xffff) }, "virtio 1.3, 2.7.6.1"},
		{"head past the table", both, func(d *virtqtest.Driver) { d.SetAvail(0, size); d.SetAvailIdx(1) },
			"virtio 1.3, 2.7.5"},
		{"head 65535", both, func(d *virtqtest.Driver) { d.SetAvail(0, 0xffff); d.SetAvailIdx(1) }, "virtio 1.3, 2.7.5"},
		{"next past the table", both, func(d *virtqtest.Driver) {
			d.SetDesc(0, desc(buf, 16, N, size))
			d.SetAvailIdx(1)
		}, "virtio 1.3, 2.7.5"},
		{"loop of one", both, func(d *virtqtest.Driver) {
			d.SetDesc(0, desc(buf, 16, N, 0))
			d.SetAvailIdx(1)
		}, "virtio 1.3, 2.7.5.3.1"},
		{"loop of two with no bytes", both, func(d *virtqtest.Driver) {
			d.SetDesc(0, desc(buf, 0, N, 1))
			d.SetDesc(1, desc(buf, 0, N, 0))
			d.SetAvailIdx(1)
		}, "virtio 1.3, 2.7.5.3.1"},
		{"indirect not negotiated", virtq.FeatureEventIdx, func(d *virtqtest.Driver) {
			d.PokeDesc(table, desc(buf, 16, 0, 0))
			d.SetDesc(0, desc(table, 16, I, 0))
			d.SetAvailIdx(1)
		}, "virtio 1.3, 2.7.5.3.1"},
		{"indirect with next", both, func(d *virtqtest.Driver) {
			d.PokeDesc(table, desc(buf, 16, 0, 0))
			d.SetDesc(0, desc(table, 16, I|N, 1))
			d.SetAvailIdx(1)
		}, "virtio 1.3, 2.7.5.3.1"},
		{"indirect in indirect", both, func(d *virtqtest.Driver) {
			d.PokeDesc(table, desc(table, 16, I, 0))
			d.SetDesc(0, desc(table, 16, I, 0))
			d.SetAvailIdx(1)
		}, "virtio 1.3, 2.7.5.3.1"},
		{"empty table", both, func(d *virtqtest.Driver) {
			d.SetDesc(0, desc(table, 0, I, 0))
			d.SetAvailIdx(1)
		}, "virtio 1.3, 2.7.5.3"},
		{"table of 24 bytes", both, func(d *virtqtest.Driver) {
			d.SetDesc(0, desc(table, 24, I, 0))
			d.SetAvailIdx(1)
		}, "virtio 1.3, 2.7.5.3"},
		{"table outside RAM", both, func(d *virtqtest.Driver) {
			d.SetDesc(0, desc(0x100, 16, I, 0))
			d.SetAvailIdx(1)
		}, "virtio 1.3, 2.7.5.3"},
		{"table across the end of RAM", both, func(d *virtqtest.Driver) {
			d.SetDesc(0, desc(base+memLen-16, 32, I, 0))
			d.SetAvailIdx(1)
		}, "virtio 1.3, 2.7.5.3"},
		{"next past the indirect table", both, func(d *virtqtest.Driver) {
			d.PokeDesc(table, desc(buf, 16, N, 2))
			d.SetDesc(0, desc(table, 32, I, 0))
			d.SetAvailIdx(1)
		}, "virtio 1.3, 2.7.5"},
		{"loop in the indirect table", both, func(d *virtqtest.Driver) {
			d.PokeDesc(table, desc(buf, 16, N, 0))
			d.SetDesc(0, desc(table, 16, I, 0))
			d.SetAvailIdx(1)
		}, "virtio 1.3, 2.7.5.3.1"},
		{"table chain longer than the queue", both, func(d *virtqtest.Driver) {
			for i := range uint16(size + 1) {
				d.PokeDesc(table+16*uint64(i), desc(buf, 1, N, i+1))
			}
			d.PokeDesc(table+16*size, desc(buf, 1, 0, 0))
			d.SetDesc(0, desc(table, 16*(size+1), I, 0))
			d.SetAvailIdx(1)
		}, "virtio 1.3, 2.7.5.3.1"},
		{"readable after writable", both, func(d *virtqtest.Driver) {
			d.SetDesc(0, desc(buf, 16, N|W, 1))
			d.SetDesc(1, desc(buf, 16, 0, 0))
			d.SetAvailIdx(1)
		}, "virtio 1.3, 2.7.4.2"},
		{"readable after empty writable", both, func(d *virtqtest.Driver) {
			d.SetDesc(0, desc(buf, 0, N|W, 1))
			d.SetDesc(1, desc(buf, 16, 0, 0))
			d.SetAvailIdx(1)
		}, "virtio 1.3, 2.7.4.2"},
		{"readable in table after writable", both, func(d *virtqtest.Driver) {
			d.SetDesc(0, desc(buf, 16, N|W, 1))
			d.SetDesc(1, desc(table, 16, I, 0))
			d.PokeDesc(table, desc(buf, 16, 0, 0))
			d.SetAvailIdx(1)
		}, "virtio 1.3, 2.7.4.2"},
		{"buffer below RAM", both, func(d *virtqtest.Driver) {
			d.SetDesc(0, desc(0, 16, 0, 0))
			d.SetAvailIdx(1)
		}, "virtio 1.3, 2.7.5"},
		{"buffer one byte past RAM", both, func(d *virtqtest.Driver) {
			d.SetDesc(0, desc(base+memLen-15, 16, 0, 0))
			d.SetAvailIdx(1)
		}, "virtio 1.3, 2.7.5"},
		{"buffer from one region into the next", both, func(d *virtqtest.Driver) {
			d.SetDesc(0, desc(base+memLen-16, 0x400000-base-memLen+32, W, 0))
			d.SetAvailIdx(1)
		}, "virtio 1.3, 2.7.5"},
		{"buffer address wraps", both, func(d *virtqtest.Driver) {
			d.SetDesc(0, desc(1<<64-8, 16, 0, 0))
			d.SetAvailIdx(1)
		}, "virtio 1.3, 2.7.5"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			mem := newMem()
			d, err := virtqtest.New(mem, base, size, tt.features)
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			q, err := virtq.New(mem, d.Layout, tt.features, 0)
			if err != nil {
				t.Fatal(err)
			}
			tt.poke(d)
			c, ok, err := q.Next()
			var g *virtq.GuestError
			if c != nil || ok || !errors.As(err, &g) || g.Rule != tt.rule {
				t.Fatalf("Next: %v, %v, %v; want rule %s", c, ok, err, tt.rule)
			}
			// Mending the ring does not mend the queue,
			d.SetAvailIdx(0)
			if _, ok, again := q.Next(); ok || again != err {
				t.Fatalf("second Next: %v, %v", ok, again)
			}
			// a reset does.
			if d, err = virtqtest.New(mem, base, size, tt.features); err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			if q, err = virtq.New(mem, d.Layout, tt.features, 0); err != nil {
				t.Fatal(err)
			}
			d.Add(out(buf, 3))
			mustPublish(t, d)
			if c := mustNext(t, q); c.Out.Len() != 3 {
				t.Fatalf("after reset: %d bytes", c.Out.Len())
			}
		})
	}
}

// TestLongestChains: a chain may be as long as the queue, in a table too.
func TestLongestChains(t *testing.T) {
	d, q := newPair(t, 8, both)
	segs := make([]virtqtest.Seg, 8)
	for i := range segs {
		segs[i] = out(d.Alloc(16), 1)
	}
	for _, direct := range []int{8, 0} {
		if _, ok := d.AddIndirect(direct, segs...); !ok {
			t.Fatal("no room")
		}
		mustPublish(t, d)
		c := mustNext(t, q)
		if c.Out.Len() != 8 {
			t.Fatalf("%d bytes", c.Out.Len())
		}
		push(q, c, 0)
		d.Used()
	}
}

// TestTooManyInFlight reuses the descriptor of a chain that is in flight.
func TestTooManyInFlight(t *testing.T) {
	d, q := newPair(t, 4, both)
	buf := d.Alloc(16)
	for range 4 {
		d.Add(in(buf, 16))
	}
	mustPublish(t, d)
	for range 4 {
		mustNext(t, q)
	}
	if _, ok, err := q.Next(); ok || err != nil {
		t.Fatalf("empty queue: %v, %v", ok, err)
	}
	d.SetAvailIdx(5)
	var g *virtq.GuestError
	if _, _, err := q.Next(); !errors.As(err, &g) || g.Rule != "virtio 1.3, 2.7.6.1" {
		t.Fatalf("fifth chain of a queue of four: %v", err)
	}
}

// TestTooManyBytes needs a chain of more than 2^32 bytes, which names the same
// memory over and over.
func TestTooManyBytes(t *testing.T) {
	mem := guestmem.Heap(base, 64<<20)
	for _, tt := range []struct {
		n    int
		last uint32
		ok   bool
	}{{128, 32 << 20, true}, {128, 32<<20 + 1, false}, {129, 32 << 20, false}} {
		d, err := virtqtest.New(mem, base, 256, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		q, err := virtq.New(mem, d.Layout, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		segs := make([]virtqtest.Seg, tt.n)
		for i := range segs {
			segs[i] = virtqtest.Seg{Addr: base, Len: 32 << 20, Write: i >= 64}
		}
		segs[tt.n-1].Len = tt.last
		d.Add(segs...)
		mustPublish(t, d)
		c, ok, err := q.Next()
		var g *virtq.GuestError
		switch {
		case tt.ok && (!ok || c.Out.Len()+c.In.Len() != 1<<32):
			t.Errorf("%d segments, last %#x: %v", tt.n, tt.last, err)
		case !tt.ok && (!errors.As(err, &g) || g.Rule != "virtio 1.3, 2.7.5.2"):
			t.Errorf("%d segments, last %#x: ok %v, error %v", tt.n, tt.last, ok, err)
		}
	}
}

// TestChainShapes sends chains of every shape through a shuffled table and
// reads each back byte for byte.
func TestChainShapes(t *testing.T) {
	rnd := rand.New(rand.NewSource(1))
	d, q := newPair(t, 16, both)
	arena := d.Alloc(1 << 16)
	for round := range 3000 {
		var segs []virtqtest.Seg
		var want []byte
		nOut, nIn := rnd.Intn(9), rnd.Intn(8)
		inLen := 0
		for i := range nOut + nIn {
			n := rnd.Intn(40) // empty descriptors too
			s := virtqtest.Seg{Addr: arena + uint64(i)*100 + uint64(rnd.Intn(50)), Len: uint32(n), Write: i >= nOut}
			segs = append(segs, s)
			if s.Write {
				inLen += n
			} else {
				b := d.Bytes(s.Addr, n)
				rnd.Read(b)
				want = append(want, b...)
			}
		}
		if len(segs) == 0 {
			continue
		}
		d.ShuffleFree(rnd.Shuffle)
		head, ok := d.AddIndirect(rnd.Intn(len(segs)+1), segs...)
		if !ok {
			t.Fatal("no room")
		}
		mustPublish(t, d)
		c := mustNext(t, q)
		if c.Out.Len() != len(want) || c.In.Len() != inLen {
			t.Fatalf("round %d: %d out and %d in, want %d and %d", round, c.Out.Len(), c.In.Len(), len(want), inLen)
		}
		// Part by Read, the rest by Take.
		cut := rnd.Intn(len(want) + 1)
		got := make([]byte, cut)
		if _, err := io.ReadFull(&c.Out, got); err != nil {
			t.Fatal(err)
		}
		for c.Out.Len() > 0 {
			for _, v := range c.Out.Take(1 + rnd.Intn(30)) {
				got = append(got, v...)
			}
		}
		if !bytes.Equal(got, want) {
			t.Fatalf("round %d: out bytes differ", round)
		}
		reply := make([]byte, inLen)
		rnd.Read(reply)
		cut = rnd.Intn(inLen + 1)
		views := c.In.Take(cut)
		if n, err := c.In.Write(reply[cut:]); n != inLen-cut || err != nil {
			t.Fatalf("Write: %d, %v", n, err)
		}
		if n, err := c.In.Write([]byte{1}); n != 0 || err != io.ErrShortWrite {
			t.Fatalf("Write past the end: %d, %v", n, err)
		}
		at := 0
		for _, v := range views {
			at += copy(v, reply[at:cut])
		}
		push(q, c, uint32(inLen))
		h, written, ok := d.Used()
		if !ok || h != head || written != uint32(inLen) {
			t.Fatalf("used %d, %d, %v; want %d, %d", h, written, ok, head, inLen)
		}
		var back []byte
		for _, s := range segs[nOut:] {
			back = append(back, d.Bytes(s.Addr, int(s.Len))...)
		}
		if !bytes.Equal(back, reply) {
			t.Fatalf("round %d: in bytes differ", round)
		}
	}
	if d.Free() != 16 {
		t.Fatalf("%d descriptors free", d.Free())
	}
}

// TestTakeEverySplit cuts one buffer of three segments at every pair of
// offsets: the views cover it exactly, and earlier views stay the same.
func TestTakeEverySplit(t *testing.T) {
	d, q := newPair(t, 4, 0)
	a := d.Alloc(64)
	text := []byte("abcdefghijkl")
	for i, at := range []uint64{a, a + 20, a + 40} {
		copy(d.Bytes(at, 4), text[4*i:])
	}
	flat := func(v [][]byte) string { return string(bytes.Join(v, nil)) }
	for i := 0; i <= 12; i++ {
		for j := i; j <= 13; j++ {
			d.Add(out(a, 4), out(a+20, 4), out(a+40, 4))
			mustPublish(t, d)
			c := mustNext(t, q)
			v1, v2, v3 := c.Out.Take(i), c.Out.Take(j-i), c.Out.Take(100)
			end := min(j, 12)
			if flat(v1) != string(text[:i]) || flat(v2) != string(text[i:end]) || flat(v3) != string(text[end:]) {
				t.Fatalf("split at %d and %d: %q %q %q", i, j, flat(v1), flat(v2), flat(v3))
			}
			for _, v := range slices.Concat(v1, v2, v3) {
				if cap(v) != len(v) {
					t.Fatalf("split at %d and %d: view of %d bytes with capacity %d", i, j, len(v), cap(v))
				}
			}
			if n, err := c.Out.Read(make([]byte, 1)); n != 0 || err != io.EOF {
				t.Fatalf("Read at the end: %d, %v", n, err)
			}
			push(q, c, 0)
			d.Used()
		}
	}
}

func TestWrittenIsCut(t *testing.T) {
	d, q := newPair(t, 4, 0)
	d.Add(out(d.Alloc(8), 8), in(d.Alloc(8), 5))
	mustPublish(t, d)
	c := mustNext(t, q)
	c.In.Take(3)
	push(q, c, 6)
	if _, written, ok := d.Used(); !ok || written != 5 {
		t.Fatalf("written %d, want the 5 that fit", written)
	}
}

func TestNoAllocations(t *testing.T) {
	d, q := newPair(t, 64, both)
	r := newRoundTrip(d, q)
	if n := testing.AllocsPerRun(1000, r.run); n != 0 {
		t.Fatalf("%v allocations a request", n)
	}
}

// roundTrip is 8 chains through the ring: 2 readable and 3 writable segments,
// half of them indirect, a header read and the data taken.
type roundTrip struct {
	d    *virtqtest.Driver
	q    *virtq.Queue
	segs []virtqtest.Seg
	hdr  [51]byte
}

func newRoundTrip(d *virtqtest.Driver, q *virtq.Queue) *roundTrip {
	a := d.Alloc(1 << 16)
	return &roundTrip{d: d, q: q, segs: []virtqtest.Seg{out(a, 51), out(a+100, 512), in(a+1000, 108), in(a+4096, 4096),
		in(a+16384, 4096)}}
}

func (r *roundTrip) run() {
	for i := range 8 {
		r.d.AddIndirect(i%2*5, r.segs...)
	}
	r.d.Publish()
	for range 8 {
		c, ok, err := r.q.Next()
		if !ok {
			panic(err)
		}
		io.ReadFull(&c.Out, r.hdr[:])
		if len(c.Out.Take(512)) != 1 || len(c.In.Take(100)) != 1 || len(c.In.Take(8+8192)) != 3 {
			panic("wrong views")
		}
		r.q.Add(c, 8300)
	}
	r.q.Publish()
	for range 8 {
		if _, _, ok := r.d.Used(); !ok {
			panic("not used")
		}
	}
}

// BenchmarkRing is one request: both sides of the ring, no eventfd.
func BenchmarkRing(b *testing.B) {
	d, q := newPair(b, 64, both)
	q.DisableKicks()
	r := newRoundTrip(d, q)
	b.ReportAllocs()
	for i := 0; i < b.N; i += 8 {
		r.run()
	}
}

// TestBase stops a queue at every point of a lap of its indices and continues: each chain is taken
// once, in order, also one that was dropped unused, with an interrupt if the driver asks for it.
func TestBase(t *testing.T) {
	for _, features := range []uint64{0, virtq.FeatureEventIdx} {
		d, q := newPair(t, 8, features)
		buf := d.Alloc(16)
		take := func(n int) *virtq.Chain {
			t.Helper()
			c := mustNext(t, q)
			if c.In.Len() != n {
				t.Fatalf("a chain of %d bytes, not %d", c.In.Len(), n)
			}
			return c
		}
		for i := range uint16(35000) {
			d.Add(in(buf, 1))
			d.Add(in(buf, 2))
			mustPublish(t, d)
			d.EnableCalls()
			if !push(q, take(1), 0) {
				t.Fatalf("round %d: no interrupt", i)
			}
			q.Drop(take(2))
			q.Drop(take(2)) // it is still available to this queue
			base := q.Base()
			if base != 2*i+1 {
				t.Fatalf("round %d: base %d", i, base)
			}
			var err error
			if q, err = virtq.New(d.Mem, d.Layout, features, base); err != nil {
				t.Fatal(err)
			}
			d.Used()
			wanted := i%2 == 0
			if d.DisableCalls(); wanted {
				d.EnableCalls()
			}
			if signal := push(q, take(2), 0); signal != wanted {
				t.Fatalf("round %d: a queue that continued interrupts: %v, the driver wants it: %v", i, signal, wanted)
			}
			if _, ok, err := q.Next(); ok || err != nil {
				t.Fatalf("round %d: a third chain: %v, %v", i, ok, err)
			}
			if _, _, ok := d.Used(); !ok {
				t.Fatalf("round %d: the second chain is not used", i)
			}
		}
	}
}

// push is Add and Publish of one chain.
func push(q *virtq.Queue, c *virtq.Chain, written uint32) (signal bool) {
	q.Add(c, written)
	return q.Publish()
}
