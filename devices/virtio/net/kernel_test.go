package net

import (
	"errors"
	"slices"
	"testing"

	"gvm/devices/virtio"
	"gvm/inspect"
)

// fakeKernel serves nothing.
type fakeKernel struct {
	sizes []uint16 // of the queues that it has
	bases []uint16
	fails error // of Activate
	stops int
}

func (*fakeKernel) Features() uint64 { return featureMrgRxB | 1<<31 }

func (k *fakeKernel) Activate(a virtio.Activation) error {
	k.sizes, k.bases = nil, nil
	for _, q := range a.Queues {
		k.sizes, k.bases = append(k.sizes, q.Size), append(k.bases, q.Base+7)
	}
	return k.fails
}

func (k *fakeKernel) Stop() ([]uint16, error) {
	k.stops++
	return k.bases, nil
}

func (k *fakeKernel) Inspect() [][]inspect.Node {
	return slices.Repeat([][]inspect.Node{{inspect.Int("last_avail_idx", 3)}}, len(k.sizes))
}

// TestKernel: the kernel gets the queue pairs that the driver can use, and the device keeps the
// control queue.
func TestKernel(t *testing.T) {
	r := newRig(t, 2, 0)
	r.stop()
	k := new(fakeKernel)
	r.dev.cfg.Kernel = k
	if f := r.dev.Features(); f&(featureMrgRxB|virtio.FeatureIndirectDesc|virtio.FeatureEventIdx|1<<31) != featureMrgRxB {
		t.Errorf("features %#x", f)
	}
	for features, queues := range map[uint64]int{featureCtrlVQ: 2, featureCtrlVQ | featureMQ: 4} {
		stops := k.stops
		r := newRig(t, 2, 0)
		r.stop()
		r.dev.cfg.Kernel, r.a.Features = k, features
		r.activate()
		if len(k.sizes) != queues || slices.Contains(k.sizes, 0) {
			t.Errorf("the kernel has queues of sizes %d, want %d queues", k.sizes, queues)
		}
		if ack := r.control(queues, 0xff, 0); ack != ackErr {
			t.Errorf("ack %d", ack)
		}
		if _, nodes := r.dev.Inspect(); len(nodes) != 5 || len(nodes[1]) != 1 || len(nodes[queues]) < 2 {
			t.Errorf("queues %v", nodes)
		}
		r.stop()
		want := make([]uint16, 5)
		for i := range queues {
			want[i] = 7
		}
		want[queues] = 1
		for i, q := range r.a.Queues {
			if q.Base != want[i] {
				t.Errorf("queue %d has base %d, want %d", i, q.Base, want[i])
			}
		}
		if k.stops != stops+1 {
			t.Errorf("%d stops", k.stops-stops)
		}
	}
	k.fails = errors.New("no")
	if err := r.dev.Activate(r.a); !errors.Is(err, k.fails) || len(r.dev.workers) != 0 {
		t.Errorf("%v, %d workers", err, len(r.dev.workers))
	}
}
