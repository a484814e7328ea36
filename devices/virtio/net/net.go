// Package net is the virtio network device (virtio 1.3, 5.1). Its backend is a descriptor for each
// pair of queues, on which a read or a write is one frame behind a struct virtio_net_hdr: a TAP
// interface of the host, or a socket of a program that speaks for a network.
//
// The device has no goroutines but the workers of its queues. Frames go straight between the
// descriptor and the guest's memory. The worker of a receive queue takes buffers only for frames
// that are there, and waits for the descriptor and for the driver at once. The worker of a transmit
// queue waits while the backend takes no more.
//
// The device does not look into frames, nor at the driver's fields of the header: gso_type,
// hdr_len, gso_size, csum_start and csum_offset go to the backend, which must not trust them. A TAP
// interface does not: tun_get_user (drivers/net/tun.c) holds hdr_len to the frame's length,
// virtio_net_hdr_to_skb (include/linux/virtio_net.h) checks the others against the frame, and the
// write fails with EINVAL. Then the frame is lost, and counted.
package net

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"gvm/devices/virtio"
	"gvm/devices/virtio/virtq"
	"gvm/inspect"
	"gvm/kvmapi/eventfd"
)

// Feature bits (5.1.3).
const (
	CSum      = 1 << 0  // VIRTIO_NET_F_CSUM
	GuestCSum = 1 << 1  // VIRTIO_NET_F_GUEST_CSUM
	GuestTSO4 = 1 << 7  // VIRTIO_NET_F_GUEST_TSO4
	GuestTSO6 = 1 << 8  // VIRTIO_NET_F_GUEST_TSO6
	GuestECN  = 1 << 9  // VIRTIO_NET_F_GUEST_ECN
	HostTSO4  = 1 << 11 // VIRTIO_NET_F_HOST_TSO4
	HostTSO6  = 1 << 12 // VIRTIO_NET_F_HOST_TSO6
	HostECN   = 1 << 13 // VIRTIO_NET_F_HOST_ECN

	featureMTU     = 1 << 3  // VIRTIO_NET_F_MTU
	featureMAC     = 1 << 5  // VIRTIO_NET_F_MAC
	featureMrgRxB  = 1 << 15 // VIRTIO_NET_F_MRG_RXBUF
	featureStatus  = 1 << 16 // VIRTIO_NET_F_STATUS
	featureCtrlVQ  = 1 << 17 // VIRTIO_NET_F_CTRL_VQ
	featureCtrlRX  = 1 << 18 // VIRTIO_NET_F_CTRL_RX
	featureMQ      = 1 << 22 // VIRTIO_NET_F_MQ
	allOffloads    = CSum | GuestCSum | GuestTSO4 | GuestTSO6 | GuestECN | HostTSO4 | HostTSO6 | HostECN
	needsGuestCSum = GuestTSO4 | GuestTSO6 | GuestECN
)

const (
	queueSize        = 256
	controlQueueSize = 64

	// HeaderLen is the length of struct virtio_net_hdr with num_buffers (5.1.6).
	HeaderLen     = 12
	numBuffersOff = 10

	// MaxFrame is the length of the longest frame with its header: the largest IP packet behind an
	// Ethernet header of 15 bytes, as in 5.1.6.3.1.
	MaxFrame = HeaderLen + 65550

	// MaxPairs bounds the pairs of queues of a device: each queue has a thread.
	MaxPairs = 16

	minMTU = 68 // 5.1.4.1
)

// Config is the configuration of a device.
type Config struct {
	MAC [6]byte
	MTU uint16 // the largest that the driver should use; 0: the driver is not told
	// Queues are the backend's descriptors, one for each pair of queues, in non-blocking mode. The
	// caller closes them after the device's last Reset.
	Queues []int
	// Offloads are the bits CSum to HostECN that the backend is able to do.
	Offloads uint64
	// SetOffloads tells the backend which of GuestCSum to GuestECN the driver has accepted: frames to
	// the guest must need no other. nil: the backend makes no such frames.
	SetOffloads func(features uint64) error
	// SetPairs tells a backend with several queues to use the first n alone. It is 1 at first.
	SetPairs func(n int) error
	// Kernel serves the queue pairs in place of the device's workers; nil: none does.
	Kernel Kernel
	// Failed is called once, with the reason, when the backend has ended. The guest's link is down
	// then. It does not block.
	Failed func(error)
}

// Kernel is the host's kernel, which serves the queue pairs.
type Kernel interface {
	// Features returns the bits of the ring and VIRTIO_NET_F_MRG_RXBUF that the kernel has.
	Features() uint64
	// Activate is virtio.Device's, for the queues of the pairs alone. After an error nothing is
	// active.
	Activate(virtio.Activation) error
	// Stop is virtio.Device's; it does not give up.
	Stop() (bases []uint16, err error)
	// Inspect is virtio.Inspector's, for queues.
	Inspect() [][]inspect.Node
}

// Device is a network device.
type Device struct {
	cfg     Config
	pairs   []*pair
	workers virtio.Workers
	down    atomic.Bool            // the backend has ended
	changed atomic.Pointer[func()] // ConfigChanged of the last activation

	mu       sync.Mutex // guards the fields below; taken before a pair's
	driven   bool       // from Activate to Reset
	features uint64
	kernel   int           // queues that the kernel serves
	used     int           // pairs that the driver uses
	kicks    []*eventfd.FD // of the receive queues, while the device is active
}

// New returns a device. The error names the field and its fault.
func New(cfg Config) (*Device, error) {
	switch {
	case cfg.MAC == [6]byte{} || cfg.MAC[0]&1 != 0:
		return nil, fmt.Errorf("virtio-net: MAC address % x is not one of a station", cfg.MAC)
	case len(cfg.Queues) == 0 || len(cfg.Queues) > MaxPairs:
		return nil, fmt.Errorf("virtio-net: %d queue pairs: want 1 to %d", len(cfg.Queues), MaxPairs)
	case cfg.MTU != 0 && cfg.MTU < minMTU:
		return nil, fmt.Errorf("virtio-net: MTU %d: want %d or more", cfg.MTU, minMTU)
	case len(cfg.Queues) > 1 && cfg.SetPairs == nil:
		return nil, errors.New("virtio-net: several queue pairs without SetPairs")
	}
	d := &Device{cfg: cfg, used: 1}
	for i, fd := range cfg.Queues {
		p := &pair{d: d, fd: fd}
		p.active.Store(i == 0)
		d.pairs = append(d.pairs, p)
	}
	return d, nil
}

// ID implements virtio.Device.
func (*Device) ID() virtio.ID { return virtio.IDNet }

// Features implements virtio.Device.
func (d *Device) Features() uint64 {
	f := uint64(featureMrgRxB | virtio.FeatureIndirectDesc | virtio.FeatureEventIdx)
	if d.cfg.Kernel != nil {
		f &= d.cfg.Kernel.Features()
	}
	f |= d.cfg.Offloads&allOffloads | featureMAC | featureStatus | featureCtrlVQ | featureCtrlRX
	if d.cfg.MTU != 0 {
		f |= featureMTU
	}
	if len(d.pairs) > 1 {
		f |= featureMQ
	}
	return f
}

// QueueSizes implements virtio.Device: receiveq1, transmitq1 and so on, and controlq (5.1.2).
func (d *Device) QueueSizes() (sizes []uint16) {
	for range 2 * len(d.pairs) {
		sizes = append(sizes, queueSize)
	}
	return append(sizes, controlQueueSize)
}

const linkUp = 1 // VIRTIO_NET_S_LINK_UP

// Config implements virtio.Device: struct virtio_net_config up to mtu (5.1.4).
func (d *Device) Config() []byte {
	b := append([]byte(nil), d.cfg.MAC[:]...)
	status := uint16(linkUp)
	if d.down.Load() {
		status = 0
	}
	b = binary.LittleEndian.AppendUint16(b, status)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(d.pairs))) // max_virtqueue_pairs
	return binary.LittleEndian.AppendUint16(b, d.cfg.MTU)
}

// Activate implements virtio.Device.
func (d *Device) Activate(a virtio.Activation) error {
	if err := d.activate(a); err != nil {
		return fmt.Errorf("virtio-net: %w", err)
	}
	return nil
}

func (d *Device) activate(a virtio.Activation) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.driven && d.cfg.SetOffloads != nil {
		f := a.Features & allOffloads
		if f&GuestCSum == 0 { // the others need it (5.1.3.1)
			f &^= needsGuestCSum
		}
		if err := d.cfg.SetOffloads(f); err != nil {
			return err
		}
	}
	d.driven, d.features, d.kicks = true, a.Features, nil
	d.changed.Store(&a.ConfigChanged)
	for i, p := range d.pairs {
		d.kicks = append(d.kicks, a.Queues[2*i].Kick)
		p.start(a.Features&featureMrgRxB != 0)
	}
	if d.cfg.Kernel == nil {
		return d.workers.Start(a, func(i int) (virtio.Handler, time.Duration) { return d.handler(i), 0 })
	}
	n := d.control()
	rest := a
	rest.Queues = slices.Clone(a.Queues)
	for i := range n {
		rest.Queues[i].Size = 0
	}
	if err := d.workers.Start(rest, func(i int) (virtio.Handler, time.Duration) { return d.handler(i), 0 }); err != nil {
		return err
	}
	a.Queues = a.Queues[:n]
	if err := d.cfg.Kernel.Activate(a); err != nil {
		_, undone := d.workers.Stop(context.Background(), nil)
		return errors.Join(err, undone)
	}
	d.kernel = n
	return nil
}

// control returns the number of the control queue, which follows the pairs that the driver can use
// (5.1.2). The caller holds mu.
func (d *Device) control() int {
	if d.features&featureMQ != 0 {
		return 2 * len(d.pairs)
	}
	return 2
}

// handler returns the handler of queue i. The caller holds mu.
func (d *Device) handler(i int) virtio.Handler {
	control := d.control()
	switch {
	case i == control && d.features&featureCtrlVQ != 0:
		return d.commands
	case i >= control:
		return func(*virtio.Worker, *virtq.Chain) error { return guestErr("5.1.2", "a chain in queue %d", i) }
	case i%2 == 0:
		return d.pairs[i/2].receive
	}
	return d.pairs[i/2].transmit
}

// Stop implements virtio.Device. A frame that waits for buffers stays.
func (d *Device) Stop(ctx context.Context) ([]uint16, error) {
	bases, err := d.workers.Stop(ctx, func() {
		for _, p := range d.pairs {
			p.stop()
		}
	})
	if err != nil {
		return nil, fmt.Errorf("virtio-net: %w", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.kicks = nil
	if n := d.kernel; n > 0 {
		d.kernel = 0
		served, err := d.cfg.Kernel.Stop()
		if err != nil {
			return nil, fmt.Errorf("virtio-net: %w", err)
		}
		copy(bases, served)
	}
	return bases, nil
}

// Reset implements virtio.Device. Frames that the backend did not take are lost.
func (d *Device) Reset() error {
	if _, err := d.Stop(context.Background()); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.driven, d.features = false, 0
	for _, p := range d.pairs {
		p.forget()
	}
	if d.used == 1 {
		return nil // as at first, and so it was left
	}
	return d.setPairs(1)
}

// setPairs has the first n pairs used. The caller holds mu.
func (d *Device) setPairs(n int) error {
	for _, p := range d.pairs[n:] {
		p.disable() // from here on it fills no buffer
	}
	if d.cfg.SetPairs != nil {
		if err := d.cfg.SetPairs(n); err != nil {
			return fmt.Errorf("virtio-net: use %d queue pairs: %w", n, err)
		}
	}
	d.used = n
	for i, p := range d.pairs[:n] {
		if !p.active.Swap(true) && d.kicks != nil {
			if err := d.kicks[i].Signal(); err != nil {
				return err
			}
		}
	}
	return nil
}

// fail takes the link down for good.
func (d *Device) fail(err error) {
	if d.down.Swap(true) {
		return
	}
	if changed := d.changed.Load(); changed != nil {
		(*changed)()
	}
	if d.cfg.Failed != nil {
		d.cfg.Failed(err)
	}
}

func guestErr(section, format string, args ...any) error {
	return &virtq.GuestError{Rule: "virtio 1.3, " + section, What: fmt.Sprintf(format, args...)}
}
