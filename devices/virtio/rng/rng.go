// Package rng is the virtio entropy device (virtio 1.3, 5.4): the guest's
// buffers are filled from the host kernel's random number generator.
package rng

import (
	"context"
	"crypto/rand"
	"time"

	"gvm/devices/virtio"
	"gvm/devices/virtio/virtq"
	"gvm/inspect"
)

// maxFill bounds the bytes of one request, so that a guest cannot keep the
// worker from stopping; the device may fill less than it was given
// (virtio 1.3, 5.4.6.2).
const maxFill = 64 << 10

const queueSize = 64

// Device is an entropy device.
type Device struct {
	workers virtio.Workers
}

// New returns an entropy device.
func New() *Device { return &Device{} }

// ID implements virtio.Device.
func (*Device) ID() virtio.ID { return virtio.IDRNG }

// Features implements virtio.Device.
func (*Device) Features() uint64 { return virtio.FeatureIndirectDesc | virtio.FeatureEventIdx }

// QueueSizes implements virtio.Device: one request queue.
func (*Device) QueueSizes() []uint16 { return []uint16{queueSize} }

// Config implements virtio.Device: there is no configuration space.
func (*Device) Config() []byte { return nil }

// Activate implements virtio.Device.
func (d *Device) Activate(a virtio.Activation) error {
	return d.workers.Start(a, func(int) (virtio.Handler, time.Duration) { return fill, 0 })
}

// Stop implements virtio.Device. The device keeps nothing.
func (d *Device) Stop(ctx context.Context) ([]uint16, error) { return d.workers.Stop(ctx, nil) }

// Reset implements virtio.Device.
func (d *Device) Reset() error {
	_, err := d.Stop(context.Background())
	return err
}

// Inspect implements virtio.Inspector.
func (d *Device) Inspect() ([]inspect.Node, [][]inspect.Node) { return nil, d.workers.Inspect() }

func fill(w *virtio.Worker, c *virtq.Chain) error {
	if c.Out.Len() > 0 {
		return &virtq.GuestError{Rule: "virtio 1.3, 5.4.6.1", What: "device-readable buffer in the entropy queue"}
	}
	if c.In.Len() == 0 {
		return &virtq.GuestError{Rule: "virtio 1.3, 5.4.6.2", What: "empty buffer in the entropy queue"}
	}
	n := 0
	for _, b := range c.In.Take(maxFill) {
		rand.Read(b) // never fails: the runtime ends the program if the kernel has no randomness
		n += len(b)
	}
	w.Complete(c, uint32(n))
	return nil
}
