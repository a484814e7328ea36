// Package replay is an initiator without a guest: it drives virtio SCSI host
// devices (virtio 1.3, 5.6) from the driver's side of the rings, one request at
// a time, with the requests of a trace, and compares the answers. To a device,
// also one that the kernel serves, it looks like a virtual machine.
package replay

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"

	"gvm/devices/scsi"
	"gvm/devices/scsi/trace"
	"gvm/devices/virtio"
	"gvm/devices/virtio/virtqtest"
	"gvm/guestmem"
	"gvm/kvmapi/eventfd"
	"gvm/panics"
)

const (
	controlQueue = 0
	requestQueue = 2

	headerLen   = 51 // struct virtio_scsi_req_cmd's device-readable part with a CDB of 32 bytes (5.6.6.1)
	responseLen = 108
	senseOff    = 12
	controlLen  = 24 // struct virtio_scsi_ctrl_tmf (5.6.6.2)
	maxCDB      = 32

	// MaxData is the most bytes that a request may move: what vhost-scsi takes
	// pages for.
	MaxData = 8 << 20
)

// Host is a driver of one device. One goroutine uses it.
type Host struct {
	ctx    context.Context
	dev    virtio.Device
	mem    *guestmem.Memory
	queues map[int]*queue // those that are used
	broken atomic.Pointer[error]
}

// queue is a queue and memory for one request.
type queue struct {
	*virtqtest.Driver
	header, response uint64
}

// layout of the memory: a slot for each queue, then the data of a request.
const (
	queueStep = 64 << 10
	dataBase  = 4 << 20
)

// NewHost starts the device as a driver does. The end of ctx ends the wait for
// an answer, and with that the use of the Host.
func NewHost(ctx context.Context, dev virtio.Device) (*Host, error) {
	mem, err := guestmem.Map(guestmem.Config{Size: dataBase + 2*MaxData})
	if err != nil {
		return nil, err
	}
	h := &Host{ctx: ctx, dev: dev, mem: mem}
	if err := h.start(); err != nil {
		return nil, errors.Join(err, h.Close())
	}
	return h, nil
}

// start makes rings for the control queue and the first request queue, and
// leaves the other queues alone.
func (h *Host) start() error {
	a := virtio.Activation{
		Mem:           h.mem,
		Features:      h.dev.Features() | virtio.FeatureVersion1,
		Broken:        h.breaks,
		ConfigChanged: func() {},
	}
	h.queues = map[int]*queue{}
	sizes := h.dev.QueueSizes()
	a.Queues = make([]virtio.Queue, len(sizes))
	for _, i := range []int{controlQueue, requestQueue} {
		d, err := virtqtest.New(h.mem, uint64(1+i)*queueStep, sizes[i], a.Features)
		if err != nil {
			return err
		}
		h.queues[i] = &queue{d, d.Alloc(headerLen), d.Alloc(responseLen)}
		a.Queues[i] = virtio.Queue{Layout: d.Layout, Kick: d.Kick, Call: d.Call}
	}
	for i := range a.Queues {
		if a.Queues[i].Kick != nil {
			continue
		}
		kick, err := eventfd.New()
		if err != nil {
			return err
		}
		defer kick.Close()
		a.Queues[i].Kick, a.Queues[i].Call = kick, kick
	}
	return h.dev.Activate(a)
}

// breaks is told that the device has given up.
func (h *Host) breaks(err error) {
	h.broken.CompareAndSwap(nil, &err)
	h.wake()
}

// wake has a wait for an answer look up.
func (h *Host) wake() {
	for _, q := range h.queues {
		_ = q.Call.Signal()
	}
}

// Reset resets the device and starts it again; power says that the machine is
// power-cycled in between.
func (h *Host) Reset(power bool) error {
	if err := h.stop(); err != nil {
		return err
	}
	if d, ok := h.dev.(interface{ PowerOn() }); ok && power {
		d.PowerOn()
	}
	return h.start()
}

func (h *Host) stop() error {
	err := h.dev.Reset()
	for _, q := range h.queues {
		q.Close()
	}
	h.queues = nil
	return err
}

// Close stops the device, which stays the caller's to close.
func (h *Host) Close() error { return errors.Join(h.stop(), h.mem.Close()) }

// Answer is a response (virtio 1.3, 5.6.6.1).
type Answer struct {
	Response uint8
	Status   scsi.Status
	Sense    []byte
	Residual uint32
	Data     []byte // the data-in buffer, in which a byte that was not written is unset
}

// unset is in data-in buffers beforehand.
const unset = 0xee

// Command sends a command, with out as its data-out and in bytes of room for
// data-in, and waits for the answer.
func (h *Host) Command(r *trace.Record, out []byte) (Answer, error) {
	q := h.queues[requestQueue]
	header := q.Bytes(q.header, headerLen)
	clear(header)
	copy(header, r.LUN[:])
	binary.LittleEndian.PutUint64(header[8:], r.Tag)
	header[16] = byte(r.Attr)
	copy(header[19:], r.CDB[:min(len(r.CDB), maxCDB)])
	segs := []virtqtest.Seg{{Addr: q.header, Len: headerLen}}
	data := func(at uint64, n int, write bool) []byte {
		if n > 0 {
			segs = append(segs, virtqtest.Seg{Addr: at, Len: uint32(n), Write: write})
		}
		return q.Bytes(at, n)
	}
	copy(data(dataBase, len(out), false), out)
	fill(q.Bytes(q.response, responseLen))
	segs = append(segs, virtqtest.Seg{Addr: q.response, Len: responseLen, Write: true})
	in := data(dataBase+MaxData, int(r.In), true)
	fill(in)
	if err := h.roundTrip(q, segs); err != nil {
		return Answer{}, err
	}
	b := q.Bytes(q.response, responseLen)
	return Answer{
		Response: b[11], Status: scsi.Status(b[10]), Residual: binary.LittleEndian.Uint32(b[4:]),
		Sense: bytes.Clone(b[senseOff : senseOff+min(binary.LittleEndian.Uint32(b), responseLen-senseOff)]),
		Data:  bytes.Clone(in),
	}, nil
}

func fill(b []byte) {
	for i := range b {
		b[i] = unset
	}
}

// Manage sends a task management function and waits for the answer, of which
// only the response counts.
func (h *Host) Manage(r *trace.Record) (Answer, error) {
	q := h.queues[controlQueue]
	req := q.Bytes(q.header, controlLen)
	clear(req)
	binary.LittleEndian.PutUint32(req[4:], r.Function)
	copy(req[8:], r.LUN[:])
	binary.LittleEndian.PutUint64(req[16:], r.Tag)
	err := h.roundTrip(q, []virtqtest.Seg{{Addr: q.header, Len: controlLen}, {Addr: q.response, Len: 1, Write: true}})
	return Answer{Response: q.Bytes(q.response, 1)[0]}, err
}

// roundTrip has the device serve one chain.
func (h *Host) roundTrip(q *queue, segs []virtqtest.Seg) error {
	defer context.AfterFunc(h.ctx, panics.Func(h.wake))()
	if _, ok := q.Add(segs...); !ok {
		return errors.New("no room in the ring") // one request at a time always has
	}
	if _, err := q.Publish(); err != nil {
		return err
	}
	for {
		if _, _, ok := q.Used(); ok {
			return nil
		}
		if err := h.broken.Load(); err != nil {
			return fmt.Errorf("the device broke: %w", *err)
		}
		if h.ctx.Err() != nil {
			return context.Cause(h.ctx)
		}
		if q.EnableCalls() {
			continue
		}
		if _, err := q.Call.Wait(); err != nil {
			return err
		}
	}
}
