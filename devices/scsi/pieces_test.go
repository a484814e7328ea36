package scsi_test

import (
	"encoding/binary"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/scsi/scsitest"
)

// calledTuples reports reads.
type calledTuples struct {
	*tuples
	onRead func(string)
}

func (c *calledTuples) ReadTuples(p []byte, block uint64) error {
	c.onRead("read tuples")
	return c.tuples.ReadTuples(p, block)
}

// fragmented reports each read of its map, in which every other block is a hole.
type fragmented struct{ *scsitest.Recorder }

func (f fragmented) Mapped(off, _ int64) (bool, int64, error) {
	f.OnCall("map")
	return off/blockSize%2 == 0, blockSize, nil
}

// copier reports each call of CopyFrom, and copies nothing.
type copier struct{ *scsitest.Recorder }

func (c copier) CopyFrom(block.Backend, int64, int64, int64) error {
	c.OnCall("copy")
	return nil
}

// TestLongCommandsAbort aborts each long command in the middle of its first access to the backend,
// and counts those that come after: the rest of the work is left.
func TestLongCommandsAbort(t *testing.T) {
	const many = 1 << 16 // blocks
	ranges := make([]byte, 8+256*16)
	binary.BigEndian.PutUint16(ranges[2:], 256*16)
	for i := range 256 {
		binary.BigEndian.PutUint64(ranges[8+16*i:], uint64(i)*16)
		binary.BigEndian.PutUint32(ranges[16+16*i:], 8)
	}
	unmap := []byte{0x42, 0, 0, 0, 0, 0, 0, byte(len(ranges) >> 8), byte(len(ranges) & 0xff), 0}
	in := make([]byte, many*blockSize)
	ones := slices.Repeat([]byte{1}, blockSize)
	for _, v := range []struct {
		name     string
		cdb, out []byte
		pi       *calledTuples
	}{
		{"VERIFY", cdb16(0x8f, 0, 0, many), nil, nil},
		{"VERIFY of one block", cdb16(0x8f, 0x06, 0, many), make([]byte, blockSize), nil},
		{"WRITE SAME", cdb16(0x93, 0, 0, many), ones, nil},
		{"ORWRITE", cdb16(0x8b, 0, 0, many), make([]byte, many*blockSize), nil},
		{"UNMAP", unmap, ranges, nil},
		{"SANITIZE", sanitizeCDB(0x01, 5), []byte{31, 0, 0, 1, 0xa5}, nil},
		{"GET LBA STATUS", []byte{0x9e, 0x12, 9: 0, 12: 0x10, 15: 0}, nil, nil},
		{"EXTENDED COPY", nil, nil, nil},
		{"EXTENDED COPY by the backend", nil, nil, nil},
		{"READ with tuples", cdb16(0x88, 0, 0, many), nil, &calledTuples{tuples: newTuples()}},
		{"WRITE with tuples", cdb16(0x8a, 0, 0, many), make([]byte, many*blockSize),
			&calledTuples{tuples: newTuples()}},
	} {
		rec := &scsitest.Recorder{Backend: block.NewMem(many * blockSize)}
		cfg := scsi.UnitConfig{Backend: rec}
		if v.pi != nil {
			cfg.Protection = v.pi
		}
		switch v.name {
		case "GET LBA STATUS":
			cfg.Backend = fragmented{rec}
		case "EXTENDED COPY by the backend":
			cfg.Backend = copier{rec}
		}
		target := attach(t, cfg)
		if v.cdb == nil {
			all := slices.Repeat([][]byte{copySegment(0, 0, 0, many-1, 0, 0)}, 64)
			v.cdb, v.out = copyList(1, 0, [][]byte{cscd(t, target, 0, 0, blockSize)}, all)
		}
		var calls atomic.Int32
		var first sync.Once
		begun, aborting := make(chan struct{}), make(chan struct{})
		rec.OnCall = func(string) {
			calls.Add(1)
			first.Do(func() {
				close(begun)
				<-aborting
			})
		}
		if v.pi != nil {
			v.pi.onRead = rec.OnCall
		}
		answer := make(chan scsi.Result, 1)
		target.Submit(&scsi.Command{CDB: v.cdb, Out: [][]byte{v.out}, In: [][]byte{in}, Tag: 7,
			Done: func(r scsi.Result) { answer <- r }})
		<-begun
		u, ended := target.Unit(0), make(chan error, 1)
		go func() {
			if v.name == "SANITIZE" {
				ended <- target.Detach(0) // an abort does not end the operation
				return
			}
			target.AbortTask(0, 0, 7)
			ended <- nil
		}()
		for !scsi.Aborting(u) {
			time.Sleep(time.Millisecond)
		}
		close(aborting)
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if r := <-answer; r.Abort == scsi.NotAborted {
			t.Errorf("%s: %+v", v.name, r)
		}
		if n := calls.Load(); n > 4 {
			t.Errorf("%s: %d accesses in spite of the abort", v.name, n)
		}
	}
}

// TestDetachAlone: a Detach that waits for a command keeps no other unit from coming and going.
func TestDetachAlone(t *testing.T) {
	begun, hang := make(chan struct{}), make(chan struct{})
	rec := &scsitest.Recorder{Backend: block.NewMem(blocks * blockSize), OnCall: func(string) {
		close(begun)
		<-hang
	}}
	target := attach(t, scsi.UnitConfig{Backend: rec})
	answer, detached := make(chan scsi.Result, 1), make(chan error, 1)
	target.Submit(&scsi.Command{CDB: cdb10(0x28, 0, 0, 1), In: [][]byte{make([]byte, blockSize)},
		Done: func(r scsi.Result) { answer <- r }})
	<-begun
	go func() { detached <- target.Detach(0) }()
	for target.Unit(0) != nil {
		time.Sleep(time.Millisecond)
	}
	other, _ := scsi.EncodeLUN(1)
	changed := make(chan error, 1)
	u, err := scsi.NewUnit(scsi.UnitConfig{Backend: block.NewMem(blocks * blockSize), Serial: "OTHER"})
	if err != nil {
		t.Fatal(err)
	}
	go func() { changed <- errors.Join(target.Attach(other, u), target.Detach(other)) }()
	select {
	case err := <-changed:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Error("another unit waits for the command")
	}
	close(hang)
	if r := <-answer; r.Abort == scsi.NotAborted {
		t.Errorf("the command: %+v", r)
	}
	if err := <-detached; err != nil {
		t.Error(err)
	}
}

// unwritten is a disk in memory that leaves the memory of discarded and zeroed ranges untouched.
type unwritten struct{ *block.Mem }

func (unwritten) Discard(int64, int64) error { return nil }

func (unwritten) Zero(int64, int64) error { return nil }

// TestLongDiscards: UNMAP and WRITE SAME reach the backend in pieces, the first of which has 64
// MiB.
func TestLongDiscards(t *testing.T) {
	ranges := make([]byte, 24)
	binary.BigEndian.PutUint16(ranges[2:], 16)
	binary.BigEndian.PutUint32(ranges[16:], 1<<20) // 512 MiB
	for name, v := range map[string]struct{ cdb, out []byte }{
		"discard": {[]byte{0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0}, ranges},
		"zero":    {cdb16(0x93, 0, 0, 1<<20), make([]byte, blockSize)},
	} {
		rec := &scsitest.Recorder{Backend: unwritten{block.NewMem(1 << 30)}}
		target := attach(t, scsi.UnitConfig{Backend: rec})
		expect(t, target, v.cdb, v.out, 0, "GOOD")
		log := slices.DeleteFunc(rec.Log(), func(call string) bool { return call == "flush" })
		if want := name + " 0+67108864"; len(log) < 2 || log[0] != want {
			t.Errorf("%s: %q, want %q first", name, log, want)
		}
	}
}
