package scsi_test

import (
	"context"
	"errors"
	"runtime"
	"slices"
	"sync"
	"testing"
	"testing/synctest"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/scsi/scsitest"
)

// asNexus does a command of another initiator.
func asNexus(target *scsi.Target, id scsi.NexusID, cdb, out []byte, inLen int) scsitest.Answer {
	c := &scsi.Command{CDB: cdb, Nexus: id, Out: [][]byte{out}, In: [][]byte{make([]byte, inLen)}}
	a := scsitest.Run(target, c)
	a.Data = c.In[0]
	return a
}

func TestUnitAttention(t *testing.T) {
	m := block.NewMem(blocks * blockSize)
	u, err := scsi.NewUnit(scsi.UnitConfig{Backend: m, Serial: "a"})
	if err != nil {
		t.Fatal(err)
	}
	target := scsi.NewTarget()
	if err := target.Attach(0, u); err != nil {
		t.Fatal(err)
	}
	inquiry, reportLUNs := []byte{0x12, 0, 0, 0, 36, 0}, []byte{0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0}
	requestSense := []byte{3, 0, 0, 0, 18, 0}
	// INQUIRY and REPORT LUNS neither report nor clear it.
	expect(t, target, inquiry, nil, 36, "GOOD")
	expect(t, target, reportLUNs, nil, 16, "GOOD")
	expect(t, target, cdb10(0x28, 0, 0, 1), nil, blockSize, "CHECK 6/29/01")
	expect(t, target, cdb10(0x28, 0, 0, 1), nil, blockSize, "GOOD")
	// Another initiator has its own, which REQUEST SENSE takes.
	if a := asNexus(target, 7, requestSense, nil, 18); a.Status != scsi.Good || a.Data[2] != 6 || a.Data[12] != 0x29 ||
		a.Data[13] != 1 {
		t.Errorf("REQUEST SENSE of nexus 7: %v, % x", a, a.Data)
	}
	if a := asNexus(target, 7, testUnitReady, nil, 0); a.String() != "GOOD" {
		t.Errorf("after REQUEST SENSE: %v", a)
	}
	// MODE SELECT notifies the other nexuses only.
	cdb, out := control(0x04, 0)
	expect(t, target, cdb, out, 0, "GOOD")
	expect(t, target, testUnitReady, nil, 0, "GOOD")
	if a := asNexus(target, 7, testUnitReady, nil, 0); a.String() != "CHECK 6/2a/01" {
		t.Errorf("nexus 7 after MODE SELECT: %v", a)
	}
	// In order; a reset replaces pending conditions; REPORT LUNS clears its own.
	other, err := scsi.NewUnit(scsi.UnitConfig{Backend: block.NewMem(4096), Serial: "b"})
	if err != nil {
		t.Fatal(err)
	}
	if err := target.Attach(1<<48, other); err != nil {
		t.Fatal(err)
	}
	cdb, out = control(0, 0)
	if a := asNexus(target, 7, cdb, out, 0); a.String() != "CHECK 6/3f/0e" {
		t.Errorf("nexus 7 after Attach: %v", a)
	}
	if a := asNexus(target, 7, cdb, out, 0); a.String() != "GOOD" {
		t.Error(a)
	}
	expect(t, target, testUnitReady, nil, 0, "CHECK 6/3f/0e")
	expect(t, target, testUnitReady, nil, 0, "CHECK 6/2a/01")
	expect(t, target, testUnitReady, nil, 0, "GOOD")
	if err := target.Detach(1 << 48); err != nil {
		t.Fatal(err)
	}
	expect(t, target, reportLUNs, nil, 16, "GOOD")
	expect(t, target, testUnitReady, nil, 0, "GOOD")
	if a := asNexus(target, 7, testUnitReady, nil, 0); a.String() != "CHECK 6/3f/0e" {
		t.Errorf("nexus 7 after Detach: %v", a)
	}
	cdb, out = control(0x04, 0)
	expect(t, target, cdb, out, 0, "GOOD")
	target.NexusReset(7)
	expect(t, target, testUnitReady, nil, 0, "GOOD")
	for _, want := range []string{"CHECK 6/29/07", "GOOD"} {
		if a := asNexus(target, 7, testUnitReady, nil, 0); a.String() != want {
			t.Errorf("nexus 7 after I_T NEXUS RESET: %v, want %s", a, want)
		}
	}
}

// resizable is memory that grows.
type resizable struct{ *block.Mem }

func TestResized(t *testing.T) {
	r := &resizable{block.NewMem(8192)}
	u, err := scsi.NewUnit(scsi.UnitConfig{Backend: r, Serial: "a"})
	if err != nil {
		t.Fatal(err)
	}
	target := scsi.NewTarget()
	if err := target.Attach(0, u); err != nil {
		t.Fatal(err)
	}
	if err := scsitest.Ready(target, 0); err != nil {
		t.Fatal(err)
	}
	r.Mem = block.NewMem(16384)
	expect(t, target, cdb10(0x28, 0, 16, 1), nil, blockSize, "CHECK 5/21/00")
	if err := u.Resized(); err != nil {
		t.Fatal(err)
	}
	expect(t, target, cdb10(0x28, 0, 16, 1), nil, blockSize, "CHECK 6/2a/09")
	expect(t, target, cdb10(0x28, 0, 16, 1), nil, blockSize, "GOOD")
}

// TestResize makes a unit smaller under reads of its end: none of them sees the
// backend between its sizes.
func TestResize(t *testing.T) {
	r := &resizable{block.NewMem(16384)}
	u, err := scsi.NewUnit(scsi.UnitConfig{Backend: r, Serial: "a"})
	if err != nil {
		t.Fatal(err)
	}
	target := scsi.NewTarget()
	if err := target.Attach(0, u); err != nil {
		t.Fatal(err)
	}
	if err := scsitest.Ready(target, 0); err != nil {
		t.Fatal(err)
	}
	failure := errors.New("no")
	if err := u.Resize(func() error { return failure }); err != failure || u.Blocks() != 32 {
		t.Errorf("a change that failed: %v, %d blocks", err, u.Blocks())
	}
	expect(t, target, cdb10(0x28, 0, 31, 1), nil, blockSize, "GOOD")
	var readers sync.WaitGroup
	for range 2 {
		readers.Go(func() {
			for {
				switch a := scsitest.Do(target, 0, cdb10(0x28, 0, 31, 1), nil, blockSize); a.String() {
				case "GOOD", "CHECK 6/2a/09":
				case "CHECK 5/21/00":
					return
				default:
					t.Error(a)
					return
				}
			}
		})
	}
	if err := u.Resize(func() error { r.Mem = block.NewMem(8192); return nil }); err != nil || u.Blocks() != 16 {
		t.Errorf("%v, %d blocks", err, u.Blocks())
	}
	readers.Wait()
	// A size that the unit cannot have changes nothing.
	if err := u.Resize(func() error { r.Mem = block.NewMem(8191); return nil }); err == nil || u.Blocks() != 16 {
		t.Errorf("%v, %d blocks", err, u.Blocks())
	}
}

func TestStopped(t *testing.T) {
	target := attach(t, scsi.UnitConfig{})
	startStop := func(b byte) []byte { return []byte{0x1b, 0, 0, 0, b, 0} }
	expect(t, target, startStop(0), nil, 0, "GOOD")
	expect(t, target, testUnitReady, nil, 0, "CHECK 2/04/02")
	expect(t, target, cdb10(0x28, 0, 0, 1), nil, blockSize, "CHECK 2/04/02")
	expect(t, target, modeSense8, nil, 255, "GOOD")
	if a := expect(t, target, []byte{3, 0, 0, 0, 18, 0}, nil, 18, "GOOD"); a.Data[2] != 2 || a.Data[12] != 4 ||
		a.Data[13] != 2 {
		t.Errorf("REQUEST SENSE while stopped: % x", a.Data)
	}
	expect(t, target, startStop(1), nil, 0, "GOOD")
	expect(t, target, testUnitReady, nil, 0, "GOOD")
}

// stuck is a target whose reads of block 0 hang until release is called.
func stuck(t *testing.T) (target *scsi.Target, started chan struct{}, release func()) {
	hang := make(chan struct{})
	started = make(chan struct{}, 16)
	rec := &scsitest.Recorder{
		Backend: block.NewFaulty(block.NewMem(blocks*blockSize),
			block.Fault{Op: block.OpRead, Len: blockSize, Hang: hang}),
		OnCall: func(call string) { started <- struct{}{} },
	}
	target = attach(t, scsi.UnitConfig{Backend: rec})
	var once sync.Once
	release = func() { once.Do(func() { close(hang) }) }
	t.Cleanup(release)
	return target, started, release
}

// journal is a list that goroutines add to.
type journal struct {
	mu    sync.Mutex
	lines []string
}

func (l *journal) add(s string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, s)
}

// TestAnsweredIsNotCleared: of two nexuses with a command in the task set, one has its
// answer already. That its commands were cleared is only told to the other.
func TestAnsweredIsNotCleared(t *testing.T) {
	for _, f := range []struct {
		name string
		do   func(*cluster)
	}{
		{"CLEAR TASK SET", func(c *cluster) { c.ClearTaskSet(1, 0) }},
		{"PREEMPT AND ABORT", func(c *cluster) {
			cdb := []byte{0x5f, prAbort, wear, 0, 0, 0, 0, 0, 24, 0}
			done := make(chan scsi.Result, 1)
			c.Submit(&scsi.Command{CDB: cdb, Nexus: 1, Attr: scsi.HeadOfQueue, Out: [][]byte{parameters(0x11, 0, 0)},
				Done: func(r scsi.Result) { done <- r }})
			if r := <-done; r.Status != scsi.Good {
				c.t.Errorf("%+v", r)
			}
		}},
	} {
		t.Run(f.name, func(t *testing.T) {
			c := newCluster(t, scsi.UnitConfig{})
			c.keys(3)
			c.out(1, prReserve, wear, 0x11, 0, "GOOD")
			answering, release, ended := make(chan struct{}), make(chan struct{}), make(chan scsi.Result, 1)
			go c.Submit(&scsi.Command{CDB: testUnitReady, Nexus: 3, Done: func(scsi.Result) {
				close(answering)
				<-release
			}})
			<-answering
			if r := c.QueryTaskSet(3, 0); r != scsi.FunctionComplete {
				t.Errorf("QUERY TASK SET of a nexus whose command has been answered: %v", r)
			}
			// It waits for the first one to leave the set.
			go c.Submit(&scsi.Command{CDB: testUnitReady, Nexus: 2, Attr: scsi.Ordered, Done: func(r scsi.Result) {
				ended <- r
				close(release)
			}})
			for c.QueryTaskSet(2, 0) != scsi.FunctionSucceeded {
				runtime.Gosched()
			}
			f.do(c)
			if r := <-ended; r.Abort != scsi.AbortedByTask {
				t.Errorf("the command that waits: %+v", r)
			}
			for nexus, want := range map[scsi.NexusID]bool{2: true, 3: false} {
				got := false
				for range 3 { // PREEMPT has something to tell too
					got = asNexus(c.Target, nexus, testUnitReady, nil, 0).String() == "CHECK 6/2f/00" || got
				}
				if got != want {
					t.Errorf("nexus %d was told that its commands were cleared: %t", nexus, got)
				}
			}
		})
	}
}

// TestAbort aborts a read that hangs in the backend, by every function that aborts: the function
// returns after the command has been answered, and the answer reports that it was aborted.
func TestAbort(t *testing.T) {
	for _, f := range []struct {
		name  string
		do    func(*scsi.Target) scsi.TaskResponse
		cause scsi.Abort
		after string // sense data of the next command of the nexus
	}{
		{"ABORT TASK", func(t *scsi.Target) scsi.TaskResponse { return t.AbortTask(3, 0, 42) },
			scsi.AbortedByTask, "GOOD"},
		{"ABORT TASK SET", func(t *scsi.Target) scsi.TaskResponse { return t.AbortTaskSet(3, 0) },
			scsi.AbortedByTask, "GOOD"},
		{"CLEAR TASK SET", func(t *scsi.Target) scsi.TaskResponse { return t.ClearTaskSet(0, 0) }, scsi.AbortedByTask,
			"CHECK 6/2f/00"},
		{"LOGICAL UNIT RESET", func(t *scsi.Target) scsi.TaskResponse { return t.LogicalUnitReset(0) },
			scsi.AbortedByReset, "CHECK 6/29/03"},
		{"I_T NEXUS RESET", func(t *scsi.Target) scsi.TaskResponse { return t.NexusReset(3) }, scsi.AbortedByReset,
			"CHECK 6/29/07"},
	} {
		t.Run(f.name, func(t *testing.T) {
			target, started, release := stuck(t)
			asNexus(target, 3, testUnitReady, nil, 0) // unit attention
			var l journal
			var got scsi.Result
			go target.Submit(&scsi.Command{CDB: cdb10(0x28, 0, 0, 1), Nexus: 3, Tag: 42,
				In: [][]byte{make([]byte, blockSize)}, Done: func(r scsi.Result) {
					got = r
					l.add("answered")
				}})
			<-started
			if r := target.QueryTask(3, 0, 42); r != scsi.FunctionSucceeded {
				t.Errorf("QUERY TASK: %v", r)
			}
			if r := target.QueryTask(3, 0, 41); r != scsi.FunctionComplete {
				t.Errorf("QUERY TASK of another tag: %v", r)
			}
			if r := target.QueryTaskSet(0, 0); r != scsi.FunctionComplete {
				t.Errorf("QUERY TASK SET of another nexus: %v", r)
			}
			if r := target.AbortTask(0, 0, 42); r != scsi.FunctionComplete {
				t.Errorf("ABORT TASK of another nexus: %v", r)
			}
			l.add("abort")
			done := make(chan scsi.TaskResponse)
			go func() {
				r := f.do(target)
				l.add("function complete")
				done <- r
			}()
			release()
			if r := <-done; r != scsi.FunctionComplete {
				t.Errorf("response %v", r)
			}
			if want := []string{"abort", "answered", "function complete"}; !slices.Equal(l.lines, want) {
				t.Errorf("order %q, want %q", l.lines, want)
			}
			// The read may have ended before the function saw it: then it was
			// answered normally, and before the function too.
			if got.Abort != scsi.NotAborted &&
				(got.Abort != f.cause || got.Status != scsi.TaskAborted || got.Residual != blockSize) {
				t.Errorf("result %+v", got)
			}
			if a := asNexus(target, 3, testUnitReady, nil, 0); got.Abort != scsi.NotAborted && a.String() != f.after {
				t.Errorf("next command: %v, want %s", a, f.after)
			}
			if r := target.QueryTask(3, 0, 42); r != scsi.FunctionComplete {
				t.Errorf("QUERY TASK afterwards: %v", r)
			}
		})
	}
	target := attach(t, scsi.UnitConfig{})
	for _, r := range []scsi.TaskResponse{
		target.AbortTask(0, 9<<48, 1), target.AbortTaskSet(0, 9<<48), target.ClearTaskSet(0, 9<<48),
		target.LogicalUnitReset(9 << 48),
		target.QueryTask(0, 9<<48, 1), target.QueryTaskSet(0, 9<<48),
	} {
		if r != scsi.IncorrectLUN {
			t.Errorf("function for a LUN without a unit: %v", r)
		}
	}
}

// TestAbortWaiting aborts a command that an ORDERED one holds up: it ends with
// nothing done, while the ORDERED one still runs.
func TestAbortWaiting(t *testing.T) {
	target, started, release := stuck(t)
	var wg sync.WaitGroup
	submit := func(tag uint64, attr scsi.TaskAttr, cdb, out []byte) chan scsi.Result {
		c := make(chan scsi.Result, 1)
		wg.Go(func() {
			target.Submit(&scsi.Command{CDB: cdb, Tag: tag, Attr: attr, Out: [][]byte{out},
				In: [][]byte{make([]byte, blockSize)}, Done: func(r scsi.Result) { c <- r }})
		})
		return c
	}
	ordered := submit(1, scsi.Ordered, cdb10(0x28, 0, 0, 1), nil)
	<-started
	waiting := submit(2, scsi.Simple, cdb10(0x2a, 0, 9, 1), filled(3, 1))
	for target.QueryTask(0, 0, 2) != scsi.FunctionSucceeded {
		runtime.Gosched()
	}
	if r := target.AbortTask(0, 0, 2); r != scsi.FunctionComplete {
		t.Errorf("ABORT TASK: %v", r)
	}
	select {
	case r := <-waiting:
		if r.Abort != scsi.AbortedByTask || r.Residual != 2*blockSize {
			t.Errorf("aborted command: %+v", r)
		}
	default:
		t.Error("ABORT TASK returned before the command was answered")
	}
	if head := <-submit(3, scsi.HeadOfQueue, cdb10(0x28, 0, 9, 1), nil); head.Status != scsi.Good {
		t.Errorf("HEAD OF QUEUE beside ORDERED: %+v", head)
	}
	select {
	case r := <-ordered:
		t.Errorf("the ordered command ended: %+v", r)
	default:
	}
	release()
	if r := <-ordered; r.Status != scsi.Good {
		t.Errorf("ordered command: %+v", r)
	}
	wg.Wait()
	if a := scsitest.Do(target, 0, cdb10(0x28, 0, 9, 1), nil, blockSize); !slices.Equal(a.Data,
		make([]byte, blockSize)) {
		t.Error("an aborted write that had not begun wrote something")
	}
}

// TestRemove takes a unit away under a command, which finishes unless the context ends first. The
// unit is gone for other commands meanwhile.
func TestRemove(t *testing.T) {
	for _, patient := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) { testRemove(t, patient) })
	}
}

func testRemove(t *testing.T, patient bool) {
	target, started, release := stuck(t)
	done := make(chan scsi.Result, 1)
	go target.Submit(&scsi.Command{CDB: cdb10(0x28, 0, 0, 1), In: [][]byte{make([]byte, blockSize)},
		Done: func(r scsi.Result) { done <- r }})
	<-started
	ctx, cancel := context.WithCancel(t.Context())
	removed := make(chan error, 1)
	go func() { removed <- target.Remove(ctx, 0) }()
	synctest.Wait()
	if a := scsitest.Do(target, 0, testUnitReady, nil, 0); a.String() != "CHECK 5/25/00" || !a.NoLUN {
		t.Errorf("another command: %v", a)
	}
	if len(removed)+len(done) > 0 {
		t.Error("Remove does not wait for the command")
	}
	if !patient {
		cancel()
		synctest.Wait()
		if len(removed) > 0 {
			t.Error("Remove does not wait for the aborted command")
		}
	}
	release()
	if err := <-removed; err != nil {
		t.Error(err)
	}
	select {
	case r := <-done:
		if aborted := r.Abort == scsi.AbortedByReset; aborted == patient || patient && r.Status != scsi.Good {
			t.Errorf("patient %v: %+v", patient, r)
		}
	default:
		t.Error("Remove returned before the command was answered")
	}
	cancel()
}

// TestDetach takes a unit away under a command: the command is answered before
// Detach returns, and the next one finds no unit.
func TestDetach(t *testing.T) {
	target, started, release := stuck(t)
	done := make(chan scsi.Result, 1)
	go target.Submit(&scsi.Command{CDB: cdb10(0x28, 0, 0, 1), In: [][]byte{make([]byte, blockSize)},
		Done: func(r scsi.Result) { done <- r }})
	<-started
	unit := target.Unit(0)
	go release()
	if err := target.Detach(0); err != nil {
		t.Fatal(err)
	}
	select {
	case <-done:
	default:
		t.Error("Detach returned before the command was answered")
	}
	if a := scsitest.Do(target, 0, testUnitReady, nil, 0); a.String() != "CHECK 5/25/00" || !a.NoLUN {
		t.Errorf("after Detach: %v", a)
	}
	if target.Detach(0) == nil {
		t.Error("detached twice")
	}
	if err := target.Attach(2<<48, unit); err != nil {
		t.Fatal(err)
	}
	if a := scsitest.Do(target, 2<<48, testUnitReady, nil, 0); a.String() != "CHECK 6/29/01" {
		t.Errorf("attached again: %v", a)
	}
}

// TestConcurrent has many queues at once, with all attributes and resets among
// them; the race detector and the exactly-once check of scsitest watch.
func TestConcurrent(t *testing.T) {
	target := attach(t, scsi.UnitConfig{})
	var wg sync.WaitGroup
	for q := range 8 {
		wg.Go(func() {
			for i := range 100 {
				cdb, out := cdb10(0x2a, byte(i&8), uint32(8*q), 8), filled(byte(q), 8)
				if i%3 == 0 {
					cdb, out = syncCache, nil
				}
				c := &scsi.Command{CDB: cdb, Tag: uint64(i), Nexus: scsi.NexusID(q), Attr: scsi.TaskAttr(i % 7 % 3),
					Out: [][]byte{out}}
				a := scsitest.Run(target, c)
				key, _, _ := a.Codes()
				if a.Status != scsi.Good && a.Abort == scsi.NotAborted && key != scsi.UnitAttention {
					t.Error(a)
				}
				if q == 0 && i%20 == 0 {
					target.LogicalUnitReset(0)
				}
			}
		})
	}
	wg.Wait()
}

// TestCompareAndWriteAlone has a write arrive while COMPARE AND WRITE of the same
// block is about to read: it must wait, or the comparison would fail.
func TestCompareAndWriteAlone(t *testing.T) {
	target, started, release := stuck(t)
	cdb := cdb16(0x89, 0, 0, 0)
	cdb[13] = 1
	out := append(make([]byte, blockSize), filled(1, 1)...)
	var wg sync.WaitGroup
	wg.Go(func() { expect(t, target, cdb, out, 0, "GOOD") })
	<-started
	wg.Go(func() {
		c := &scsi.Command{CDB: cdb10(0x2a, 0, 0, 1), Tag: 5, Out: [][]byte{filled(2, 1)}}
		if a := scsitest.Run(target, c); a.Status != scsi.Good {
			t.Error(a)
		}
	})
	for target.QueryTask(0, 0, 5) != scsi.FunctionSucceeded {
		runtime.Gosched()
	}
	for range 1000 { // time for a write that does not wait
		runtime.Gosched()
	}
	release()
	wg.Wait()
	if a := expect(t, target, cdb10(0x28, 0, 0, 1), nil, blockSize, "GOOD"); !slices.Equal(a.Data, filled(2, 1)) {
		t.Error("the block does not hold the later write")
	}
}
