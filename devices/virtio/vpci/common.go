package vpci

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"

	"gvm/devices/virtio"
	"gvm/devices/virtio/virtq"
	"gvm/inspect"
)

// Device status bits (virtio 1.3, 2.1).
const (
	statusAcknowledge = 1
	statusDriver      = 2
	statusDriverOK    = 4
	statusFeaturesOK  = 8
	statusNeedsReset  = 64
	statusFailed      = 128
)

// The fields of struct virtio_pci_common_cfg (virtio 1.3, 4.1.4.3) by offset.
// Those after queue_device belong to features that are not offered, and read 0.
const (
	deviceFeatureSelect = 0x00
	deviceFeature       = 0x04
	driverFeatureSelect = 0x08
	driverFeature       = 0x0c
	configMSIXVector    = 0x10
	numQueues           = 0x12
	deviceStatus        = 0x14
	configGeneration    = 0x15
	queueSelect         = 0x16
	queueSize           = 0x18
	queueMSIXVector     = 0x1a
	queueEnable         = 0x1c
	queueNotifyOff      = 0x1e
	queueDesc           = 0x20
	queueDriver         = 0x28
	queueDevice         = 0x30
)

const noVector = 0xffff // VIRTIO_MSI_NO_VECTOR

// regs are the registers of BAR 0.
type regs struct{ d *Device }

func (r regs) Read(off uint64, p []byte) {
	clear(p)
	d := r.d
	switch { // without d.mu: it is held while a device stops
	case off >= notifyOff:
		return
	case off == isrOff:
		p[0] = d.intx.read()
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case off < commonSize:
		if off <= configGeneration && off+uint64(len(p)) > configGeneration {
			d.look()
		}
		b := d.common()
		copy(p, b[off:])
	case off >= deviceOff:
		d.look()
		copy(p, d.seen[min(off-deviceOff, uint64(len(d.seen))):])
	}
}

func (r regs) Write(off uint64, p []byte) {
	d := r.d
	if off >= notifyOff {
		// KVM does this when the doorbell is connected.
		if i := (off - notifyOff) / notifyMul; off%notifyMul == 0 && i < uint64(len(d.queues)) {
			if err := d.queues[i].kick.Signal(); err != nil {
				d.cfg.Log(fmt.Errorf("vpci: %s: notify queue %d: %w", d.cfg.Name, i, err))
			}
		}
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case off < commonSize:
		d.setCommon(off, p)
	case off >= deviceOff:
		w, ok := d.cfg.Device.(virtio.ConfigWriter)
		if d.look(); ok && off-deviceOff+uint64(len(p)) <= uint64(len(d.seen)) {
			w.WriteConfig(uint32(off-deviceOff), p)
			d.seen = d.snapshot() // the driver's own change is no new generation
		}
	}
}

// snapshot returns device configuration; the capability said how long it can
// be.
func (d *Device) snapshot() []byte {
	c := d.cfg.Device.Config()
	return c[:min(len(c), d.cfgLen)]
}

// look refreshes the snapshot. Whatever changed since the last one is a new
// generation, also when the device has not said so yet: a
// driver that read one half before and the other after must find out (virtio
// 1.3, 4.1.4.3.1).
func (d *Device) look() {
	if now := d.snapshot(); !bytes.Equal(now, d.seen) {
		d.seen = now
		d.gen.Add(1)
	}
}

// selected is the queue at queue_select, or nil.
func (d *Device) selected() *queue {
	if int(d.queueSelect) < len(d.queues) {
		return &d.queues[d.queueSelect]
	}
	return nil
}

// common returns the structure as it reads now.
func (d *Device) common() (b [commonSize]byte) {
	le := binary.LittleEndian
	half := func(v uint64, sel uint32) uint32 {
		if sel > 1 {
			return 0
		}
		return uint32(v >> (32 * sel))
	}
	le.PutUint32(b[deviceFeatureSelect:], d.offeredSelect)
	le.PutUint32(b[deviceFeature:], half(d.offered, d.offeredSelect))
	le.PutUint32(b[driverFeatureSelect:], d.acceptedSelect)
	le.PutUint32(b[driverFeature:], half(d.accepted, d.acceptedSelect))
	le.PutUint16(b[configMSIXVector:], uint16(d.cfgVector.Load()))
	le.PutUint16(b[numQueues:], uint16(len(d.queues)))
	b[deviceStatus] = d.status
	if a := d.act.Load(); a != nil && a.broken.Load() {
		b[deviceStatus] |= statusNeedsReset
	}
	b[configGeneration] = byte(d.gen.Load())
	le.PutUint16(b[queueSelect:], d.queueSelect)
	q := d.selected()
	if q == nil {
		le.PutUint16(b[queueMSIXVector:], noVector)
		return b
	}
	le.PutUint16(b[queueSize:], q.size)
	le.PutUint16(b[queueMSIXVector:], q.vector)
	if q.enabled {
		b[queueEnable] = 1
	}
	le.PutUint16(b[queueNotifyOff:], d.queueSelect)
	le.PutUint64(b[queueDesc:], q.desc)
	le.PutUint64(b[queueDriver:], q.driver)
	le.PutUint64(b[queueDevice:], q.used)
	return b
}

// setCommon writes one field in its natural width (virtio 1.3, 4.1.3.1), or a
// half of one of 64 bits; any other write is dropped.
func (d *Device) setCommon(off uint64, p []byte) {
	var buf [8]byte
	copy(buf[:], p)
	v := binary.LittleEndian.Uint64(buf[:])
	type access struct {
		off uint64
		n   int
	}
	switch (access{off, len(p)}) {
	case access{deviceFeatureSelect, 4}:
		d.offeredSelect = uint32(v)
	case access{driverFeatureSelect, 4}:
		d.acceptedSelect = uint32(v)
	case access{driverFeature, 4}:
		if s := d.acceptedSelect; s <= 1 && d.status&statusFeaturesOK == 0 {
			setHalf(&d.accepted, 4*uint64(s), v, 4)
			d.accepted &= d.offered
		}
	case access{configMSIXVector, 2}:
		d.cfgVector.Store(uint32(d.vector(v)))
	case access{deviceStatus, 1}:
		d.setStatus(byte(v))
	case access{queueSelect, 2}:
		d.queueSelect = uint16(v)
	default:
		if q := d.selected(); q != nil && d.status&statusDriverOK == 0 {
			d.setQueue(q, off, len(p), v)
		}
	}
}

// setQueue writes a field of a queue that is not in use. The device has been
// given all of it at DRIVER_OK, so nothing changes from then to a reset; size
// and addresses not even after queue_enable (virtio 1.3, 4.1.4.3.2).
func (d *Device) setQueue(q *queue, off uint64, n int, v uint64) {
	switch {
	case off == queueMSIXVector && n == 2:
		q.vector = d.vector(v)
	case q.enabled:
	case off == queueEnable && n == 2:
		q.enabled = v == 1
	case off == queueSize && n == 2:
		if bits.OnesCount64(v) == 1 && v <= uint64(q.max) {
			q.size = uint16(v)
		}
	case off%4 != 0 || n != 4 && (n != 8 || off%8 != 0):
	case off&^7 == queueDesc:
		setHalf(&q.desc, off&7, v, n)
	case off&^7 == queueDriver:
		setHalf(&q.driver, off&7, v, n)
	case off&^7 == queueDevice:
		setHalf(&q.used, off&7, v, n)
	}
}

// setHalf puts the low n bytes of v into f from byte at on.
func setHalf(f *uint64, at, v uint64, n int) {
	mask := ^uint64(0) >> (64 - 8*n) << (8 * at)
	*f = *f&^mask | v<<(8*at)&mask
}

// vector is the value of a vector register after v was written: one that does
// not exist reads back as none, which tells the driver (virtio 1.3,
// 4.1.5.1.2.1).
func (d *Device) vector(v uint64) uint16 {
	if v >= uint64(d.msix.Len()) {
		return noVector
	}
	return uint16(v)
}

// setStatus follows virtio 1.3, 2.1 and 3.1: bits are added one step after the
// other, and only a reset clears them. DEVICE_NEEDS_RESET is the device's, so
// the driver's writes there do not count.
func (d *Device) setStatus(v byte) {
	if v == 0 {
		if err := d.resetLocked(); err != nil {
			d.cfg.Log(fmt.Errorf("vpci: %s: reset: %w", d.cfg.Name, err))
		}
		return
	}
	v &= statusAcknowledge | statusDriver | statusDriverOK | statusFeaturesOK | statusFailed
	if d.status&^v != 0 {
		return
	}
	if v&statusFeaturesOK != 0 && d.accepted&virtio.FeatureVersion1 == 0 {
		v &^= statusFeaturesOK
	}
	if v&statusFeaturesOK == 0 || v&statusFailed != 0 && d.status&statusDriverOK == 0 {
		v &^= statusDriverOK
	}
	begun := v &^ d.status
	d.status = v
	if begun&statusFeaturesOK != 0 {
		d.events.Add("FEATURES_OK", inspect.Bits("driver_feature", d.accepted))
	}
	if begun&statusFailed != 0 {
		d.events.Add("FAILED")
	}
	if begun&statusDriverOK != 0 {
		d.activate()
	}
}

func (d *Device) activate() {
	a := &activation{}
	enabled := 0
	for i := range d.queues {
		a.vectors = a.vectors || d.queues[i].vector != noVector
		if d.queues[i].enabled {
			enabled++
		}
	}
	d.events.Add("DRIVER_OK", inspect.Int("queues_enabled", enabled))
	d.intx.begin(a)
	err := d.stuck
	switch {
	case err != nil:
		err = fmt.Errorf("it did not stop before: %w", err)
	case !d.master:
		err = errors.New("bus mastering is off")
	default:
		a.state = stopped
		a.Activation = virtio.Activation{
			Mem: d.cfg.Mem, Features: d.accepted, Queues: make([]virtio.Queue, len(d.queues)),
			Broken:        func(err error) { d.broken(a, err) },
			ConfigChanged: func() { d.changed(a) },
		}
		for i := range d.queues {
			q := &d.queues[i]
			v := virtio.Queue{Kick: q.kick, Call: d.unheard}
			if q.vector != noVector {
				v.Call = d.msix.Event(int(q.vector))
			}
			if q.enabled {
				v.Layout = virtq.Layout{Size: q.size, Desc: q.desc, Driver: q.driver, Device: q.used}
			}
			a.Queues[i] = v
		}
		d.proceed(a)
		return
	}
	d.broken(a, fmt.Errorf("activate: %w", err))
}

// broken sets DEVICE_NEEDS_RESET and tells the driver, once per activation.
func (d *Device) broken(a *activation, err error) {
	if d.act.Load() != a || !a.broken.CompareAndSwap(false, true) {
		return
	}
	a.reason.Store(&err)
	d.events.Add("DEVICE_NEEDS_RESET", inspect.Text("error", err.Error()))
	d.cfg.Log(fmt.Errorf("vpci: %s: %w", d.cfg.Name, err))
	d.interrupt(a)
}

func (d *Device) changed(a *activation) {
	if d.act.Load() == a {
		d.gen.Add(1)
		d.interrupt(a)
	}
}

// interrupt is a configuration change notification (virtio 1.3, 4.1.5.3).
func (d *Device) interrupt(a *activation) {
	if d.intx.config(a) {
		return
	}
	if v := d.cfgVector.Load(); v != noVector {
		if err := d.msix.Event(int(v)).Signal(); err != nil {
			d.cfg.Log(fmt.Errorf("vpci: %s: configuration interrupt: %w", d.cfg.Name, err))
		}
	}
}

// reset is a reset from outside of the virtio interface.
func (d *Device) reset() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.master = false
	if err := d.resetLocked(); err != nil {
		return fmt.Errorf("vpci: %s: reset: %w", d.cfg.Name, err)
	}
	return nil
}

// resetLocked waits until the device has stopped and forgets what the driver
// set (virtio 1.3, 2.4.1). The status reads 0 after it even when the device
// failed to stop, for a driver waits for that without end; it is DRIVER_OK that
// is refused then.
func (d *Device) resetLocked() error {
	d.stuck = d.cfg.Device.Reset()
	switch {
	case d.stuck != nil:
		d.events.Add("reset", inspect.Text("error", d.stuck.Error()))
	case d.status != 0:
		d.events.Add("reset")
	}
	d.forget()
	return d.stuck
}

func (d *Device) forget() {
	d.act.Store(nil)
	d.status = 0
	d.offered, d.accepted = d.cfg.Device.Features()|virtio.FeatureVersion1, 0
	d.offeredSelect, d.acceptedSelect, d.queueSelect = 0, 0, 0
	d.cfgVector.Store(noVector)
	for i := range d.queues {
		q := &d.queues[i]
		q.setup = setup{size: q.max, vector: noVector}
	}
	d.intx.reset()
	d.msix.Discard()
}
