// Package vhostvsock is the virtio socket device (virtio 1.3, 5.10) that the kernel serves by
// /dev/vhost-vsock: programs of the host reach the guest by AF_VSOCK, at a CID that no other
// machine of the host has. The guest finds the same PCI device as that of package vsock.
package vhostvsock

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"gvm/devices/virtio"
	"gvm/devices/virtio/vhostring"
	"gvm/devices/virtio/virtq"
	"gvm/inspect"
	"gvm/kvmapi/vhost"
)

// Queue numbers (5.10.2) and sizes. The kernel serves rx and tx; no event is ever sent, as the
// guest's connections are never interrupted without its knowledge (5.10.6.7).
const (
	served = 2

	queueSize      = 256
	eventQueueSize = 16
)

// ErrInUse is the error of New for a CID that another machine has.
var ErrInUse = errors.New("another machine of this host has it; give a CID of its own")

// Config is the configuration of a device.
type Config struct {
	CID    uint64                   // the guest's, from 3 on
	Note   func(string)             // takes one line for the user; nil drops it
	Before func(ioctl string) error // vhost.Device's
}

// Device is a socket device that the kernel serves.
type Device struct {
	cfg    Config
	dev    *vhost.Vsock     // nil after the kernel's half had to be closed
	kernel uint64           // feature bits that the kernel has
	rings  *vhostring.Rings // while active
}

// New opens the kernel's device and takes the CID, so that all that can go wrong does before a
// guest runs.
func New(cfg Config) (*Device, error) {
	if cfg.Note == nil {
		cfg.Note = func(string) {}
	}
	d := &Device{cfg: cfg}
	if err := d.open(); err != nil {
		return nil, fmt.Errorf("vhost-vsock: %w", err)
	}
	return d, nil
}

func (d *Device) open() error {
	dev, err := vhost.OpenVsock()
	if err != nil {
		return err
	}
	dev.Before = d.cfg.Before
	if err := d.prepare(dev); err != nil {
		return errors.Join(err, dev.Close())
	}
	d.dev = dev
	return nil
}

func (d *Device) prepare(dev *vhost.Vsock) (err error) {
	if d.kernel, err = dev.Features(); err != nil {
		return err
	}
	if d.kernel&virtio.FeatureVersion1 == 0 {
		return fmt.Errorf("this kernel's features %#x lack VIRTIO_F_VERSION_1: boot a newer kernel", d.kernel)
	}
	if err := dev.SetOwner(); err != nil {
		return err
	}
	err = dev.SetGuestCID(d.cfg.CID)
	if errors.Is(err, unix.EADDRINUSE) {
		return fmt.Errorf("CID %d: %w", d.cfg.CID, ErrInUse)
	}
	return err
}

// Close stops the device and closes the kernel's half, which ends the host's connections.
func (d *Device) Close() error {
	err := d.Reset()
	if d.dev != nil {
		err = errors.Join(err, d.dev.Close())
		d.dev = nil
	}
	return err
}

// ID implements virtio.Device.
func (*Device) ID() virtio.ID { return virtio.IDVsock }

// Features implements virtio.Device: the kernel's features that the transport can carry.
func (d *Device) Features() uint64 {
	return d.kernel & (vhost.FeatureVsockSeqpacket | virtio.FeatureIndirectDesc | virtio.FeatureEventIdx)
}

// QueueSizes implements virtio.Device: rx, tx and event queue.
func (*Device) QueueSizes() []uint16 { return []uint16{queueSize, queueSize, eventQueueSize} }

// Config implements virtio.Device: guest_cid.
func (d *Device) Config() []byte { return binary.LittleEndian.AppendUint64(nil, d.cfg.CID) }

// Activate implements virtio.Device.
func (d *Device) Activate(a virtio.Activation) error {
	if err := d.activate(a); err != nil {
		return errors.Join(fmt.Errorf("vhost-vsock: %w", err), d.Reset())
	}
	return nil
}

func (d *Device) activate(a virtio.Activation) error {
	for _, q := range a.Queues[:served] {
		if q.Size == 0 { // the kernel starts both or none
			return &virtq.GuestError{Rule: "virtio 1.3, 5.10.2", What: "driver without an rx or tx queue"}
		}
	}
	if d.dev == nil {
		if err := d.open(); err != nil {
			return err
		}
	}
	var err error
	if d.rings, err = vhostring.New(&d.dev.Device, "vhost-vsock", a, served); err != nil {
		return err
	}
	// Bits of the transport are none of the kernel's business.
	if err := d.rings.Set(a.Features & d.kernel); err != nil {
		return err
	}
	if err := d.dev.SetRunning(true); err != nil {
		return err
	}
	return d.rings.Start()
}

// Stop implements virtio.Device. The kernel answers all that it has taken, and the host's
// connections stay: what their programs send waits. The wait does not end with ctx.
func (d *Device) Stop(context.Context) ([]uint16, error) {
	rings := d.rings
	bases, undone, err := d.stop()
	if err := errors.Join(undone, err, rings.Interrupt()); err != nil {
		return nil, fmt.Errorf("vhost-vsock: %w", err)
	}
	return bases, nil
}

// Reset implements virtio.Device. The kernel does not forget the host's connections: the next
// driver resets each at its next packet, and Close ends them.
func (d *Device) Reset() error {
	_, undone, err := d.stop()
	if undone != nil {
		d.cfg.Note(fmt.Sprintf("vhost-vsock: closed, to be opened again, because it did not stop: %v", undone))
	}
	if err != nil {
		return fmt.Errorf("vhost-vsock: %w", err)
	}
	return nil
}

// stop undoes Activate and returns the base of each queue. If the kernel refuses a part of it,
// which undone says, the kernel's half is closed, and the next Activate opens it anew.
func (d *Device) stop() (bases []uint16, undone, err error) {
	if d.rings == nil {
		return nil, nil, nil
	}
	if err := d.rings.Halt(); err != nil {
		return nil, nil, err
	}
	if bases, undone = d.detach(); undone != nil {
		err = d.dev.Close()
		d.dev = nil
	}
	err = errors.Join(err, d.rings.Close())
	d.rings = nil
	return bases, undone, err
}

func (d *Device) detach() ([]uint16, error) {
	if err := d.dev.SetRunning(false); err != nil {
		return nil, err
	}
	bases, err := d.rings.Bases(func(queue int, n uint16) {
		d.cfg.Note(fmt.Sprintf(
			"vhost-vsock: queue %d: the kernel stopped with %d of the guest's buffers taken and not used", queue, n))
	})
	if err != nil {
		return nil, err
	}
	if err := d.rings.Clear(); err != nil {
		return nil, err
	}
	return bases, d.dev.SetMemTable(nil)
}

// Inspect implements virtio.Inspector. The kernel shows no connections.
func (d *Device) Inspect() ([]inspect.Node, [][]inspect.Node) {
	return []inspect.Node{inspect.Int("guest_cid", d.cfg.CID), inspect.Bool("running", d.rings != nil)},
		d.rings.Inspect()
}
