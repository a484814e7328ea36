package scsi_test

import (
	"slices"
	"syscall"
	"testing"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/scsi/scsitest"
)

// TestCachePromise proves by the log of calls which data has reached the backend when a command is
// answered. A line "-" marks each answer.
func TestCachePromise(t *testing.T) {
	p := filled(1, 8)
	write := func(lba uint32) []byte { return cdb10(0x2a, 0, lba, 8) }
	writeFUA := func(lba uint32) []byte { return cdb10(0x2a, 0x08, lba, 8) }
	read := cdb10(0x28, 0, 0, 8)
	readFUA := cdb10(0x28, 0x08, 0, 8)
	wsNDOB := cdb16(0x93, 0x01, 0, 8)
	writeVerify := cdb10(0x2e, 0, 0, 8)
	wceOff, off := selectPage(append([]byte{0x08, 18}, make([]byte, 18)...)...)
	wceOn, on := selectPage(append([]byte{0x08, 18, 0x04}, make([]byte, 17)...)...)
	type step struct{ cdb, out []byte }
	tests := []struct {
		name  string
		cache scsi.CacheMode
		steps []step
		want  []string
	}{
		{"writeback, sync", scsi.WriteBack,
			[]step{{write(0), p}, {write(8), p}, {syncCache, nil}, {syncCache, nil}},
			[]string{"write 0+4096", "-", "write 4096+4096", "-", "flush", "-", "flush", "-"}},
		{"writeback, FUA write", scsi.WriteBack,
			[]step{{write(0), p}, {writeFUA(8), p}},
			[]string{"write 0+4096", "-", "durable 4096+4096", "-"}},
		{"writeback, FUA read of dirty data", scsi.WriteBack,
			[]step{{readFUA, nil}, {write(0), p}, {readFUA, nil}, {readFUA, nil}, {read, nil}},
			[]string{"read 0+4096", "-", "write 0+4096", "-", "flush", "read 0+4096", "-", "read 0+4096", "-",
				"read 0+4096", "-"}},
		{"writeback, WCE off and on", scsi.WriteBack,
			[]step{{write(0), p}, {wceOff, off}, {write(8), p}, {wsNDOB, nil}, {wceOn, on}, {write(16), p}},
			[]string{"write 0+4096", "-", "flush", "-", "durable 4096+4096", "-", "zero 0+4096", "flush", "-", "-",
				"write 8192+4096", "-"}},
		{"writeback, WRITE AND VERIFY", scsi.WriteBack,
			[]step{{writeVerify, p}},
			[]string{"durable 0+4096", "read 0+4096", "-"}},
		{"writeback, stop", scsi.WriteBack,
			[]step{{write(0), p}, {[]byte{0x1b, 0, 0, 0, 0, 0}, nil}},
			[]string{"write 0+4096", "-", "flush", "-"}},
		{"writethrough", scsi.WriteThrough,
			[]step{{write(0), p}, {wsNDOB, nil}, {syncCache, nil}},
			[]string{"durable 0+4096", "-", "zero 0+4096", "flush", "-", "flush", "-"}},
		{"unsafe", scsi.Unsafe,
			[]step{{write(0), p}, {writeFUA(8), p}, {syncCache, nil}, {readFUA, nil}, {wceOff, off}, {write(16), p}},
			[]string{"write 0+4096", "-", "write 4096+4096", "-", "-", "read 0+4096", "-", "-",
				"write 8192+4096", "-"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			rec := &scsitest.Recorder{Backend: block.NewMem(blocks * blockSize)}
			target := attach(t, scsi.UnitConfig{Backend: rec, Cache: tt.cache})
			for _, s := range tt.steps {
				done := make(chan struct{})
				c := &scsi.Command{CDB: s.cdb, Done: func(r scsi.Result) {
					defer close(done)
					if r.Status != scsi.Good {
						t.Errorf("%s: status %02x, sense % x", scsi.OpcodeName(s.cdb), r.Status, r.Sense)
					}
					rec.Note("-")
				}}
				if s.out != nil {
					c.Out = [][]byte{s.out}
				} else {
					c.In = [][]byte{make([]byte, 4096)}
				}
				target.Submit(c)
				<-done
			}
			if got := rec.Log(); !slices.Equal(got, tt.want) {
				t.Errorf("calls\n%q, want\n%q", got, tt.want)
			}
		})
	}
}

// TestCacheWithoutSyncer has a backend without durable writes: each is a write
// and a flush, in this order.
func TestCacheWithoutSyncer(t *testing.T) {
	rec := &scsitest.Recorder{Backend: block.NewMem(blocks * blockSize)}
	plain := struct {
		block.Backend
		block.Vectored
	}{rec, rec}
	target := attach(t, scsi.UnitConfig{Backend: plain, Cache: scsi.WriteThrough})
	expect(t, target, cdb10(0x2a, 0, 0, 1), filled(1, 1), 0, "GOOD")
	if got := rec.Log(); !slices.Equal(got, []string{"write 0+512", "flush"}) {
		t.Errorf("calls %q", got)
	}
}

// TestFlushFailure checks that a flush that failed covers nothing: the data is
// still dirty for the next FUA read.
func TestFlushFailure(t *testing.T) {
	f := block.NewFaulty(block.NewMem(blocks*blockSize), block.Fault{Op: block.OpFlush, Nth: 1, Err: syscall.EIO})
	rec := &scsitest.Recorder{Backend: f}
	target := attach(t, scsi.UnitConfig{Backend: rec})
	expect(t, target, cdb10(0x2a, 0, 0, 1), filled(1, 1), 0, "GOOD")
	expect(t, target, cdb10(0x28, 0x08, 0, 1), nil, blockSize, "CHECK 3/0c/00")
	expect(t, target, cdb10(0x28, 0x08, 0, 1), nil, blockSize, "GOOD")
	if got := rec.Log(); !slices.Equal(got, []string{"write 0+512", "flush failed", "flush", "read 0+512"}) {
		t.Errorf("calls %q", got)
	}
	// Where every write must be durable, a failing flush fails the write.
	f = block.NewFaulty(block.NewMem(blocks*blockSize), block.Fault{Op: block.OpFlush, Err: syscall.EIO})
	target = attach(t, scsi.UnitConfig{Backend: struct{ block.Backend }{f}, Cache: scsi.WriteThrough})
	expect(t, target, cdb10(0x2a, 0, 0, 1), filled(1, 1), 0, "CHECK 3/0c/00")
	expect(t, target, cdb16(0x93, 1, 0, 1), nil, 0, "CHECK 3/0c/00")
}

// TestFlushFailureOfModeSelect: turning the write cache off is GOOD only once the written data is
// durable, however often the flush before has failed.
func TestFlushFailureOfModeSelect(t *testing.T) {
	f := block.NewFaulty(block.NewMem(blocks*blockSize), block.Fault{Op: block.OpFlush, Nth: 1, Err: syscall.EIO})
	rec := &scsitest.Recorder{Backend: f}
	target := attach(t, scsi.UnitConfig{Backend: rec})
	expect(t, target, cdb10(0x2a, 0, 0, 1), filled(1, 1), 0, "GOOD")
	cdb, out := selectPage(append([]byte{0x08, 18}, make([]byte, 18)...)...)
	expect(t, target, cdb, out, 0, "CHECK 3/0c/00")
	for range 2 {
		expect(t, target, cdb, out, 0, "GOOD")
	}
	if got := rec.Log(); !slices.Equal(got, []string{"write 0+512", "flush failed", "flush"}) {
		t.Errorf("calls %q", got)
	}
}

// TestWCE checks the caching page, and that a change by MODE SELECT holds.
func TestWCE(t *testing.T) {
	wce := func(target *scsi.Target, control byte) byte {
		return expect(t, target, []byte{0x1a, 0x08, control<<6 | 0x08, 0, 255, 0}, nil, 255, "GOOD").Data[6]
	}
	target := attach(t, scsi.UnitConfig{})
	setWCE(t, target, false)
	if got := []byte{wce(target, 0), wce(target, 1), wce(target, 2)}; !slices.Equal(got, []byte{0, 4, 4}) {
		t.Errorf("current, changeable, default WCE: %v", got)
	}
	if r := target.LogicalUnitReset(0); r != scsi.FunctionComplete {
		t.Errorf("LOGICAL UNIT RESET: %v", r)
	}
	expect(t, target, testUnitReady, nil, 0, "CHECK 6/29/03")
	if wce(target, 0) != 0 {
		t.Error("a reset of the unit turned the write cache on behind the initiator's back")
	}
	target.PowerOn()
	expect(t, target, testUnitReady, nil, 0, "CHECK 6/29/01")
	if wce(target, 0) != 4 {
		t.Error("power on did not restore WCE")
	}
	target = attach(t, scsi.UnitConfig{Cache: scsi.WriteThrough})
	if got := []byte{wce(target, 0), wce(target, 1), wce(target, 2)}; !slices.Equal(got, []byte{0, 0, 0}) {
		t.Errorf("writethrough: current, changeable, default WCE: %v", got)
	}
	cdb, out := selectPage(append([]byte{0x08, 18, 0x04}, make([]byte, 17)...)...)
	expect(t, target, cdb, out, 0, "CHECK 5/26/00")
}
