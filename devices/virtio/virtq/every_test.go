package virtq_test

import (
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"testing"

	"gvm/devices/internal/every"
	"gvm/devices/virtio/virtq"
	"gvm/devices/virtio/virtqtest"
	"gvm/guestmem"
)

// Places in a RAM of 3 GiB from address 0, of which the tests touch a few pages. It is large enough
// for buffers whose sum passes 2^32 bytes.
const (
	ramEnd  = guestmem.HoleStart
	bufAt   = 0x2000
	baitAt  = 0x3000  // of an indirect table that no chain comes to
	tableAt = 0x10000 // of others
	last16  = ramEnd - 16
	unknown = 0x100 // a flag that virtio 1.3, 2.7.5 does not define
)

// span is a buffer, or an indirect table.
type span struct {
	addr uint64
	n    uint32
}

// inRAM reports whether every byte of s is RAM. An empty span names no byte.
func (s span) inRAM() bool { return s.n == 0 || s.addr < ramEnd && uint64(s.n) <= ramEnd-s.addr }

// segment is one buffer of a chain.
type segment struct {
	span
	write bool
}

// lawful holds the buffers of a chain, or of its beginning, against the rules for all of them. Each
// rule, once broken, stays broken when buffers follow.
func lawful(chain []segment, size int) bool {
	var total uint64
	for i, s := range chain {
		if !s.inRAM() { // the driver gives the device memory of its own (2.7.5)
			return false
		}
		if i > 0 && chain[i-1].write && !s.write { // device-readable ones come first (2.7.4.2)
			return false
		}
		total += uint64(s.n)
	}
	// Bytes: 2.7.5.2. Descriptors: 2.7.5.3.1; gvm does not count the one that refers to an indirect
	// table, which is no buffer.
	return total <= 1<<32 && len(chain) <= size
}

// wanted is virtio 1.3, 2.7.5, as its text goes: the buffers of the chain that starts at head, and
// whether a driver may make such a chain. read returns a descriptor of a table.
func wanted(size int, indirect bool, head int, read func(table uint64, i int) virtqtest.Desc) ([]segment, bool) {
	var chain []segment
	var seen []uint64
	table, entries, within := uint64(0), size, false
	for i := head; ; {
		at := table + 16*uint64(i)
		if i >= entries || slices.Contains(seen, at) { // loops are forbidden (2.7.5.2)
			return nil, false
		}
		seen = append(seen, at)
		d := read(table, i)
		s := span{d.Addr, d.Len}
		if d.Flags&virtq.DescFIndirect != 0 {
			switch { // 2.7.5.3.1
			case !indirect, within, d.Flags&virtq.DescFNext != 0:
				return nil, false
			case s.n == 0, s.n%16 != 0, !s.inRAM(): // 2.7.5.3: a table of descriptors
				return nil, false
			}
			table, entries, i, within = s.addr, int(s.n/16), 0, true // its WRITE is ignored (2.7.5.3.2)
			continue
		}
		if chain = append(chain, segment{s, d.Flags&virtq.DescFWrite != 0}); !lawful(chain, size) {
			return nil, false
		}
		if d.Flags&virtq.DescFNext == 0 {
			return chain, true
		}
		i = int(d.Next)
	}
}

// tables is a set of descriptor tables: all that are made of these values.
type tables struct {
	size     uint16
	flags    []uint16
	buffers  []span
	indirect []span // indirect tables
	// Those of descriptors in indirect tables.
	inFlags   []uint16
	inBuffers []span
}

// choose makes a descriptor of the table at table; 0 is the queue's own.
func (s *tables) choose(pick func(int) int, table uint64, negotiated bool) (d virtqtest.Desc) {
	const both = virtq.DescFIndirect | virtq.DescFNext
	flags, buffers := s.flags, s.buffers
	if table != 0 {
		flags, buffers = s.inFlags, s.inBuffers
	}
	d.Flags = flags[pick(len(flags))]
	var place span
	switch {
	case d.Flags&virtq.DescFIndirect == 0:
		place = buffers[pick(len(buffers))]
	case d.Flags&both == both || table != 0 || !negotiated: // wrong with any rest
		place = span{baitAt, 16}
	default:
		place = s.indirect[pick(len(s.indirect))]
	}
	d.Addr, d.Len = place.addr, place.n
	if d.Flags&both == virtq.DescFNext {
		nexts := int(s.size) + 2 // all, the one past the table, and the largest
		if table != 0 {
			nexts++ // the indirect tables have up to one entry more
		}
		if d.Next = uint16(pick(nexts)); int(d.Next) == nexts-1 {
			d.Next = 0xffff
		}
	}
	return d
}

// bait is the descriptor where a device has no reason to read. One that reads it takes it for the
// end of a good chain.
var bait = virtqtest.Desc{Addr: bufAt + 2048, Len: 5, Flags: virtq.DescFWrite}

// check gives a queue every table of s, at every index of the available ring, and returns their
// number. A descriptor is chosen when the oracle reads it, and is bait before.
func (s *tables) check(t *testing.T, features uint64) int {
	mem, err := guestmem.Map(guestmem.Config{Size: ramEnd})
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	d, err := virtqtest.New(mem, 0, s.size, features)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if d.Desc != 0 {
		t.Fatalf("descriptor table at %#x", d.Desc)
	}
	ram, negotiated := mem.Regions()[0].Bytes, features&virtq.FeatureIndirectDesc != 0
	d.PokeDesc(baitAt, bait)
	for i := range uint64(s.size) {
		d.PokeDesc(16*i, bait)
	}
	for i := range uint64(s.size) + 2 {
		d.PokeDesc(tableAt+16*i, bait)
	}
	type chosen struct {
		at   uint64
		desc virtqtest.Desc
	}
	var table []chosen
	head, idx := 0, uint16(0)
	var q *virtq.Queue
	fail := func(format string, args ...any) {
		t.Helper()
		t.Fatalf("head %d, descriptors %+v: %s", head, table, fmt.Sprintf(format, args...))
	}
	defer func() {
		if r := recover(); r != nil {
			fail("panic: %v", r)
		}
	}()
	return every.Run(func(pick func(int) int) {
		for _, c := range table {
			d.PokeDesc(c.at, bait)
		}
		table = table[:0]
		if head = pick(int(s.size) + 2); head == int(s.size)+1 {
			head = 0xffff
		}
		want, ok := wanted(int(s.size), negotiated, head, func(start uint64, i int) virtqtest.Desc {
			at := start + 16*uint64(i)
			desc := s.choose(pick, start, negotiated)
			table = append(table, chosen{at, desc})
			d.PokeDesc(at, desc)
			return desc
		})
		if q == nil {
			if q, err = virtq.New(mem, d.Layout, features, idx); err != nil {
				t.Fatal(err)
			}
		}
		d.SetAvail(idx, uint16(head))
		d.SetAvailIdx(idx + 1)
		c, got, err := q.Next()
		if _, guest := err.(*virtq.GuestError); err != nil && !guest {
			fail("not a GuestError: %v", err)
		}
		if got != ok || got == (err != nil) {
			fail("taken %v, want %v: %v", got, ok, err)
		}
		if !ok {
			q = nil // broken
			return
		}
		var readable, writable int
		views := make([][]byte, 0, 4)
		for _, s := range want {
			if s.write {
				writable += int(s.n)
			} else {
				readable += int(s.n)
			}
		}
		if c.Out.Len() != readable || c.In.Len() != writable {
			fail("%d bytes out and %d in, want %d and %d", c.Out.Len(), c.In.Len(), readable, writable)
		}
		views = append(append(views, c.Out.Take(readable)...), c.In.Take(writable)...)
		for _, s := range want {
			if s.n == 0 {
				continue
			}
			if len(views) == 0 || len(views[0]) != int(s.n) || &views[0][0] != &ram[s.addr] {
				fail("%+v is not among the buffers", s)
			}
			views = views[1:]
		}
		if len(views) > 0 {
			fail("%d buffers too many", len(views))
		}
		q.Add(c, math.MaxUint32) // more than most chains hold
		q.Publish()
		used := ram[d.Device+4+8*uint64(idx&(s.size-1)):]
		id, n := binary.LittleEndian.Uint32(used), binary.LittleEndian.Uint32(used[4:])
		if int(id) != head || int(n) != min(writable, math.MaxUint32) {
			fail("used %d with %d bytes, want %d", id, n, writable)
		}
		idx++
	})
}

// All descriptors that TestEveryTable makes: half of the flags have INDIRECT.
var (
	allFlags  = flagsOf(virtq.DescFNext, virtq.DescFWrite, virtq.DescFIndirect, unknown)
	allPlaces = []span{
		{bufAt, 0}, {last16, 0}, {ramEnd, 0}, {math.MaxUint64 - 7, 0},
		{bufAt, 1}, {last16, 1}, {ramEnd, 1}, {math.MaxUint64 - 7, 1},
		{bufAt, 16}, {last16, 16}, {ramEnd, 16}, {math.MaxUint64 - 7, 16},
		{bufAt, 17}, {last16, 17}, {ramEnd, 17}, {math.MaxUint64 - 7, 17},
		{bufAt, 1 << 31}, {last16, 1 << 31}, {ramEnd, 1 << 31}, {math.MaxUint64 - 7, 1 << 31},
		{bufAt, math.MaxUint32}, {last16, math.MaxUint32}, {ramEnd, math.MaxUint32}, {math.MaxUint64 - 7, math.MaxUint32},
	}
	badTables = []span{
		{tableAt, 0}, {tableAt, 1}, {tableAt, 15}, {tableAt, 17}, {tableAt, math.MaxUint32}, {tableAt, math.MaxUint32 - 15},
		{last16, 32}, {ramEnd, 16}, {math.MaxUint64 - 15, 16}, {math.MaxUint64 - 15, 32},
	}
)

// flagsOf returns every combination of some flags.
func flagsOf(flags ...uint16) []uint16 {
	all := []uint16{0}
	for _, f := range flags {
		for _, v := range all {
			all = append(all, v|f)
		}
	}
	return all
}

// TestEveryTable gives the device every descriptor table of queues of 1, 2 and 4 entries, of the
// values below, with and without VIRTIO_F_INDIRECT_DESC, and compares its requests with virtio
// 1.3: chains are taken or refused as the text says, with the same buffers, never more of them than
// the queue has entries, and without a panic.
//
// The values: all 16 combinations of NEXT, WRITE, INDIRECT and an undefined flag; every next and
// head in the table, the first past it and 65535; buffers of 0, 1, 16, 17, 2^31 and 2^32-1 bytes,
// inside RAM, at its last 16 bytes, after its end and up to the end of the address space; indirect
// tables of no entry to one more than the queue has, of 2^27 entries, of other lengths, outside
// RAM, and on top of the queue's table.
//
// All of that is 10^13 tables for 4 entries. Left out are tables that differ only where a chain
// does not come: there a bait waits for a device that goes too far. Besides, for 4 entries the
// first set has a good and a wrong buffer, the second all kinds of good ones, and the third more
// indirect tables, with fewer flags.
func TestEveryTable(t *testing.T) {
	inner := flagsOf(virtq.DescFNext, virtq.DescFWrite, virtq.DescFIndirect)
	few := []span{{ramEnd, 0}, {last16, 16}, {last16, 17}}
	total := 0
	for _, s := range []tables{
		{1, allFlags, allPlaces, slices.Concat(badTables, []span{{tableAt, 16}, {tableAt, 32}, {tableAt, 1 << 31}, {0, 16}}),
			allFlags, allPlaces},
		{2, allFlags, allPlaces, slices.Concat(badTables, []span{{tableAt, 16}, {tableAt, 48}, {0, 32}}), inner, few},
		{4, allFlags, few[1:], []span{{tableAt, 17}, {tableAt, 64}}, inner, few[1:]},
		{4, flagsOf(virtq.DescFNext, virtq.DescFWrite), []span{{ramEnd, 0}, {bufAt, 1}, {bufAt, 1 << 31}, {1 << 31, 1 << 31}},
			nil, nil, nil},
		{4, flagsOf(virtq.DescFNext, virtq.DescFIndirect), []span{{bufAt, 1}}, []span{{tableAt, 16}, {tableAt, 80}, {0, 64}},
			inner, []span{{bufAt, 1}}},
	} {
		for _, features := range []uint64{0, virtq.FeatureIndirectDesc} {
			n := s.check(t, features)
			t.Logf("queue of %d, features %#x: %d tables", s.size, features, n)
			total += n
		}
	}
	t.Logf("%d tables", total)
}
