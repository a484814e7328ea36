// Package virtiotest holds virtio devices to the contract of virtio.Device, from the driver's side
// of their queues.
package virtiotest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"gvm/devices/virtio"
	"gvm/devices/virtio/virtqtest"
	"gvm/guestmem"
	"gvm/panics"
)

// QueueSpan is the guest memory that StopAndContinue needs for each queue, from address 0.
const QueueSpan = 1 << 20

// Slot is a request that a driver sends again as soon as it is answered.
type Slot interface {
	// Next prepares the request and returns its buffers.
	Next() []virtqtest.Seg
	// Check checks the answer to the request before the next Next, and how many bytes the device
	// says that it wrote.
	Check(written uint32) error
}

// Load is the driver's work.
type Load struct {
	Rounds   int    // how often the device is stopped
	Features uint64 // those that the driver accepts
	// Slots returns the driver's requests in flight in a queue, with memory from d. A queue without
	// slots is set up, and left to Round.
	Slots func(queue int, d *virtqtest.Driver) []Slot
	// Left is how many chains of a queue with slots a device may keep at the end, because it needs
	// more of them for its next answer; nil: none.
	Left func(queue int) int
	// Round, if it is not nil, is called in each round with the queues, once while the device is
	// active and once while it is stopped.
	Round func(queues []*virtqtest.Driver, stopped bool)
}

// StopAndContinue stops and continues a device under load. The test fails if the device loses a
// request, answers one twice or wrongly, or does anything while it is stopped. A doorbell or an
// interrupt that is lost leaves it waiting.
func StopAndContinue(t *testing.T, dev virtio.Device, mem *guestmem.Memory, l Load) {
	t.Helper()
	s := &stopper{broken: make(chan struct{})}
	a := virtio.Activation{Mem: mem, Features: l.Features, Broken: s.breaks, ConfigChanged: func() {}}
	for i, size := range dev.QueueSizes() {
		d, err := virtqtest.New(mem, uint64(i)*QueueSpan, size, l.Features)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		s.queues = append(s.queues, d)
		a.Queues = append(a.Queues, virtio.Queue{Layout: d.Layout, Kick: d.Kick, Call: d.Call})
	}
	if err := dev.Activate(a); err != nil {
		t.Fatal(err)
	}
	errs := make([]error, len(s.queues))
	var drivers sync.WaitGroup
	for i, d := range s.queues {
		if slots := l.Slots(i, d); len(slots) > 0 {
			left := 0
			if l.Left != nil {
				left = l.Left(i)
			}
			drivers.Go(panics.Func(func() { errs[i] = s.drive(d, slots, left) }))
		}
	}
	random := rand.New(rand.NewPCG(1, 2))
	for round := range l.Rounds {
		patience := time.Duration(random.Int64N(int64(100 * time.Microsecond)))
		if err := s.round(dev, &a, l, random.Uint64N(64), patience); err != nil {
			t.Errorf("round %d: %v", round, err)
			s.breaks(err)
			break
		}
	}
	s.ending.Store(true)
	drivers.Wait()
	for i, err := range errs {
		if err != nil {
			t.Errorf("queue %d: %v", i, err)
		}
	}
	if err := dev.Reset(); err != nil {
		t.Error(err)
	}
	t.Logf("%d requests, %d stops given up", s.answers.Load(), s.givenUp)
}

// stopper is one StopAndContinue.
type stopper struct {
	queues  []*virtqtest.Driver
	givenUp int
	answers atomic.Uint64
	ending  atomic.Bool

	once   sync.Once
	err    error
	broken chan struct{} // closed when err is there
}

func (s *stopper) breaks(err error) {
	s.once.Do(func() {
		s.err = err
		close(s.broken)
		for _, d := range s.queues {
			_ = d.Call.Signal() // ends the driver's wait
		}
	})
}

var errGivenUp = errors.New("given up")

// round lets the device answer some requests, stops it and has it continue. The first attempt to
// stop it is given up after patience.
func (s *stopper) round(
	dev virtio.Device, a *virtio.Activation, l Load, answers uint64, patience time.Duration,
) error {
	for until := s.answers.Load() + answers; s.answers.Load() < until; {
		select {
		case <-s.broken:
			return fmt.Errorf("the device broke: %w", s.err)
		default:
			time.Sleep(10 * time.Microsecond)
		}
	}
	if l.Round != nil {
		l.Round(s.queues, false)
	}
	// A Stop that is given up, at any point of its work, leaves the device active.
	ctx, giveUp := context.WithCancelCause(context.Background())
	defer time.AfterFunc(patience, panics.Func(func() { giveUp(errGivenUp) })).Stop()
	bases, err := dev.Stop(ctx)
	if giveUp(nil); errors.Is(err, errGivenUp) {
		s.givenUp++
		bases, err = dev.Stop(context.Background())
	}
	if err != nil {
		return err
	}
	if len(bases) != len(a.Queues) {
		return fmt.Errorf("%d bases for %d queues", len(bases), len(a.Queues))
	}
	if err := s.used(bases, "stopped with"); err != nil {
		return err
	}
	if l.Round != nil {
		l.Round(s.queues, true)
	}
	time.Sleep(20 * time.Microsecond) // for a device that goes on
	if err := s.used(bases, "went on after a stop with"); err != nil {
		return err
	}
	for i := range bases {
		a.Queues[i].Base = bases[i]
	}
	return dev.Activate(*a)
}

// used compares the used index of each queue, as the driver sees it, with the bases.
func (s *stopper) used(bases []uint16, what string) error {
	for i, d := range s.queues {
		if used := guestmem.LoadUint16(d.Bytes(d.Device, 4)[2:]); used != bases[i] {
			return fmt.Errorf("queue %d: the device %s base %d, and used index %d", i, what, bases[i], used)
		}
	}
	return nil
}

// drive keeps every slot in flight, and returns when all but left are answered after the end.
func (s *stopper) drive(d *virtqtest.Driver, slots []Slot, left int) error {
	byHead := make([]Slot, d.Size)
	send := func(slot Slot) error {
		segs := slot.Next()
		head, ok := d.Add(segs...)
		if !ok {
			return fmt.Errorf("no room for %d buffers", len(segs))
		}
		byHead[head] = slot
		_, err := d.Publish()
		return err
	}
	for _, slot := range slots {
		if err := send(slot); err != nil {
			return err
		}
	}
	for flying := len(slots); flying > left; {
		head, written, ok := d.Used()
		if !ok {
			if d.EnableCalls() {
				continue
			}
			if _, err := d.Call.Wait(); err != nil {
				return err
			}
			select {
			case <-s.broken:
				return nil // which the round tells
			default:
			}
			continue
		}
		slot := byHead[head]
		if err := slot.Check(written); err != nil {
			s.breaks(err)
			return err
		}
		s.answers.Add(1)
		if s.ending.Load() {
			flying--
		} else if err := send(slot); err != nil {
			s.breaks(err)
			return err
		}
	}
	return nil
}
