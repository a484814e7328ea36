// Package vhostring has the kernel serve the queues of a virtio device, by any of its vhost
// devices: the kernel gets the guest's memory, the rings, the doorbells and the interrupts, and
// its report of an error in the rings breaks the device or not. The rest, such as the call that
// starts the service, is in the packages vhostnet, vhostscsi and vhostvsock.
package vhostring

import (
	"errors"
	"fmt"
	"sync"

	"gvm/devices/virtio"
	"gvm/devices/virtio/virtq"
	"gvm/guestmem"
	"gvm/inspect"
	"gvm/kvmapi/eventfd"
	"gvm/kvmapi/vhost"
	"gvm/panics"
)

// Rings are the queues of an active device. The nil Rings are those of a device that is not active.
type Rings struct {
	dev     *vhost.Device
	name    string
	a       virtio.Activation
	queues  int // the first so many are the kernel's
	stop    *eventfd.FD
	errs    []*eventfd.FD // by queue; nil for one the driver left alone
	suspect []suspect     // by queue
	started bool
	running sync.WaitGroup
}

// New opens the files of the rings, or nothing on an error. The kernel serves the first queues of
// a; name is the device's in errors.
func New(dev *vhost.Device, name string, a virtio.Activation, queues int) (r *Rings, err error) {
	r = &Rings{dev: dev, name: name, a: a, queues: queues,
		errs: make([]*eventfd.FD, queues), suspect: make([]suspect, queues)}
	if r.stop, err = eventfd.New(); err != nil {
		return nil, err
	}
	for i := range r.served() {
		if r.errs[i], err = eventfd.New(); err != nil {
			return nil, errors.Join(err, r.Close())
		}
	}
	return r, nil
}

// served yields the kernel's queues that the driver uses.
func (r *Rings) served() func(func(int, virtio.Queue) bool) {
	return func(yield func(int, virtio.Queue) bool) {
		for i, q := range r.a.Queues[:min(r.queues, len(r.a.Queues))] {
			if q.Size != 0 && !yield(i, q) {
				return
			}
		}
	}
}

// Set gives the kernel the memory, the features and the vrings. Clear undoes it, also after an
// error.
func (r *Rings) Set(features uint64) error {
	var regions []vhost.Region
	for _, m := range r.a.Mem.Regions() {
		regions = append(regions, vhost.Region{GPA: m.Base, Bytes: m.Bytes})
	}
	if err := r.dev.SetMemTable(regions); err != nil {
		return err
	}
	if err := r.dev.SetFeatures(features); err != nil {
		return err
	}
	for i, q := range r.served() {
		if err := r.setVring(i, q); err != nil {
			return err
		}
	}
	return nil
}

func (r *Rings) setVring(i int, q virtio.Queue) error {
	addr, err := resolve(r.a.Mem, q.Layout, r.a.Features)
	if err != nil {
		return fmt.Errorf("queue %d: %w", i, err)
	}
	if err := r.dev.SetVringNum(i, q.Size); err != nil {
		return err
	}
	if err := r.dev.SetVringBase(i, q.Base); err != nil {
		return err
	}
	if err := r.dev.SetVringAddr(i, addr); err != nil {
		return err
	}
	if err := r.dev.SetVringErr(i, r.errs[i]); err != nil {
		return err
	}
	if err := r.dev.SetVringCall(i, q.Call); err != nil {
		return err
	}
	return r.dev.SetVringKick(i, q.Kick)
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

// Start is called when the kernel serves the vrings. It begins to watch for errors. The kernel
// looks at a queue when its doorbell rings, and one that rang earlier is forgotten, so Start rings
// them all.
func (r *Rings) Start() error {
	r.started = true
	r.running.Go(panics.Func(r.run))
	for i, q := range r.served() {
		if err := q.Kick.Signal(); err != nil {
			return fmt.Errorf("queue %d: %w", i, err)
		}
	}
	return nil
}

// Halt ends the watch, started or not.
func (r *Rings) Halt() error {
	if err := r.stop.Signal(); err != nil {
		return fmt.Errorf("stop watching for errors: %w", err)
	}
	r.running.Wait()
	return nil
}

// Bases asks the kernel, which has stopped to serve the vrings, how far it came in each; nil if it
// had not begun. A queue that is not the kernel's is at the base that it had. unanswered is called
// for a queue of which the kernel took more than it used.
func (r *Rings) Bases(unanswered func(queue int, n uint16)) ([]uint16, error) {
	if !r.started {
		return nil, nil
	}
	bases := make([]uint16, len(r.a.Queues))
	for i, q := range r.a.Queues {
		bases[i] = q.Base
	}
	for i, q := range r.served() {
		base, err := r.dev.VringBase(i)
		if err != nil {
			return nil, err
		}
		bases[i] = base
		used, err := r.a.Mem.Slice(q.Device, 4)
		if err != nil {
			return nil, err
		}
		if n := base - guestmem.LoadUint16(used[2:]); n != 0 {
			unanswered(i, n)
		}
	}
	return bases, nil
}

// Clear takes the vrings' state from the kernel, above all the addresses, for the next
// driver may use fewer queues, and the memory for something else.
func (r *Rings) Clear() error {
	for i := range r.queues {
		if err := r.dev.SetVringKick(i, nil); err != nil {
			return err
		}
		if err := r.dev.SetVringCall(i, nil); err != nil {
			return err
		}
		if err := r.dev.SetVringErr(i, nil); err != nil {
			return err
		}
		if err := r.dev.SetVringAddr(i, vhost.VringAddr{}); err != nil {
			return err
		}
	}
	return nil
}

// Interrupt interrupts for each queue. The kernel interrupts for the last chains after it has
// counted them as used, when it may have lost the eventfd already. One more is harmless.
func (r *Rings) Interrupt() (err error) {
	if r == nil {
		return nil
	}
	for _, q := range r.served() {
		err = errors.Join(err, q.Call.Signal())
	}
	return err
}

// Features returns the features that the driver has negotiated.
func (r *Rings) Features() uint64 {
	if r == nil {
		return 0
	}
	return r.a.Features
}

// Close closes all that New opened.
func (r *Rings) Close() error {
	errs := []error{r.stop.Close()}
	for _, fd := range r.errs {
		if fd != nil {
			errs = append(errs, fd.Close())
		}
	}
	return errors.Join(errs...)
}

// Inspect returns of each queue the base that the kernel has reached (VHOST_GET_VRING_BASE). The
// kernel does not show more.
func (r *Rings) Inspect() [][]inspect.Node {
	if r == nil {
		return nil
	}
	queues := make([][]inspect.Node, len(r.a.Queues))
	for i := range r.served() {
		if base, err := r.dev.VringBase(i); err == nil {
			queues[i] = []inspect.Node{inspect.Int("last_avail_idx", base)}
		} else {
			queues[i] = []inspect.Node{inspect.Text("error", err.Error())}
		}
	}
	return queues
}
