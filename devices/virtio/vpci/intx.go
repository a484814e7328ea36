package vpci

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"gvm/devices/pci"
	"gvm/kvmapi/eventfd"
	"gvm/panics"
)

// ISR status (virtio 1.3, 4.1.4.5).
const (
	isrQueue  = 1
	isrConfig = 2
)

// intx is how a device interrupts a driver that has not enabled MSI-X: the ISR status
// register, and INTx#, which is asserted while a bit of it is set.
//
// A worker, or vhost in the kernel, signals a queue's Call. Without MSI-X KVM does not
// take the event: a goroutine does, and sets the bit. Reading ISR status clears it
// and lowers the line before the driver ends the interrupt, so that the level is exact
// at any time and no resampling at the EOI is needed.
//
// mu is below Device.mu; MSIX and pci.INTx are locked under it.
type intx struct {
	d    *Device
	pin  *pci.INTx
	wake *eventfd.FD // has the goroutine look for the next event to wait for, or end

	mu      sync.Mutex
	status  byte
	started bool
	stop    atomic.Bool
	done    chan struct{} // closed when the goroutine has ended
}

// begin begins an activation: earlier signals are not its.
func (x *intx) begin(a *activation) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.gather()
	x.d.msix.TakePending()
	x.d.act.Store(a)
	x.watch()
}

// read is the driver's read of ISR status, which clears it. With MSI-X enabled it is 0.
func (x *intx) read() (v byte) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.gather()
	v, x.status = x.status, 0
	x.pin.Set(false)
	return v
}

// config sets the bit of a configuration change of a, and reports whether that is how
// its driver is told.
func (x *intx) config(a *activation) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.d.msix.Enabled() {
		return false
	}
	if x.d.act.Load() == a {
		x.status |= isrConfig
		x.pin.Set(true)
	}
	return true
}

// reset forgets everything, after the activation has ended.
func (x *intx) reset() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.gather()
	x.status = 0
	x.pin.Set(false)
}

// gather takes the queues' events, and drops them if they are of an activation that
// has ended. mu is held.
func (x *intx) gather() {
	if x.d.msix.Enabled() {
		return
	}
	was, err := x.d.unheard.Drain()
	if err != nil {
		x.d.cfg.Log(fmt.Errorf("vpci: %s: %w", x.d.cfg.Name, err))
	}
	a := x.d.act.Load()
	if a == nil {
		return
	}
	if a.vectors && x.d.msix.TakePending() || was {
		x.status |= isrQueue
	}
}

// changed follows MSI-X being enabled and disabled.
func (x *intx) changed() {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.d.msix.Enabled() {
		x.status = 0
		x.pin.Set(false)
	}
	x.watch()
}

// watch has the goroutine follow the driver's choice. It starts with the first
// driver that does without MSI-X, and ends with the device. mu is held.
func (x *intx) watch() {
	if !x.started {
		if x.d.act.Load() == nil || x.d.msix.Enabled() {
			return
		}
		x.started, x.done = true, make(chan struct{})
		panics.Go(x.run)
	}
	x.signal()
}

func (x *intx) signal() {
	if err := x.wake.Signal(); err != nil {
		x.d.cfg.Log(fmt.Errorf("vpci: %s: INTx: %w", x.d.cfg.Name, err))
	}
}

func (x *intx) run() {
	defer close(x.done)
	fds := []unix.PollFd{{Fd: int32(x.wake.Fd())}, {Fd: int32(x.d.unheard.Fd())}}
	for i := range x.d.msix.Len() {
		fds = append(fds, unix.PollFd{Fd: int32(x.d.msix.Event(i).Fd())})
	}
	for i := range fds {
		fds[i].Events = unix.POLLIN
	}
	for !x.stop.Load() {
		n := 1
		if a := x.d.act.Load(); a != nil && !x.d.msix.Enabled() {
			if n = 2; a.vectors {
				n = len(fds)
			}
		}
		_, err := unix.Poll(fds[:n], -1)
		if err == nil {
			_, err = x.wake.Drain()
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			x.d.cfg.Log(fmt.Errorf("vpci: %s: INTx: %w", x.d.cfg.Name, err))
			return
		}
		x.mu.Lock()
		x.gather()
		x.pin.Set(x.status != 0)
		x.mu.Unlock()
	}
}

// close ends the goroutine. The device was reset.
func (x *intx) close() error {
	x.stop.Store(true)
	if x.started {
		x.signal()
		<-x.done
	}
	return x.wake.Close()
}
