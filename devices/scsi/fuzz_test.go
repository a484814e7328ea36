package scsi_test

import (
	"bytes"
	"encoding/hex"
	"strings"
	"testing"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/scsi/scsitest"
)

// guarded is memory that fails the test when it is used outside its blocks.
type guarded struct {
	*block.Mem
	t *testing.T
}

func (g *guarded) check(n int, off int64) {
	if off < 0 || n < 0 || off%blockSize != 0 || n%blockSize != 0 || off+int64(n) > g.Size() {
		g.t.Errorf("backend used at %d for %d bytes, its size is %d", off, n, g.Size())
	}
}

func (g *guarded) ReadVec(iov [][]byte, off int64) (int, error) {
	g.check(total(iov), off)
	return g.Mem.ReadVec(iov, off)
}

func (g *guarded) WriteVec(iov [][]byte, off int64) (int, error) {
	g.check(total(iov), off)
	return g.Mem.WriteVec(iov, off)
}

func (g *guarded) ReadVecNow(iov [][]byte, off int64) bool {
	_, err := g.ReadVec(iov, off)
	return err == nil
}

func (g *guarded) WriteVecNow(iov [][]byte, off int64) bool {
	_, err := g.WriteVec(iov, off)
	return err == nil
}

func (g *guarded) WriteVecDurable(iov [][]byte, off int64) (int, error) { return g.WriteVec(iov, off) }

func (g *guarded) Discard(off, n int64) error {
	g.check(int(n), off)
	return g.Mem.Discard(off, n)
}

func (g *guarded) Zero(off, n int64) error { return g.Discard(off, n) }

func total(iov [][]byte) int {
	n := 0
	for _, p := range iov {
		n += len(p)
	}
	return n
}

// FuzzCDB sends one command, with data-out and a data-in buffer in two pieces,
// to a small unit.
func FuzzCDB(f *testing.F) {
	for _, list := range [][]scsitest.Vector{scsitest.Answers, scsitest.Refusals, scsitest.ThinRefusals} {
		for _, v := range list {
			cdb, _ := hex.DecodeString(strings.ReplaceAll(v.CDB, " ", ""))
			out, _ := hex.DecodeString(strings.ReplaceAll(v.Out, " ", ""))
			f.Add(cdb, out, uint16(v.InLen), uint16(7), uint64(0), uint8(0))
		}
	}
	for _, p := range scsi.Probes(blockSize, 15) {
		f.Add(p.CDB, make([]byte, p.Out), uint16(p.In), uint16(7), uint64(0), uint8(0))
	}
	f.Add(cdb10(0x2a, 0x08, 1, 2), filled(1, 2), uint16(0), uint16(300), uint64(0), uint8(1))
	f.Add(cdb16(0x88, 0x08, 15, 1), []byte{}, uint16(600), uint16(300), uint64(0), uint8(2))
	f.Add(cdb10(0x2f, 0x02, 1, 1), filled(1, 1), uint16(0), uint16(1), uint64(0), uint8(0))
	f.Add(append(cdb16(0x89, 0, 1, 0)[:13], 1, 0, 0), filled(1, 2), uint16(0), uint16(1), uint64(0), uint8(0))
	f.Add(cdb10(0x41, 0, 1, 3), filled(1, 1), uint16(0), uint16(1), uint64(1<<48), uint8(3))
	f.Fuzz(func(t *testing.T, cdb, out []byte, inLen, cut uint16, lun uint64, attr uint8) {
		g := &guarded{block.NewMem(16 * blockSize), t}
		target := attach(t, scsi.UnitConfig{Backend: g})
		const fence = 0xa5
		room := bytes.Repeat([]byte{fence}, int(inLen)+16)
		in := room[:inLen:inLen]
		sent := bytes.Clone(out)
		i, o := min(int(cut), len(in)), min(int(cut), len(out))
		c := &scsi.Command{LUN: scsi.LUN(lun), CDB: cdb, Attr: scsi.TaskAttr(attr), In: [][]byte{in[:i], in[i:]},
			Out: [][]byte{out[:o], out[o:]}}
		a := scsitest.Run(target, c)
		if a.Residual > uint32(len(in)+len(out)) {
			t.Errorf("residual %d of %d bytes", a.Residual, len(in)+len(out))
		}
		if !bytes.Equal(room[inLen:], bytes.Repeat([]byte{fence}, 16)) || !bytes.Equal(out, sent) {
			t.Error("bytes outside the data-in buffer changed")
		}
		key, _, _ := a.Codes()
		switch a.Status {
		case scsi.Good:
			if len(a.Sense) != 0 {
				t.Errorf("GOOD with sense % x", a.Sense)
			}
		case scsi.CheckCondition:
			if key != scsi.IllegalRequest && key != scsi.Miscompare && key != scsi.UnitAttention {
				t.Errorf("sense key %x with a sound backend: % x", key, a.Sense)
			}
		case scsi.ReservationConflict:
			if cdb[0] != 0x5f { // PERSISTENT RESERVE OUT needs a registration
				t.Error("a reservation conflict without a reservation")
			}
		default:
			t.Errorf("status %02x", a.Status)
		}
		if g.Size() != 16*blockSize {
			t.Errorf("size %d", g.Size())
		}
	})
}
