package vhostscsi

import (
	"context"
	"errors"
	"fmt"

	"gvm/devices/virtio"
	"gvm/devices/virtio/vhostring"
	"gvm/kvmapi/vhost"
)

// Activate implements virtio.Device. The kernel wants everything before the
// endpoint: with it, it makes as many commands as the vrings have entries, and
// no vring can be changed any more.
func (d *Device) Activate(a virtio.Activation) error {
	if err := d.activate(a); err != nil {
		return errors.Join(fmt.Errorf("vhost-scsi: %w", err), d.Reset())
	}
	return nil
}

func (d *Device) activate(a virtio.Activation) error {
	if d.dev == nil {
		if err := d.open(); err != nil {
			return err
		}
	}
	// Events that an earlier driver missed are no news for this one. One that continues
	// may have missed what changed while the device was stopped.
	missed := d.stopped && a.Features&vhost.FeatureSCSIHotplug != 0
	if err := d.dev.SetEventsMissed(missed); err != nil {
		return err
	}
	d.stopped = false
	var err error
	if d.rings, err = vhostring.New(&d.dev.Device, "vhost-scsi", a, firstRequestQueue+d.cfg.Queues); err != nil {
		return err
	}
	// Bits of the transport are none of the kernel's business.
	if err := d.rings.Set(a.Features & d.kernel); err != nil {
		return err
	}
	if err := d.dev.SetEndpoint(d.endpoint); err != nil {
		return d.explain(err)
	}
	d.hear(a.Features, Hears)
	return d.rings.Start()
}

// hear sets Hearing for a driver with these features.
func (d *Device) hear(features uint64, h Hearing) {
	if features&vhost.FeatureSCSIHotplug == 0 {
		h = Deaf
	}
	d.hearing.Store(int32(h))
}

// Stop implements virtio.Device: the kernel lets the target go, once it has
// answered all that it had taken, and forgets the queues. Without the target it hears
// of no change to a logical unit, so a driver with VIRTIO_SCSI_F_HOTPLUG is told,
// when it continues, that events were missed. The device keeps nothing else. The kernel
// cannot be told to give up, so the wait does not end with ctx.
func (d *Device) Stop(context.Context) ([]uint16, error) {
	rings := d.rings
	bases, undone, err := d.stop()
	err = errors.Join(err, rings.Interrupt())
	if err := errors.Join(undone, err); err != nil {
		return nil, fmt.Errorf("vhost-scsi: %w", err)
	}
	if bases != nil {
		d.stopped = true
		d.hear(rings.Features(), Paused)
	}
	return bases, nil
}

// Reset implements virtio.Device. Requests in flight finish, as at Stop.
func (d *Device) Reset() error {
	d.stopped = false
	d.hearing.Store(int32(NoDriver))
	_, undone, err := d.stop()
	if undone != nil {
		d.cfg.Note(fmt.Sprintf("vhost-scsi: closed, to be opened again, because it did not stop: %v", undone))
	}
	if err != nil {
		return fmt.Errorf("vhost-scsi: %w", err)
	}
	return nil
}

// stop undoes Activate and returns the base of each queue that was served.
//
// The kernel's half stays open, for its owner, workers and permission to use it
// are got once, before the guest runs; a monitor that gave up its privileges
// could not open it again. So everything that Activate set has to be undone:
// above all the addresses, for the kernel writes to the used ring of each vring
// that has one when it gets an endpoint, and the next driver may use fewer
// queues and the memory for something else. Should the kernel refuse any of it,
// which undone says, closing does the same, and the next Activate opens anew.
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

func (d *Device) detach() (bases []uint16, err error) {
	// VHOST_SCSI_CLEAR_ENDPOINT takes the portal groups away before it stops the
	// queues: a request of between is answered with BAD_TARGET. Without memory the
	// kernel takes none; those that it has taken know their addresses.
	if err := d.dev.SetMemTable(nil); err != nil {
		return nil, err
	}
	if err := d.dev.ClearEndpoint(d.endpoint); err != nil {
		return nil, err
	}
	if bases, err = d.rings.Bases(d.account); err != nil {
		return nil, err
	}
	return bases, d.rings.Clear()
}

// account notes that the kernel has let the target go, and has taken n requests of a queue that it
// did not answer. It answers all that it took, but those that it dropped as no request; more than
// that would be a fault of its own, so the first such time is told.
func (d *Device) account(queue int, n uint16) {
	if !d.told {
		d.told = true
		d.cfg.Note(fmt.Sprintf(
			"vhost-scsi: queue %d: the kernel stopped with %d of the guest's requests taken and not answered", queue, n))
	}
}
