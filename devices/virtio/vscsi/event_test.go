package vscsi

import (
	"bytes"
	"testing"

	"gvm/devices/scsi"
	"gvm/devices/virtio"
)

const allEvents = featureHotplug | featureChange | virtio.FeatureEventIdx

// settle returns when the worker has all event buffers.
func (r *rig) settle() {
	r.t.Helper()
	if err := r.dev.workers[eventQueue].Barrier(); err != nil {
		r.t.Fatal(err)
	}
}

func TestEvents(t *testing.T) {
	const lun300 = scsi.LUN(0x412c) << 48
	for _, tt := range []struct {
		name   string
		typ    EventType
		lun    scsi.LUN
		reason Reason
		want   []byte
	}{
		{"rescan", TransportReset, 5 << 48, ResetRescan, []byte{1, 0, 0, 0, 1, 0, 0, 5, 0, 0, 0, 0, 1, 0, 0, 0}},
		{"removed", TransportReset, lun300, ResetRemoved, []byte{1, 0, 0, 0, 1, 0, 0x41, 0x2c, 0, 0, 0, 0, 2, 0, 0, 0}},
		{"hard reset", TransportReset, 1 << 48, ResetHard, []byte{1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0}},
		{"capacity", ParamChange, 2 << 48, ParamReason(0x2a, 0x09),
			[]byte{3, 0, 0, 0, 1, 0, 0, 2, 0, 0, 0, 0, 0x2a, 0x09, 0, 0}},
	} {
		r := newRig(t, Config{Target: &fake{submit: good}}, allEvents)
		segs := r.send(1, nil, nil, 20, []int{3, 9})
		r.settle()
		if got := r.dev.Event(tt.typ, tt.lun, tt.reason); got != Delivered {
			t.Errorf("%s: delivery %d", tt.name, got)
		}
		if got := r.result(1, segs); !bytes.Equal(got, tt.want) {
			t.Errorf("%s: % x", tt.name, got)
		}
	}
}

func TestEventsMissed(t *testing.T) {
	r := newRig(t, Config{Target: &fake{submit: good}}, allEvents)
	for lun := scsi.LUN(1); lun <= 2; lun++ {
		if got := r.dev.Event(TransportReset, lun<<48, ResetRescan); got != Missed {
			t.Errorf("an event without a buffer: delivery %d", got)
		}
	}
	// The next buffer comes back at once: some event was lost.
	missed := []byte{0, 0, 0, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	if got := r.roundTrip(1, nil, nil, 16, nil); !bytes.Equal(got, missed) {
		t.Fatalf("% x", got)
	}
	segs := r.send(1, nil, nil, 16, nil)
	r.settle()
	r.dev.Event(TransportReset, 3<<48, ResetRescan)
	if got := r.result(1, segs); !bytes.Equal(got, []byte{1, 0, 0, 0, 1, 0, 0, 3, 0, 0, 0, 0, 1, 0, 0, 0}) {
		t.Fatalf("% x", got)
	}
}

func TestEventsNeedFeatures(t *testing.T) {
	for _, tt := range []struct {
		features uint64
		typ      EventType
		reason   Reason
		sent     bool
	}{
		{featureChange, TransportReset, ResetRescan, false},
		{featureChange, TransportReset, ResetRemoved, false},
		{0, TransportReset, ResetHard, true},
		{featureHotplug, TransportReset, ResetRemoved, true},
		{featureHotplug, ParamChange, ParamReason(0x2a, 9), false},
		{featureChange, ParamChange, ParamReason(0x2a, 9), true},
	} {
		r := newRig(t, Config{Target: &fake{submit: good}}, tt.features)
		r.send(1, nil, nil, 16, nil)
		r.settle()
		want := Unwanted
		if tt.sent {
			want = Delivered
		}
		if got := r.dev.Event(tt.typ, 1<<48, tt.reason); got != want {
			t.Errorf("%+v: delivery %d", tt, got)
		}
		if _, _, ok := r.q[1].Used(); ok != tt.sent {
			t.Errorf("%+v: sent %v", tt, ok)
		}
	}
}

// TestEventsAcrossReset: a reset forgets buffers and lost events; an inactive
// device has no driver to tell.
func TestEventsAcrossReset(t *testing.T) {
	r := newRig(t, Config{Target: &fake{submit: good}}, allEvents)
	r.dev.Event(TransportReset, 1<<48, ResetRescan)
	r.send(2, header(lun5, 1, 0), nil, 108, nil)
	if err := r.dev.Reset(); err != nil {
		t.Fatal(err)
	}
	if got := r.dev.Event(TransportReset, 1<<48, ResetRescan); got != Inactive {
		t.Errorf("an event without a driver: delivery %d", got)
	}
	r.activate(allEvents)
	r.send(1, nil, nil, 16, nil)
	r.settle()
	if _, _, ok := r.q[1].Used(); ok {
		t.Fatal("an event of before the reset")
	}
	if err := r.dev.Reset(); err != nil {
		t.Fatal(err)
	}
	r.activate(allEvents)
	r.dev.Event(TransportReset, 1<<48, ResetRescan) // not into the old buffer
	if got := r.roundTrip(1, nil, nil, 16, nil); got[3] != 0x80 {
		t.Fatalf("% x", got)
	}
}
