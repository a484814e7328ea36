package scsi_test

import (
	"bytes"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/scsi/scsitest"
)

// TestSubmitWaitsForNothing has storage that hangs under more commands than may wait
// for it: Submit returns, commands that need no storage are answered meanwhile, and
// those that have not begun can be aborted.
func TestSubmitWaitsForNothing(t *testing.T) {
	for waiting, most := range map[int]int{0: scsi.MaxWaiting, 2: 2} {
		submitToHanging(t, waiting, uint64(most))
	}
}

func submitToHanging(t *testing.T, waiting int, most uint64) {
	synctest.Test(t, func(t *testing.T) {
		const more = 6
		hang := make(chan struct{})
		var begun atomic.Int32
		target := attach(t, scsi.UnitConfig{Backend: &scsitest.Recorder{
			Backend: block.NewFaulty(block.NewMem(blocks*blockSize), block.Fault{Op: block.OpRead, Hang: hang}),
			OnCall:  func(string) { begun.Add(1) },
		}, Waiting: waiting})
		var good, aborted atomic.Int32
		for tag := range most + more {
			target.Submit(&scsi.Command{CDB: cdb10(0x28, 0, 0, 1), Tag: tag, In: [][]byte{make([]byte, blockSize)},
				Done: func(r scsi.Result) {
					switch {
					case r.Abort == scsi.AbortedByTask:
						aborted.Add(1)
					case r.Status == scsi.Good:
						good.Add(1)
					}
				}})
			synctest.Wait()
		}
		if n := uint64(begun.Load()); n != most {
			t.Errorf("%d commands wait for the storage, want %d", n, most)
		}
		answered := false
		target.Submit(&scsi.Command{CDB: testUnitReady, Done: func(r scsi.Result) { answered = r.Status == scsi.Good }})
		if !answered {
			t.Error("TEST UNIT READY waits")
		}
		if r := target.AbortTask(0, 0, most+1); r != scsi.FunctionComplete || aborted.Load() != 1 {
			t.Errorf("ABORT TASK of one that waits for others: %v, %d aborted", r, aborted.Load())
		}
		close(hang)
		synctest.Wait()
		if n := int32(most + more - 1); good.Load() != n || begun.Load() != n {
			t.Errorf("%d commands used the storage, %d ended well", begun.Load(), good.Load())
		}
	})
}

// reluctant is storage that would wait each second time it is asked, with half of the
// transfer done.
type reluctant struct {
	*block.Mem
	asked, refused int
}

func (r *reluctant) would(iov [][]byte) bool {
	if r.asked++; r.asked%2 == 0 {
		return true
	}
	r.refused++
	return false
}

func (r *reluctant) ReadVecNow(iov [][]byte, off int64) bool {
	if !r.would(iov) {
		clear(iov[0])
		return false
	}
	return r.Mem.ReadVecNow(iov, off)
}

func (r *reluctant) WriteVecNow(iov [][]byte, off int64) bool {
	if !r.would(iov) {
		_, _ = r.WriteAt(make([]byte, blockSize), off)
		return false
	}
	return r.Mem.WriteVecNow(iov, off)
}

// TestPrompt compares commands done at once with others: the same data, and the answer inside
// Submit or later.
func TestPrompt(t *testing.T) {
	b := &reluctant{Mem: block.NewMem(blocks * blockSize)}
	target := attach(t, scsi.UnitConfig{Backend: b})
	for i := range byte(8) {
		want := bytes.Repeat([]byte{i + 1}, 4*blockSize)
		expect(t, target, cdb10(0x2a, 0, uint32(i)*4, 4), want, 0, "GOOD")
		for range 2 {
			if a := scsitest.Do(target, 0, cdb10(0x28, 0, uint32(i)*4, 4), nil, 4*blockSize); a.Status != scsi.Good ||
				a.Residual != 0 || !bytes.Equal(a.Data, want) {
				t.Errorf("round %d: %v, residual %d", i, a, a.Residual)
			}
		}
	}
	if b.asked != 24 || b.refused != 12 {
		t.Errorf("asked %d times, refused %d times", b.asked, b.refused)
	}

	target = attach(t, scsi.UnitConfig{})
	inline := func(c scsi.Command) (inside bool, status scsi.Status) {
		done := make(chan scsi.Status, 1)
		returned := atomic.Bool{}
		c.Done = func(r scsi.Result) {
			inside = !returned.Load()
			done <- r.Status
		}
		target.Submit(&c)
		returned.Store(true)
		return inside, <-done
	}
	in, out := [][]byte{make([]byte, blockSize)}, [][]byte{make([]byte, blockSize)}
	for name, c := range map[string]scsi.Command{
		"READ(10)":        {CDB: cdb10(0x28, 0, 0, 1), In: in},
		"WRITE(16)":       {CDB: cdb16(0x8a, 0, 0, 1), Out: out},
		"TEST UNIT READY": {CDB: testUnitReady},
		"INQUIRY":         {CDB: []byte{0x12, 0, 0, 0, 36, 0}, In: in},
	} {
		if inside, status := inline(c); !inside || status != scsi.Good {
			t.Errorf("%s: inside Submit %v, status %02x", name, inside, status)
		}
	}
	c := scsi.Command{CDB: cdb10(0x28, 0, blocks, 1), In: in}
	if inside, status := inline(c); !inside || status != scsi.CheckCondition {
		t.Errorf("READ past the end: inside Submit %v, status %02x", inside, status)
	}
}
