package vhostscsi

import (
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
	"gvm/devices/virtio"
	"gvm/devices/virtio/virtq"
	"gvm/guestmem"
	"gvm/kvmapi/eventfd"
	"gvm/kvmapi/vhost"
	"gvm/panics"
)

// watcher waits for errors of the vrings (VHOST_SET_VRING_ERR). The kernel
// reports two kinds: a ring or chain that breaks the rules, which stops the
// queue; and a request that it answers (BAD_TARGET for a CDB that is too long,
// say) or drops, and continues. Any user of the guest with a SCSI generic device
// can cause the second, so it must not break the device. look tells them apart.
type watcher struct {
	dev     *vhost.SCSI
	a       virtio.Activation
	stop    *eventfd.FD
	errs    []*eventfd.FD // by queue; nil for one the driver left alone
	suspect []suspect     // by queue
	started bool          // there was an endpoint
	running sync.WaitGroup
}

// suspect is where a queue stood when its last error was looked at, and whether
// there was more for the kernel to take.
type suspect struct {
	more bool
	base uint16
}

// newWatcher opens what a watcher needs, or nothing on an error.
func newWatcher(dev *vhost.SCSI, a virtio.Activation) (w *watcher, err error) {
	w = &watcher{dev: dev, a: a, errs: make([]*eventfd.FD, len(a.Queues)), suspect: make([]suspect, len(a.Queues))}
	if w.stop, err = eventfd.New(); err != nil {
		return nil, err
	}
	for i, q := range a.Queues {
		if q.Size == 0 {
			continue
		}
		if w.errs[i], err = eventfd.New(); err != nil {
			return nil, errors.Join(err, w.close())
		}
	}
	return w, nil
}

func (w *watcher) start() {
	w.started = true
	w.running.Go(panics.Func(w.run))
}

// halt stops the watcher, started or not, and waits for it.
func (w *watcher) halt() error {
	if err := w.stop.Signal(); err != nil {
		return err
	}
	w.running.Wait()
	return nil
}

func (w *watcher) close() error {
	errs := []error{w.stop.Close()}
	for _, fd := range w.errs {
		if fd != nil {
			errs = append(errs, fd.Close())
		}
	}
	return errors.Join(errs...)
}

func (w *watcher) run() {
	poll := []unix.PollFd{{Fd: int32(w.stop.Fd()), Events: unix.POLLIN}}
	for _, fd := range w.errs {
		p := unix.PollFd{Fd: -1, Events: unix.POLLIN} // poll(2) skips it
		if fd != nil {
			p.Fd = int32(fd.Fd())
		}
		poll = append(poll, p)
	}
	for {
		if _, err := unix.Poll(poll, -1); errors.Is(err, unix.EINTR) {
			continue
		} else if err != nil {
			w.a.Broken(fmt.Errorf("vhost-scsi: poll of the error eventfds: %w", err))
			return
		}
		if poll[0].Revents != 0 {
			return
		}
		for i := range w.errs {
			p := &poll[1+i]
			if p.Revents == 0 {
				continue
			}
			if err := w.look(i); err != nil {
				w.a.Broken(fmt.Errorf("vhost-scsi: queue %d: %w", i, err))
				p.Fd = -1
			}
		}
	}
}

// look finds the kind of an error of queue i. If the kernel has taken all that
// is available, it was a request, which is done. Otherwise the kernel may have
// stopped at a chain that it cannot take, or not be finished. So the doorbell
// makes it look again: if an error follows and the kernel is at the same index,
// the error is of the first kind, for the second comes with a chain that was taken.
func (w *watcher) look(i int) error {
	base, err := w.dev.VringBase(i)
	if err != nil {
		return err
	}
	avail, err := w.a.Mem.Slice(w.a.Queues[i].Driver, 4)
	if err != nil {
		return err
	}
	more := guestmem.LoadUint16(avail[2:]) != base
	if s := w.suspect[i]; s.more && more && s.base == base {
		what := fmt.Sprintf("the kernel cannot take entry %d of the available ring", base)
		return &virtq.GuestError{Rule: "virtio 1.3, 2.7", What: what}
	}
	w.suspect[i] = suspect{more, base}
	// In this order: the error that may follow the doorbell must be kept.
	if _, err := w.errs[i].Drain(); err != nil {
		return err
	}
	if more {
		return w.a.Queues[i].Kick.Signal()
	}
	return nil
}
