// Package vhostnet has the kernel serve the queue pairs of a network device by /dev/vhost-net:
// frames pass between a TAP interface and the guest's memory without this process. What remains of
// the device, its configuration and its control queue, is package net's.
package vhostnet

import (
	"errors"
	"fmt"

	"gvm/devices/virtio"
	"gvm/devices/virtio/vhostring"
	"gvm/inspect"
	"gvm/kvmapi/vhost"
)

// Pairs are the queue pairs of a device. They implement net.Kernel.
type Pairs struct {
	pairs    []*pair
	features uint64 // that the kernel has
	note     func(string)
}

// pair is a queue pair, which has a device of the kernel's own.
type pair struct {
	dev   *vhost.Net
	tap   int
	rings *vhostring.Rings // while active
}

const served = 2 // queues of a pair

// Open opens a device of the kernel's for each queue of a TAP interface. Its errors say how to fix
// the problem. note takes one line for the user.
func Open(taps []int, note func(string)) (*Pairs, error) {
	k := &Pairs{note: note}
	for _, tap := range taps {
		dev, err := vhost.OpenNet()
		if err != nil {
			return nil, errors.Join(err, k.Close())
		}
		k.pairs = append(k.pairs, &pair{dev: dev, tap: tap})
		if k.features, err = dev.Features(); err == nil {
			err = dev.SetOwner()
		}
		if err == nil && k.features&virtio.FeatureVersion1 == 0 {
			err = fmt.Errorf("this kernel's features %#x lack VIRTIO_F_VERSION_1: boot a newer kernel", k.features)
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("vhost-net: %w", err), k.Close())
		}
	}
	k.features &^= vhost.FeatureNetHeader // a TAP interface makes its own
	return k, nil
}

// Close closes the kernel's devices.
func (k *Pairs) Close() (err error) {
	for _, p := range k.pairs {
		err = errors.Join(err, p.dev.Close())
	}
	return err
}

// Features implements net.Kernel.
func (k *Pairs) Features() uint64 { return k.features }

// Activate implements net.Kernel.
func (k *Pairs) Activate(a virtio.Activation) error {
	for i := range len(a.Queues) / served {
		p := a
		p.Queues = a.Queues[served*i:][:served]
		if err := k.pairs[i].activate(p, k.features); err != nil {
			_, undone := k.Stop()
			return errors.Join(fmt.Errorf("vhost-net: pair %d: %w", i, err), undone)
		}
	}
	return nil
}

func (p *pair) activate(a virtio.Activation, features uint64) (err error) {
	if p.rings, err = vhostring.New(&p.dev.Device, "vhost-net", a, served); err != nil {
		return err
	}
	// Offloads are between the driver and the TAP interface, and bits of the transport the
	// transport's.
	if err := p.rings.Set(a.Features & features); err != nil {
		return err
	}
	for i, q := range a.Queues {
		if q.Size != 0 {
			if err := p.dev.SetBackend(i, p.tap); err != nil {
				return err
			}
		}
	}
	return p.rings.Start()
}

// Stop implements net.Kernel. The kernel finishes the frames that it has taken.
func (k *Pairs) Stop() (bases []uint16, err error) {
	for i, p := range k.pairs {
		if p.rings == nil {
			continue
		}
		b, e := k.stop(i)
		e = errors.Join(e, p.rings.Interrupt(), p.rings.Close())
		bases, err, p.rings = append(bases, b...), errors.Join(err, e), nil
	}
	if err != nil {
		return nil, fmt.Errorf("vhost-net: %w", err)
	}
	return bases, nil
}

func (k *Pairs) stop(i int) ([]uint16, error) {
	p := k.pairs[i]
	if err := p.rings.Halt(); err != nil {
		return nil, err
	}
	for vring := range served {
		if err := p.dev.SetBackend(vring, -1); err != nil {
			return nil, err
		}
	}
	bases, err := p.rings.Bases(func(queue int, n uint16) {
		k.note(fmt.Sprintf("vhost-net: queue %d: the kernel stopped with %d of the guest's buffers taken and not used",
			served*i+queue, n))
	})
	if err != nil {
		return nil, err
	}
	if err := p.rings.Clear(); err != nil {
		return nil, err
	}
	return bases, p.dev.SetMemTable(nil)
}

// Inspect implements net.Kernel: of each queue how far the kernel is.
func (k *Pairs) Inspect() (queues [][]inspect.Node) {
	for _, p := range k.pairs {
		queues = append(queues, p.rings.Inspect()...)
	}
	return queues
}
