// Package vscsi is the virtio SCSI host device (virtio 1.3, 5.6) over an
// in-process SCSI target: it turns requests in virtqueues into scsi.Commands,
// and their results into responses. The host has one target, number 0.
package vscsi

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"gvm/devices/scsi"
	"gvm/devices/scsi/trace"
	"gvm/devices/virtio"
	"gvm/devices/virtio/virtq"
)

// Target is the SCSI target that the device needs; *scsi.Target is one.
type Target interface {
	Submit(*scsi.Command)
	AbortTask(scsi.NexusID, scsi.LUN, uint64) scsi.TaskResponse
	AbortTaskSet(scsi.NexusID, scsi.LUN) scsi.TaskResponse
	ClearTaskSet(scsi.NexusID, scsi.LUN) scsi.TaskResponse
	LogicalUnitReset(scsi.LUN) scsi.TaskResponse
	PowerOn()
	NexusReset(scsi.NexusID) scsi.TaskResponse
	QueryTask(scsi.NexusID, scsi.LUN, uint64) scsi.TaskResponse
	QueryTaskSet(scsi.NexusID, scsi.LUN) scsi.TaskResponse
}

// Observer is told of every request once it has been answered, and of resets.
// Its methods are called from the threads that serve queues, at the same time.
type Observer interface {
	// Now returns the time since an origin of the observer's.
	Now() time.Duration
	// Observe keeps nothing of the record, which the device uses again.
	Observe(*trace.Record)
}

// Feature bits (5.6.3).
const (
	featureHotplug    = 1 << 1 // VIRTIO_SCSI_F_HOTPLUG
	featureChange     = 1 << 2 // VIRTIO_SCSI_F_CHANGE
	featureProtection = 1 << 3 // VIRTIO_SCSI_F_T10_PI
)

// Queue numbers (5.6.2).
const (
	controlQueue = iota
	eventQueue
	requestQueue // the first of them
)

// struct virtio_scsi_config (5.6.4).
const (
	configLen    = 36
	senseSizeOff = 20
	cdbSizeOff   = 24

	defaultSenseSize = 96
	defaultCDBSize   = 32
	// The bounds of the driver's values: SPC-5 4.4.1 ends sense data at 252
	// bytes, and CDBs have 6 (SPC-5 4.2.2) to 260 (SPC-5 4.2.3).
	maxSenseSize = 252
	minCDBSize   = 6
	maxCDBSize   = 260
)

const (
	sideQueueSize   = 64 // of the control and the event queue
	defaultRingSize = 256
	maxRingSize     = 1024
	maxQueues       = 1024
)

// Config is the configuration of a device.
type Config struct {
	Target   Target
	Queues   int          // request queues; 0 is 1
	RingSize uint16       // entries in each request queue, a power of two from 4 to 1024; 0 is 256
	Nexus    scsi.NexusID // the guest's, at the target
	Observer Observer     // may be nil
	// Poll is how long the thread of a request queue looks for the next request before it
	// sleeps, at most, while requests come that fast; 0 is not at all.
	Poll time.Duration
	// Protection offers VIRTIO_SCSI_F_T10_PI: protection information moves beside the
	// data of units that have it.
	Protection bool
}

// Device is a virtio SCSI host.
type Device struct {
	cfg                Config
	senseSize, cdbSize atomic.Uint32
	driven             bool // from Activate to Reset
	protection         bool // VIRTIO_SCSI_F_T10_PI is negotiated
	workers            virtio.Workers
	events             events
	functions          functions
}

// New returns a device. The error names the field and its fault.
func New(cfg Config) (*Device, error) {
	if cfg.Queues == 0 {
		cfg.Queues = 1
	}
	if cfg.RingSize == 0 {
		cfg.RingSize = defaultRingSize
	}
	switch {
	case cfg.Target == nil:
		return nil, errors.New("virtio-scsi: no target")
	case cfg.Queues < 0 || cfg.Queues > maxQueues:
		return nil, fmt.Errorf("virtio-scsi: %d request queues: want 1 to %d", cfg.Queues, maxQueues)
	case cfg.RingSize < 4 || cfg.RingSize > maxRingSize || cfg.RingSize&(cfg.RingSize-1) != 0:
		return nil, fmt.Errorf("virtio-scsi: ring size %d: want a power of two from 4 to %d", cfg.RingSize, maxRingSize)
	}
	d := &Device{cfg: cfg}
	d.defaults()
	return d, nil
}

func (d *Device) defaults() {
	d.senseSize.Store(defaultSenseSize)
	d.cdbSize.Store(defaultCDBSize)
}

// ID implements virtio.Device.
func (*Device) ID() virtio.ID { return virtio.IDSCSI }

// Features implements virtio.Device.
func (d *Device) Features() uint64 {
	f := uint64(featureHotplug | featureChange | virtio.FeatureIndirectDesc | virtio.FeatureEventIdx)
	if d.cfg.Protection {
		f |= featureProtection
	}
	return f
}

// QueueSizes implements virtio.Device: control, event and request queues.
func (d *Device) QueueSizes() []uint16 {
	sizes := []uint16{controlQueue: sideQueueSize, eventQueue: sideQueueSize}
	for range d.cfg.Queues {
		sizes = append(sizes, d.cfg.RingSize)
	}
	return sizes
}

// Config implements virtio.Device.
func (d *Device) Config() []byte {
	ring := uint32(d.cfg.RingSize)
	segments := ring - 2 // beside the data, header and response take a descriptor each
	if d.cfg.Protection {
		segments /= 2 // protection information may have as many
	}
	b := make([]byte, 0, configLen)
	for _, v := range []uint32{
		uint32(d.cfg.Queues), // num_queues
		segments,             // seg_max
		0xffff,               // max_sectors
		ring,                 // cmd_per_lun
		eventLen,             // event_info_size
		d.senseSize.Load(),   // sense_size
		d.cdbSize.Load(),     // cdb_size
		0,                    // max_channel, max_target: 16 bits each
		16383,                // max_lun
	} {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	return b
}

// WriteConfig implements virtio.ConfigWriter: the driver may set sense_size
// and cdb_size, and reads the device's values back.
func (d *Device) WriteConfig(off uint32, p []byte) {
	b := d.Config()
	if int64(off)+int64(len(p)) > configLen {
		return
	}
	copy(b[off:], p)
	d.senseSize.Store(min(binary.LittleEndian.Uint32(b[senseSizeOff:]), maxSenseSize))
	d.cdbSize.Store(max(min(binary.LittleEndian.Uint32(b[cdbSizeOff:]), maxCDBSize), minCDBSize))
}

// Activate implements virtio.Device.
func (d *Device) Activate(a virtio.Activation) error {
	d.driven, d.protection = true, a.Features&featureProtection != 0
	d.events.start(a.Features)
	if err := d.workers.Start(a, d.serve); err != nil {
		d.events.reset()
		return fmt.Errorf("virtio-scsi: %w", err)
	}
	return nil
}

// serve returns how queue i is served.
func (d *Device) serve(i int) (virtio.Handler, time.Duration) {
	switch i {
	case controlQueue:
		return d.control, 0
	case eventQueue:
		return d.events.add, 0
	}
	q := uint16(i - requestQueue)
	return func(w *virtio.Worker, c *virtq.Chain) error { return d.request(q, w, c) }, d.cfg.Poll
}

// PowerOn is a power cycle of the machine, which the target sees: the guest
// finds every unit as it was attached. The device is not active.
func (d *Device) PowerOn() {
	d.cfg.Target.PowerOn()
	d.observe(trace.PowerOn)
}

// observe tells the observer of an event that is no request.
func (d *Device) observe(kind trace.Kind) {
	if o := d.cfg.Observer; o != nil {
		o.Observe(&trace.Record{Kind: kind, Missing: trace.NoQueue, Time: o.Now()})
	}
}

// Stop implements virtio.Device. The device keeps sense_size, cdb_size, whether the driver is to be
// told of lost events, and as many events that come meanwhile as the driver has given buffers. To
// the target the I_T nexus stays.
func (d *Device) Stop(ctx context.Context) ([]uint16, error) { return d.stop(ctx, d.events.stop) }

// Reset implements virtio.Device: no more requests are taken, those in flight
// are aborted or finish, and sense_size and cdb_size are the defaults again.
// To the target it is the loss of the I_T nexus.
func (d *Device) Reset() error {
	d.defaults()
	if !d.driven {
		return nil
	}
	if _, err := d.stop(context.Background(), func() {
		d.events.reset()
		d.cfg.Target.NexusReset(d.cfg.Nexus)
	}); err != nil {
		return err
	}
	d.driven = false
	d.observe(trace.Reset)
	return nil
}

func (d *Device) stop(ctx context.Context, halted func()) ([]uint16, error) {
	bases, err := d.workers.Stop(ctx, halted)
	if err != nil {
		return nil, fmt.Errorf("virtio-scsi: %w", err)
	}
	return bases, nil
}

// address returns the LUN that the eight bytes name (5.6.6.1), and false when
// they do not name target 0. Any single level LUN is the target's to judge,
// and so are well-known ones; a second level, which has no place in the
// format, makes a LUN that no target has.
func address(lun []byte) (scsi.LUN, bool) {
	v := binary.BigEndian.Uint64(lun)
	if v == uint64(scsi.ReportLUNsWLUN) {
		return scsi.ReportLUNsWLUN, true
	}
	return scsi.LUN(v << 16), v>>48 == 0x0100
}

func guestErr(rule, format string, args ...any) error {
	return &virtq.GuestError{Rule: "virtio 1.3, " + rule, What: fmt.Sprintf(format, args...)}
}
