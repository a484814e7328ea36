// Package example is a complete virtio device, to begin another one from: a driver gets the bytes
// of each request back in reverse order. Its row and a driver are in package machine's tests.
package example

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"slices"
	"time"

	"gvm/devices/virtio"
	"gvm/devices/virtio/virtq"
)

// ID is one that virtio 1.3, 5 does not assign.
const ID virtio.ID = 63

const MaxLen = 4096 // bytes of a request at most: the field max_len of the configuration space

// Device reverses bytes.
type Device struct{ workers virtio.Workers }

// ID implements virtio.Device.
func (*Device) ID() virtio.ID { return ID }

// Features implements virtio.Device: the bits of the ring that virtio.Workers serves.
func (*Device) Features() uint64 { return virtio.FeatureIndirectDesc | virtio.FeatureEventIdx }

// QueueSizes implements virtio.Device: one request queue.
func (*Device) QueueSizes() []uint16 { return []uint16{64} }

// Config implements virtio.Device.
func (*Device) Config() []byte { return binary.LittleEndian.AppendUint32(nil, MaxLen) }

// Activate implements virtio.Device.
func (d *Device) Activate(a virtio.Activation) error {
	return d.workers.Start(a, func(int) (virtio.Handler, time.Duration) { return reverse, 0 })
}

// Stop implements virtio.Device.
func (d *Device) Stop(ctx context.Context) ([]uint16, error) { return d.workers.Stop(ctx, nil) }

// Reset implements virtio.Device. No request takes long enough to abort it.
func (d *Device) Reset() error {
	_, err := d.Stop(context.Background())
	return err
}

func reverse(w *virtio.Worker, c *virtq.Chain) error {
	if n := c.Out.Len(); n > MaxLen || n > c.In.Len() {
		return &virtq.GuestError{Rule: "max_len", What: fmt.Sprintf("%d bytes, room for %d", n, c.In.Len())}
	}
	data, _ := io.ReadAll(&c.Out) // one copy, which the guest cannot change
	slices.Reverse(data)
	written, _ := c.In.Write(data)
	w.Complete(c, uint32(written))
	return nil
}
