package vscsi

import (
	"bytes"
	"io"
	"reflect"
	"sync"
	"testing"
	"time"

	"gvm/devices/scsi"
	"gvm/devices/scsi/trace"
	"gvm/devices/virtio"
)

// watcher is an observer that keeps its calls; every look at its clock is
// 1000 ns later.
type watcher struct {
	mu   sync.Mutex
	now  time.Duration
	seen []trace.Record
}

func (w *watcher) Now() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.now += 1000
	return w.now
}

func (w *watcher) Observe(r *trace.Record) {
	w.mu.Lock()
	defer w.mu.Unlock()
	c := *r
	c.CDB, c.Sense = bytes.Clone(r.CDB), bytes.Clone(r.Sense)
	w.seen = append(w.seen, c)
}

func (w *watcher) taken() []trace.Record {
	w.mu.Lock()
	defer w.mu.Unlock()
	seen := w.seen
	w.seen = nil
	return seen
}

// TestObserver follows every field of a record, on each way that a request is
// answered.
func TestObserver(t *testing.T) {
	f := &fake{}
	w := &watcher{}
	r := newRig(t, Config{Target: f, Queues: 2, Observer: w}, 0)
	cdb := append([]byte{0x28, 1, 2, 3, 4, 5, 6, 7, 8, 9}, make([]byte, 22)...)
	want := trace.Record{
		Kind: trace.Command, Queue: 1, Time: 1000, Latency: 1000, LUN: [8]byte{1, 0, 0x40, 5}, Tag: 0x1122334455667788,
		Attr: 77, CDB: cdb, In: 6,
		Status: scsi.CheckCondition, Residual: 2, Sense: []byte{0x70, 1, 2},
	}
	check := func(what string) {
		t.Helper()
		if got := w.taken(); len(got) != 1 || !reflect.DeepEqual(got[0], want) {
			t.Errorf("%s:\n%+v, want\n%+v", what, got, want)
		}
	}

	f.submit = func(c *scsi.Command) {
		c.Done(scsi.Result{Status: scsi.CheckCondition, Sense: []byte{0x70, 1, 2}, Residual: 2})
	}
	r.roundTrip(3, header(lun5, 0x1122334455667788, 77, cdb...), nil, 108+6, nil)
	check("data-in")

	f.submit = func(c *scsi.Command) {
		c.Done(scsi.Result{Status: scsi.TaskAborted, Abort: scsi.AbortedByTask, Residual: 7})
	}
	r.roundTrip(2, append(header(lun5, 2, 0, cdb...), "payload"...), nil, 108, nil)
	want.Queue, want.Time, want.Tag, want.Attr, want.In, want.Out = 0, 3000, 2, 0, 0, 7
	want.Status, want.Residual, want.Sense, want.Response = scsi.TaskAborted, 7, []byte{}, 2
	want.Payload = []byte("payload") // to a command that has no blocks to write
	check("data-out, aborted")
	want.Payload = nil

	r.roundTrip(2, header("\x01\x09\x00\x00\x00\x00\x00\x00", 2, 0, cdb...), nil, 108+4, nil)
	want.Time, want.LUN, want.Out, want.In = 5000, [8]byte{1, 9}, 0, 4
	want.Response, want.Status, want.Residual = 3, scsi.Good, 4
	check("a bad target")

	r.roundTrip(2, append(header(lun5, 2, 0, cdb...), "abc"...), nil, 108+4, nil)
	want.Time, want.LUN, want.Out, want.Response, want.Residual = 7000, [8]byte{1, 0, 0x40, 5}, 3, 9, 7
	check("data both ways")

	// No more sense data than the driver gets.
	r.dev.WriteConfig(20, []byte{2, 0, 0, 0})
	f.submit = func(c *scsi.Command) { c.Done(scsi.Result{Status: scsi.CheckCondition, Sense: []byte{0x70, 1, 2}}) }
	r.roundTrip(2, header(lun5, 2, 0, cdb...), nil, 12+2, nil)
	want.Time, want.Out, want.In, want.Response, want.Residual = 9000, 0, 0, 0, 0
	want.Status, want.Sense = scsi.CheckCondition, []byte{0x70, 1}
	check("little sense")

	f.response = scsi.IncorrectLUN
	r.roundTrip(0, tmf(5, lun5, 0x99), nil, 1, nil)
	want = trace.Record{Kind: trace.TaskManagement, Missing: trace.NoQueue | trace.NoResidual, Time: 11000, Latency: 1000,
		LUN: [8]byte{1, 0, 0x40, 5}, Tag: 0x99, Function: 5, Response: 12}
	check("task management")

	if err := r.dev.Reset(); err != nil {
		t.Fatal(err)
	}
	want = trace.Record{Kind: trace.Reset, Missing: trace.NoQueue, Time: 13000}
	check("reset")
	r.dev.PowerOn()
	want = trace.Record{Kind: trace.PowerOn, Missing: trace.NoQueue, Time: 14000}
	check("power on")
}

// lastRecord is an observer that keeps where the record is, which observers must not.
type lastRecord struct {
	at      *trace.Record
	payload int
}

func (*lastRecord) Now() time.Duration { return 0 }

func (l *lastRecord) Observe(r *trace.Record) { l.at, l.payload = r, len(r.Payload) }

// TestPayloadNotKept: a parameter list that was traced is not kept with its chain.
func TestPayloadNotKept(t *testing.T) {
	last, f := &lastRecord{}, &fake{submit: func(c *scsi.Command) { c.Done(scsi.Result{}) }}
	r := newRig(t, Config{Target: f, Observer: last}, 0)
	modeSelect := append([]byte{0x55, 0x10, 0, 0, 0, 0, 0, 0x10, 0, 0}, make([]byte, 22)...)
	r.roundTrip(2, append(header(lun5, 1, 0, modeSelect...), make([]byte, 4096)...), nil, 108, nil)
	if last.payload != 4096 || last.at.Payload != nil {
		t.Errorf("%d bytes were told, and %d are kept", last.payload, len(last.at.Payload))
	}
}

// TestObserverAllocatesNothing is TestNoAllocations with a trace.
func TestObserverAllocatesNothing(t *testing.T) {
	if raceDetector {
		t.Skip("the race detector allocates")
	}
	n := newObservedPath(t, 8)
	if a := testing.AllocsPerRun(500, n.run); a != 0 {
		t.Errorf("%v allocations for 8 requests", a)
	}
}

func newObservedPath(t testing.TB, depth int) *nullPath {
	w, err := trace.NewWriter(io.Discard, trace.Header{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	r := newRig(t, Config{Target: nullTargets(t)["null"], Observer: w.Device(0)},
		virtio.FeatureEventIdx|virtio.FeatureIndirectDesc)
	return pathOn(r, depth)
}

// BenchmarkObserved is BenchmarkNullPath with a trace.
func BenchmarkObserved(b *testing.B) {
	n := newObservedPath(b, 32)
	b.ReportAllocs()
	for i := 0; i < b.N; i += 32 {
		n.run()
	}
}
