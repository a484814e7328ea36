package scsi

import (
	"testing"
	"testing/synctest"
	"time"
)

// TestPieces: the first piece has 64 MiB; pieces grow to 4 GiB while each is quick, and shrink to
// 2,048 blocks while each is slow.
func TestPieces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := (&Unit{blockSize: 512}).pieces()
		const all = 1 << 40
		if n := p.next(all); n != 64<<20/512 {
			t.Errorf("the first piece has %d blocks", n)
		}
		if n := p.next(all); n != 128<<20/512 {
			t.Errorf("after a quick piece: %d blocks", n)
		}
		for range 20 {
			p.next(all)
		}
		if n := p.next(all); n != 4<<30/512 {
			t.Errorf("the largest piece has %d blocks", n)
		}
		for range 40 {
			time.Sleep(time.Second)
			p.next(all)
		}
		if n := p.next(all); n != 2*2048 { // it was quick
			t.Errorf("after slow pieces: %d blocks", n)
		}
		if n := p.next(7); n != 7 {
			t.Errorf("the rest of 7 blocks: %d", n)
		}
	})
}
