package scsi_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/scsi/scsitest"
)

// attachMore attaches units at LUN 1 and up.
func attachMore(t *testing.T, target *scsi.Target, cfgs ...scsi.UnitConfig) {
	t.Helper()
	for i, cfg := range cfgs {
		cfg.Serial = "S-000" + string(rune('1'+i))
		u, err := scsi.NewUnit(cfg)
		if err != nil {
			t.Fatal(err)
		}
		lun, _ := scsi.EncodeLUN(i + 1)
		if err := target.Attach(lun, u); err != nil {
			t.Fatal(err)
		}
		if err := scsitest.Ready(target, lun); err != nil {
			t.Fatal(err)
		}
	}
	if err := scsitest.Ready(target, 0); err != nil { // REPORTED LUNS DATA HAS CHANGED
		t.Fatal(err)
	}
}

// cscd is an Identification CSCD descriptor with the n-th designator of the unit
// at lun.
func cscd(t *testing.T, target *scsi.Target, lun, n, blockSize int) []byte {
	t.Helper()
	at, _ := scsi.EncodeLUN(lun)
	page := scsitest.Do(target, at, []byte{0x12, 1, 0x83, 1, 0, 0}, nil, 256).Data
	d := page[4:]
	for ; n > 0; n-- {
		d = d[4+d[3]:]
	}
	b := make([]byte, 32)
	b[0] = 0xe4
	b[4], b[5], b[7] = d[0]&0xf, d[1]&0x3f, d[3]
	copy(b[8:28], d[4:4+d[3]])
	b[30], b[31] = byte(blockSize>>8), byte(blockSize)
	return b
}

// copySegment is a block device to block device segment descriptor.
func copySegment(flags byte, from, to, blocks uint16, fromLBA, toLBA uint64) []byte {
	be := binary.BigEndian
	b := make([]byte, 28)
	b[0], b[1], b[3] = 0x02, flags, 24
	be.PutUint16(b[4:], from)
	be.PutUint16(b[6:], to)
	be.PutUint16(b[10:], blocks)
	be.PutUint64(b[12:], fromLBA)
	be.PutUint64(b[20:], toLBA)
	return b
}

// copyList is the parameter list of EXTENDED COPY with its CDB. list is the list
// identifier, flags are byte 1 of the header.
func copyList(list, flags byte, cscds, segments [][]byte) (cdb, out []byte) {
	c, s := slices.Concat(cscds...), slices.Concat(segments...)
	out = make([]byte, 16)
	out[0], out[1] = list, flags
	binary.BigEndian.PutUint16(out[2:], uint16(len(c)))
	binary.BigEndian.PutUint32(out[8:], uint32(len(s)))
	out = slices.Concat(out, c, s)
	cdb = make([]byte, 16)
	cdb[0] = 0x83
	binary.BigEndian.PutUint32(cdb[10:], uint32(len(out)))
	return cdb, out
}

func receive(action, list byte) []byte {
	return []byte{0x84, action, list, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0}
}

// TestExtendedCopy copies inside a unit and between units of different block
// sizes and backends.
func TestExtendedCopy(t *testing.T) {
	file, err := block.Open(filepath.Join(t.TempDir(), "disk"), block.Options{Size: blocks * blockSize})
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	other, err := block.Open(filepath.Join(t.TempDir(), "other"), block.Options{Size: blocks * blockSize})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	rec := &scsitest.Recorder{Backend: block.NewMem(blocks * blockSize)}
	target := attach(t, scsi.UnitConfig{Backend: file})
	attachMore(t, target, scsi.UnitConfig{Backend: other},
		scsi.UnitConfig{Backend: rec, BlockSize: 4096, Cache: scsi.WriteThrough})
	want := make([]byte, blocks*blockSize)
	copy(want, filled(3, 64))
	if _, err := file.WriteAt(want, 0); err != nil {
		t.Fatal(err)
	}
	cscds := [][]byte{cscd(t, target, 0, 0, 512), cscd(t, target, 1, 0, 512), cscd(t, target, 2, 0, 4096)}
	cdb, out := copyList(7, 0, cscds, [][]byte{
		copySegment(0, 0, 0, 16, 0, 100),    // inside a unit
		copySegment(0, 0, 0, 16, 100, 108),  // onto itself
		copySegment(0, 0, 1, 64, 0, 1000),   // to another file
		copySegment(0, 0, 2, 16, 8, 4),      // to larger blocks
		copySegment(2, 0, 2, 3, 0, 200),     // counted in them
		copySegment(0, 2, 1, 1, 4, 0),       // and back
		copySegment(0, 0, 1, 0, blocks, 12), // nothing
	})
	a := expect(t, target, cdb, out, 0, "GOOD")
	if a.Residual != 0 {
		t.Errorf("residual %d", a.Residual)
	}
	copy(want[100*blockSize:], want[:16*blockSize])
	copy(want[108*blockSize:], slices.Clone(want[100*blockSize:116*blockSize]))
	for _, v := range []struct {
		b      block.Backend
		lba, n int
		size   int
		want   []byte
	}{
		{file, 0, 200, blockSize, want},
		{other, 1000, 64, blockSize, want},
		{rec.Backend, 4, 2, 4096, want[8*blockSize:]},
		{rec.Backend, 200, 3, 4096, want},
		{other, 0, 8, blockSize, want[8*blockSize:]},
	} {
		got := make([]byte, v.n*v.size)
		if _, err := v.b.ReadAt(got, int64(v.lba*v.size)); err != nil || !bytes.Equal(got, v.want[:len(got)]) {
			t.Errorf("block %d of %T: %v, or not the copied data", v.lba, v.b, err)
		}
	}
	if log := strings.Join(rec.Log(), ", "); log != "durable 16384+8192, durable 819200+12288, read 16384+4096" {
		t.Errorf("the unit without a write cache did %s", log)
	}
	a = expect(t, target, receive(0, 7), nil, 64, "GOOD")
	if got := hex.EncodeToString(a.Data); got != "00000008"+"01"+"0007"+"00"+"00012000" {
		t.Errorf("copy status %s", got)
	}
	expect(t, target, receive(0, 8), nil, 64, "CHECK 5/24/00")
	expect(t, target, receive(4, 7), nil, 64, "CHECK 5/24/00")
	if a := expect(t, target, receive(1, 7), nil, 64, "GOOD"); hex.EncodeToString(a.Data) != "00000000" {
		t.Errorf("copy data % x", a.Data)
	}
}

// TestExtendedCopyRefusals has one thing wrong with each list.
func TestExtendedCopyRefusals(t *testing.T) {
	target := attach(t, scsi.UnitConfig{})
	attachMore(t, target, scsi.UnitConfig{Backend: block.NewMem(blocks * blockSize), ReadOnly: true},
		scsi.UnitConfig{Backend: block.NewMem(blocks * blockSize), BlockSize: 4096})
	self, readOnly, large := cscd(t, target, 0, 0, 512), cscd(t, target, 1, 0, 512), cscd(t, target, 2, 0, 4096)
	with := func(b []byte, at int, v ...byte) []byte {
		b = slices.Clone(b)
		copy(b[at:], v)
		return b
	}
	seg := copySegment(0, 0, 0, 8, 0, 100)
	some := func(n int, b []byte) [][]byte { return slices.Repeat([][]byte{b}, n) }
	for _, v := range []struct {
		name     string
		header   [2]byte
		cscds    [][]byte
		segments [][]byte
		want     string
	}{
		{"the same twice", [2]byte{1, 0}, some(2, self), [][]byte{copySegment(0, 0, 1, 8, 0, 100)}, "GOOD"},
		{"the T10 designator is longer than the field", [2]byte{1, 0}, [][]byte{with(self, 7, 30)}, some(1, seg),
			"CHECK 5/26/00"},
		{"no segments", [2]byte{1, 0}, some(1, self), nil, "GOOD"},
		{"list identifier that is not wanted", [2]byte{1, 0x18}, some(1, self), some(1, seg), "CHECK 5/26/00"},
		{"no list identifier", [2]byte{0, 0x18}, some(1, self), some(1, seg), "GOOD"},
		{"reserved LIST ID USAGE", [2]byte{1, 0x08}, some(1, self), some(1, seg), "CHECK 5/26/00"},
		{"kind of CSCD", [2]byte{1, 0}, some(1, with(self, 0, 0xe0)), some(1, seg), "CHECK 5/26/07"},
		{"kind of the second CSCD", [2]byte{1, 0}, [][]byte{self, with(self, 0, 0xe0)}, some(1, seg), "CHECK 5/26/07"},
		{"too many CSCDs", [2]byte{1, 0}, some(17, self), some(1, seg), "CHECK 5/26/06"},
		{"too many segments", [2]byte{1, 0}, some(1, self), some(65, seg), "CHECK 5/26/08"},
		{"too many of both", [2]byte{1, 0}, some(17, self), some(65, seg), "CHECK 5/1a/00"},
		{"half a CSCD", [2]byte{1, 0}, [][]byte{self, self[:16]}, some(1, seg), "CHECK 5/1a/00"},
		{"half a segment", [2]byte{1, 0}, some(1, self), [][]byte{seg, seg[:8]}, "CHECK 5/1a/00"},
		{"a tape", [2]byte{1, 0}, some(1, with(self, 1, 0x01)), some(1, seg), "CHECK 5/26/00"},
		{"a port's designator", [2]byte{1, 0}, some(1, with(self, 5, 0x13)), some(1, seg), "CHECK 5/26/00"},
		{"another block length", [2]byte{1, 0}, some(1, with(self, 30, 0x10, 0)), some(1, seg), "CHECK 5/26/00"},
		{"kind of segment", [2]byte{1, 0}, some(1, self), some(1, with(seg, 0, 0x03)), "CHECK 5/26/09"},
		{"kind of the second segment", [2]byte{1, 0}, some(1, self), [][]byte{seg, with(seg, 0, 0x0a)},
			"CHECK 5/26/09"},
		{"length of a segment", [2]byte{1, 0}, some(1, self), some(1, with(seg, 3, 20)), "CHECK 5/26/00"},
		{"source that is not listed", [2]byte{1, 0}, some(1, self), some(1, copySegment(0, 1, 0, 8, 0, 100)),
			"CHECK a/0d/02"},
		{"destination that is not listed", [2]byte{1, 0}, some(1, self), some(1, copySegment(0, 0, 0xffff, 8, 0, 100)),
			"CHECK a/0d/02"},
		{"unit that is not there", [2]byte{1, 0}, some(1, with(self, 15, 0x77)), some(1, seg), "CHECK a/0d/02"},
		{"read-only destination", [2]byte{1, 0}, [][]byte{self, readOnly}, some(1, copySegment(0, 0, 1, 8, 0, 100)),
			"CHECK a/00/00"},
		{"read-only source", [2]byte{1, 0}, [][]byte{self, readOnly}, some(1, copySegment(0, 1, 0, 8, 0, 100)), "GOOD"},
		{"part of a block", [2]byte{1, 0}, [][]byte{self, large}, some(1, copySegment(0, 0, 1, 12, 0, 100)),
			"CHECK a/26/0a"},
		{"past the end of the source", [2]byte{1, 0}, some(1, self), some(1, copySegment(0, 0, 0, 8, blocks-7, 100)),
			"CHECK a/00/00"},
		{"past the end of the destination", [2]byte{1, 0}, some(1, self), some(1, copySegment(0, 0, 0, 8, 0, 1<<63)),
			"CHECK a/00/00"},
	} {
		cdb, out := copyList(v.header[0], v.header[1], v.cscds, v.segments)
		a := scsitest.Do(target, 0, cdb, out, 0)
		if a.String() != v.want {
			t.Errorf("%s: %v, want %s", v.name, a, v.want)
		}
	}
	cdb, out := copyList(1, 0, some(1, self), some(1, seg))
	out[15] = 4
	expect(t, target, cdb, out, 0, "CHECK 5/26/0b") // inline data
	out[15], cdb[13] = 0, cdb[13]-1
	expect(t, target, cdb, out, 0, "CHECK 5/1a/00")
	cdb[13] += 2
	expect(t, target, cdb, out, 0, "CHECK 5/0e/03")
	cdb[11] = 1
	expect(t, target, cdb, out, 0, "CHECK 5/1a/00")
}

// TestExtendedCopyFailure asks for the result of a copy whose second segment fails, and of more
// copies than are kept.
func TestExtendedCopyFailure(t *testing.T) {
	faulty := block.NewFaulty(block.NewMem(blocks*blockSize),
		block.Fault{Op: block.OpRead, Off: 8 * blockSize, Len: blockSize, Err: syscall.EIO})
	target := attach(t, scsi.UnitConfig{Backend: faulty})
	self := [][]byte{cscd(t, target, 0, 0, 512)}
	segments := [][]byte{copySegment(0, 0, 0, 4, 0, 100), copySegment(0, 0, 0, 4, 8, 100)}
	cdb, out := copyList(9, 0x10, self, segments) // kept, although no one asked for that
	expect(t, target, cdb, out, 0, "CHECK a/00/00")
	a := expect(t, target, receive(0, 9), nil, 64, "GOOD")
	if got := hex.EncodeToString(a.Data); got != "00000008"+"02"+"0001"+"00"+"00000800" {
		t.Errorf("copy status %s", got)
	}
	a = expect(t, target, receive(4, 9), nil, 128, "GOOD")
	if got := hex.EncodeToString(a.Data); got !=
		"0000004a"+strings.Repeat("00", 52)+"02000012"+"70000a000000000a"+strings.Repeat("00", 10) {
		t.Errorf("failure details %s", got)
	}
	for list := byte(10); list < 26; list++ {
		cdb, out := copyList(list, 0, self, segments[:1])
		expect(t, target, cdb, out, 0, "GOOD")
	}
	expect(t, target, receive(0, 9), nil, 64, "CHECK 5/24/00")
	expect(t, target, receive(0, 10), nil, 64, "GOOD")
	if err := target.Detach(0); err != nil {
		t.Fatal(err)
	}
}

// TestORWrite sets bits, in buffers that end inside blocks.
func TestORWrite(t *testing.T) {
	rec := &scsitest.Recorder{Backend: block.NewMem(blocks * blockSize)}
	target := attach(t, scsi.UnitConfig{Backend: rec})
	have, more := filled(1, 600), filled(9, 600)
	expect(t, target, cdb16(0x8a, 0, 8, 600), have, 0, "GOOD")
	rec.Log()
	c := &scsi.Command{CDB: cdb16(0x8b, 0x08, 8, 600), Out: [][]byte{more[:100], more[100:1000], more[1000:]}}
	if a := scsitest.Run(target, c); a.String() != "GOOD" || a.Residual != 0 {
		t.Errorf("%v, residual %d", a, a.Residual)
	}
	for i := range have {
		have[i] |= more[i]
	}
	if a := expect(t, target, cdb16(0x88, 0, 8, 600), nil, len(have), "GOOD"); !bytes.Equal(a.Data, have) {
		t.Error("not the bits of both")
	}
	if log := strings.Join(rec.Log(), ", "); log !=
		"read 4096+262144, durable 4096+262144, read 266240+45056, durable 266240+45056, read 4096+307200" {
		t.Errorf("FUA: %s", log)
	}
	faulty := block.NewFaulty(block.NewMem(blocks*blockSize), block.Fault{Op: block.OpRead, Err: syscall.EIO})
	if a := expect(t, attach(t, scsi.UnitConfig{Backend: faulty}), cdb16(0x8b, 0, 0, 2), more[:1024], 0,
		"CHECK 3/11/00"); a.Residual != 1024 {
		t.Errorf("residual %d", a.Residual)
	}
}

// TestImmediate has SYNCHRONIZE CACHE and START STOP UNIT answered before the
// flush, whose failure ends the next command as a deferred error.
func TestImmediate(t *testing.T) {
	for name, cdb := range map[string][]byte{
		"SYNCHRONIZE CACHE(10)": cdb10(0x35, 2, 0, 0), "SYNCHRONIZE CACHE(16)": cdb16(0x91, 2, 0, 0),
		"START STOP UNIT": {0x1b, 1, 0, 0, 0, 0},
	} {
		rec := &scsitest.Recorder{Backend: block.NewFaulty(block.NewMem(blocks*blockSize),
			block.Fault{Op: block.OpFlush, Nth: 2, Err: syscall.EIO})}
		target := attach(t, scsi.UnitConfig{Backend: rec})
		for range 2 {
			answer := make(chan scsi.Status, 1)
			target.Submit(&scsi.Command{CDB: cdb, Done: func(r scsi.Result) {
				rec.Note("answered")
				answer <- r.Status
			}})
			if status := <-answer; status != scsi.Good {
				t.Errorf("%s: status %02x", name, status)
			}
			settle(target)
		}
		if log := strings.Join(rec.Log(), ", "); log != "answered, flush, answered, flush failed" {
			t.Errorf("%s: %s", name, log)
		}
		c := &scsi.Command{CDB: testUnitReady, Nexus: 1}
		if a := scsitest.Run(target, c); a.String() != "CHECK 6/29/01" {
			t.Errorf("%s: another initiator gets %v", name, a)
		}
		a := expect(t, target, []byte{0x12, 0, 0, 0, 96, 0}, nil, 96, "GOOD")
		a = expect(t, target, testUnitReady, nil, 0, "CHECK 3/0c/00")
		if a.Sense[0] != 0x71 {
			t.Errorf("%s: response code %02x of a deferred error", name, a.Sense[0])
		}
		expect(t, target, []byte{0x1b, 0, 0, 0, 1, 0}, nil, 0, "GOOD")
		expect(t, target, testUnitReady, nil, 0, "GOOD")
	}
}

// TestDeferredSurvives: a reset does not lose the news of lost data, which REQUEST
// SENSE tells too, in the format that it is asked for.
func TestDeferredSurvives(t *testing.T) {
	faulty := block.NewFaulty(block.NewMem(blocks*blockSize), block.Fault{Op: block.OpFlush, Err: syscall.EIO})
	target := attach(t, scsi.UnitConfig{Backend: faulty})
	expect(t, target, cdb10(0x35, 2, 0, 0), nil, 0, "GOOD")
	settle(target)
	target.LogicalUnitReset(0)
	a := expect(t, target, []byte{0x03, 1, 0, 0, 255, 0}, nil, 255, "GOOD")
	if got := hex.EncodeToString(a.Data); got != "73030c0000000000" {
		t.Errorf("REQUEST SENSE: %s", got)
	}
	expect(t, target, testUnitReady, nil, 0, "CHECK 6/29/03")
}

// mapped is a backend in which each 16th KiB has storage.
type mapped struct {
	*block.Mem
	err error
}

func (m mapped) Mapped(off, n int64) (bool, int64, error) {
	const period = 16 << 10
	at := off % period
	if at < 1<<10 {
		return true, min(1<<10-at, n), m.err
	}
	return false, min(period-at, n), m.err
}

func TestGetLBAStatus(t *testing.T) {
	get := func(lba uint64, alloc uint32) []byte {
		b := cdb16(0x9e, 0x12, lba, alloc)
		return b
	}
	full := attach(t, scsi.UnitConfig{Backend: struct{ block.Backend }{block.NewMem(blocks * blockSize)}})
	a := expect(t, full, get(5, 24), nil, 24, "GOOD")
	if got := hex.EncodeToString(a.Data); got != "00000014"+"00000000"+"0000000000000005"+"000007fb"+"00000000" {
		t.Errorf("without provisioning: %s", got)
	}
	thin := attach(t, scsi.UnitConfig{Backend: mapped{Mem: block.NewMem(blocks * blockSize)}})
	a = expect(t, thin, get(1, 60), nil, 64, "GOOD") // three descriptors and a half
	if got := hex.EncodeToString(a.Data); got != "00000034"+"00000000"+"0000000000000001"+"00000001"+"00000000"+
		"0000000000000002"+"0000001e"+"01000000"+"0000000000000020"+"00000002"+"00000000" {
		t.Errorf("thin: %s", got)
	}
	a = expect(t, thin, get(blocks-1, 4096), nil, 4096, "GOOD")
	if got := hex.EncodeToString(a.Data); got != "00000014"+"00000000"+"00000000000007ff"+"00000001"+"01000000" {
		t.Errorf("the last block: %s", got)
	}
	// A block is mapped if a part of it has storage.
	large := attach(t, scsi.UnitConfig{Backend: mapped{Mem: block.NewMem(blocks * blockSize)}, BlockSize: 4096})
	a = expect(t, large, get(0, 40), nil, 64, "GOOD")
	if got := hex.EncodeToString(a.Data); got !=
		"00000024"+"00000000"+"0000000000000000"+"00000001"+"00000000"+"0000000000000001"+"00000003"+"01000000" {
		t.Errorf("4096 bytes: %s", got)
	}
	expect(t, attach(t, scsi.UnitConfig{Backend: mapped{block.NewMem(blocks * blockSize), syscall.EIO}}), get(0, 24),
		nil, 24, "CHECK 3/11/00")
}

// TestImmediateHoldsUpNothing: once SYNCHRONIZE CACHE or START STOP UNIT with IMMED has been
// answered, its flush holds up no task management function and no other command, and any number of
// them keep one flush that runs and one to come.
func TestImmediateHoldsUpNothing(t *testing.T) {
	for name, cdb := range map[string][]byte{
		"SYNCHRONIZE CACHE(10)": cdb10(0x35, 2, 0, 0), "SYNCHRONIZE CACHE(16)": cdb16(0x91, 2, 0, 0),
		"START STOP UNIT": {0x1b, 1, 0, 0, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			hang, started := make(chan struct{}), make(chan struct{}, 100)
			rec := &scsitest.Recorder{
				Backend: block.NewFaulty(block.NewMem(blocks*blockSize), block.Fault{Op: block.OpFlush, Hang: hang}),
				OnCall:  func(string) { started <- struct{}{} },
			}
			target := attach(t, scsi.UnitConfig{Backend: rec})
			release := sync.OnceFunc(func() { close(hang) })
			t.Cleanup(release)
			for tag := range uint64(50) {
				answered := make(chan scsi.Status, 1)
				target.Submit(&scsi.Command{CDB: cdb, Tag: tag, Attr: scsi.HeadOfQueue,
					Done: func(r scsi.Result) { answered <- r.Status }})
				if status := <-answered; status != scsi.Good {
					t.Fatalf("status %02x", status)
				}
				if tag == 0 {
					<-started // so that this flush is not for the others
				}
			}
			done := make(chan struct{})
			go func() {
				defer close(done)
				target.AbortTask(0, 0, 0)
				target.AbortTaskSet(0, 0)
				target.ClearTaskSet(0, 0)
				target.NexusReset(0)
				scsitest.Run(target, &scsi.Command{CDB: testUnitReady, Attr: scsi.Ordered})
				target.LogicalUnitReset(0)
			}()
			select {
			case <-done:
			case <-time.After(time.Minute):
				t.Fatal("the flush holds them up")
			}
			ended, cancel := context.WithCancel(t.Context())
			cancel()
			unit := target.Unit(0)
			if busy := target.End(ended); !slices.Equal(busy, []*scsi.Unit{unit}) {
				t.Errorf("End: busy %v, while the flush runs", busy)
			}
			rec.Note("released")
			release()
			if err := target.Detach(0); err != nil {
				t.Fatal(err)
			}
			if log := rec.Log(); len(log) != 3 || log[0] != "released" {
				t.Errorf("calls %q, want the flush that hung and one for all later ones", log)
			}
		})
	}
}
