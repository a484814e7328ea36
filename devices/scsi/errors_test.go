package scsi_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"syscall"
	"testing"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/scsi/scsitest"
)

// TestErrors checks the sense data of failures of the backend.
func TestErrors(t *testing.T) {
	for _, v := range []struct {
		op   block.Op
		err  error
		cdb  []byte
		out  []byte
		in   int
		want string
	}{
		{block.OpRead, syscall.EIO, cdb10(0x28, 0, 0, 2), nil, 1024, "CHECK 3/11/00"},
		{block.OpRead, syscall.ENOSPC, cdb10(0x28, 0, 0, 2), nil, 1024, "CHECK 3/11/00"},
		{block.OpRead, errors.New("odd"), cdb10(0x2f, 0, 0, 2), nil, 0, "CHECK 3/11/00"},
		{block.OpWrite, syscall.EIO, cdb10(0x2a, 0, 0, 2), make([]byte, 1024), 0, "CHECK 3/0c/00"},
		{block.OpWrite, syscall.EIO, cdb10(0x2a, 8, 0, 2), make([]byte, 1024), 0, "CHECK 3/0c/00"},
		{block.OpWrite, errors.New("odd"), cdb10(0x2a, 0, 0, 2), make([]byte, 1024), 0, "CHECK 3/0c/00"},
		{block.OpWrite, syscall.ENOSPC, cdb10(0x2a, 0, 0, 2), make([]byte, 1024), 0, "CHECK 7/27/07"},
		{block.OpWrite, syscall.EDQUOT, cdb16(0x93, 0, 0, 2), bytes.Repeat([]byte{1}, 512), 0, "CHECK 7/27/07"},
		{block.OpWrite, syscall.EROFS, cdb10(0x2a, 0, 0, 2), make([]byte, 1024), 0, "CHECK 7/27/00"},
		{block.OpFlush, syscall.EIO, syncCache, nil, 0, "CHECK 3/0c/00"},
		{block.OpFlush, syscall.EIO, cdb16(0x91, 0, 0, 0), nil, 0, "CHECK 3/0c/00"},
		{block.OpFlush, syscall.ENOSPC, syncCache, nil, 0, "CHECK 7/27/07"},
		{block.OpFlush, syscall.EIO, []byte{0x1b, 0, 0, 0, 0, 0}, nil, 0, "CHECK 3/0c/00"},
		{block.OpZero, syscall.EIO, cdb16(0x93, 1, 0, 2), nil, 0, "CHECK 3/0c/00"},
		{block.OpDiscard, syscall.EIO, cdb16(0x93, 9, 0, 2), nil, 0, "CHECK 3/0c/00"},
		{block.OpDiscard, syscall.EIO, cdb10(0x42, 0, 0, 24), []byte{0, 22, 0, 16, 23: 0, 19: 1}, 0, "CHECK 3/0c/00"},
	} {
		var reported []error
		f := block.NewFaulty(block.NewMem(blocks*blockSize), block.Fault{Op: v.op, Short: 512, Err: v.err})
		target := attach(t, scsi.UnitConfig{Backend: f, OnError: func(err error) { reported = append(reported, err) }})
		a := expect(t, target, v.cdb, v.out, v.in, v.want)
		if v.cdb[0] != 0x42 && a.Residual != uint32(len(v.out)+v.in) {
			t.Errorf("%s: residual %d of %d", scsi.OpcodeName(v.cdb), a.Residual, len(v.out)+v.in)
		}
		if len(reported) != 1 || !errors.Is(reported[0], v.err) {
			t.Errorf("%s: OnError got %v", scsi.OpcodeName(v.cdb), reported)
		}
	}
}

// TestDiscardUnsupported: a backend that cannot discard after all has zeroes written.
func TestDiscardUnsupported(t *testing.T) {
	for _, v := range []struct{ cdb, out []byte }{
		{cdb10(0x42, 0, 0, 24), []byte{0, 22, 0, 16, 23: 0, 19: 1}},
		{cdb16(0x93, 9, 0, 1), nil},
	} {
		var reported []error
		f := block.NewFaulty(block.NewMem(blocks*blockSize),
			block.Fault{Op: block.OpDiscard | block.OpZero, Err: errors.ErrUnsupported})
		target := attach(t, scsi.UnitConfig{Backend: f, OnError: func(err error) { reported = append(reported, err) }})
		expect(t, target, cdb10(0x2a, 0, 0, 2), filled(1, 2), 0, "GOOD")
		expect(t, target, v.cdb, v.out, 0, "GOOD")
		if a := expect(t, target, cdb10(0x28, 0, 0, 2), nil, 2*blockSize, "GOOD"); !bytes.Equal(a.Data[:blockSize],
			make([]byte, blockSize)) || !bytes.Equal(a.Data[blockSize:], filled(1, 2)[blockSize:]) {
			t.Errorf("%s: wrong data", scsi.OpcodeName(v.cdb))
		}
		if len(reported) > 0 {
			t.Errorf("%s: OnError got %v", scsi.OpcodeName(v.cdb), reported)
		}
	}
}

// TestRetry: a failed operation is repeated as long as Retry returns true, except a flush.
func TestRetry(t *testing.T) {
	unmap := []byte{0, 22, 0, 16, 23: 0, 19: 1}
	for _, v := range []struct {
		op   block.Op
		cdb  []byte
		out  []byte
		in   int
		want string // when it fails three times, and is done again twice
		once string // when it fails once
	}{
		{block.OpRead, cdb10(0x28, 0, 0, 2), nil, 1024, "CHECK 3/11/00", "GOOD"},
		{block.OpWrite, cdb10(0x2a, 0, 0, 2), make([]byte, 1024), 0, "CHECK 7/27/07", "GOOD"},
		{block.OpWrite, cdb10(0x2a, 8, 0, 2), make([]byte, 1024), 0, "CHECK 7/27/07", "GOOD"},
		{block.OpWrite, cdb16(0x93, 0, 0, 2), bytes.Repeat([]byte{1}, 512), 0, "CHECK 7/27/07", "GOOD"},
		{block.OpZero, cdb16(0x93, 1, 0, 2), nil, 0, "CHECK 7/27/07", "GOOD"},
		{block.OpDiscard, cdb16(0x93, 9, 0, 2), nil, 0, "CHECK 7/27/07", "GOOD"},
		{block.OpDiscard, cdb10(0x42, 0, 0, 24), unmap, 0, "CHECK 7/27/07", "GOOD"},
		{block.OpFlush, syncCache, nil, 0, "CHECK 7/27/07", "CHECK 7/27/07"},
		{block.OpFlush, cdb10(0x2a, 8, 0, 2), make([]byte, 1024), 0, "CHECK 7/27/07", "CHECK 7/27/07"},
	} {
		faults := make([]block.Fault, 3)
		for i := range faults {
			faults[i] = block.Fault{Op: v.op, Nth: i + 1, Short: 512, Err: syscall.ENOSPC}
		}
		for n, want := range map[int]string{1: v.once, 3: v.want} {
			var reported, asked int
			f := block.NewFaulty(block.NewMem(blocks*blockSize), faults[:n]...)
			target := attach(t, scsi.UnitConfig{Backend: f, OnError: func(error) { reported++ },
				Retry: func(err error) bool {
					asked++
					return errors.Is(err, syscall.ENOSPC) && asked < 3
				}})
			expect(t, target, v.cdb, v.out, v.in, want)
			wantReported, wantAsked := n, n
			if v.op == block.OpFlush {
				wantReported, wantAsked = 1, 1
			}
			if reported != wantReported || asked != wantAsked {
				t.Errorf("%s, %d failures: reported %d times, asked %d times",
					scsi.OpcodeName(v.cdb), n, reported, asked)
			}
		}
	}
}

// TestScatteredRandom compares random reads and writes with a copy in memory.
func TestScatteredRandom(t *testing.T) {
	for _, b := range []block.Backend{block.NewMem(blocks * blockSize),
		struct{ block.Backend }{block.NewMem(blocks * blockSize)}} {
		target := attach(t, scsi.UnitConfig{Backend: b, Cache: scsi.WriteThrough})
		want := make([]byte, blocks*blockSize)
		r := rand.New(rand.NewPCG(1, 2))
		for range 500 {
			lba, n := r.IntN(blocks-64), 1+r.IntN(64)
			p := make([]byte, n*blockSize)
			var iov [][]byte
			for q := p; len(q) > 0; {
				k := 1 + r.IntN(len(q))
				iov = append(iov, q[:k])
				q = q[k:]
			}
			c := &scsi.Command{CDB: cdb16(0x88, 0, uint64(lba), uint32(n)), In: iov}
			if r.IntN(2) == 0 {
				for i := range p {
					p[i] = byte(r.Uint32())
				}
				copy(want[lba*blockSize:], p)
				c = &scsi.Command{CDB: cdb16(0x8a, 0, uint64(lba), uint32(n)), Out: iov}
			}
			if a := scsitest.Run(target, c); a.Status != scsi.Good || a.Residual != 0 ||
				!bytes.Equal(p, want[lba*blockSize:(lba+n)*blockSize]) {
				t.Fatalf("%s of %d blocks at %d in %d pieces: %v, residual %d, or wrong data",
					scsi.OpcodeName(c.CDB), n, lba, len(iov), a, a.Residual)
			}
		}
	}
}
