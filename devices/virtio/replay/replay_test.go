package replay

import (
	"bytes"
	"context"
	"errors"
	"reflect"
	"slices"
	"testing"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/scsi/trace"
	"gvm/devices/virtio"
	"gvm/devices/virtio/vscsi"
)

// process is a side with gvm's own target, with the disks of the corpus.
func process(t *testing.T, ctx context.Context, w *trace.Writer) Side {
	t.Helper()
	s := Side{Name: "process"}
	for i, d := range corpusDisks {
		u, err := scsi.NewUnit(scsi.UnitConfig{Backend: block.NewMem(min(int64(d.Size), 64<<20)), Serial: string(d.Serial),
			BlockSize: d.BlockSize, ReadOnly: d.ReadOnly})
		if err != nil {
			t.Fatal(err)
		}
		target := scsi.NewTarget()
		if err := target.Attach(0, u); err != nil {
			t.Fatal(err)
		}
		cfg := vscsi.Config{Target: target}
		if w != nil {
			cfg.Observer = w.Device(uint8(i))
		}
		dev, err := vscsi.New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		s.Hosts = append(s.Hosts, host(t, ctx, dev))
	}
	return s
}

func host(t *testing.T, ctx context.Context, dev virtio.Device) *Host {
	t.Helper()
	h, err := NewHost(ctx, dev)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	return h
}

func TestCorpus(t *testing.T) {
	_, list := Corpus()
	ops, names := map[byte]int{}, map[string]bool{}
	for _, r := range list {
		if r.Kind == trace.Command {
			ops[r.CDB[0]]++
			names[r.Op()] = true
		}
	}
	for op := range 256 {
		for action := range byte(32) {
			cdb := []byte{byte(op), action}
			if _, _, ok := scsi.CommandInfo(cdb); ok && !names[scsi.OpcodeName(cdb)] {
				t.Errorf("%s is not in the corpus", scsi.OpcodeName(cdb))
			}
		}
	}
	if len(list) < 300 || len(ops) != 256 {
		t.Errorf("%d requests, %d operation codes", len(list), len(ops))
	}
	again, second := Corpus()
	if _, first := Corpus(); !reflect.DeepEqual(first, second) || len(again.Devices) != len(corpusDisks) {
		t.Error("the corpus changes")
	}
}

// TestRunAlike replays the corpus at two targets that are alike, and what one of
// them recorded at a third.
func TestRunAlike(t *testing.T) {
	_, list := Corpus()
	var file bytes.Buffer
	w, err := trace.NewWriter(&file, trace.Header{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	none := func(d *Difference) error {
		t.Errorf("request %d, %s: %q; %s, %s", d.Number, d.Record.Op(), d.What, d.A.Text(d.Record), d.B.Text(d.Record))
		return nil
	}
	sum, err := Run(ctx, list, []Side{process(t, ctx, w), process(t, ctx, nil)}, none)
	if err != nil || sum.Requests < 300 || sum.Skipped+sum.Different > 0 {
		t.Fatalf("%+v, %v", sum, err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	r, err := trace.NewReader(&file)
	if err != nil {
		t.Fatal(err)
	}
	recorded, err := Load(r)
	if err != nil {
		t.Fatal(err)
	}
	recorded = slices.DeleteFunc(recorded, func(r trace.Record) bool {
		return r.Kind > trace.TaskManagement && r.Kind != trace.Reset && r.Kind != trace.PowerOn
	})
	// COMPARE AND WRITE and VERIFY depend on data that a trace does not have.
	unlike := map[byte]bool{}
	again, err := Run(ctx, recorded, []Side{process(t, ctx, nil)}, func(d *Difference) error {
		unlike[d.Record.CDB[0]] = true
		return nil
	})
	// The one request with data both ways is refused before its data is looked at.
	if err != nil || again.Requests != sum.Requests-1 || again.Skipped != 1 {
		t.Fatalf("%+v, %v", again, err)
	}
	for op := range unlike {
		if !slices.Contains([]byte{0x2f, 0x89, 0x8f, 0xaf}, op) {
			t.Errorf("operation code %#x is answered differently the second time", op)
		}
	}
}

// TestRunDifferent finds a difference of each kind.
func TestRunDifferent(t *testing.T) {
	lun := trace.UnitLUN(0)
	ready, inq := make([]byte, 6), []byte{0x12, 0, 0, 0, 36, 0}
	fake := func(response scsi.Result, data byte) Side {
		return Side{"fake", []*Host{host(t, t.Context(), fakeDevice(t, func(c *scsi.Command) {
			for _, b := range c.In {
				b[0], b[len(b)-1] = data, data
			}
			c.Done(response)
		}))}}
	}
	sense := scsi.Sense{Key: scsi.IllegalRequest, ASC: 0x24}
	for _, tt := range []struct {
		cdb  []byte
		in   uint32
		a, b scsi.Result
		data [2]byte
		want []string
	}{
		{ready, 0, scsi.Result{}, scsi.Result{}, [2]byte{}, nil},
		{ready, 0, scsi.Result{}, scsi.Result{Status: scsi.Busy}, [2]byte{}, []string{"status"}},
		{ready, 0, scsi.Result{}, scsi.Result{Overrun: true}, [2]byte{}, []string{"response"}},
		{ready, 0, scsi.Result{}, scsi.Result{Sense: sense.Fixed()}, [2]byte{}, []string{"sense"}},
		{inq, 36, scsi.Result{}, scsi.Result{Residual: 3}, [2]byte{}, []string{"residual"}},
		{inq, 36, scsi.Result{}, scsi.Result{}, [2]byte{1, 2}, []string{"data"}},
	} {
		list := []trace.Record{{Kind: trace.Command, LUN: lun, CDB: tt.cdb, In: tt.in}}
		var got *Difference
		sum, err := Run(t.Context(), list, []Side{fake(tt.a, tt.data[0]), fake(tt.b, tt.data[1])},
			func(d *Difference) error { got = d; return nil })
		if err != nil || sum.Requests != 1 || sum.Different != min(len(tt.want), 1) {
			t.Fatalf("%q: %+v, %v", tt.want, sum, err)
		}
		if got != nil && (!slices.Equal(got.What, tt.want) ||
			got.A.Text(got.Record) == got.B.Text(got.Record) && tt.want[0] != "data") {
			t.Errorf("%q: %+v", tt.want, got)
		}
		if tt.data[0] != 0 && !slices.Equal(got.Data, []int{0, 35}) {
			t.Errorf("bytes %v differ", got.Data)
		}
	}
}

// TestRunEnds has the wait for an answer that does not come end with its context.
func TestRunEnds(t *testing.T) {
	ctx, stop := context.WithCancelCause(t.Context())
	held := make(chan *scsi.Command, 1)
	h := host(t, ctx, fakeDevice(t, func(c *scsi.Command) { held <- c }))
	why := errors.New("enough")
	ended := make(chan *scsi.Command, 1)
	go func() {
		c := <-held
		stop(why)
		ended <- c
	}()
	list := []trace.Record{{Kind: trace.Command, LUN: trace.UnitLUN(0), CDB: make([]byte, 6)}}
	if _, err := Run(ctx, list, []Side{{"fake", []*Host{h}}}, nil); !errors.Is(err, why) {
		t.Error(err)
	}
	(<-ended).Done(scsi.Result{}) // for Close
}

// TestRunRefuses gives requests that no side can serve.
func TestRunRefuses(t *testing.T) {
	ctx := t.Context()
	side := process(t, ctx, nil)
	unmap := trace.Record{Kind: trace.Command, LUN: trace.UnitLUN(0), CDB: []byte{0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0},
		Out: 24}
	sum, err := Run(ctx, []trace.Record{unmap, {Kind: trace.Lost, Count: 3}}, []Side{side}, nil)
	if err != nil || sum != (Summary{Skipped: 1, Lost: 3}) {
		t.Errorf("%+v, %v", sum, err)
	}
	for _, r := range []trace.Record{
		{Kind: trace.Command, Device: 99, CDB: make([]byte, 6)},
		{Kind: trace.TaskManagement, Device: 99},
		{Kind: trace.Command, CDB: make([]byte, 6), In: MaxData + 1},
		{Kind: trace.Command, CDB: make([]byte, 6), Out: MaxData + 1},
	} {
		if _, err := Run(ctx, []trace.Record{r}, []Side{side}, nil); err == nil {
			t.Errorf("%+v: no error", r)
		}
	}
}

func TestSpans(t *testing.T) {
	for want, n := range map[string][]int{"": nil, "3": {3}, "0-1 5 7-9": {0, 1, 5, 7, 8, 9}} {
		if got := Spans(n); got != want {
			t.Errorf("%v: %q, want %q", n, got, want)
		}
	}
}

// fakeDevice is a virtio SCSI host whose target does what submit says.
func fakeDevice(t *testing.T, submit func(*scsi.Command)) virtio.Device {
	t.Helper()
	d, err := vscsi.New(vscsi.Config{Target: fakeTarget{submit}})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

type fakeTarget struct{ submit func(*scsi.Command) }

func (f fakeTarget) Submit(c *scsi.Command)                                       { f.submit(c) }
func (fakeTarget) AbortTask(scsi.NexusID, scsi.LUN, uint64) (r scsi.TaskResponse) { return }
func (fakeTarget) AbortTaskSet(scsi.NexusID, scsi.LUN) (r scsi.TaskResponse)      { return }
func (fakeTarget) ClearTaskSet(scsi.NexusID, scsi.LUN) (r scsi.TaskResponse)      { return }
func (fakeTarget) LogicalUnitReset(scsi.LUN) (r scsi.TaskResponse)                { return }
func (fakeTarget) PowerOn()                                                       {}
func (fakeTarget) NexusReset(scsi.NexusID) (r scsi.TaskResponse)                  { return }
func (fakeTarget) QueryTask(scsi.NexusID, scsi.LUN, uint64) (r scsi.TaskResponse) { return }
func (fakeTarget) QueryTaskSet(scsi.NexusID, scsi.LUN) (r scsi.TaskResponse)      { return }
