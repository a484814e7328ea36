// Package fs is the virtio file system device (virtio 1.3, 5.11): it gives the guest a directory
// tree of the host, which package hostfs serves.
package fs

import (
	"cmp"
	"context"
	"fmt"
	"strings"
	"time"

	"gvm/devices/virtio"
	"gvm/devices/virtio/fs/hostfs"
	"gvm/devices/virtio/virtq"
	"gvm/inspect"
	"gvm/panics"
)

const (
	maxTag    = 36 // bytes of struct virtio_fs_config's tag (5.11.4)
	queueSize = 256
	// MaxRequests bounds the requests of a share that the host serves at a time, each of which may
	// keep a thread. More wait in the queue.
	MaxRequests = 32
)

// Share is a directory of the host with the name by which the guest mounts it.
type Share struct {
	Tag      string
	Dir      string
	ReadOnly bool
	Root     bool          // hostfs.Config.Root
	Valid    time.Duration // hostfs.Config.Valid
	Files    int           // hostfs.Config.Files
	Requests int           // bounds the requests that the host serves at a time; 0: MaxRequests
}

// CheckTag checks a tag.
func CheckTag(tag string) error {
	if tag == "" || len(tag) > maxTag || strings.ContainsRune(tag, 0) {
		return fmt.Errorf("tag %q: want 1 to %d bytes", tag, maxTag)
	}
	return nil
}

// Device is a file system device.
type Device struct {
	share   Share
	tree    *hostfs.FS
	workers virtio.Workers
	slots   [2]chan struct{} // taken by requests that are being served; of the hiprio queue, and the other
	broken  func(error)
}

// New opens the tree of a share and returns its device. The caller closes it.
func New(s Share) (*Device, error) {
	if err := CheckTag(s.Tag); err != nil {
		return nil, err
	}
	tree, err := hostfs.Open(hostfs.Config{Dir: s.Dir, ReadOnly: s.ReadOnly, Root: s.Root, Valid: s.Valid,
		Files: s.Files})
	if err != nil {
		return nil, fmt.Errorf("share %s: %w", s.Tag, err)
	}
	return &Device{share: s, tree: tree, slots: [2]chan struct{}{make(chan struct{}, 1),
		make(chan struct{}, cmp.Or(s.Requests, MaxRequests))}}, nil
}

// closePatience bounds the wait of Close for the host, which flushes files that the guest has open.
const closePatience = 100 * time.Millisecond

// Close closes the tree. The device is not used afterwards. Requests that the host does not answer,
// and files that it does not close, may be left.
func (d *Device) Close() {
	done := make(chan struct{})
	panics.Go(func() {
		defer close(done)
		d.tree.Close()
	})
	select {
	case <-done:
	case <-time.After(closePatience):
	}
}

// ID implements virtio.Device.
func (*Device) ID() virtio.ID { return virtio.IDFS }

// Features implements virtio.Device: there is no notification queue.
func (*Device) Features() uint64 { return virtio.FeatureIndirectDesc | virtio.FeatureEventIdx }

// QueueSizes implements virtio.Device: the hiprio queue and a request queue (5.11.2).
func (*Device) QueueSizes() []uint16 { return []uint16{queueSize, queueSize} }

// Config implements virtio.Device: struct virtio_fs_config, with num_request_queues.
func (d *Device) Config() []byte {
	b := make([]byte, maxTag, maxTag+4)
	copy(b, d.share.Tag)
	return append(b, 1, 0, 0, 0)
}

// Activate implements virtio.Device.
func (d *Device) Activate(a virtio.Activation) error {
	d.broken = a.Broken
	return d.workers.Start(a, func(queue int) (virtio.Handler, time.Duration) {
		return func(w *virtio.Worker, c *virtq.Chain) error { return d.request(w, c, d.slots[queue]) }, 0
	})
}

// Stop implements virtio.Device. The device keeps the inodes and the open files of the guest.
func (d *Device) Stop(ctx context.Context) ([]uint16, error) { return d.workers.Stop(ctx, nil) }

// Reset implements virtio.Device. A request that the host serves cannot be aborted.
func (d *Device) Reset() error {
	_, err := d.Stop(context.Background())
	if err == nil {
		d.tree.Reset()
	}
	return err
}

// Inspect implements virtio.Inspector.
func (d *Device) Inspect() ([]inspect.Node, [][]inspect.Node) {
	c := d.tree.Counts()
	return []inspect.Node{
		inspect.Text("tag", d.share.Tag),
		inspect.Text("dir", d.share.Dir),
		inspect.Bool("read_only", d.share.ReadOnly),
		inspect.Count("requests", c.Requests),
		inspect.Int("serving", len(d.slots[0])+len(d.slots[1])),
		inspect.Int("inodes", c.Inodes),
		inspect.Int("open_files", c.Handles),
		inspect.Int("descriptors", c.Files),
		inspect.Int("max_descriptors", c.MaxFiles),
	}, d.workers.Inspect()
}

// request serves a request of either queue in a goroutine of its own: the host's file system may
// wait.
func (d *Device) request(w *virtio.Worker, c *virtq.Chain, slots chan struct{}) error {
	select {
	case slots <- struct{}{}:
	default:
		w.Interrupt()
		slots <- struct{}{}
	}
	panics.Go(func() {
		// The first bytes that the driver sends are the FUSE header, the first that it gets the answer's
		// (5.11.6.1).
		n, err := d.tree.Serve(c.Out.Take(c.Out.Len()), c.In.Take(c.In.Len()))
		<-slots
		if err != nil {
			d.broken(&virtq.GuestError{Rule: "virtio 1.3, 5.11.6.1", What: err.Error()})
		}
		w.Complete(c, uint32(n))
	})
	return nil
}
