package virtq_test

import (
	"math/rand"
	"testing"

	"gvm/devices/virtio/virtq"
)

// TestInterruptSuppression runs the used index over 65535 twice, in batches,
// and compares each decision with the rule itself: interrupt when an entry with
// index used_event was written (virtio 1.3, 2.7.7.2).
func TestInterruptSuppression(t *testing.T) {
	d, q := newPair(t, 64, virtq.FeatureEventIdx)
	rnd := rand.New(rand.NewSource(2))
	buf := d.Alloc(16)
	idx, yes, no := uint16(0), 0, 0
	for total := 0; total < 140000; {
		batch := 1 + rnd.Intn(50)
		event := idx + uint16(rnd.Intn(80)) - 20
		if rnd.Intn(50) == 0 {
			event = uint16(rnd.Intn(1 << 16))
		}
		d.SetUsedEvent(event)
		want := false
		for range batch {
			d.Add(in(buf, 16))
			mustPublish(t, d)
			q.Add(mustNext(t, q), 1)
			want = want || idx == event
			idx++
		}
		if got := q.Publish(); got != want {
			t.Fatalf("used idx %d after a batch of %d, used_event %d: signal %v", idx, batch, event, got)
		}
		if want {
			yes++
		} else {
			no++
		}
		if q.Publish() {
			t.Fatal("Publish of nothing signals")
		}
		for range batch {
			if _, _, ok := d.Used(); !ok {
				t.Fatal("not published")
			}
		}
		total += batch
	}
	if yes < 500 || no < 500 {
		t.Fatalf("%d signals, %d suppressed: one side is hardly tested", yes, no)
	}

	d, q = newPair(t, 4, 0)
	for _, want := range []bool{true, false, true} {
		if want {
			d.EnableCalls()
		} else {
			d.DisableCalls()
		}
		d.Add(in(d.Alloc(16), 16))
		mustPublish(t, d)
		if got := push(q, mustNext(t, q), 1); got != want {
			t.Fatalf("flags: signal %v, want %v", got, want)
		}
		d.Used()
	}
}

// TestAsked: a driver that moves used_event asks for interrupts, and one that leaves it polls.
// Without VIRTIO_F_EVENT_IDX its flag tells.
func TestAsked(t *testing.T) {
	d, q := newPair(t, 4, virtq.FeatureEventIdx)
	d.SetUsedEvent(7)
	for i, want := range []bool{true, false, false} {
		if got := q.Asked(); got != want {
			t.Errorf("call %d: asked %v, want %v", i, got, want)
		}
	}
	if d.SetUsedEvent(6); !q.Asked() {
		t.Error("the driver moved used_event back, and has not asked")
	}
	d, q = newPair(t, 4, 0)
	for range 2 {
		if d.DisableCalls(); q.Asked() {
			t.Error("asked with VIRTQ_AVAIL_F_NO_INTERRUPT")
		}
		if d.EnableCalls(); !q.Asked() {
			t.Error("not asked without VIRTQ_AVAIL_F_NO_INTERRUPT")
		}
	}
}

// TestKickSuppression follows the driver's kicks over the wrap of idx: one
// after EnableKicks, none while the device polls.
func TestKickSuppression(t *testing.T) {
	for _, features := range []uint64{0, virtq.FeatureEventIdx} {
		d, q := newPair(t, 8, features)
		buf := d.Alloc(16)
		send := func() bool {
			d.Add(in(buf, 16))
			return mustPublish(t, d)
		}
		serve := func() {
			push(q, mustNext(t, q), 0)
			d.Used()
		}
		for i := range 70000 / 4 {
			if q.EnableKicks() {
				t.Fatal("empty queue has more")
			}
			if !send() {
				t.Fatalf("features %#x, round %d: no kick though the device waits", features, i)
			}
			q.DisableKicks()
			for range 2 {
				if send() {
					t.Fatalf("features %#x, round %d: kick while the device polls", features, i)
				}
			}
			serve()
			serve()
			serve()
			// The driver adds one between the device's last look and its
			// request: no kick, and EnableKicks says so.
			if send() {
				t.Fatalf("features %#x, round %d: kick while the device polls", features, i)
			}
			if !q.EnableKicks() {
				t.Fatalf("features %#x, round %d: a chain was missed", features, i)
			}
			serve()
			if _, err := d.Kick.Drain(); err != nil {
				t.Fatal(err)
			}
		}
	}
}
