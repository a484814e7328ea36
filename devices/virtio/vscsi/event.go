package vscsi

import (
	"encoding/binary"
	"sync"

	"gvm/devices/iovec"
	"gvm/devices/scsi"
	"gvm/devices/virtio"
	"gvm/devices/virtio/virtq"
)

// EventType is the kind of an event, Reason its cause (5.6.6.3).
type (
	EventType uint32
	Reason    uint32
)

// Event types, and the reasons of a TransportReset.
const (
	TransportReset EventType = 1 // VIRTIO_SCSI_T_TRANSPORT_RESET
	ParamChange    EventType = 3 // VIRTIO_SCSI_T_PARAM_CHANGE; see ParamReason

	ResetHard    Reason = 0 // the unit was reset
	ResetRescan  Reason = 1 // the unit has appeared
	ResetRemoved Reason = 2 // the unit is gone
)

const (
	noEvent      = 0       // VIRTIO_SCSI_T_NO_EVENT
	eventsMissed = 1 << 31 // VIRTIO_SCSI_T_EVENTS_MISSED
	eventLen     = 16      // struct virtio_scsi_event
)

// ParamReason is the reason of a ParamChange: the additional sense code and
// qualifier that the unit attention condition has too.
func ParamReason(asc, ascq byte) Reason { return Reason(asc) | Reason(ascq)<<8 }

// Delivery is the outcome of an event.
type Delivery int

// Deliveries.
const (
	Delivered Delivery = iota // the driver has it
	Missed                    // for want of a buffer: the next event says that some were lost
	Unwanted                  // the driver has not negotiated the feature
	Inactive                  // the device has no driver; one that starts looks by itself
)

// Event tells the driver about a logical unit, if the driver negotiated the
// feature for that. It does not block and keeps nothing for later: without a
// buffer the event is lost, and the next one says that some were.
func (d *Device) Event(t EventType, lun scsi.LUN, reason Reason) Delivery {
	return d.events.send(t, lun, reason)
}

// events is the event queue: buffers that wait for something to report. They are used in the order
// in which they were taken. Lock order: mu is taken before the worker's own lock.
type events struct {
	mu       sync.Mutex
	driven   bool
	features uint64 // that the driver accepted
	buffers  []buffer
	dropped  int     // buffers of the driver that were dropped at a stop and are not taken again yet
	waiting  []event // for those buffers
	missed   bool
}

// event is the content of an event.
type event struct {
	EventType
	scsi.LUN
	Reason
}

type buffer struct {
	w *virtio.Worker
	c *virtq.Chain
}

func (e *events) start(features uint64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.driven, e.features = true, features
}

// stop drops the buffers, which are taken again if the device continues: events wait for that.
func (e *events) stop() {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, b := range e.buffers {
		b.w.Drop(b.c)
	}
	e.dropped += len(e.buffers)
	e.buffers = nil
}

// reset is stop that forgets the driver.
func (e *events) reset() {
	e.stop()
	e.mu.Lock()
	defer e.mu.Unlock()
	e.driven, e.missed, e.dropped, e.waiting = false, false, 0, nil
}

// add serves the event queue: it keeps the buffer, or reports with it at once an event
// that waits, or that events were lost for want of a buffer.
func (e *events) add(w *virtio.Worker, c *virtq.Chain) error {
	if n := c.In.Len(); n < eventLen {
		return guestErr("5.6.6.3.1", "event buffer of %d bytes", n)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.buffers, e.dropped = append(e.buffers, buffer{w, c}), max(e.dropped-1, 0)
	switch {
	case len(e.waiting) > 0:
		e.write(e.waiting[0])
		e.waiting = e.waiting[1:]
	case e.missed:
		e.write(event{})
	}
	return nil
}

func (e *events) send(t EventType, lun scsi.LUN, reason Reason) Delivery {
	e.mu.Lock()
	defer e.mu.Unlock()
	wanted := true
	switch {
	case t == ParamChange:
		wanted = e.features&featureChange != 0
	case reason != ResetHard:
		wanted = e.features&featureHotplug != 0
	}
	switch {
	case !e.driven:
		return Inactive
	case !wanted:
		return Unwanted
	case len(e.buffers) == 0 && len(e.waiting) < e.dropped:
		e.waiting = append(e.waiting, event{t, lun, reason})
	case !e.write(event{t, lun, reason}):
		return Missed
	}
	return Delivered
}

// write fills one buffer. It returns false and remembers the loss if there is
// none. The caller holds mu.
func (e *events) write(ev event) bool {
	if len(e.buffers) == 0 {
		e.missed = true
		return false
	}
	b := e.buffers[0]
	e.buffers = append(e.buffers[:0], e.buffers[1:]...)
	var out [eventLen]byte
	t := ev.EventType
	if e.missed {
		t |= eventsMissed
		e.missed = false
	}
	binary.LittleEndian.PutUint32(out[:], uint32(t))
	if ev.EventType != noEvent {
		// The same form of the LUN that REPORT LUNS has, on target 0.
		binary.BigEndian.PutUint64(out[4:], 0x01<<56|uint64(ev.LUN)>>16)
	}
	binary.LittleEndian.PutUint32(out[12:], uint32(ev.Reason))
	iovec.Scatter(b.c.In.Take(eventLen), out[:])
	b.w.Complete(b.c, eventLen)
	return true
}
