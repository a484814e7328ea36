// Package balloon is the virtio traditional memory balloon device (virtio 1.3, 5.5). The driver
// gives pages of guest memory back to the host: as many as Resize asks for, which it then does not
// use (the balloon), and by free page reporting those that it happens not to use. A page that the
// guest touches again is there again, with zeros, so that deflating needs no work and no answer.
package balloon

import (
	"context"
	"encoding/binary"
	"fmt"
	"slices"
	"sync"
	"time"

	"gvm/devices/virtio"
	"gvm/devices/virtio/virtq"
	"gvm/guestmem"
	"gvm/inspect"
)

// Virtqueues (5.5.2). A driver without VIRTIO_BALLOON_F_FREE_PAGE_HINT has no queue 3: Linux then
// numbers the queue of reports 3, where 5.5.2 has 4. Both take reports.
const (
	inflate = iota
	deflate
	statistics
	hints
	reporting
	queues

	queueSize = 128
)

// Feature bits (5.5.3). Of these the device does not offer VIRTIO_BALLOON_F_MUST_TELL_HOST: the
// guest may use a page again without a word.
const (
	featureStats        = 1 << 1 // VIRTIO_BALLOON_F_STATS_VQ
	featureDeflateOnOOM = 1 << 2 // VIRTIO_BALLOON_F_DEFLATE_ON_OOM
	featurePagePoison   = 1 << 4 // VIRTIO_BALLOON_F_PAGE_POISON
	featureReporting    = 1 << 5 // VIRTIO_BALLOON_F_PAGE_REPORTING
)

// Offsets in the configuration space (5.5.4).
const (
	offNumPages  = 0
	offActual    = 4 // of the driver
	offPoisonVal = 12
	configLen    = 16
)

// PageSize is the unit of the balloon for guests of any page size (5.5.6).
const PageSize = 4096

// Bounds of one chain's work, so that it does not keep the worker from stopping: the rest of a
// longer one is not given back. Linux has 256 pages in one.
const (
	maxPages = 4096
	maxStats = 64
)

// Device is a balloon device.
type Device struct {
	workers virtio.Workers

	mu        sync.Mutex // taken before a worker's lock
	config    [configLen]byte
	features  uint64           // that the driver accepted
	mem       *guestmem.Memory // of the handlers, without mu
	changed   func()           // tells the driver of a change of num_pages; nil: not active
	driven    bool             // there is a driver
	due       bool             // changed has to be called by the next Activate
	ask       func()           // gives the buffer of the statistics queue back; nil: there is none
	drop      func()           // drops it
	stats     []inspect.Node   // as in State; a new slice for each buffer
	statsAt   time.Duration    // inspect.Clock
	statsCame chan struct{}    // closed when the next come

	inflated, deflated uint64 // pages
	reported           uint64 // bytes
	err                error  // the last failure to give memory back
}

// New returns a device whose balloon is empty.
func New() *Device { return &Device{statsCame: make(chan struct{})} }

// ID implements virtio.Device.
func (*Device) ID() virtio.ID { return virtio.IDBalloon }

// Features implements virtio.Device.
func (*Device) Features() uint64 {
	return featureStats | featureDeflateOnOOM | featurePagePoison | featureReporting |
		virtio.FeatureIndirectDesc | virtio.FeatureEventIdx
}

// QueueSizes implements virtio.Device.
func (*Device) QueueSizes() []uint16 { return slices.Repeat([]uint16{queueSize}, queues) }

// Config implements virtio.Device.
func (d *Device) Config() []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.config[:])
}

// WriteConfig implements virtio.ConfigWriter: actual and poison_val are the driver's.
func (d *Device) WriteConfig(off uint32, p []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, v := range p {
		if at := int(off) + i; at >= offActual && at < offActual+4 || at >= offPoisonVal {
			d.config[at] = v
		}
	}
}

func (d *Device) field(off int) uint32 { return binary.LittleEndian.Uint32(d.config[off:]) }

// Activate implements virtio.Device.
func (d *Device) Activate(a virtio.Activation) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.features, d.mem = a.Features, a.Mem
	serve := [queues]virtio.Handler{d.inflate, d.deflate, d.takeStats, d.report, d.report}
	err := d.workers.Start(a, func(queue int) (virtio.Handler, time.Duration) { return serve[queue], 0 })
	if err != nil {
		return err
	}
	if d.changed, d.driven = a.ConfigChanged, true; d.due {
		d.due = false
		d.changed()
	}
	return nil
}

// Stop implements virtio.Device. The buffer for statistics is taken again when the device
// continues.
func (d *Device) Stop(ctx context.Context) ([]uint16, error) { return d.stop(ctx, func() {}) }

// Reset implements virtio.Device. The size that was asked for stays: the next driver finds it.
func (d *Device) Reset() error {
	_, err := d.stop(context.Background(), func() {
		d.driven, d.due, d.stats = false, false, nil
		clear(d.config[offActual:])
	})
	return err
}

// stop stops the workers; then is called with mu held.
func (d *Device) stop(ctx context.Context, then func()) ([]uint16, error) {
	bases, err := d.workers.Stop(ctx, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.drop != nil {
			d.drop()
		}
		d.ask, d.drop = nil, nil
	})
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.changed = nil
	then()
	return bases, nil
}

// inflate takes the numbers of pages for the balloon.
func (d *Device) inflate(w *virtio.Worker, c *virtq.Chain) error {
	b := make([]byte, min(c.Out.Len(), 4*maxPages)&^3)
	c.Out.Read(b)
	pages := make([]int, len(b)/4)
	for i := range pages {
		pages[i] = int(binary.LittleEndian.Uint32(b[4*i:]))
	}
	slices.Sort(pages) // neighbours are given back at once
	for i := 0; i < len(pages); {
		n := 1
		for i+n < len(pages) && pages[i+n] == pages[i]+n {
			n++
		}
		run, err := d.mem.Slice(uint64(pages[i])*PageSize, uint64(n)*PageSize)
		if err != nil {
			return &virtq.GuestError{Rule: "virtio 1.3, 5.5.6", What: fmt.Sprintf("page %#x: %v", pages[i], err)}
		}
		d.discard(run)
		i += n
	}
	d.mu.Lock()
	d.inflated += uint64(len(pages))
	d.mu.Unlock()
	w.Complete(c, 0)
	return nil
}

// deflate takes the numbers of pages that the guest uses again.
func (d *Device) deflate(w *virtio.Worker, c *virtq.Chain) error {
	d.mu.Lock()
	d.deflated += uint64(c.Out.Len() / 4)
	d.mu.Unlock()
	w.Complete(c, 0)
	return nil
}

// report takes free pages (5.5.6.7). The guest uses them again once the chain is given back. They
// keep their contents if those have to be other than zeros.
func (d *Device) report(w *virtio.Worker, c *virtq.Chain) error {
	d.mu.Lock()
	poisoned := d.features&featurePagePoison != 0 && d.field(offPoisonVal) != 0
	d.mu.Unlock()
	if n := c.In.Len(); !poisoned {
		for _, b := range c.In.Take(n) {
			d.discard(b)
		}
		d.mu.Lock()
		d.reported += uint64(n)
		d.mu.Unlock()
	}
	w.Complete(c, 0)
	return nil
}

// discard gives memory back to the host. A host that does not take it has all of its memory in use,
// as it would without a balloon.
func (d *Device) discard(b []byte) {
	if err := d.mem.Discard(b); err != nil {
		d.mu.Lock()
		d.err = err
		d.mu.Unlock()
	}
}

// takeStats takes the driver's statistics (5.5.6.3), and keeps the buffer until the next are
// wanted.
func (d *Device) takeStats(w *virtio.Worker, c *virtq.Chain) error {
	const entry = 10 // struct virtio_balloon_stat: le16 tag, le64 val
	b := make([]byte, min(c.Out.Len(), maxStats*entry))
	c.Out.Read(b)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.ask != nil {
		return &virtq.GuestError{Rule: "virtio 1.3, 5.5.6.3.1", What: "two buffers in the statistics queue"}
	}
	d.ask, d.drop = func() { w.Complete(c, 0) }, func() { w.Drop(c) }
	if len(b) < entry {
		return nil // the first buffer need have none
	}
	var values [len(statNames)]*uint64
	for ; len(b) >= entry; b = b[entry:] {
		if tag := int(binary.LittleEndian.Uint16(b)); tag < len(statNames) {
			v := binary.LittleEndian.Uint64(b[2:])
			values[tag] = &v
		}
	}
	d.stats, d.statsAt = []inspect.Node{}, inspect.Clock()
	for tag, v := range values {
		if v != nil {
			d.stats = append(d.stats, inspect.Int(statNames[tag], *v))
		}
	}
	close(d.statsCame)
	d.statsCame = make(chan struct{})
	return nil
}

// Resize asks the driver for a balloon of size bytes, of which whole pages below 16 TiB count. The
// driver takes its time, and one that starts later finds the size.
func (d *Device) Resize(size uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	binary.LittleEndian.PutUint32(d.config[offNumPages:], uint32(size/PageSize))
	if d.changed != nil {
		d.changed()
	} else {
		d.due = d.driven
	}
}

// State has the driver's reports.
type State struct {
	Size   uint64 // bytes that Resize asked for
	Actual uint64 // bytes in the balloon
	Driven bool   // there is a driver
	// Stats are the guest's statistics, unverified, by their names in 5.5.6.4, in small letters; nil:
	// none came.
	Stats []inspect.Node
}

// State asks the driver for statistics, and returns them, or the last ones if ctx ends first.
func (d *Device) State(ctx context.Context) State {
	d.mu.Lock()
	came := d.statsCame
	asked := d.ask != nil
	if asked {
		d.ask()
		d.ask, d.drop = nil, nil
	}
	d.mu.Unlock()
	if asked {
		select {
		case <-came:
		case <-ctx.Done():
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return State{uint64(d.field(offNumPages)) * PageSize, uint64(d.field(offActual)) * PageSize, d.driven, d.stats}
}

// statNames are the tags (5.5.6.4) without VIRTIO_BALLOON_S_, and those of Linux's
// virtio_balloon.h.
var statNames = [...]string{"swap_in", "swap_out", "majflt", "minflt", "memfree", "memtot", "avail", "caches",
	"htlb_pgalloc", "htlb_pgfail", "oom_kill", "alloc_stall", "async_scan", "direct_scan", "async_reclaim",
	"direct_reclaim"}

// Inspect implements virtio.Inspector. It shows the last statistics, and asks for none.
func (d *Device) Inspect() ([]inspect.Node, [][]inspect.Node) {
	d.mu.Lock() // never held for long
	defer d.mu.Unlock()
	nodes := []inspect.Node{
		inspect.Int("num_pages", d.field(offNumPages)),
		inspect.Int("actual", d.field(offActual)),
		inspect.Bits("poison_val", d.field(offPoisonVal)),
		inspect.Count("inflated_pages", d.inflated),
		inspect.Count("deflated_pages", d.deflated),
		inspect.Count("reported_bytes", d.reported),
	}
	if d.err != nil {
		nodes = append(nodes, inspect.Text("error", d.err.Error()))
	}
	if d.stats != nil {
		stats := inspect.Group("stats", inspect.Node{Name: "age", Value: inspect.Age(inspect.Clock() - d.statsAt)})
		stats.Nodes = append(stats.Nodes, d.stats...)
		nodes = append(nodes, stats)
	}
	return nodes, d.workers.Inspect()
}
