package scsi_test

import (
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/scsi/scsitest"
)

// elapsed does c and returns its answer and how long it took.
func elapsed(target *scsi.Target, c scsi.Command) (scsitest.Answer, time.Duration) {
	start := time.Now()
	a := scsitest.Run(target, &c)
	return a, time.Since(start).Round(time.Microsecond)
}

// TestLimitGivesBackAborted resets the unit under more commands than the limit lets run: those
// that never ran cost nothing.
func TestLimitGivesBackAborted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		target := attach(t, scsi.UnitConfig{Backend: block.NewMem(blocks * blockSize),
			IOPS: block.Limit{Rate: 1000}, Bandwidth: block.Limit{Rate: 1000 * blockSize}})
		const total, each = 30000, 256
		var ran, ended atomic.Int32
		for i := range total {
			c := reads(1, 1)[0]
			c.Tag, c.Nexus = uint64(i), 1
			c.Done = func(r scsi.Result) {
				if ended.Add(1); r.Status == scsi.Good {
					ran.Add(1)
				}
			}
			target.Submit(c)
			if i%each == each-1 {
				synctest.Wait()
				target.LogicalUnitReset(0)
			}
		}
		target.PowerOn()
		if n := ran.Load(); ended.Load() != total || n == 0 || n > 100 {
			t.Errorf("%d of %d commands answered, %d ran at once, want at most a burst of 100", ended.Load(), total, n)
		}
		for scsitest.Do(target, 0, testUnitReady, nil, 0).Status != scsi.Good {
		}
		if a, d := elapsed(target, *reads(1, 1)[0]); a.Status != scsi.Good || d > time.Millisecond {
			t.Errorf("the next read: %v after %v, want at most 1ms", a, d)
		}
	})
}

// TestLimitGivesBackPlace aborts the first of those that wait: the others move up.
func TestLimitGivesBackPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := scsi.UnitConfig{Backend: block.NewMem(blocks * blockSize),
			Bandwidth: block.Limit{Rate: blockSize, Burst: blockSize}}
		target := attach(t, cfg)
		start, at := time.Now(), make([]time.Duration, 5)
		for i, size := range []int{1, 50, 1, 1, 1} {
			c := reads(1, size)[0]
			c.Tag = uint64(i)
			c.Done = func(scsi.Result) { at[i] = time.Since(start).Round(time.Millisecond) }
			target.Submit(c)
		}
		time.Sleep(10 * time.Second)
		target.AbortTask(0, 0, 1)
		time.Sleep(time.Minute)
		synctest.Wait()
		// The wait of the aborted command gives no burst.
		const s = time.Second
		if want := []time.Duration{0, 10 * s, 10 * s, 11 * s, 12 * s}; !slices.Equal(at, want) {
			t.Errorf("answered after %v, want %v", at, want)
		}
	})
}

// TestLimitGivesBackTurn stops the unit under a command that waits: a command that has its turn
// then and is refused gives it back.
func TestLimitGivesBackTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		target := attach(t, scsi.UnitConfig{Backend: block.NewMem(blocks * blockSize),
			IOPS:      block.Limit{Rate: 1, Burst: 1},
			Bandwidth: block.Limit{Rate: blockSize, Burst: blockSize}})
		expect(t, target, cdb10(0x28, 0, 0, 1), nil, blockSize, "GOOD")
		waits := make(chan scsi.Result, 1)
		c := reads(1, 1)[0]
		c.Done = func(r scsi.Result) { waits <- r }
		target.Submit(c)
		expect(t, target, []byte{0x1b, 0, 0, 0, 0, 0}, nil, 0, "GOOD")
		if r := <-waits; r.Status != scsi.CheckCondition {
			t.Errorf("the command that waited: %+v", r)
		}
		expect(t, target, []byte{0x1b, 0, 0, 0, 1, 0}, nil, 0, "GOOD")
		if a, d := elapsed(target, *reads(1, 1)[0]); a.Status != scsi.Good || d > 0 {
			t.Errorf("the next read: %v after %v", a, d)
		}
	})
}

// TestLimitGivesBackCopy aborts an EXTENDED COPY that waits for its second segment: neither unit
// has that counted.
func TestLimitGivesBackCopy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := scsi.UnitConfig{Backend: block.NewMem(blocks * blockSize),
			Bandwidth: block.Limit{Rate: blockSize, Burst: blockSize}}
		target := attach(t, cfg)
		cfg.Backend = block.NewMem(blocks * blockSize)
		attachMore(t, target, cfg)
		cscds := [][]byte{cscd(t, target, 0, 0, blockSize), cscd(t, target, 1, 0, blockSize)}
		cdb, out := copyList(1, 0, cscds, [][]byte{copySegment(0, 0, 1, 1, 0, 0), copySegment(0, 0, 1, 50, 0, 0)})
		done := make(chan scsi.Result, 1)
		target.Submit(&scsi.Command{CDB: cdb, Tag: 7, Out: [][]byte{out}, Done: func(r scsi.Result) { done <- r }})
		synctest.Wait()
		if target.AbortTask(0, 0, 7); (<-done).Abort != scsi.AbortedByTask {
			t.Error("the copy is not aborted")
		}
		for lun := range 2 {
			c := reads(1, 1)[0]
			c.LUN, _ = scsi.EncodeLUN(lun)
			if a, d := elapsed(target, *c); a.Status != scsi.Good || lun == 0 && d != time.Second ||
				lun == 1 && d != 0 {
				// both were used by the first segment, one second ago for LUN 1
				t.Errorf("LUN %d: %v after %v", lun, a, d)
			}
		}
	})
}

// TestLimitRefusedCostsNothing does commands that use no medium, or less of it than their CDB
// could, and then a read, which must not wait for them.
func TestLimitRefusedCostsNothing(t *testing.T) {
	type list = []scsi.Command
	in := func(cdb []byte, n int) scsi.Command {
		return scsi.Command{CDB: cdb, In: [][]byte{make([]byte, n)}}
	}
	out := func(cdb []byte, n int) scsi.Command {
		return scsi.Command{CDB: cdb, Out: [][]byte{make([]byte, n)}}
	}
	none := func(cdb ...byte) scsi.Command { return scsi.Command{CDB: cdb} }
	verify := func(flags byte, n uint16) scsi.Command { return none(cdb10(0x2f, flags, 0, n)...) }
	naca := cdb10(0x28, 0, 0, 1)
	naca[9] = 0x04
	compare := cdb16(0x89, 0, 0, 0)
	compare[13] = 2
	unmap := []byte{0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0}
	beyond := make([]byte, 24)
	beyond[1], beyond[3], beyond[8], beyond[19] = 22, 16, 0xff, 1
	aca := in(cdb10(0x28, 0, 0, 1), blockSize)
	aca.Attr = scsi.ACA
	other := in(cdb10(0x28, 0, 0, 4), 4*blockSize)
	other.Nexus = 9
	reserve, stop, start := none(0x16, 0, 0, 0, 0, 0), none(0x1b, 0, 0, 0, 0, 0), none(0x1b, 0, 0, 0, 1, 0)
	type test struct {
		do   list
		want string // the answer to the last of them
		wait int    // seconds that the read waits
	}
	for name, v := range map[string]test{
		"VERIFY with BYTCHK 2":         {list{verify(0x04, 8)}, "CHECK 5/24/00", 0},
		"VERIFY with VRPROTECT":        {list{verify(0x20, 8)}, "CHECK 5/24/00", 0},
		"VERIFY out of range":          {list{none(cdb10(0x2f, 0, blocks, 8)...)}, "CHECK 5/21/00", 0},
		"VERIFY without data":          {list{verify(0x02, 8)}, "CHECK 5/0e/03", 0},
		"VERIFY of no block":           {list{verify(0, 0)}, "GOOD", 0},
		"VERIFY":                       {list{verify(0, 8)}, "GOOD", 1}, // it has waited itself
		"READ of no block":             {list{in(cdb10(0x28, 0, 0, 0), 8*blockSize)}, "GOOD", 0},
		"READ into nothing":            {list{none(cdb10(0x28, 0, 0, 8)...)}, "GOOD", 0},
		"READ into a large buffer":     {list{in(cdb10(0x28, 0, 0, 1), 8*blockSize)}, "GOOD", 1},
		"READ out of range":            {list{in(cdb10(0x28, 0, blocks, 8), 8*blockSize)}, "CHECK 5/21/00", 0},
		"READ with RDPROTECT":          {list{in(cdb10(0x28, 0x20, 0, 8), 8*blockSize)}, "CHECK 5/24/00", 0},
		"READ with NACA":               {list{in(naca, blockSize)}, "CHECK 5/24/00", 0},
		"READ with the attribute ACA":  {list{aca}, "CHECK 5/0e/03", 0},
		"WRITE with too little data":   {list{out(cdb10(0x2a, 0, 0, 8), blockSize)}, "CHECK 5/0e/03", 0},
		"WRITE of no block":            {list{out(cdb10(0x2a, 0, 0, 0), 8*blockSize)}, "GOOD", 0},
		"WRITE AND VERIFY, BYTCHK 3":   {list{out(cdb10(0x2e, 6, 0, 8), 8*blockSize)}, "CHECK 5/24/00", 0},
		"ORWRITE with too little data": {list{out(cdb16(0x8b, 0, 0, 8), blockSize)}, "CHECK 5/0e/03", 0},
		"COMPARE AND WRITE, half":      {list{out(compare, 2*blockSize)}, "CHECK 5/0e/03", 0},
		"WRITE SAME of no block":       {list{out(cdb10(0x41, 0, 0, 0), blockSize)}, "CHECK 5/24/00", 0},
		"WRITE SAME with ANCHOR":       {list{out(cdb10(0x41, 0x10, 0, 8), blockSize)}, "CHECK 5/24/00", 0},
		"WRITE SAME without data":      {list{none(cdb10(0x41, 0, 0, 8)...)}, "CHECK 5/0e/03", 0},
		"UNMAP out of range":           {list{{CDB: unmap, Out: [][]byte{beyond}}}, "CHECK 5/21/00", 0},
		"UNMAP of nothing":             {list{none(0x42, 0, 0, 0, 0, 0, 0, 0, 0, 0)}, "GOOD", 0},
		"PRE-FETCH":                    {list{none(cdb10(0x34, 0, 0, 8)...)}, "GOOD", 0},
		"READ DEFECT DATA":             {list{in([]byte{0x37, 0, 0, 0, 0, 0, 0, 0, 4, 0}, 4)}, "GOOD", 0},
		"SYNCHRONIZE CACHE off range":  {list{none(cdb10(0x35, 0, blocks, 8)...)}, "CHECK 5/21/00", 0},
		"a stopped unit":               {list{stop, in(cdb10(0x28, 0, 0, 8), 8*blockSize), start}, "GOOD", 0},
		"a unit attention":             {list{other}, "CHECK 6/29/01", 0},
		"a reservation":                {list{reserve, {CDB: testUnitReady, Nexus: 9}, other}, "STATUS 18", 0},
		"an unknown service action":    {list{none(cdb16(0x9e, 0x1f, 0, 8)...)}, "CHECK 5/24/00", 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				target := attach(t, scsi.UnitConfig{Backend: block.NewMem(blocks * blockSize),
					IOPS: block.Limit{Rate: 1, Burst: 1}, Bandwidth: block.Limit{Rate: blockSize, Burst: blockSize}})
				for i, c := range v.do {
					a, d := elapsed(target, c)
					if i == len(v.do)-1 && a.String() != v.want {
						t.Errorf("%v, want %s", a, v.want)
					}
					if d > 0 && name != "VERIFY" { // which reads more than the burst
						t.Errorf("answered after %v", d)
					}
				}
				if a, d := elapsed(target, *reads(1, 1)[0]); a.String() != "GOOD" ||
					d != time.Duration(v.wait)*time.Second {
					t.Errorf("the read after it: %v after %v, want %ds", a, d, v.wait)
				}
			})
		})
	}
}
