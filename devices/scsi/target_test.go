package scsi_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"sync"
	"testing"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/scsi/scsitest"
)

const blocks, blockSize = 2048, 512

// attach makes a target with one unit at LUN 0, past its unit attention.
func attach(t testing.TB, cfg scsi.UnitConfig) *scsi.Target {
	t.Helper()
	if cfg.Backend == nil {
		cfg.Backend = block.NewMem(blocks * blockSize)
	}
	if cfg.Serial == "" {
		cfg.Serial = "S-0042"
	}
	u, err := scsi.NewUnit(cfg)
	if err != nil {
		t.Fatal(err)
	}
	target := scsi.NewTarget()
	if err := target.Attach(0, u); err != nil {
		t.Fatal(err)
	}
	if err := scsitest.Ready(target, 0); err != nil {
		t.Fatal(err)
	}
	return target
}

// settle waits until every command is done, as an ORDERED one comes after all of them, and the
// flushes of those with IMMED. INQUIRY reports nothing that is pending.
func settle(target *scsi.Target) {
	done := make(chan struct{})
	target.Submit(&scsi.Command{CDB: []byte{0x12, 0, 0, 0, 0, 0}, Attr: scsi.Ordered,
		Done: func(scsi.Result) { close(done) }})
	<-done
	<-target.Unit(0).Flushed()
}

// cdb16 is a 16-byte CDB with a logical block address and a number of blocks.
func cdb16(op, flags byte, lba uint64, n uint32) []byte {
	b := make([]byte, 16)
	b[0], b[1] = op, flags
	binary.BigEndian.PutUint64(b[2:], lba)
	binary.BigEndian.PutUint32(b[10:], n)
	return b
}

// cdb10 is the same with 10 bytes.
func cdb10(op, flags byte, lba uint32, n uint16) []byte {
	b := make([]byte, 10)
	b[0], b[1] = op, flags
	binary.BigEndian.PutUint32(b[2:], lba)
	binary.BigEndian.PutUint16(b[7:], n)
	return b
}

// cdb12 is the same with 12.
func cdb12(op, flags byte, lba, n uint32) []byte {
	b := make([]byte, 12)
	b[0], b[1] = op, flags
	binary.BigEndian.PutUint32(b[2:], lba)
	binary.BigEndian.PutUint32(b[6:], n)
	return b
}

// expect does a command and checks how it ended.
func expect(t testing.TB, target *scsi.Target, cdb, out []byte, inLen int, want string) scsitest.Answer {
	t.Helper()
	a := scsitest.Do(target, 0, cdb, out, inLen)
	if a.String() != want {
		t.Errorf("%s % x: %v, want %s", scsi.OpcodeName(cdb), cdb, a, want)
	}
	return a
}

// filled is n blocks, each with its own bytes.
func filled(seed byte, n int) []byte {
	p := make([]byte, n*blockSize)
	for i := range p {
		p[i] = seed + byte(i/blockSize)*3 + byte(i)
	}
	return p
}

var (
	testUnitReady = make([]byte, 6)
	syncCache     = cdb10(0x35, 0, 0, 0)
	modeSense8    = []byte{0x1a, 0x08, 0x08, 0, 255, 0}
)

// selectPage is MODE SELECT(6) of one page.
func selectPage(page ...byte) (cdb, out []byte) {
	out = append(make([]byte, 4), page...)
	return []byte{0x15, 0x10, 0, 0, byte(len(out)), 0}, out
}

func setWCE(t *testing.T, target *scsi.Target, on bool) {
	t.Helper()
	page := append([]byte{0x08, 18}, make([]byte, 18)...)
	if on {
		page[2] = 0x04
	}
	cdb, out := selectPage(page...)
	expect(t, target, cdb, out, 0, "GOOD")
}

func control(bits2, bits4 byte) (cdb, out []byte) {
	return selectPage(0x0a, 10, 0x02|bits2, 0x10, bits4, 0, 0, 0, 0, 0, 0, 0)
}

func TestVectors(t *testing.T) {
	target := attach(t, scsi.UnitConfig{})
	scsitest.Check(t, target, 0, scsitest.Answers)
	scsitest.Check(t, target, 0, scsitest.Refusals)
	scsitest.Check(t, target, 0, scsitest.ThinRefusals)
}

// TestReadWrite writes with every write command and reads with every read
// command, with data that differs from block to block.
func TestReadWrite(t *testing.T) {
	target := attach(t, scsi.UnitConfig{})
	six := func(op byte, lba uint32, n int) []byte {
		return []byte{op, byte(lba >> 16), byte(lba >> 8), byte(lba), byte(n), 0}
	}
	want := filled(0, blocks)
	type form struct {
		name        string
		read, write func(lba uint32, n int) []byte
	}
	forms := []form{
		{"6", func(l uint32, n int) []byte { return six(0x08, l, n) },
			func(l uint32, n int) []byte { return six(0x0a, l, n) }},
		{"10", func(l uint32, n int) []byte { return cdb10(0x28, 0x10, l, uint16(n)) },
			func(l uint32, n int) []byte { return cdb10(0x2a, 0x10, l, uint16(n)) }},
		{"12", func(l uint32, n int) []byte { return cdb12(0xa8, 0x08, l, uint32(n)) },
			func(l uint32, n int) []byte { return cdb12(0xaa, 0x08, l, uint32(n)) }},
		{"16", func(l uint32, n int) []byte { return cdb16(0x88, 0x18, uint64(l), uint32(n)) },
			func(l uint32, n int) []byte { return cdb16(0x8a, 0x18, uint64(l), uint32(n)) }},
		{"verify10", nil, func(l uint32, n int) []byte { return cdb10(0x2e, 0x02, l, uint16(n)) }},
		{"verify12", nil, func(l uint32, n int) []byte { return cdb12(0xae, 0x02, l, uint32(n)) }},
		{"verify16", nil, func(l uint32, n int) []byte { return cdb16(0x8e, 0x00, uint64(l), uint32(n)) }},
	}
	expect(t, target, cdb10(0x2a, 0, 0, blocks), want, 0, "GOOD")
	for i, f := range forms {
		lba, n := uint32(100*i+1), 3+i
		p := filled(byte(50+i), n)
		copy(want[lba*blockSize:], p)
		if a := expect(t, target, f.write(lba, n), p, 0, "GOOD"); a.Residual != 0 {
			t.Errorf("write(%s): residual %d", f.name, a.Residual)
		}
	}
	for _, f := range forms {
		if f.read == nil {
			continue
		}
		for lba := uint32(0); lba < blocks; lba += 128 {
			a := expect(t, target, f.read(lba, 128), nil, 128*blockSize, "GOOD")
			if !bytes.Equal(a.Data, want[lba*blockSize:(lba+128)*blockSize]) {
				t.Errorf("read(%s) at %d: wrong data", f.name, lba)
			}
		}
	}
	// In READ(6) and WRITE(6), 0 is 256 blocks.
	if a := expect(t, target, six(0x08, 0, 0), nil, 256*blockSize, "GOOD"); !bytes.Equal(a.Data, want[:256*blockSize]) {
		t.Error("READ(6) of 256 blocks: wrong data")
	}
}

// TestBufferSizes has data-in and data-out of other sizes than the CDB says.
func TestBufferSizes(t *testing.T) {
	target := attach(t, scsi.UnitConfig{})
	p := filled(9, 4)
	expect(t, target, cdb10(0x2a, 0, 0, 4), p, 0, "GOOD")

	a := expect(t, target, cdb10(0x28, 0, 0, 2), nil, 4*blockSize, "GOOD")
	if a.Residual != 2*blockSize || a.Overrun || !bytes.Equal(a.Data, p[:2*blockSize]) {
		t.Errorf("large buffer: residual %d, overrun %v", a.Residual, a.Overrun)
	}
	a = expect(t, target, cdb10(0x28, 0, 0, 4), nil, 1000, "GOOD")
	if a.Residual != 0 || !a.Overrun || !bytes.Equal(a.Data, p[:1000]) {
		t.Errorf("small buffer: residual %d, overrun %v", a.Residual, a.Overrun)
	}
	a = expect(t, target, cdb10(0x2a, 0, 10, 1), p, 0, "GOOD")
	if a.Residual != 3*blockSize || a.Overrun {
		t.Errorf("too much data-out: residual %d, overrun %v", a.Residual, a.Overrun)
	}
	a = expect(t, target, cdb10(0x2a, 0, 20, 4), p[:3*blockSize], 0, "CHECK 5/0e/03")
	if a.Residual != 3*blockSize || !a.Overrun {
		t.Errorf("too little data-out: residual %d, overrun %v", a.Residual, a.Overrun)
	}
	a = expect(t, target, cdb10(0x28, 0, 10, 14), nil, 14*blockSize, "GOOD")
	if !bytes.Equal(a.Data, append(slices.Clone(p[:blockSize]), make([]byte, 13*blockSize)...)) {
		t.Error("a write went past its blocks, or one with too little data wrote something")
	}
	if a := expect(t, target, []byte{0x12, 0, 0, 0, 96, 0}, nil, 5, "GOOD"); !a.Overrun {
		t.Error("INQUIRY with a buffer of 5 bytes: no overrun")
	}
	if a := expect(t, target, []byte{0x12, 0, 0, 0, 5, 0}, nil, 5, "GOOD"); a.Overrun {
		t.Error("INQUIRY with an allocation length of 5 bytes: overrun")
	}
	// The buffers scattered, in pieces that end inside blocks.
	in := make([]byte, 4*blockSize+100)
	c := &scsi.Command{CDB: cdb10(0x28, 0, 0, 4), In: [][]byte{in[:1], in[1:700], {}, in[700:]}}
	if r := scsitest.Run(target, c); r.Status != scsi.Good || r.Residual != 100 || !bytes.Equal(in[:4*blockSize], p) {
		t.Errorf("scattered read: %v, residual %d", r, r.Residual)
	}
}

// sparse is storage of any size that keeps the blocks that were written.
type sparse struct {
	size int64
	mu   sync.Mutex
	m    map[int64][]byte
}

func (s *sparse) Size() int64  { return s.size }
func (s *sparse) Flush() error { return nil }
func (s *sparse) ReadAt(p []byte, off int64) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := 0; i < len(p); i += blockSize {
		clear(p[i : i+blockSize])
		copy(p[i:i+blockSize], s.m[off+int64(i)])
	}
	return len(p), nil
}
func (s *sparse) WriteAt(p []byte, off int64) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := 0; i < len(p); i += blockSize {
		s.m[off+int64(i)] = slices.Clone(p[i : i+blockSize])
	}
	return len(p), nil
}

// TestLarge has a disk of 3 TiB, whose last block 32 bits cannot address.
func TestLarge(t *testing.T) {
	target := attach(t, scsi.UnitConfig{Backend: &sparse{size: 3 << 40, m: map[int64][]byte{}}})
	if a := expect(t, target, cdb10(0x25, 0, 0, 0), nil, 8, "GOOD"); !bytes.Equal(a.Data,
		[]byte{255, 255, 255, 255, 0, 0, 2, 0}) {
		t.Errorf("READ CAPACITY(10): % x", a.Data)
	}
	last := uint64(3<<40/blockSize - 1)
	if a := expect(t, target, cdb16(0x9e, 0x10, 0, 32), nil, 32, "GOOD"); binary.BigEndian.Uint64(a.Data) != last {
		t.Errorf("READ CAPACITY(16): % x", a.Data)
	}
	for i, lba := range []uint64{0, 1<<32 - 1, 1 << 32, last} {
		expect(t, target, cdb16(0x8a, 0, lba, 1), filled(byte(i), 1), 0, "GOOD")
	}
	for i, lba := range []uint64{0, 1<<32 - 1, 1 << 32, last} {
		if a := expect(t, target, cdb16(0x88, 0, lba, 1), nil, blockSize, "GOOD"); !bytes.Equal(a.Data,
			filled(byte(i), 1)) {
			t.Errorf("block %#x: wrong data", lba)
		}
	}
	expect(t, target, cdb16(0x88, 0, last, 2), nil, 2*blockSize, "CHECK 5/21/00")
}

func TestThinAndSame(t *testing.T) {
	rec := &scsitest.Recorder{Backend: block.NewMem(blocks * blockSize)}
	target := attach(t, scsi.UnitConfig{Backend: rec})
	want := filled(1, blocks)
	check := func(what string) {
		t.Helper()
		if a := expect(t, target, cdb10(0x28, 0, 0, blocks), nil, blocks*blockSize,
			"GOOD"); !bytes.Equal(a.Data, want) {
			t.Errorf("%s: wrong data", what)
		}
	}
	calls := func(want ...string) {
		t.Helper()
		if got := rec.Log(); !slices.Equal(got, want) {
			t.Errorf("calls %q, want %q", got, want)
		}
	}
	expect(t, target, cdb10(0x2a, 0, 0, blocks), want, 0, "GOOD")
	rec.Log()

	// Two ranges and an incomplete third, which is ignored.
	list := []byte{0, 46, 0, 40, 0, 0, 0, 0}
	for _, r := range [][2]uint32{{8, 16}, {100, 3}} {
		list = binary.BigEndian.AppendUint64(list, uint64(r[0]))
		list = binary.BigEndian.AppendUint32(list, r[1])
		list = append(list, 0, 0, 0, 0)
		clear(want[r[0]*blockSize : (r[0]+r[1])*blockSize])
	}
	list = append(list, 0, 0, 0, 0, 0, 0, 7, 0)
	expect(t, target, cdb10(0x42, 0, 0, 48), list, 0, "GOOD")
	calls("discard 4096+8192", "discard 51200+1536")
	check("UNMAP")
	rec.Log()

	one := filled(200, 1)
	expect(t, target, cdb10(0x41, 0, 300, 600), one, 0, "GOOD")
	calls("write 153600+262144", "write 415744+45056")
	for i := 300; i < 900; i++ {
		copy(want[i*blockSize:], one)
	}
	check("WRITE SAME(10)")
	expect(t, target, cdb16(0x93, 0x08, 400, 10), one, 0, "GOOD") // UNMAP with data that is not zero
	check("WRITE SAME(16) UNMAP of data")
	rec.Log()
	expect(t, target, cdb16(0x93, 0x08, 500, 10), make([]byte, blockSize), 0, "GOOD")
	expect(t, target, cdb16(0x93, 0x09, 510, 10), nil, 0, "GOOD") // NDOB
	expect(t, target, cdb16(0x93, 0x01, 520, 10), nil, 0, "GOOD")
	expect(t, target, cdb10(0x41, 0x00, 530, 10), make([]byte, blockSize), 0, "GOOD")
	calls("discard 256000+5120", "discard 261120+5120", "zero 266240+5120", "zero 271360+5120")
	clear(want[500*blockSize : 540*blockSize])
	check("WRITE SAME of zeroes")
}

// TestThick has a backend with none of the optional interfaces.
func TestThick(t *testing.T) {
	target := attach(t, scsi.UnitConfig{Backend: struct{ block.Backend }{block.NewMem(blocks * blockSize)}})
	scsitest.Check(t, target, 0, scsitest.Refusals)
	expect(t, target, cdb10(0x2a, 0, 0, 4), filled(1, 4), 0, "GOOD")
	expect(t, target, cdb10(0x42, 0, 0, 24), make([]byte, 24), 0, "CHECK 5/20/00")
	expect(t, target, cdb16(0x93, 0x08, 0, 1), make([]byte, blockSize), 0, "CHECK 5/24/00")
	expect(t, target, cdb16(0x93, 0x01, 1, 2), nil, 0, "GOOD")
	want := filled(1, 4)
	clear(want[blockSize : 3*blockSize])
	if a := expect(t, target, cdb10(0x28, 0, 0, 4), nil, 4*blockSize, "GOOD"); !bytes.Equal(a.Data, want) {
		t.Error("WRITE SAME NDOB: wrong data")
	}
	if a := expect(t, target, cdb16(0x9e, 0x10, 0, 32), nil, 32, "GOOD"); a.Data[14] != 0 {
		t.Errorf("LBPME of a thick unit: %02x", a.Data[14])
	}
	if a := expect(t, target, []byte{0x12, 1, 0xb2, 0, 255, 0}, nil, 255, "GOOD"); !bytes.Equal(a.Data,
		[]byte{0, 0xb2, 0, 4, 0, 0, 0, 0}) {
		t.Errorf("VPD B2 of a thick unit: % x", a.Data)
	}
	if a := expect(t, target, cdb12(0xa3, 0x0c, 0x01420000, 16), nil, 16, "GOOD"); !bytes.Equal(a.Data,
		[]byte{0, 1, 0, 0}) {
		t.Errorf("REPORT SUPPORTED OPERATION CODES of UNMAP: % x", a.Data)
	}
}

func TestVerify(t *testing.T) {
	target := attach(t, scsi.UnitConfig{})
	p := filled(7, 1024)
	expect(t, target, cdb10(0x2a, 0, 0, 1024), p, 0, "GOOD")
	wrong := slices.Clone(p)
	wrong[600*blockSize+5]++
	for _, v := range []struct {
		cdb []byte
		out []byte
		end string
	}{
		{cdb10(0x2f, 0, 0, 1024), nil, "GOOD"},
		{cdb10(0x2f, 0x02, 0, 1024), p, "GOOD"},
		{cdb12(0xaf, 0x02, 0, 1024), p, "GOOD"},
		{cdb16(0x8f, 0x02, 0, 1024), p, "GOOD"},
		{cdb10(0x2f, 0x02, 0, 1024), wrong, "CHECK e/1d/00"},
		{cdb12(0xaf, 0x02, 0, 1024), wrong, "CHECK e/1d/00"},
		{cdb16(0x8f, 0x02, 0, 1024), wrong, "CHECK e/1d/00"},
		{cdb10(0x2f, 0, 0, 1024), wrong, "GOOD"}, // BYTCHK 0 compares nothing
		{cdb10(0x2f, 0x06, 3, 1), p[3*blockSize : 4*blockSize], "GOOD"},
		{cdb10(0x2f, 0x06, 3, 2), p[3*blockSize : 4*blockSize], "CHECK e/1d/00"},
		{cdb10(0x2f, 0x22, 0, 1), p[:blockSize], "CHECK 5/24/00"},
	} {
		expect(t, target, v.cdb, v.out, 0, v.end)
	}
}

func TestCompareAndWrite(t *testing.T) {
	target := attach(t, scsi.UnitConfig{})
	old, new := filled(1, 2), filled(100, 2)
	expect(t, target, cdb10(0x2a, 0, 5, 2), old, 0, "GOOD")
	cdb := cdb16(0x89, 0, 5, 2)
	cdb[10], cdb[13] = 0, 2
	if a := expect(t, target, cdb, append(slices.Clone(old), new...), 0, "GOOD"); a.Residual != 0 {
		t.Errorf("residual %d", a.Residual)
	}
	// The same again does not match: byte 0 differs already.
	wrong := append(slices.Clone(new), old...)
	wrong[700] ^= 0xff
	a := expect(t, target, cdb, wrong, 0, "CHECK e/1d/00")
	if want := []byte{0xf0, 0, 0x0e, 0, 0, 2, 0xbc}; !bytes.Equal(a.Sense[:7], want) { // VALID, INFORMATION 700
		t.Errorf("sense % x, want % x", a.Sense[:7], want)
	}
	if a := expect(t, target, cdb10(0x28, 0, 5, 2), nil, 2*blockSize, "GOOD"); !bytes.Equal(a.Data, new) {
		t.Error("a miscompare changed the medium")
	}
}

// TestCompareAndWriteAtomic counts in a block with COMPARE AND WRITE from eight
// queues: no step may be lost.
func TestCompareAndWriteAtomic(t *testing.T) {
	target := attach(t, scsi.UnitConfig{})
	const queues, steps = 8, 50
	var wg sync.WaitGroup
	for range queues {
		wg.Go(func() {
			cdb := cdb16(0x89, 0, 0, 0)
			cdb[13] = 1
			for done := 0; done < steps; {
				out := make([]byte, 2*blockSize)
				copy(out, scsitest.Do(target, 0, cdb10(0x28, 0, 0, 1), nil, blockSize).Data)
				n := binary.BigEndian.Uint64(out)
				for i := 0; i < blockSize; i += 8 {
					binary.BigEndian.PutUint64(out[blockSize+i:], n+1)
				}
				switch a := scsitest.Do(target, 0, cdb, out, 0); a.String() {
				case "GOOD":
					done++
				case "CHECK e/1d/00":
				default:
					t.Error(a)
					return
				}
			}
		})
	}
	wg.Wait()
	a := expect(t, target, cdb10(0x28, 0, 0, 1), nil, blockSize, "GOOD")
	for i := 0; i < blockSize; i += 8 {
		if n := binary.BigEndian.Uint64(a.Data[i:]); n != queues*steps {
			t.Fatalf("counter %d at byte %d, want %d", n, i, queues*steps)
		}
	}
}

func TestReadOnly(t *testing.T) {
	rec := &scsitest.Recorder{Backend: block.NewMem(blocks * blockSize)}
	target := attach(t, scsi.UnitConfig{Backend: rec, ReadOnly: true})
	caw := cdb16(0x89, 0, 0, 0)
	caw[13] = 1
	for _, cdb := range [][]byte{
		{0x0a, 0, 0, 0, 1, 0}, cdb10(0x2a, 0, 0, 1), cdb12(0xaa, 0, 0, 1), cdb16(0x8a, 0, 0, 1),
		cdb10(0x2e, 0, 0, 1), cdb12(0xae, 0, 0, 1), cdb16(0x8e, 0, 0, 1), cdb10(0x41, 0, 0, 1),
		cdb16(0x93, 0, 0, 1), caw,
		cdb16(0x8a, 0, 1<<40, 1),
	} {
		if a := expect(t, target, cdb, make([]byte, 2*blockSize), 0, "CHECK 7/27/00"); a.Residual != 2*blockSize {
			t.Errorf("%s: residual %d", scsi.OpcodeName(cdb), a.Residual)
		}
	}
	expect(t, target, syncCache, nil, 0, "GOOD")
	expect(t, target, cdb10(0x28, 0, 0, 1), nil, blockSize, "GOOD")
	if got := rec.Log(); !slices.Equal(got, []string{"read 0+512"}) {
		t.Errorf("calls %q", got)
	}
	if a := expect(t, target, modeSense8, nil, 255, "GOOD"); a.Data[2] != 0x90 {
		t.Errorf("device-specific parameter %02x, want WP and DPOFUA", a.Data[2])
	}
}

func TestControlPage(t *testing.T) {
	target := attach(t, scsi.UnitConfig{})
	cdb, out := control(0, 0x08) // SWP
	expect(t, target, cdb, out, 0, "GOOD")
	expect(t, target, cdb10(0x2a, 0, 0, 1), make([]byte, blockSize), 0, "CHECK 7/27/02")
	if a := expect(t, target, modeSense8, nil, 255, "GOOD"); a.Data[2] != 0x90 {
		t.Errorf("device-specific parameter %02x with SWP", a.Data[2])
	}
	cdb, out = control(0x04, 0) // D_SENSE
	expect(t, target, cdb, out, 0, "GOOD")
	a := expect(t, target, []byte{0x12, 0, 0x80, 0, 255, 0}, nil, 255, "CHECK 5/24/00")
	if want := []byte{0x72, 5, 0x24, 0, 0, 0, 0, 8, 2, 6, 0, 0, 0xcf, 0, 2, 0}; !bytes.Equal(a.Sense, want) {
		t.Errorf("descriptor sense % x, want % x", a.Sense, want)
	}
	cdb, out = control(0, 0)
	expect(t, target, cdb, out, 0, "GOOD")
	a = expect(t, target, []byte{0x12, 0, 0x80, 0, 255, 0}, nil, 255, "CHECK 5/24/00")
	if want := []byte{0x70, 0, 5, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x24, 0, 0, 0xcf, 0, 2}; !bytes.Equal(a.Sense, want) {
		t.Errorf("fixed sense % x, want % x", a.Sense, want)
	}
}

func TestWrongLUN(t *testing.T) {
	target := attach(t, scsi.UnitConfig{})
	for _, lun := range []scsi.LUN{5 << 48, 0x4005 << 48, 0x0100 << 48, 1, 0xc102 << 48} {
		a := scsitest.Do(target, lun, []byte{0x12, 0, 0, 0, 96, 0}, nil, 96)
		if a.Status != scsi.Good || !a.NoLUN || len(a.Data) != 96 || a.Data[0] != 0x7f {
			t.Errorf("INQUIRY of LUN %#x: %v, %v, % x", uint64(lun), a, a.NoLUN, a.Data)
		}
		if a := scsitest.Do(target, lun, testUnitReady, nil, 0); a.String() != "CHECK 5/25/00" || !a.NoLUN {
			t.Errorf("TEST UNIT READY of LUN %#x: %v, %v", uint64(lun), a, a.NoLUN)
		}
		if a := scsitest.Do(target, lun, []byte{3, 0, 0, 0, 18, 0}, nil, 18); a.Status != scsi.Good || !a.NoLUN ||
			a.Data[2] != 5 || a.Data[12] != 0x25 {
			t.Errorf("REQUEST SENSE of LUN %#x: %v, % x", uint64(lun), a, a.Data)
		}
	}
	// A target whose only unit is elsewhere answers discovery at LUN 0.
	elsewhere := scsi.NewTarget()
	reportLUNs := []byte{0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0}
	if a := scsitest.Do(elsewhere, 0, reportLUNs, nil, 64); a.String() != "CHECK 5/25/00" || !a.NoLUN {
		t.Errorf("REPORT LUNS of an empty target: %v", a)
	}
	u, err := scsi.NewUnit(scsi.UnitConfig{Backend: block.NewMem(4096), Serial: "x"})
	if err != nil {
		t.Fatal(err)
	}
	if err := elsewhere.Attach(0x4101<<48, u); err != nil {
		t.Fatal(err)
	}
	a := scsitest.Do(elsewhere, 0, reportLUNs, nil, 64)
	if a.NoLUN || !bytes.Equal(a.Data, []byte{0, 0, 0, 8, 0, 0, 0, 0, 0x41, 1, 0, 0, 0, 0, 0, 0}) {
		t.Errorf("REPORT LUNS at LUN 0: %v, % x", a, a.Data)
	}
	if a := scsitest.Do(elsewhere, 0, cdb10(0x28, 0, 0, 1), nil, blockSize); a.String() != "CHECK 5/25/00" ||
		!a.NoLUN || a.Residual != blockSize {
		t.Errorf("READ(10) at LUN 0: %v", a)
	}
	// The well-known logical unit, past its unit attention.
	if err := scsitest.Ready(target, scsi.ReportLUNsWLUN); err != nil {
		t.Fatal(err)
	}
	if a := scsitest.Do(target, scsi.ReportLUNsWLUN, []byte{0x12, 0, 0, 0, 5, 0}, nil, 5); a.Data[0] != 0x1e ||
		a.NoLUN {
		t.Errorf("INQUIRY of the well-known unit: %v, % x", a, a.Data)
	}
	if a := scsitest.Do(target, scsi.ReportLUNsWLUN, cdb10(0x28, 0, 0, 1), nil, blockSize); a.String() !=
		"CHECK 5/20/00" {
		t.Errorf("READ(10) of the well-known unit: %v", a)
	}
}

// TestManyUnits has three units that must not be taken for one another.
func TestManyUnits(t *testing.T) {
	target := scsi.NewTarget()
	luns := []int{0, 3, 300}
	ids := map[string]int{}
	for i, n := range luns {
		m := block.NewMem(int64(i+1) * 8192)
		if _, err := m.WriteAt(filled(byte(77*i), 1), 0); err != nil {
			t.Fatal(err)
		}
		u, err := scsi.NewUnit(scsi.UnitConfig{Backend: m, Serial: fmt.Sprintf("disk%d", n)})
		if err != nil {
			t.Fatal(err)
		}
		lun, _ := scsi.EncodeLUN(n)
		if err := target.Attach(lun, u); err != nil {
			t.Fatal(err)
		}
		if err := target.Attach(lun, u); err == nil {
			t.Error("a LUN was given twice")
		}
	}
	for i, n := range luns {
		flat := scsi.LUN(0x4000|n) << 48
		if err := scsitest.Ready(target, flat); err != nil {
			t.Fatal(err)
		}
		if a := scsitest.Do(target, flat, cdb10(0x28, 0, 0, 1), nil, blockSize); !bytes.Equal(a.Data,
			filled(byte(77*i), 1)) {
			t.Errorf("LUN %d: wrong data", n)
		}
		if a := scsitest.Do(target, flat, cdb10(0x25, 0, 0, 0), nil, 8); binary.BigEndian.Uint32(a.Data) !=
			uint32(16*(i+1)-1) {
			t.Errorf("LUN %d: capacity % x", n, a.Data)
		}
		ids[string(scsitest.Do(target, flat, []byte{0x12, 1, 0x83, 0, 255, 0}, nil, 255).Data[8:16])]++
	}
	if len(ids) != len(luns) {
		t.Errorf("%d NAA designators for %d units", len(ids), len(luns))
	}
	same, err := scsi.NewUnit(scsi.UnitConfig{Backend: block.NewMem(4096), Serial: "disk3"})
	if err != nil {
		t.Fatal(err)
	}
	if target.Attach(9<<48, same) == nil {
		t.Error("two units with one serial number")
	}
	want := []scsi.LUN{0, 3 << 48, 0x412c << 48}
	if got := target.LUNs(); !slices.Equal(got, want) {
		t.Errorf("LUNs() = %x, want %x", got, want)
	}
}

func TestNewUnitRefuses(t *testing.T) {
	m := block.NewMem(8192)
	for name, cfg := range map[string]scsi.UnitConfig{
		"no backend":      {Serial: "x"},
		"no serial":       {Backend: m},
		"odd size":        {Backend: block.NewMem(1000), Serial: "x"},
		"empty":           {Backend: block.NewMem(0), Serial: "x"},
		"block size":      {Backend: m, Serial: "x", BlockSize: 1024},
		"serial not text": {Backend: m, Serial: "a\nb"},
		"serial too long": {Backend: m, Serial: string(bytes.Repeat([]byte("s"), 65))},
		"vendor too long": {Backend: m, Serial: "x", Vendor: "123456789"},
		"cache":           {Backend: m, Serial: "x", Cache: 9},
		"exponent":        {Backend: m, Serial: "x", PhysicalBlockExponent: 16},
	} {
		if _, err := scsi.NewUnit(cfg); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	u, err := scsi.NewUnit(scsi.UnitConfig{Backend: struct {
		block.Backend
		identity
	}{m, "/images/a"}})
	if err != nil || u.Serial() != "b09bd74bbbbb592b289a" {
		t.Errorf("serial %q, %v", u.Serial(), err)
	}
}

type identity string

func (i identity) Identity() string { return string(i) }
