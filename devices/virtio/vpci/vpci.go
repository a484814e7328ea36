// Package vpci shows a virtio device to the guest as a PCI function: the modern
// transport of virtio 1.3, 4.1. It does feature negotiation, device status,
// queue set-up, doorbells, MSI-X and INTx, and hands the device its queues at
// DRIVER_OK; the transitional and legacy interfaces are not there.
package vpci

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"sync"
	"sync/atomic"

	"gvm/devices/pci"
	"gvm/devices/virtio"
	"gvm/guestmem"
	"gvm/inspect"
	"gvm/kvmapi/eventfd"
	"gvm/panics"
)

// PCI identity (virtio 1.3, 4.1.2) and capabilities (4.1.4).
const (
	vendorID     = 0x1af4
	deviceIDBase = 0x1040
	revision     = 1
	capVendor    = 0x09

	capCommon = 1
	capNotify = 2
	capISR    = 3
	capDevice = 4
	capPCI    = 5
)

// BAR 0 holds the four structures, a page or more each, so that a guest can map
// them apart; BAR 2 is MSI-X's.
const (
	barRegs = 0
	barMSIX = 2

	commonOff  = 0x0000
	commonSize = 0x40 // up to and with admin_queue_num
	isrOff     = 0x1000
	deviceOff  = 0x2000
	deviceMax  = 0x1000
	notifyOff  = 0x3000
	notifyMul  = 4 // notify_off_multiplier: an address per queue
)

// Doorbells connects an address of the guest to an eventfd without an exit to
// gvm: KVM's ioeventfd, of any length and any datum. The device keeps owning
// fd. Both are called while the BAR moves and do not call back.
type Doorbells interface {
	AddDoorbell(addr uint64, fd *eventfd.FD) error
	RemoveDoorbell(addr uint64, fd *eventfd.FD) error
}

// Config has the parameters of New; all but Log and Context are required.
type Config struct {
	Name      string // for messages
	Device    virtio.Device
	Mem       *guestmem.Memory
	Vectors   pci.Vectors
	Doorbells Doorbells
	// Log is told what broke: a device that failed or found its guest at
	// fault, the operation that the machine refused. A guest can cause any number of calls.
	// It comes from any goroutine, with locks held: it does not call back.
	Log func(error)
	// Context ends when the guest need not be waited for any more: a CPU that clears Bus Master Enable
	// waits for the device until then. nil does not end.
	Context context.Context
}

// queue is a virtqueue. What is not setup never changes: a doorbell that causes
// an exit uses kick without the lock.
type queue struct {
	max  uint16
	kick *eventfd.FD
	setup
}

// setup has the driver's values for a virtqueue, which a reset forgets.
type setup struct {
	size, vector       uint16
	enabled            bool
	desc, driver, used uint64 // queue_desc, queue_driver, queue_device
}

// activation is one time between DRIVER_OK and reset; what an earlier one
// reports late is dropped.
type activation struct {
	broken  atomic.Bool
	reason  atomic.Pointer[error] // of broken
	vectors bool                  // some queue has an MSI-X vector

	// Device.mu guards these.
	state             activationState
	virtio.Activation // with the bases to continue at, if the device is stopped
}

type activationState int

const (
	failed activationState = iota // the device is reset
	active
	stopped
)

// Device is a virtio device on PCI.
//
// mu is below the function's lock: the PCI_CFG window and a reset come through
// configuration space. It is held while the virtio.Device is called, so what a
// worker may call (broken, changed, a doorbell) works without it.
type Device struct {
	cfg      Config
	fn       *pci.Function
	msix     *pci.MSIX
	queues   []queue // the slice never changes
	intx     intx
	unheard  *eventfd.FD // Call of a queue without a vector
	cfgLen   int
	doorbell []int // queues whose doorbell is connected; guarded by the bus

	cfgVector atomic.Uint32
	gen       atomic.Uint32 // config_generation, the low 8 bits
	act       atomic.Pointer[activation]
	paused    atomic.Bool
	events    inspect.Events

	mu             sync.Mutex
	status         byte // without DEVICE_NEEDS_RESET, which is act's
	offered        uint64
	accepted       uint64
	offeredSelect  uint32
	acceptedSelect uint32
	queueSelect    uint16
	master         bool   // the guest lets the function use memory
	stuck          error  // the device's Reset failed: it must not start again
	seen           []byte // device configuration of the present generation
}

// New puts c.Device behind a PCI function, which the caller adds to a bus. On
// an error everything that was opened is closed.
func New(c Config) (*Device, error) {
	if c.Log == nil {
		c.Log = func(error) {}
	}
	if c.Context == nil {
		c.Context = context.Background()
	}
	d := &Device{cfg: c, seen: c.Device.Config()}
	d.cfgLen = len(d.seen)
	sizes := c.Device.QueueSizes()
	if len(sizes) == 0 || len(sizes) >= pci.MaxVectors || d.cfgLen > deviceMax {
		return nil, fmt.Errorf("vpci: %s: %d queues, %d bytes of configuration", c.Name, len(sizes), d.cfgLen)
	}
	id := deviceIDBase + uint16(c.Device.ID())
	d.fn = pci.NewFunction(pci.FunctionConfig{
		Name: c.Name, Vendor: vendorID, Device: id, SubVendor: vendorID, SubDevice: id,
		Class: class(c.Device.ID()), Revision: revision, Reset: d.reset, Command: d.command,
		Inspect: d.inspect,
	})
	if err := d.open(sizes); err != nil {
		return nil, errors.Join(fmt.Errorf("vpci: %s: %w", c.Name, err), d.release())
	}
	d.forget()
	return d, nil
}

func class(id virtio.ID) uint32 {
	if id == virtio.IDSCSI {
		return 0x010000 // SCSI controller
	}
	return 0xff0000 // fits in no defined class
}

func (d *Device) open(sizes []uint16) (err error) {
	if d.unheard, err = eventfd.New(); err != nil {
		return err
	}
	if d.intx.wake, err = eventfd.New(); err != nil {
		return err
	}
	d.intx.d, d.intx.pin = d, d.fn.AddINTx()
	for i, n := range sizes {
		if bits.OnesCount16(n) != 1 || n > 1<<15 {
			return fmt.Errorf("queue %d has a bad size %d", i, n)
		}
		kick, err := eventfd.New()
		if err != nil {
			return err
		}
		d.queues = append(d.queues, queue{max: n, kick: kick})
	}
	notify := uint32(notifyMul * len(sizes))
	err = d.fn.AddBAR(pci.BAR{
		// Not prefetchable: a read of ISR clears it.
		Index: barRegs, Wide: true, Size: 1 << bits.Len32(notifyOff+notify-1),
		Handler: regs{d}, Mapped: d.connect, Unmapped: d.disconnect,
	})
	if err != nil {
		return err
	}
	if d.msix, err = d.fn.AddMSIX(barMSIX, 1+len(sizes), d.cfg.Vectors, d.cfg.Log); err != nil {
		return err
	}
	d.msix.Changed = d.intx.changed
	caps := []pci.Capability{
		vendorCap(capCommon, commonOff, commonSize),
		vendorCap(capNotify, notifyOff, notify, notifyMul, 0, 0, 0),
		vendorCap(capISR, isrOff, 1),
		vendorCap(capDevice, deviceOff, uint32(d.cfgLen)),
		d.window(),
	}
	for _, c := range caps {
		if c.Body[1] == capDevice && d.cfgLen == 0 {
			continue // this type of device has none (virtio 1.3, 4.1.4.6.1)
		}
		if _, err := d.fn.AddCapability(c); err != nil {
			return err
		}
	}
	return nil
}

// vendorCap is struct virtio_pci_cap after its first two bytes (virtio 1.3,
// 4.1.4): cap_len, cfg_type, bar, id, padding, offset, length.
func vendorCap(kind byte, off, length uint32, more ...byte) pci.Capability {
	body := []byte{byte(16 + len(more)), kind, barRegs, 0, 0, 0}
	body = binary.LittleEndian.AppendUint32(body, off)
	body = binary.LittleEndian.AppendUint32(body, length)
	return pci.Capability{ID: capVendor, Body: append(body, more...)}
}

// window is VIRTIO_PCI_CAP_PCI_CFG (virtio 1.3, 4.1.4.9): the driver chooses a
// BAR, an offset and a length, and pci_cfg_data is what is there. A choice that
// is not an aligned access of 1, 2 or 4 bytes inside a BAR of this function
// reads as ones and writes nothing.
func (d *Device) window() pci.Capability {
	const bar, offset, length, data = 2, 6, 10, 14
	c := vendorCap(capPCI, 0, 0, 0, 0, 0, 0)
	c.Writable = make([]byte, len(c.Body))
	c.Writable[bar] = 0xff
	for i := offset; i < len(c.Writable); i++ {
		c.Writable[i] = 0xff
	}
	at := func(body []byte) (pci.Handler, uint64, []byte) {
		h, size := d.fn.Region(int(body[bar]))
		off := uint64(binary.LittleEndian.Uint32(body[offset:]))
		n := uint64(binary.LittleEndian.Uint32(body[length:]))
		if h == nil || n != 1 && n != 2 && n != 4 || off%n != 0 || off+n > size {
			return nil, 0, nil
		}
		return h, off, body[data : data+n]
	}
	c.OnRead = func(body []byte, off, n int) {
		if off+n <= data {
			return
		}
		if h, off, p := at(body); h != nil {
			h.Read(off, p)
			return
		}
		binary.LittleEndian.PutUint32(body[data:], 0xffffffff)
	}
	c.OnWrite = func(body []byte, off, n int) {
		if off+n <= data {
			return
		}
		if h, off, p := at(body); h != nil {
			h.Write(off, p)
		}
	}
	return c
}

// Function returns the PCI function. Its Reset is the whole device's.
func (d *Device) Function() *pci.Function { return d.fn }

// Close takes the function off its bus, stops the device and closes every
// eventfd and vector. No vCPU may run any more.
func (d *Device) Close() error {
	d.fn.Detach()
	err := d.reset()
	return errors.Join(err, d.release())
}

func (d *Device) release() error {
	var errs []error
	if d.intx.wake != nil {
		errs = append(errs, d.intx.close())
	}
	for i := range d.queues {
		errs = append(errs, d.queues[i].kick.Close())
	}
	if d.unheard != nil {
		errs = append(errs, d.unheard.Close())
	}
	if d.msix != nil {
		errs = append(errs, d.msix.Close())
	}
	return errors.Join(errs...)
}

// connect and disconnect make the doorbells follow BAR 0. One that cannot be
// connected (KVM has a limit) works by way of an exit, as regs.Write does.
func (d *Device) connect(base uint64) {
	for i := range d.queues {
		if err := d.cfg.Doorbells.AddDoorbell(base+notifyOff+uint64(i)*notifyMul, d.queues[i].kick); err != nil {
			d.cfg.Log(fmt.Errorf("vpci: %s: doorbell of queue %d: %w", d.cfg.Name, i, err))
			continue
		}
		d.doorbell = append(d.doorbell, i)
	}
}

func (d *Device) disconnect(base uint64) {
	for _, i := range d.doorbell {
		if err := d.cfg.Doorbells.RemoveDoorbell(base+notifyOff+uint64(i)*notifyMul, d.queues[i].kick); err != nil {
			d.cfg.Log(fmt.Errorf("vpci: %s: doorbell of queue %d: %w", d.cfg.Name, i, err))
		}
	}
	d.doorbell = d.doorbell[:0]
}

// command follows the bus master bit. Without it a function must not touch
// memory (PCI 3.0, 6.2.2): the device stops, and continues when the bit is set.
//
// Linux clears the bit before kexec, and the next kernel sets it before it resets the
// device, whose rings are not there any more. But to find the sizes of the BARs it turned
// memory decoding off before, which a driver that only clears the bit for a while has
// no reason to do. So then the device does not continue, and its driver has to reset it.
// It also takes back its interrupts: the next kernel may enable a device that shares its
// line first, and does not know its messages, which wait for bus mastering.
func (d *Device) command(command uint16) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.master = command&pci.CommandMaster != 0
	a := d.act.Load()
	if a == nil {
		return
	}
	if !d.master {
		if err := d.stop(d.cfg.Context, a); err != nil { // the machine ends
			d.fail(a, fmt.Errorf("bus mastering was turned off: %w", err))
		}
		if command&pci.CommandMemory == 0 {
			if a.state == stopped {
				d.fail(a, errors.New("bus mastering and memory decoding were turned off"))
			}
			d.intx.reset()
			d.msix.Discard()
		}
	}
	d.proceed(a)
}

// stop stops the device if it is active. If it does not, because ctx ends first, stop returns the
// cause of ctx. A device that cannot stop fails. The caller holds mu.
func (d *Device) stop(ctx context.Context, a *activation) error {
	if a.state != active {
		return nil
	}
	bases, err := d.cfg.Device.Stop(ctx)
	switch {
	case err != nil && ctx.Err() != nil && errors.Is(err, context.Cause(ctx)):
		return err
	case err != nil:
		d.fail(a, fmt.Errorf("stop: %w", err))
		return nil
	}
	a.state = stopped
	d.events.Add("stopped")
	for i, base := range bases {
		a.Queues[i].Base = base
	}
	return nil
}

// proceed has a stopped device continue if nothing keeps it from that. The caller holds mu.
func (d *Device) proceed(a *activation) {
	if a.state != stopped || !d.master || d.paused.Load() {
		return
	}
	a.state = active
	act := a.Activation
	act.Queues = slices.Clone(a.Queues) // the device keeps them
	if err := d.cfg.Device.Activate(act); err != nil {
		a.state = failed
		d.broken(a, fmt.Errorf("activate: %w", err))
		return
	}
	d.events.Add("active")
}

// fail resets the device, and tells the driver to do that too. The caller holds mu.
func (d *Device) fail(a *activation, err error) {
	d.stuck = d.cfg.Device.Reset()
	a.state = failed
	d.broken(a, errors.Join(err, d.stuck))
}

// Pause stops the device, if a driver uses it, until Resume. It does not wait: done gets nil when
// everything in flight is finished, or the cause of ctx, with the device as it was, if ctx ended
// first. A device that cannot give up (see virtio.Device's Stop) does not answer before its storage
// does.
func (d *Device) Pause(ctx context.Context) (done <-chan error) {
	d.paused.Store(true)
	return d.later(func(a *activation) error { return d.stop(ctx, a) })
}

// Resume has the device continue after Pause, also one that has not stopped yet. It does not wait:
// done gets nil then.
func (d *Device) Resume() (done <-chan error) {
	d.paused.Store(false)
	return d.later(func(*activation) error { return nil })
}

// later runs do, if there is an activation, and then has the device continue if it may, in a
// goroutine: mu may be held as long as storage takes.
func (d *Device) later(do func(*activation) error) <-chan error {
	done := make(chan error, 1)
	panics.Go(func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		var err error
		if a := d.act.Load(); a != nil {
			err = do(a)
			d.proceed(a)
		}
		done <- err
	})
	return done
}
