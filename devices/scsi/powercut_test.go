package scsi_test

import (
	"encoding/binary"
	"math/rand/v2"
	"sync"
	"testing"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/scsi/scsitest"
)

// numbered is a block that holds its address and the number of the write to it.
func numbered(lba, n uint64) []byte {
	b := make([]byte, blockSize)
	for i := 0; i < blockSize; i += 16 {
		binary.BigEndian.PutUint64(b[i:], lba)
		binary.BigEndian.PutUint64(b[i+8:], n)
	}
	return b
}

// number returns the number of a block, and false for one that is torn or another's.
func number(b []byte, lba uint64) (uint64, bool) {
	n := binary.BigEndian.Uint64(b[8:])
	if n == 0 {
		return 0, allZero(b)
	}
	return n, string(b) == string(numbered(lba, n))
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// promise is the initiators' knowledge of their blocks. The newest write of a block is written
// before it is sent.
type promise struct {
	mu                   sync.Mutex
	more                 sync.Cond // there are more writes
	writes               int       // acknowledged
	sent, acked, durable [64]uint64
}

// TestPowerCut: after a power cut that keeps any part of the cache, every block that was promised
// to be durable is there or overwritten by a later one, and none is torn, with several initiators
// that write, flush and discard at once.
func TestPowerCut(t *testing.T) {
	const fua, flushes, wceOff = 1, 2, 4
	for _, v := range []struct {
		name  string
		cache scsi.CacheMode
		how   int
	}{
		{"flushes", scsi.WriteBack, flushes},
		{"FUA", scsi.WriteBack, fua},
		{"flushes and FUA", scsi.WriteBack, fua | flushes},
		{"WCE off", scsi.WriteBack, wceOff},
		{"write-through", scsi.WriteThrough, 0},
		{"unsafe", scsi.Unsafe, flushes},
	} {
		t.Run(v.name, func(t *testing.T) {
			for seed := range uint64(30) {
				disk := block.NewVolatile(64 * blockSize)
				target := attach(t, scsi.UnitConfig{Backend: disk, Cache: v.cache})
				if v.how&wceOff != 0 {
					setWCE(t, target, false)
				}
				p := &promise{}
				p.more.L = &p.mu
				var all sync.WaitGroup
				for w := range uint64(3) {
					all.Go(func() { powerCutWriter(target, p, v.cache, v.how, w, rand.New(rand.NewPCG(seed, w))) })
				}
				r := rand.New(rand.NewPCG(seed, 99))
				p.mu.Lock()
				for last := r.IntN(300); p.writes < last; {
					p.more.Wait()
				}
				p.mu.Unlock()
				disk.PowerCut(r)
				all.Wait()
				got := make([]byte, 64*blockSize)
				if _, err := disk.Medium().ReadAt(got, 0); err != nil {
					t.Fatal(err)
				}
				for lba := range uint64(64) {
					n, whole := number(got[lba*blockSize:(lba+1)*blockSize], lba)
					lost := v.cache != scsi.Unsafe && n < p.durable[lba]
					if !whole || n > p.sent[lba] || lost {
						t.Fatalf("seed %d, block %d: write %d (whole: %v) of %d, %d was durable",
							seed, lba, n, whole, p.sent[lba], p.durable[lba])
					}
				}
			}
		})
	}
}

// powerCutWriter writes to every third block until there is no power.
func powerCutWriter(target *scsi.Target, p *promise, cache scsi.CacheMode, how int, w uint64, r *rand.Rand) {
	for {
		lba := w + 3*r.Uint64N(21)
		flags, always := byte(0), cache == scsi.WriteThrough || how&4 != 0
		if how&1 != 0 && r.IntN(2) == 0 {
			flags = 0x08
		}
		p.mu.Lock()
		p.sent[lba]++
		n := p.sent[lba]
		p.mu.Unlock()
		c := &scsi.Command{CDB: cdb16(0x8a, flags, lba, 1), Out: [][]byte{numbered(lba, n)}}
		if a := scsitest.Run(target, c); a.Status != scsi.Good {
			return
		}
		p.mu.Lock()
		p.acked[lba] = n
		p.writes++
		p.more.Signal()
		if flags != 0 || always {
			p.durable[lba] = n
		}
		before := p.acked
		p.mu.Unlock()
		if how&2 == 0 || r.IntN(4) != 0 {
			continue
		}
		if a := scsitest.Run(target, &scsi.Command{CDB: syncCache}); a.Status != scsi.Good {
			return
		}
		p.mu.Lock()
		for i, n := range before {
			p.durable[i] = max(p.durable[i], n)
		}
		p.mu.Unlock()
	}
}
