package scsi_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/scsi/scsitest"
)

// tuples keeps protection information in memory.
type tuples struct {
	mu      sync.Mutex
	data    map[uint64][scsi.TupleSize]byte
	fails   int // the n-th write from here on fails, 0: none does
	flushed int
}

var unchecked = [scsi.TupleSize]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

func newTuples() *tuples { return &tuples{data: map[uint64][scsi.TupleSize]byte{}} }

func (m *tuples) ReadTuples(p []byte, block uint64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := 0; i < len(p); i += scsi.TupleSize {
		t, ok := m.data[block+uint64(i/scsi.TupleSize)]
		if !ok {
			t = unchecked
		}
		copy(p[i:], t[:])
	}
	return nil
}

func (m *tuples) WriteTuples(p []byte, block uint64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fails > 0 {
		if m.fails--; m.fails == 0 {
			return errBackend
		}
	}
	for i := 0; i < len(p); i += scsi.TupleSize {
		m.data[block+uint64(i/scsi.TupleSize)] = [scsi.TupleSize]byte(p[i:])
	}
	return nil
}

func (m *tuples) ClearTuples(block, n uint64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := range n {
		delete(m.data, block+i)
	}
	return nil
}

func (m *tuples) Flush() error {
	m.flushed++
	return nil
}

// tuple is protection information as it has to be for a block.
func tuple(guard uint16, app uint16, ref uint32) []byte {
	b := binary.BigEndian.AppendUint16(nil, guard)
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint16(b, app), ref)
}

// guarded9 is a block that begins with the check string of CRCs.
var guarded9 = append([]byte("123456789"), make([]byte, blockSize-9)...)

// guardOf is the guard of a block, by another way than the target's: a division bit by bit.
func guardOf(p []byte) (c uint16) {
	for _, b := range p {
		for bit := 7; bit >= 0; bit-- {
			top := c >> 15
			if c <<= 1; top^uint16(b>>bit&1) != 0 {
				c ^= 0x8bb7
			}
		}
	}
	return c
}

func TestGuard(t *testing.T) {
	if g := guardOf([]byte("123456789")); g != 0xd0db { // CRC-16/T10-DIF
		t.Fatalf("the test's CRC is %04x", g)
	}
	m := newTuples()
	target := attach(t, scsi.UnitConfig{Protection: m})
	expect(t, target, cdb10(0x2a, 0, 7, 1), guarded9, 0, "GOOD")
	if got := m.data[7]; !bytes.Equal(got[:], tuple(guardOf(guarded9), 0, 7)) {
		t.Errorf("% x, want % x", got, tuple(guardOf(guarded9), 0, 7))
	}
}

// protectedDo is a command with protection information.
func protectedDo(target *scsi.Target, cdb, out, piOut []byte, in, piIn int) (scsitest.Answer, []byte, []byte) {
	c := &scsi.Command{CDB: cdb}
	data, pi := make([]byte, in), make([]byte, piIn)
	if out != nil {
		c.Out = [][]byte{out[:1], out[1:]}
	}
	if in > 0 {
		c.In = [][]byte{data[:in/2-3], data[in/2-3:]}
	}
	if piOut != nil {
		c.ProtectionOut = [][]byte{piOut[:3], piOut[3:]}
	}
	if piIn > 0 {
		c.ProtectionIn = [][]byte{pi[:5], pi[5:]}
	}
	return scsitest.Run(target, c), data, pi
}

// TestProtectFields has every value of RDPROTECT, WRPROTECT and VRPROTECT meet tuples that are
// right or wrong in a field.
func TestProtectFields(t *testing.T) {
	good := guardOf(guarded9)
	const lba = 9
	for name, v := range map[string]struct {
		tuple []byte
		want  [8]string // by the value of the field
	}{
		"right": {tuple(good, 0x1234, lba),
			[8]string{"GOOD", "GOOD", "GOOD", "GOOD", "GOOD", "GOOD", "CHECK 5/24/00", "CHECK 5/24/00"}},
		"wrong guard": {tuple(good^1, 0x1234, lba), [8]string{"CHECK b/10/01", "CHECK b/10/01", "GOOD", "GOOD",
			"CHECK b/10/01", "CHECK b/10/01", "CHECK 5/24/00", "CHECK 5/24/00"}},
		"wrong reference": {tuple(good, 0x1234, lba+1), [8]string{"CHECK b/10/03", "CHECK b/10/03", "CHECK b/10/03",
			"GOOD", "GOOD", "CHECK b/10/03", "CHECK 5/24/00", "CHECK 5/24/00"}},
		"escape": {tuple(good^1, 0xffff, lba+1),
			[8]string{"GOOD", "GOOD", "GOOD", "GOOD", "GOOD", "GOOD", "CHECK 5/24/00", "CHECK 5/24/00"}},
	} {
		for field, want := range v.want {
			flags := byte(field << 5)
			m, disk := newTuples(), block.NewMem(blocks*blockSize)
			target := attach(t, scsi.UnitConfig{Backend: disk, Protection: m})
			if _, err := disk.WriteAt(guarded9, lba*blockSize); err != nil {
				t.Fatal(err)
			}
			m.data[lba] = [scsi.TupleSize]byte(v.tuple)
			for _, cdb := range [][]byte{cdb10(0x28, flags, lba, 1), cdb12(0xa8, flags, lba, 1),
				cdb16(0x88, flags, lba, 1)} {
				a, data, pi := protectedDo(target, cdb, nil, nil, blockSize, scsi.TupleSize)
				key, _, _ := a.Codes()
				if a.String() != want ||
					key == scsi.AbortedCommand && (a.Sense[0] != 0xf0 || binary.BigEndian.Uint32(a.Sense[3:]) != lba) {
					t.Errorf("%s, %s with RDPROTECT %d: %v % x, want %s",
						name, scsi.OpcodeName(cdb), field, a, a.Sense, want)
				}
				if want == "GOOD" && (!bytes.Equal(data, guarded9) || field > 0 && !bytes.Equal(pi, v.tuple) ||
					field == 0 && !bytes.Equal(pi, make([]byte, scsi.TupleSize))) {
					t.Errorf("%s, RDPROTECT %d: wrong data, or protection information % x", name, field, pi)
				}
			}
			if a := scsitest.Do(target, 0, cdb10(0x2f, flags, lba, 1), nil, 0); a.String() != want {
				t.Errorf("%s, VRPROTECT %d: %v, want %s", name, field, a, want)
			}
			// With a field of 0 the target makes the tuple, also if the initiator sends one.
			if field == 0 {
				want = "GOOD"
			}
			for _, cdb := range [][]byte{cdb10(0x2a, flags, lba, 1), cdb12(0xaa, flags, lba, 1),
				cdb16(0x8a, flags, lba, 1), cdb10(0x2a, flags|8, lba, 1)} {
				m.data[lba] = unchecked
				a, _, _ := protectedDo(target, cdb, guarded9, v.tuple, 0, 0)
				got, stored := m.data[lba], v.tuple
				if field == 0 {
					stored = tuple(good, 0, lba)
				}
				if a.String() != want || (want == "GOOD") != bytes.Equal(got[:], stored) {
					t.Errorf("%s, %s with WRPROTECT %d: %v, want %s; stored % x",
						name, scsi.OpcodeName(cdb), field, a, want, got)
				}
			}
		}
	}
}

// TestProtectionBuffers: without a buffer the unit acts as a host bus adapter, and one that is too
// small is an error.
func TestProtectionBuffers(t *testing.T) {
	m := newTuples()
	target := attach(t, scsi.UnitConfig{Protection: m})
	expect(t, target, cdb10(0x2a, 0x20, 3, 2), filled(1, 2), 0, "GOOD")
	for i := range uint32(2) {
		if got, want := m.data[uint64(3+i)],
			tuple(guardOf(filled(1, 2)[i*blockSize:][:blockSize]), 0, 3+i); !bytes.Equal(got[:], want) {
			t.Errorf("block %d: % x, want % x", 3+i, got, want)
		}
	}
	if a := expect(t, target, cdb10(0x28, 0x20, 3, 2), nil, 2*blockSize, "GOOD"); !bytes.Equal(a.Data, filled(1, 2)) {
		t.Error("wrong data")
	}
	a, _, _ := protectedDo(target, cdb10(0x28, 0x20, 3, 2), nil, nil, 2*blockSize, scsi.TupleSize)
	b, _, _ := protectedDo(target, cdb10(0x2a, 0x20, 3, 2), filled(2, 2), make([]byte, scsi.TupleSize), 0, 0)
	for _, a := range []scsitest.Answer{a, b} {
		if a.String() != "CHECK 5/0e/03" || !a.Overrun || a.Residual != 2*blockSize {
			t.Errorf("%v, overrun %v, residual %d", a, a.Overrun, a.Residual)
		}
	}
	for _, cdb := range [][]byte{cdb16(0x8b, 0x20, 0, 1), cdb10(0x41, 0x20, 0, 1), cdb16(0x93, 0x20, 0, 1),
		cdb10(0x2f, 0x22, 0, 1), cdb16(0x89, 0x20, 0, 0)} {
		expect(t, target, cdb, filled(0, 1), 0, "CHECK 5/24/00")
	}
}

func TestProtectionShown(t *testing.T) {
	for _, p := range []scsi.Protection{nil, newTuples()} {
		target := attach(t, scsi.UnitConfig{Protection: p})
		var want [3]byte
		if p != nil {
			want = [3]byte{0x01, 0x01, 0x05} // PROTECT; PROT_EN; GRD_CHK and REF_CHK
		}
		got := [3]byte{
			expect(t, target, []byte{0x12, 0, 0, 0, 96, 0}, nil, 96, "GOOD").Data[5] & 0x01,
			expect(t, target, append([]byte{0x9e, 0x10}, append(make([]byte, 11), 32, 0, 0)...), nil, 32,
				"GOOD").Data[12],
			expect(t, target, []byte{0x12, 1, 0x86, 0, 64, 0}, nil, 64, "GOOD").Data[4],
		}
		if got != want {
			t.Errorf("with %T: % x, want % x", p, got, want)
		}
	}
}

// TestProtectionKept: after every command that changes blocks their tuples are right, and of those
// that were discarded there are none.
func TestProtectionKept(t *testing.T) {
	for _, size := range []int{512, 4096} {
		m, disk := newTuples(), block.NewMem(64*4096)
		target := attach(t, scsi.UnitConfig{Backend: disk, Protection: m, BlockSize: size})
		all := make([]byte, 64*4096)
		fill := func(n int, b byte) []byte { return bytes.Repeat([]byte{b}, n*size) }
		unmap := append([]byte{0, 22, 0, 16, 0, 0, 0, 0}, append(make([]byte, 7), 8, 0, 0, 0, 16, 0, 0, 0, 0)...)
		for _, v := range []struct {
			cdb, out []byte
			cleared  [2]uint64 // blocks without a tuple afterwards
		}{
			{cdb10(0x2a, 0, 0, 40), fill(40, 1), [2]uint64{}},
			{[]byte{0x0a, 0, 0, 2, 3, 0}, fill(3, 2), [2]uint64{}},
			{cdb10(0x2e, 0, 5, 3), fill(3, 3), [2]uint64{}},
			{cdb16(0x8b, 0, 6, 3), fill(3, 4), [2]uint64{}},
			{append(cdb16(0x89, 0, 20, 0)[:13], 1, 0, 0), append(fill(1, 1), fill(1, 9)...), [2]uint64{}},
			{cdb10(0x41, 0, 24, 10), fill(1, 7), [2]uint64{}},
			{cdb16(0x93, 0x01, 26, 4), nil, [2]uint64{}},
			{cdb10(0x42, 0, 0, 24), unmap, [2]uint64{8, 24}},
			{cdb16(0x93, 0x09, 8, 8), nil, [2]uint64{8, 24}},
			{cdb10(0x2a, 0, 8, 16), fill(16, 5), [2]uint64{}},
			{[]byte{0x48, 1, 0, 0, 0, 0, 0, 0, 6, 0}, []byte{1, 0, 0, 2, 0xab, 0xcd}, [2]uint64{}},
			{[]byte{0x48, 2, 0, 0, 0, 0, 0, 0, 0, 0}, nil, [2]uint64{0, 40}},
		} {
			if size == 4096 && v.cdb[0] == 0x42 {
				continue // the granularity of the memory is one block there
			}
			expect(t, target, v.cdb, v.out, 0, "GOOD")
			if _, err := disk.ReadAt(all, 0); err != nil {
				t.Fatal(err)
			}
			for i := range uint64(40) {
				want := tuple(guardOf(all[int(i)*size:][:size]), 0, uint32(i))
				if got, ok := m.data[i]; i >= v.cleared[0] && i < v.cleared[1] {
					if ok && v.cdb[0] != 0x93 {
						t.Errorf("% x: block %d has a tuple", v.cdb, i)
					}
				} else if !bytes.Equal(got[:], want) {
					t.Errorf("% x: block %d: % x, want % x", v.cdb, i, got, want)
				}
			}
			expect(t, target, cdb10(0x2f, 0, 0, 40), nil, 0, "GOOD")
		}
	}
}

// TestProtectionFinds: a change of the data or of a tuple behind the target's back is an error, and
// no data.
func TestProtectionFinds(t *testing.T) {
	m, disk := newTuples(), block.NewMem(blocks*blockSize)
	target := attach(t, scsi.UnitConfig{Backend: disk, Protection: m})
	expect(t, target, cdb10(0x2a, 0, 0, 600), make([]byte, 600*blockSize), 0, "GOOD")
	if _, err := disk.WriteAt(filled(1, 1), 555*blockSize); err != nil {
		t.Fatal(err)
	}
	for _, cdb := range [][]byte{cdb10(0x28, 0, 550, 10), cdb10(0x28, 0x20, 0, 600), cdb10(0x2f, 0, 0, 600),
		{0x08, 0, 2, 43, 1, 0}} {
		a := scsitest.Do(target, 0, cdb, nil, 600*blockSize)
		if a.String() != "CHECK b/10/01" || binary.BigEndian.Uint32(a.Sense[3:]) != 555 ||
			int(a.Residual) != 600*blockSize {
			t.Errorf("% x: %v, sense % x, residual %d", cdb, a, a.Sense, a.Residual)
		}
	}
	expect(t, target, cdb10(0x28, 0x60, 550, 10), nil, 10*blockSize, "GOOD") // RDPROTECT 011b
	expect(t, target, cdb10(0x2a, 0, 555, 1), filled(2, 1), 0, "GOOD")
	expect(t, target, cdb10(0x28, 0, 550, 10), nil, 10*blockSize, "GOOD")
}

// TestProtectionSharedBuffer: a read checks the medium's data, even if something else changes the
// initiator's buffer before the command ends.
func TestProtectionSharedBuffer(t *testing.T) {
	m := &changingTuples{tuples: newTuples(), buffer: make([]byte, 4*blockSize)}
	target := attach(t, scsi.UnitConfig{Protection: m})
	expect(t, target, cdb10(0x2a, 0, 0, 4), filled(1, 4), 0, "GOOD")
	a := scsitest.Run(target, &scsi.Command{CDB: cdb10(0x28, 0, 0, 4), In: [][]byte{m.buffer}})
	if a.Status != scsi.Good || !bytes.Equal(m.buffer, filled(1, 4)) {
		t.Errorf("%v", a)
	}
}

// changingTuples changes the initiator's buffer when the tuples are read.
type changingTuples struct {
	*tuples
	buffer []byte
}

func (m *changingTuples) ReadTuples(p []byte, block uint64) error {
	m.buffer[0] ^= 0xff
	return m.tuples.ReadTuples(p, block)
}

// TestProtectionInterrupted: a write that ends in the middle leaves its blocks unchecked, not
// unreadable.
func TestProtectionInterrupted(t *testing.T) {
	for n := 1; n <= 2; n++ {
		m := newTuples()
		target := attach(t, scsi.UnitConfig{Protection: m})
		expect(t, target, cdb10(0x2a, 0, 0, 4), filled(1, 4), 0, "GOOD")
		m.fails = n
		expect(t, target, cdb10(0x2a, 0, 1, 2), filled(9, 2), 0, "CHECK 3/0c/00")
		a := expect(t, target, cdb10(0x28, 0, 0, 4), nil, 4*blockSize, "GOOD")
		want := filled(1, 4)
		if n == 2 {
			copy(want[blockSize:], filled(9, 2))
		}
		if !bytes.Equal(a.Data, want) {
			t.Errorf("%d: wrong data", n)
		}
	}
}

// TestProtectionTogether has initiators write and read the same blocks at the same time: none finds
// one's data with the tuple of another.
func TestProtectionTogether(t *testing.T) {
	m := newTuples()
	target := attach(t, scsi.UnitConfig{Protection: m})
	var all sync.WaitGroup
	for i := range 4 {
		r := rand.New(rand.NewPCG(uint64(i), 1))
		all.Go(func() {
			for range 200 {
				lba, n := uint32(r.IntN(16)), 1+r.IntN(8)
				var a scsitest.Answer
				switch r.IntN(3) {
				case 0:
					a = scsitest.Do(target, 0, cdb10(0x28, 0, lba, uint16(n)), nil, n*blockSize)
				case 1:
					a = scsitest.Do(target, 0, cdb10(0x2a, 0, lba, uint16(n)), filled(byte(r.Uint32()), n), 0)
				default:
					a = scsitest.Do(target, 0, cdb16(0x93, 9, uint64(lba), uint32(n)), nil, 0)
				}
				if a.Status != scsi.Good {
					t.Errorf("%v", a)
				}
			}
		})
	}
	all.Wait()
}

// TestProtectionFlushed: both are durable when a flush is answered, and a unit that gets smaller
// and grows has no old tuples.
func TestProtectionFlushed(t *testing.T) {
	m := newTuples()
	target := attach(t, scsi.UnitConfig{Protection: m})
	expect(t, target, cdb10(0x2a, 0, 0, 1), filled(1, 1), 0, "GOOD")
	if m.flushed != 0 {
		t.Error("flushed by a write")
	}
	expect(t, target, syncCache, nil, 0, "GOOD")
	expect(t, target, cdb10(0x2a, 8, 0, 1), filled(1, 1), 0, "GOOD")
	if m.flushed != 2 {
		t.Errorf("flushed %d times", m.flushed)
	}

	r := &resizable{block.NewMem(8192)}
	u, err := scsi.NewUnit(scsi.UnitConfig{Backend: r, Serial: "a", Protection: newTuples()})
	if err != nil {
		t.Fatal(err)
	}
	target = scsi.NewTarget()
	if err := errors.Join(target.Attach(0, u), scsitest.Ready(target, 0)); err != nil {
		t.Fatal(err)
	}
	expect(t, target, cdb10(0x2a, 0, 0, 16), filled(1, 16), 0, "GOOD")
	for _, size := range []int64{4096, 8192} {
		if err := u.Resize(func() error { r.Mem = block.NewMem(size); return nil }); err != nil {
			t.Fatal(err)
		}
		expect(t, target, testUnitReady, nil, 0, "CHECK 6/2a/09")
	}
	expect(t, target, cdb10(0x28, 0, 8, 8), nil, 8*blockSize, "GOOD")
}

// TestProtectionCopied: EXTENDED COPY makes tuples for where the blocks are then.
func TestProtectionCopied(t *testing.T) {
	m := newTuples()
	target := attach(t, scsi.UnitConfig{Protection: m})
	expect(t, target, cdb10(0x2a, 0, 0, 4), filled(1, 4), 0, "GOOD")
	cdb, list := copyList(1, 0, [][]byte{cscd(t, target, 0, 0, blockSize)}, [][]byte{copySegment(0, 0, 0, 4, 0, 100)})
	expect(t, target, cdb, list, 0, "GOOD")
	if a := expect(t, target, cdb10(0x28, 0, 100, 4), nil, 4*blockSize, "GOOD"); !bytes.Equal(a.Data, filled(1, 4)) {
		t.Error("wrong data")
	}
	if got := fmt.Sprintf("% x", m.data[100]); got != fmt.Sprintf("% x", tuple(guardOf(filled(1, 1)), 0, 100)) {
		t.Error(got)
	}
}
