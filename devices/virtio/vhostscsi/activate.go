package vhostscsi

import (
	"context"
	"errors"
	"fmt"

	"gvm/devices/virtio"
	"gvm/devices/virtio/virtq"
	"gvm/guestmem"
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
	var regions []vhost.Region
	for _, r := range a.Mem.Regions() {
		regions = append(regions, vhost.Region{GPA: r.Base, Bytes: r.Bytes})
	}
	if err := d.dev.SetMemTable(regions); err != nil {
		return err
	}
	// Bits of the transport are none of the kernel's business.
	if err := d.dev.SetFeatures(a.Features & d.kernel); err != nil {
		return err
	}
	// What an earlier driver missed is no news for this one. One that continues
	// may have missed what changed while the device was stopped.
	missed := d.stopped && a.Features&vhost.FeatureSCSIHotplug != 0
	if err := d.dev.SetEventsMissed(missed); err != nil {
		return err
	}
	d.stopped = false
	var err error
	if d.watch, err = newWatcher(d.dev, a); err != nil {
		return err
	}
	for i, q := range a.Queues {
		if q.Size == 0 {
			continue
		}
		if err := d.setVring(i, a); err != nil {
			return err
		}
	}
	if err := d.dev.SetEndpoint(d.endpoint); err != nil {
		return d.explain(err)
	}
	d.hear(a.Features, Hears)
	d.watch.start()
	// The kernel looks at a queue when its doorbell rings, and one that rang
	// before the endpoint was there is forgotten.
	for i, q := range a.Queues {
		if q.Size == 0 {
			continue
		}
		if err := q.Kick.Signal(); err != nil {
			return fmt.Errorf("queue %d: %w", i, err)
		}
	}
	return nil
}

// hear sets Hearing for a driver with these features.
func (d *Device) hear(features uint64, h Hearing) {
	if features&vhost.FeatureSCSIHotplug == 0 {
		h = Deaf
	}
	d.hearing.Store(int32(h))
}

func (d *Device) setVring(i int, a virtio.Activation) error {
	q := a.Queues[i]
	addr, err := resolve(a.Mem, q.Layout, a.Features)
	if err != nil {
		return fmt.Errorf("queue %d: %w", i, err)
	}
	if err := d.dev.SetVringNum(i, q.Size); err != nil {
		return err
	}
	if err := d.dev.SetVringBase(i, q.Base); err != nil {
		return err
	}
	if err := d.dev.SetVringAddr(i, addr); err != nil {
		return err
	}
	if err := d.dev.SetVringErr(i, d.watch.errs[i]); err != nil {
		return err
	}
	if err := d.dev.SetVringCall(i, q.Call); err != nil {
		return err
	}
	return d.dev.SetVringKick(i, q.Kick)
}

// resolve finds a queue's parts in guest RAM; the device side's own New says
// whether they may be there.
func resolve(mem *guestmem.Memory, l virtq.Layout, features uint64) (a vhost.VringAddr, err error) {
	if _, err := virtq.New(mem, l, features, 0); err != nil {
		return a, err
	}
	n := uint64(l.Size)
	for _, part := range []struct {
		to      *[]byte
		addr, n uint64
	}{{&a.Desc, l.Desc, 16 * n}, {&a.Driver, l.Driver, 6 + 2*n}, {&a.Device, l.Device, 6 + 8*n}} {
		if *part.to, err = mem.Slice(part.addr, part.n); err != nil {
			return a, err
		}
	}
	return a, nil
}

// Stop implements virtio.Device: the kernel lets the target go, once it has
// answered what it had taken, and forgets the queues. Without the target it hears
// of no change to a logical unit, so a driver with VIRTIO_SCSI_F_HOTPLUG is told,
// when it continues, that events were missed. The device keeps nothing else. The kernel
// cannot be told to give up, so the wait does not end with ctx.
func (d *Device) Stop(context.Context) ([]uint16, error) {
	var queues []virtio.Queue
	var features uint64
	if d.watch != nil {
		queues, features = d.watch.a.Queues, d.watch.a.Features
	}
	bases, undone, err := d.stop()
	// The kernel interrupts for the last requests after it has counted them
	// as answered, when it may have lost the eventfd already. One more is harmless.
	for _, q := range queues {
		if q.Size != 0 {
			err = errors.Join(err, q.Call.Signal())
		}
	}
	if err := errors.Join(undone, err); err != nil {
		return nil, fmt.Errorf("vhost-scsi: %w", err)
	}
	if bases != nil {
		d.stopped = true
		d.hear(features, Paused)
	}
	return bases, nil
}

// Reset implements virtio.Device. What is in flight finishes, as at Stop.
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
	if d.watch == nil {
		return nil, nil, nil
	}
	if err := d.watch.halt(); err != nil {
		return nil, nil, fmt.Errorf("stop watching for errors: %w", err)
	}
	if bases, undone = d.detach(); undone != nil {
		err = d.dev.Close()
		d.dev = nil
	}
	err = errors.Join(err, d.watch.close())
	d.watch = nil
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
	if d.watch.started {
		if bases, err = d.account(); err != nil {
			return nil, err
		}
	}
	for i := range firstRequestQueue + d.cfg.Queues {
		if err := d.dev.SetVringKick(i, nil); err != nil {
			return nil, err
		}
		if err := d.dev.SetVringCall(i, nil); err != nil {
			return nil, err
		}
		if err := d.dev.SetVringErr(i, nil); err != nil {
			return nil, err
		}
		if err := d.dev.SetVringAddr(i, vhost.VringAddr{}); err != nil {
			return nil, err
		}
	}
	return bases, nil
}

// account asks the kernel, which has let the target go, how far it came in each
// vring. By then it has answered what it took, except what it dropped as no request;
// more than that would be a fault of its own, so the first such time is told.
func (d *Device) account() ([]uint16, error) {
	bases := make([]uint16, len(d.watch.a.Queues))
	for i, q := range d.watch.a.Queues {
		if q.Size == 0 {
			continue
		}
		base, err := d.dev.VringBase(i)
		if err != nil {
			return nil, err
		}
		bases[i] = base
		used, err := d.watch.a.Mem.Slice(q.Device, 4)
		if err != nil {
			return nil, err
		}
		if n := base - guestmem.LoadUint16(used[2:]); n != 0 && !d.told {
			d.told = true
			d.cfg.Note(fmt.Sprintf(
				"vhost-scsi: queue %d: the kernel stopped with %d of the guest's requests taken and not answered", i, n))
		}
	}
	return bases, nil
}
