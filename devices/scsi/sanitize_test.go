package scsi_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/scsi/scsitest"
)

// sanitizeCDB is SANITIZE with flags and service action, and the length of a list.
func sanitizeCDB(b1 byte, n int) []byte {
	return []byte{0x48, b1, 0, 0, 0, 0, 0, byte(n >> 8), byte(n), 0}
}

func TestSanitize(t *testing.T) {
	rec := &scsitest.Recorder{Backend: block.NewMem(blocks * blockSize)}
	target := attach(t, scsi.UnitConfig{Backend: rec})
	data := filled(1, 64)
	medium := func() []byte {
		p := make([]byte, blocks*blockSize)
		if _, err := rec.Backend.ReadAt(p, 0); err != nil {
			t.Fatal(err)
		}
		return p
	}
	expect(t, target, cdb16(0x8a, 0, 0, 64), data, 0, "GOOD")
	rec.Log()
	expect(t, target, sanitizeCDB(0x02, 0), nil, 0, "GOOD")
	if log := strings.Join(rec.Log(), ", "); log != "discard 0+1048576, flush" {
		t.Errorf("BLOCK ERASE: %s", log)
	}
	if !bytes.Equal(medium(), make([]byte, blocks*blockSize)) {
		t.Error("BLOCK ERASE: not all zeroes")
	}
	list := []byte{0x83, 0, 0, 3, 0xa0, 0xb1, 0xc2} // INVERT, three times
	expect(t, target, sanitizeCDB(0x01, len(list)), list, 0, "GOOD")
	want := bytes.Repeat([]byte{0xa0, 0xb1, 0xc2}, 171)[:blockSize]
	if got := medium(); !bytes.Equal(got, bytes.Repeat(want, blocks)) {
		t.Errorf("OVERWRITE: % x", got[:8])
	}
	list[0] = 0x82
	expect(t, target, sanitizeCDB(0x81, len(list)), list, 0, "GOOD")
	ready(t, target)
	if got := medium(); got[0] != 0x5f || got[blocks*blockSize-1] != ^want[blockSize-1] {
		t.Errorf("OVERWRITE with IMMED, inverted: % x", got[:8])
	}
	for _, v := range []struct {
		b1   byte
		n    int
		list []byte
	}{
		{0x02, 8, make([]byte, 8)}, {0x1f, 8, make([]byte, 8)}, {0x01, 0, nil}, {0x01, 4, make([]byte, 4)},
		{0x01, 4 + blockSize + 1, make([]byte, 4+blockSize+1)},
		{0x01, 7, []byte{0, 0, 0, 3, 1, 2, 3}}, {0x01, 7, []byte{1, 0, 0, 0, 1, 2, 3}},
		{0x01, 7, []byte{1, 0, 0, 4, 1, 2, 3}}, {0x03, 0, nil}, {0x00, 0, nil},
	} {
		expect(t, target, sanitizeCDB(v.b1, v.n), v.list, 0, "CHECK 5/24/00")
	}
	expect(t, target, sanitizeCDB(0x1f, 0), nil, 0, "GOOD") // nothing has failed
	expect(t, target, []byte{0x1b, 0, 0, 0, 0, 0}, nil, 0, "GOOD")
	expect(t, target, sanitizeCDB(0x02, 0), nil, 0, "CHECK 2/04/02")
	expect(t, attach(t, scsi.UnitConfig{ReadOnly: true}), sanitizeCDB(0x01, 7), list, 0, "CHECK 7/27/00")
	expect(t, attach(t, scsi.UnitConfig{Backend: struct{ block.Backend }{rec.Backend}}), sanitizeCDB(0x02, 0), nil, 0,
		"CHECK 5/20/00")
}

// TestSanitizeProgress asks while SANITIZE is at it.
func TestSanitizeProgress(t *testing.T) {
	rec := &scsitest.Recorder{Backend: block.NewMem(blocks * blockSize)}
	target := attach(t, scsi.UnitConfig{Backend: rec})
	asked := 0
	rec.OnCall = func(call string) {
		if asked++; asked > 1 {
			return
		}
		expect(t, target, testUnitReady, nil, 0, "CHECK 2/04/1b")
		expect(t, target, cdb10(0x28, 0, 0, 1), nil, blockSize, "CHECK 2/04/1b")
		expect(t, target, []byte{0x12, 0, 0, 0, 96, 0}, nil, 96, "GOOD")
		if a := expect(t, target, []byte{0x03, 0, 0, 0, 18, 0}, nil, 18, "GOOD"); hex.EncodeToString(a.Data) !=
			"700002000000000a00000000041b00000000" {
			t.Errorf("REQUEST SENSE % x", a.Data)
		}
	}
	expect(t, target, sanitizeCDB(0x02, 0), nil, 0, "GOOD")
	if asked != 2 {
		t.Errorf("%d calls", asked)
	}
	expect(t, target, testUnitReady, nil, 0, "GOOD")
}

// TestSanitizeFailure: a unit whose SANITIZE has failed has no medium until one succeeds, or EXIT
// FAILURE MODE is allowed.
func TestSanitizeFailure(t *testing.T) {
	for _, v := range []struct {
		b1   byte // AUSE, IMMED
		want string
		exit string
	}{{0x02, "CHECK 3/31/03", "CHECK 5/24/00"}, {0x22, "CHECK 3/31/03", "GOOD"}, {0x82, "GOOD", "CHECK 5/24/00"},
		{0xa2, "GOOD", "GOOD"}} {
		faulty := block.NewFaulty(block.NewMem(blocks*blockSize),
			block.Fault{Op: block.OpDiscard, Nth: 1, Err: syscall.EIO})
		target := attach(t, scsi.UnitConfig{Backend: faulty})
		expect(t, target, sanitizeCDB(v.b1, 0), nil, 0, v.want)
		ready(t, target)
		expect(t, target, testUnitReady, nil, 0, "CHECK 3/31/03")
		expect(t, target, cdb10(0x2a, 0, 0, 1), make([]byte, blockSize), 0, "CHECK 3/31/03")
		expect(t, target, sanitizeCDB(0x1f, 0), nil, 0, v.exit)
		expect(t, target, sanitizeCDB(0x02, 0), nil, 0, "GOOD")
		expect(t, target, testUnitReady, nil, 0, "GOOD")
	}
}

// ready waits until no sanitize operation is in progress.
func ready(t *testing.T, target *scsi.Target) {
	t.Helper()
	for range 100_000 {
		if scsitest.Do(target, 0, testUnitReady, nil, 0).String() != "CHECK 2/04/1b" {
			return
		}
		time.Sleep(100 * time.Microsecond)
	}
	t.Fatal("SANITIZE is in progress for ever")
}

// TestSanitizeAborted: a SANITIZE that waits for the medium and is aborted leaves no state, with
// IMMED and without, and an abort of it does not wait for the command that has the medium.
func TestSanitizeAborted(t *testing.T) {
	for _, b1 := range []byte{0x02, 0x82, 0xa2} {
		for name, abort := range map[string]func(*scsi.Target){
			"ABORT TASK":  func(target *scsi.Target) { target.AbortTask(0, 0, 7) },
			"NEXUS RESET": func(target *scsi.Target) { target.NexusReset(3) },
		} {
			hang, reading := make(chan struct{}), make(chan struct{})
			rec := &scsitest.Recorder{Backend: block.NewMem(blocks * blockSize)}
			target := attach(t, scsi.UnitConfig{Backend: rec})
			rec.OnCall = func(call string) {
				if strings.HasPrefix(call, "read") {
					close(reading)
					<-hang
				}
			}
			read, sanitize := make(chan scsi.Result, 1), make(chan scsi.Result, 1)
			asNexus(target, 2, testUnitReady, nil, 0)
			target.Submit(&scsi.Command{CDB: cdb10(0x28, 0, 0, 1), In: [][]byte{make([]byte, blockSize)},
				Nexus: 2, Tag: 1,
				Done: func(r scsi.Result) { read <- r }})
			<-reading
			nexus := scsi.NexusID(0)
			if name == "NEXUS RESET" {
				nexus = 3
				asNexus(target, 3, testUnitReady, nil, 0)
			}
			target.Submit(&scsi.Command{CDB: sanitizeCDB(b1, 0), Nexus: nexus, Tag: 7,
				Done: func(r scsi.Result) { sanitize <- r }})
			waitsForMedium(target.Unit(0), 1)
			ended := make(chan struct{})
			go func() {
				abort(target)
				close(ended)
			}()
			select {
			case <-ended:
			case <-time.After(time.Minute):
				t.Errorf("%s waits for the READ", name)
			}
			close(hang)
			if r := <-sanitize; r.Abort == scsi.NotAborted {
				t.Errorf("%s: %+v", name, r)
			}
			expect(t, target, testUnitReady, nil, 0, "GOOD")
			if r := <-read; r.Status != scsi.Good {
				t.Errorf("%s: the READ: %+v", name, r)
			}
			target.LogicalUnitReset(0)
			expect(t, target, testUnitReady, nil, 0, "CHECK 6/29/03")
			expect(t, target, testUnitReady, nil, 0, "GOOD")
		}
	}
}

// TestSanitizeGoesOn: an operation goes on over abort, reset and power on, none of which waits for
// it, and is a failure once the unit was detached meanwhile.
func TestSanitizeGoesOn(t *testing.T) {
	list := []byte{31, 0, 0, 1, 0xa5}
	for name, end := range map[string]func(*scsi.Target){
		"ABORT TASK":         func(target *scsi.Target) { target.AbortTask(0, 0, 7) },
		"LOGICAL UNIT RESET": func(target *scsi.Target) { target.LogicalUnitReset(0) },
		"NEXUS RESET":        func(target *scsi.Target) { target.NexusReset(0) },
		"power on":           func(target *scsi.Target) { target.PowerOn() },
		"Detach": func(target *scsi.Target) {
			u := target.Unit(0)
			if err := target.Detach(0); err != nil {
				t.Error(err)
			}
			if err := target.Attach(0, u); err != nil {
				t.Error(err)
			}
		},
		"Resize": func(target *scsi.Target) {
			if err := target.Unit(0).Resize(func() error { return nil }); err != nil {
				t.Error(err)
			}
		},
	} {
		for _, b1 := range []byte{0x01, 0x81} {
			target := attach(t, scsi.UnitConfig{Backend: block.Null(1 << 60)})
			answer := make(chan scsi.Result, 1)
			target.Submit(&scsi.Command{CDB: sanitizeCDB(b1, len(list)), Out: [][]byte{list}, Tag: 7,
				Done: func(r scsi.Result) { answer <- r }})
			for scsitest.Do(target, 0, testUnitReady, nil, 0).String() != "CHECK 2/04/1b" {
				time.Sleep(time.Millisecond)
			}
			end(target)
			if b1 == 0x81 || name != "Resize" {
				<-answer
			}
			want := "CHECK 2/04/1b"
			if name == "Detach" {
				want = "CHECK 3/31/03"
			}
			if err := scsitest.Ready(target, 0); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s, %02x: %v, want %s", name, b1, err, want)
			}
			if err := target.Detach(0); err != nil {
				t.Error(err)
			}
		}
	}
}

// TestSanitizeLetsResize: a resize waits for a piece of the operation, not for a pass of it.
func TestSanitizeLetsResize(t *testing.T) {
	var calls atomic.Int32
	var first sync.Once
	begun, asked := make(chan struct{}), make(chan struct{})
	rec := &scsitest.Recorder{Backend: block.Null(1 << 30), OnCall: func(string) {
		calls.Add(1)
		first.Do(func() {
			close(begun)
			<-asked
		})
	}}
	target := attach(t, scsi.UnitConfig{Backend: rec})
	list := []byte{1, 0, 0, 1, 0xa5}
	expect(t, target, sanitizeCDB(0x81, len(list)), list, 0, "GOOD")
	<-begun
	u, resized := target.Unit(0), make(chan error, 1)
	go func() {
		resized <- u.Resize(func() error {
			if n := calls.Load(); n > 4 {
				t.Errorf("the resize waited for %d writes", n)
			}
			return nil
		})
	}()
	waitsForMedium(u, 1)
	close(asked)
	if err := <-resized; err != nil {
		t.Error(err)
	}
	if err := target.Detach(0); err != nil {
		t.Error(err)
	}
}

// writeBack is a backend whose WriteBack goes on until it is stopped.
type writeBack struct {
	*scsitest.Recorder
	begun chan struct{}
}

func (w writeBack) WriteBack(ctx context.Context) error {
	close(w.begun)
	<-ctx.Done()
	return ctx.Err()
}

// TestSanitizeWriteBack ends an operation that makes its data durable: it is stopped, and does not
// begin to flush.
func TestSanitizeWriteBack(t *testing.T) {
	for name, end := range map[string]func(*scsi.Target){
		"Detach": func(target *scsi.Target) {
			if err := target.Detach(0); err != nil {
				t.Error(err)
			}
		},
		"End": func(target *scsi.Target) {
			if busy := target.End(t.Context()); busy != nil {
				t.Errorf("busy: %v", busy)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := writeBack{&scsitest.Recorder{Backend: block.NewMem(blocks * blockSize)}, make(chan struct{})}
			b.OnCall = func(call string) {
				if call == "flush" {
					t.Error("a flush")
				}
			}
			target := attach(t, scsi.UnitConfig{Backend: b})
			list := []byte{31, 0, 0, 1, 0xa5}
			expect(t, target, sanitizeCDB(0x81, len(list)), list, 0, "GOOD")
			<-b.begun
			end(target)
		})
	}
}

// waitsForMedium returns when n commands or changes wait for the medium of u.
func waitsForMedium(u *scsi.Unit, n int) {
	for scsi.MediumWaits(u) < n {
		time.Sleep(time.Millisecond)
	}
}

// TestReadBehindSanitize: a READ that waits for the medium behind a SANITIZE finds the operation
// when it gets the medium.
func TestReadBehindSanitize(t *testing.T) {
	reading, hang, answered := make(chan struct{}), make(chan struct{}), make(chan struct{})
	var first atomic.Bool
	rec := &scsitest.Recorder{Backend: block.NewMem(blocks * blockSize), OnCall: func(call string) {
		switch {
		case strings.HasPrefix(call, "write"):
			<-answered
		case first.CompareAndSwap(false, true):
			close(reading)
			<-hang
		}
	}}
	target := attach(t, scsi.UnitConfig{Backend: rec})
	var done [3]chan string
	list := []byte{1, 0, 0, 1, 0xa5}
	for i, c := range []scsi.Command{
		{CDB: cdb10(0x28, 0, 0, 1), In: [][]byte{make([]byte, blockSize)}},
		{CDB: sanitizeCDB(0x81, len(list)), Out: [][]byte{list}},
		{CDB: cdb10(0x28, 0, 0, 1), In: [][]byte{make([]byte, blockSize)}},
	} {
		done[i] = make(chan string, 1)
		go func() { done[i] <- scsitest.Run(target, &c).String() }()
		if i == 0 {
			<-reading
		}
		waitsForMedium(target.Unit(0), i)
	}
	close(hang)
	for i, want := range []string{"GOOD", "GOOD", "CHECK 2/04/1b"} {
		if got := <-done[i]; got != want {
			t.Errorf("command %d: %s, want %s", i, got, want)
		}
	}
	close(answered)
}

// TestMemoryAfterDone scribbles over the CDB and the buffers of each command upon its answer, which
// are the initiator's again, for the commands that go on after it.
func TestMemoryAfterDone(t *testing.T) {
	list := []byte{0x81, 0, 0, 2, 0xa0, 0xb1}
	for _, v := range []struct{ cdb, out []byte }{
		{sanitizeCDB(0x81, len(list)), list}, {sanitizeCDB(0x82, 0), nil},
		{cdb10(0x35, 0x02, 0, 0), nil}, {cdb16(0x91, 0x02, 0, 0), nil}, {[]byte{0x1b, 1, 0, 0, 0, 0}, nil},
	} {
		faulty := block.NewFaulty(block.NewMem(blocks*blockSize),
			block.Fault{Op: block.OpFlush | block.OpDiscard, Err: syscall.EIO})
		target := attach(t, scsi.UnitConfig{Backend: faulty})
		cdb, out, done := bytes.Clone(v.cdb), bytes.Clone(v.out), make(chan struct{})
		c := &scsi.Command{CDB: cdb, Out: [][]byte{out}}
		c.Done = func(scsi.Result) {
			for i := range cdb {
				cdb[i] = 0xff // AUSE among others
			}
			for i := range out {
				out[i] = 0xff
			}
			*c = scsi.Command{LUN: 1 << 63, Nexus: 99}
			close(done)
		}
		target.Submit(c)
		<-done
		settle(target)
		if v.cdb[0] != 0x48 {
			expect(t, target, testUnitReady, nil, 0, "CHECK 3/0c/00") // deferred, to the nexus that sent it
			continue
		}
		ready(t, target)
		expect(t, target, testUnitReady, nil, 0, "CHECK 3/31/03")
		expect(t, target, sanitizeCDB(0x1f, 0), nil, 0, "CHECK 5/24/00") // AUSE was 0
	}
}

// TestStopAborted: a START STOP UNIT that is aborted while it flushes, or cannot flush, does not
// stop the unit.
func TestStopAborted(t *testing.T) {
	hang, flushing := make(chan struct{}), make(chan struct{})
	rec := &scsitest.Recorder{Backend: block.NewMem(blocks * blockSize)}
	target := attach(t, scsi.UnitConfig{Backend: rec})
	rec.OnCall = func(string) {
		close(flushing)
		<-hang
	}
	answer := make(chan scsi.Result, 1)
	target.Submit(&scsi.Command{CDB: []byte{0x1b, 0, 0, 0, 0, 0}, Tag: 7, Done: func(r scsi.Result) {
		answer <- r
	}})
	<-flushing
	aborted := make(chan struct{})
	go func() {
		target.AbortTask(0, 0, 7)
		close(aborted)
	}()
	for !scsi.Aborting(target.Unit(0)) {
		time.Sleep(time.Millisecond)
	}
	close(hang)
	<-aborted
	if r := <-answer; r.Abort != scsi.NotAborted {
		expect(t, target, testUnitReady, nil, 0, "GOOD")
	}
	faulty := block.NewFaulty(block.NewMem(blocks*blockSize), block.Fault{Op: block.OpFlush, Err: syscall.EIO})
	target = attach(t, scsi.UnitConfig{Backend: faulty})
	expect(t, target, []byte{0x1b, 0, 0, 0, 0, 0}, nil, 0, "CHECK 3/0c/00")
	expect(t, target, testUnitReady, nil, 0, "GOOD")
}
