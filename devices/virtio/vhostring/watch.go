package vhostring

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
	"gvm/devices/virtio/virtq"
	"gvm/guestmem"
)

// suspect is where a queue stood when its last error was looked at, and whether
// there was more for the kernel to take.
type suspect struct {
	more bool
	base uint16
}

// run waits for errors of the vrings (VHOST_SET_VRING_ERR). The kernel
// reports two kinds: a ring or chain that breaks the rules, which stops the
// queue; and a request that it answers (BAD_TARGET for a CDB that is too long,
// say) or drops, and continues. Any user of the guest with a SCSI generic device
// can cause the second, so it must not break the device. look tells them apart.
func (r *Rings) run() {
	poll := []unix.PollFd{{Fd: int32(r.stop.Fd()), Events: unix.POLLIN}}
	for _, fd := range r.errs {
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
			r.a.Broken(fmt.Errorf("%s: poll of the error eventfds: %w", r.name, err))
			return
		}
		if poll[0].Revents != 0 {
			return
		}
		for i := range r.errs {
			p := &poll[1+i]
			if p.Revents == 0 {
				continue
			}
			if err := r.look(i); err != nil {
				r.a.Broken(fmt.Errorf("%s: queue %d: %w", r.name, i, err))
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
func (r *Rings) look(i int) error {
	base, err := r.dev.VringBase(i)
	if err != nil {
		return err
	}
	avail, err := r.a.Mem.Slice(r.a.Queues[i].Driver, 4)
	if err != nil {
		return err
	}
	more := guestmem.LoadUint16(avail[2:]) != base
	if s := r.suspect[i]; s.more && more && s.base == base {
		what := fmt.Sprintf("the kernel cannot take entry %d of the available ring", base)
		return &virtq.GuestError{Rule: "virtio 1.3, 2.7", What: what}
	}
	r.suspect[i] = suspect{more, base}
	// In this order: the error that may follow the doorbell must be kept.
	if _, err := r.errs[i].Drain(); err != nil {
		return err
	}
	if more {
		return r.a.Queues[i].Kick.Signal()
	}
	return nil
}
