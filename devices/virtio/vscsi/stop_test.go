package vscsi

import (
	"bytes"
	"encoding/binary"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/virtio"
	"gvm/devices/virtio/virtiotest"
	"gvm/devices/virtio/virtqtest"
	"gvm/guestmem"
)

// slow is a target that has most commands wait, and counts all.
type slow struct {
	*scsi.Target
	commands atomic.Uint64
}

func (s *slow) Submit(c *scsi.Command) {
	n := s.commands.Add(1)
	if n%4 == 0 {
		s.Target.Submit(c)
		return
	}
	go func() {
		time.Sleep(time.Duration(n%7) * 10 * time.Microsecond)
		s.Target.Submit(c)
	}()
}

// counted is a slot whose requests are counted.
type counted struct {
	virtiotest.Slot
	sent *atomic.Uint64
}

func (c counted) Next() []virtqtest.Seg {
	c.sent.Add(1)
	return c.Slot.Next()
}

// eventDriver is the driver of the event queue: it records the delivered events.
type eventDriver struct {
	t                *testing.T
	dev              *Device
	addr             map[uint16]uint64 // of the buffers that the device has, by head
	spare            []uint64
	delivered, heard int
	missed           bool // an event is lost, and the driver does not know yet
	told             int  // how often the driver was told of that
}

func (e *eventDriver) round(queues []*virtqtest.Driver, stopped bool) {
	d := queues[eventQueue]
	if e.addr == nil {
		e.addr, e.spare = map[uint16]uint64{}, []uint64{d.Alloc(eventLen)}
	}
	for head, _, ok := d.Used(); ok; head, _, ok = d.Used() {
		typ := binary.LittleEndian.Uint32(d.Bytes(e.addr[head], eventLen))
		if typ&eventsMissed != 0 {
			e.told++
			if !e.missed {
				e.t.Error("the driver is told of an event that was not lost")
			}
			e.missed = false
		}
		if typ&^eventsMissed != noEvent {
			e.heard++
		}
		e.spare = append(e.spare, e.addr[head])
	}
	if waiting := len(e.dev.events.waiting); stopped && e.heard+waiting != e.delivered {
		e.t.Fatalf("the driver has heard of %d events, %d wait for the device to continue, the device has delivered %d",
			e.heard, waiting, e.delivered)
	}
	for len(e.spare) > 0 && !stopped {
		addr := e.spare[0]
		e.spare = e.spare[1:]
		head, _ := d.Add(virtqtest.Seg{Addr: addr, Len: eventLen, Write: true})
		e.addr[head] = addr
		if _, err := d.Publish(); err != nil {
			e.t.Fatal(err)
		}
	}
	switch e.dev.Event(ParamChange, 0, ParamReason(0x2a, 0x09)) {
	case Delivered:
		e.delivered++
	case Missed:
		e.missed = true
	default:
		e.t.Error("the device has no driver")
	}
}

// TestStopAndContinue stops the device under load in all of its queues. Every request reaches the
// target once, and every event that was delivered the driver.
func TestStopAndContinue(t *testing.T) {
	const queues, slots = 2, 5
	heard, told := 0, 0
	for _, tt := range []struct {
		name     string
		rounds   int
		features uint64
		poll     time.Duration
	}{
		{"flags", 100, allEvents &^ virtio.FeatureEventIdx, 0},
		{"event_idx, polling", 1000, allEvents, 20 * time.Microsecond},
	} {
		t.Run(tt.name, func(t *testing.T) {
			disk := block.NewMem(512 * virtiotest.DiskBlocks(queues*slots))
			u, err := scsi.NewUnit(scsi.UnitConfig{Backend: disk, Serial: "STOP"})
			if err != nil {
				t.Fatal(err)
			}
			target := &slow{Target: scsi.NewTarget()}
			if err := target.Attach(0, u); err != nil {
				t.Fatal(err)
			}
			dev, err := New(Config{Target: target, Queues: queues, RingSize: 16, Poll: tt.poll})
			if err != nil {
				t.Fatal(err)
			}
			var sent atomic.Uint64
			events := &eventDriver{t: t, dev: dev}
			virtiotest.StopAndContinue(t, dev, guestmem.Heap(0, (2+queues)*virtiotest.QueueSpan), virtiotest.Load{
				Rounds: tt.rounds, Features: tt.features, Round: events.round,
				Slots: func(queue int, d *virtqtest.Driver) (list []virtiotest.Slot) {
					switch queue {
					case controlQueue:
						return []virtiotest.Slot{virtiotest.Management(d, sFunctionComplete)}
					case eventQueue:
						return nil
					}
					for i := range slots {
						list = append(list, counted{virtiotest.Disk(d, (queue-requestQueue)*slots+i), &sent})
					}
					return list
				},
			})
			if n := target.commands.Load(); n != sent.Load() {
				t.Errorf("%d commands reached the target, of %d requests", n, sent.Load())
			}
			heard, told = heard+events.heard, told+events.told
		})
	}
	if heard == 0 || told == 0 {
		t.Errorf("the driver heard of %d events, and %d times that some were lost", heard, told)
	}
}

// TestStopKeeps: the driver's settings stay over a stop, and so do events that it has not seen; a
// reset of the stopped device forgets them.
func TestStopKeeps(t *testing.T) {
	f := &fake{submit: good}
	r := newRig(t, Config{Target: f}, allEvents)
	r.dev.WriteConfig(senseSizeOff, []byte{18})
	buffer := r.send(1, nil, nil, 16, nil)
	r.settle()
	bases, err := r.dev.Stop(t.Context())
	if err != nil || !slices.Equal(bases, []uint16{0, 0, 0}) {
		t.Fatalf("bases %v of a device that kept an event buffer: %v", bases, err)
	}
	if again, err := r.dev.Stop(t.Context()); err != nil || len(again) != 0 {
		t.Errorf("stopped again: %v, %v", again, err)
	}
	// The driver's buffer waits for the first event.
	for _, want := range []Delivery{Delivered, Missed} {
		if got := r.dev.Event(TransportReset, 1<<48, ResetRescan); got != want {
			t.Errorf("an event while the device is stopped: delivery %d, not %d", got, want)
		}
	}
	if err := r.dev.Activate(r.a); err != nil { // all bases are 0
		t.Fatal(err)
	}
	if got := r.result(1, buffer); len(got) != 16 || !bytes.Equal(got[:4], []byte{1, 0, 0, 0x80}) {
		t.Errorf("event % x", got)
	}
	if size := r.dev.Config()[senseSizeOff]; size != 18 {
		t.Errorf("sense_size %d", size)
	}
	if calls := f.taken(); len(calls) != 0 {
		t.Errorf("a stop is more than a stop to the target: %q", calls)
	}

	if _, err := r.dev.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := r.dev.Reset(); err != nil {
		t.Fatal(err)
	}
	if calls := f.taken(); !slices.Equal(calls, []string{"nexus reset 0"}) {
		t.Errorf("a reset of the stopped device: %q", calls)
	}
	got, size := r.dev.Event(TransportReset, 1<<48, ResetRescan), r.dev.Config()[senseSizeOff]
	if got != Inactive || size != 96 {
		t.Errorf("after the reset: delivery %d, sense_size %d", got, size)
	}
}
