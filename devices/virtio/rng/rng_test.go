package rng_test

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"gvm/devices/virtio"
	"gvm/devices/virtio/rng"
	"gvm/devices/virtio/virtiotest"
	"gvm/devices/virtio/virtq"
	"gvm/devices/virtio/virtqtest"
	"gvm/guestmem"
)

const base = 0x10000

func activate(t *testing.T, dev *rng.Device) (*virtqtest.Driver, chan error) {
	t.Helper()
	mem := guestmem.Heap(base, 1<<20)
	d, err := virtqtest.New(mem, base, 64, dev.Features())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	broken := make(chan error, 1)
	if err := dev.Activate(virtio.Activation{
		Mem: mem, Features: dev.Features(),
		Queues: []virtio.Queue{{Layout: d.Layout, Kick: d.Kick, Call: d.Call}},
		Broken: func(err error) { broken <- err },
	}); err != nil {
		t.Fatal(err)
	}
	return d, broken
}

func TestFill(t *testing.T) {
	var dev virtio.Device = rng.New()
	if dev.ID() != 4 || len(dev.QueueSizes()) != 1 || len(dev.Config()) != 0 {
		t.Fatal("not an entropy device")
	}
	d, _ := activate(t, dev.(*rng.Device))
	a := d.Alloc(200 << 10)
	ask := func(segs ...virtqtest.Seg) uint32 {
		t.Helper()
		d.Add(segs...)
		if _, err := d.Publish(); err != nil {
			t.Fatal(err)
		}
		_, written, err := d.Wait()
		if err != nil {
			t.Fatal(err)
		}
		return written
	}
	if n := ask(virtqtest.Seg{Addr: a, Len: 40, Write: true}, virtqtest.Seg{Addr: a + 64, Len: 24, Write: true}); n != 64 {
		t.Fatalf("wrote %d of 64", n)
	}
	first := bytes.Clone(d.Bytes(a, 40))
	if zero := make([]byte, 24); bytes.Equal(d.Bytes(a+64, 24), zero) || !bytes.Equal(d.Bytes(a+40, 24), zero) {
		t.Fatal("the bytes are not where the buffers are")
	}
	ask(virtqtest.Seg{Addr: a, Len: 40, Write: true})
	if bytes.Equal(first, d.Bytes(a, 40)) {
		t.Fatal("the same bytes twice")
	}
	if n := ask(virtqtest.Seg{Addr: a, Len: 200 << 10, Write: true}); n != 64<<10 {
		t.Fatalf("wrote %d of a large buffer", n)
	}
	if err := dev.Reset(); err != nil {
		t.Fatal(err)
	}
	if err := dev.Reset(); err != nil {
		t.Fatal(err)
	}
}

func TestRules(t *testing.T) {
	dev := rng.New()
	for _, seg := range []virtqtest.Seg{{Addr: base, Len: 8}, {Addr: base, Len: 0, Write: true}} {
		d, broken := activate(t, dev)
		d.Add(seg)
		if _, err := d.Publish(); err != nil {
			t.Fatal(err)
		}
		var g *virtq.GuestError
		if err := <-broken; !errors.As(err, &g) {
			t.Fatalf("%+v: %v", seg, err)
		}
		if err := dev.Reset(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestUnusedQueue(t *testing.T) {
	dev := rng.New()
	if err := dev.Activate(virtio.Activation{Queues: make([]virtio.Queue, 1)}); err != nil {
		t.Fatal(err)
	}
	if err := dev.Reset(); err != nil {
		t.Fatal(err)
	}
}

// fill is a buffer of the driver.
type fill struct {
	d    *virtqtest.Driver
	addr uint64
}

func (f fill) Next() []virtqtest.Seg {
	clear(f.d.Bytes(f.addr, 32))
	return []virtqtest.Seg{{Addr: f.addr, Len: 24, Write: true}}
}

func (f fill) Check(written uint32) error {
	b, zero := f.d.Bytes(f.addr, 32), make([]byte, 24)
	if written != 24 || bytes.Equal(b[:24], zero) || !bytes.Equal(b[24:], zero[:8]) {
		return fmt.Errorf("%d bytes: % x", written, b)
	}
	return nil
}

func TestStopAndContinue(t *testing.T) {
	for features, rounds := range map[uint64]int{0: 100, virtio.FeatureEventIdx: 1000} {
		virtiotest.StopAndContinue(t, rng.New(), guestmem.Heap(0, virtiotest.QueueSpan), virtiotest.Load{
			Rounds: rounds, Features: features,
			Slots: func(_ int, d *virtqtest.Driver) (slots []virtiotest.Slot) {
				for range 40 {
					slots = append(slots, fill{d, d.Alloc(32)})
				}
				return slots
			},
		})
	}
}
