package vmm

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"gvm/devices/serial"
	"gvm/kvmapi"
	"gvm/panics"
)

// Pauser pauses and resumes the vCPUs of a running machine, and presses its buttons and keys. The
// zero value is for one Config. Its methods may be called from any goroutine.
//
// A paused machine stays paused over a reset; cancelling Run's context ends it. In a Pause its
// devices are stopped, with everything in flight finished, and continue after it. A request that
// Holds the machine keeps its device from that, and continues after the resume.
type Pauser struct {
	wanted   atomic.Bool              // whether release is set, for vCPUs to check
	debugger atomic.Pointer[Debugger] // of m; nil: none

	mu      sync.Mutex
	m       *machine      // the current life; nil: the machine does not run
	release chan struct{} // closed by Resume; nil: not paused
	stopped chan struct{} // closed once every vCPU has stopped
	parked  int           // vCPUs of m that have stopped for release
	holds   int           // calls of Hold that wait for release
	giveUp  func(error)   // ends a Pause that waits for devices; nil: none does
	over    chan struct{} // closed when Run returns
}

// Errors of a Pauser.
var (
	ErrNotRunning = errors.New("the machine does not run now: it starts again, or ends")
	ErrPaused     = errors.New("the machine is paused")
	ErrNotPaused  = errors.New("the machine is not paused")
	ErrResumed    = errors.New("it was resumed before it had paused")
	ErrDebugged   = errors.New("a debugger has stopped it; continue or detach there")
	errHeld       = errors.New("a request holds the machine")
)

// BusyError is the error of a Pause whose context ended while a device waited for its storage.
type BusyError struct {
	Device string
	Err    error // the cause of the context
}

func (e *BusyError) Error() string {
	return fmt.Sprintf("%s does not finish the guest's requests: %v", e.Device, e.Err)
}

func (e *BusyError) Unwrap() error { return e.Err }

// Pause returns once no vCPU is in the guest, and no device has anything in flight but requests
// that Hold the machine. If ctx ends first, it resumes the machine. It returns ErrResumed if Resume
// was called first.
func (p *Pauser) Pause(ctx context.Context) error {
	p.mu.Lock()
	if p.m == nil || p.release != nil {
		defer p.mu.Unlock()
		if p.m == nil {
			return ErrNotRunning
		}
		return ErrPaused
	}
	if p.debugger.Load().Halted() {
		defer p.mu.Unlock()
		return ErrDebugged
	}
	err := p.want()
	release, stopped, over := p.release, p.stopped, p.over
	p.mu.Unlock()
	if err != nil {
		return err
	}
	select {
	case <-stopped:
		err = p.stopDevices(ctx, release)
	case <-over:
		return ErrNotRunning
	case <-release:
		return ErrResumed
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.giveUp = nil
	switch {
	case p.m == nil:
		return ErrNotRunning
	case p.release != release:
		return ErrResumed
	case err != nil:
		p.resume()
	}
	return err
}

// stopDevices stops the devices for the Pause that made release. A request that holds the machine
// may be in flight after it.
func (p *Pauser) stopDevices(ctx context.Context, release chan struct{}) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	p.mu.Lock()
	m := p.m
	if m == nil || p.release != release || p.holds > 0 {
		p.mu.Unlock()
		return nil
	}
	p.giveUp = cancel
	var stops []<-chan error
	for _, v := range m.virtio {
		stops = append(stops, v.Pause(ctx))
	}
	p.mu.Unlock()
	defer context.AfterFunc(m.life, panics.Func(func() { cancel(ErrNotRunning) }))()
	for i, stopped := range stops {
		err := context.Canceled
		select {
		case err = <-stopped:
		case <-ctx.Done():
			select { // both may be ready
			case err = <-stopped:
			default:
			}
		}
		if err == nil {
			continue
		}
		switch cause := context.Cause(ctx); cause {
		case errHeld:
			return nil
		case ErrResumed, ErrNotRunning:
			return cause
		default:
			return &BusyError{deviceName(i, m.cfg.Devices[i]), cause}
		}
	}
	return nil
}

// want asks every vCPU to stop. The caller holds mu.
func (p *Pauser) want() error {
	p.release, p.stopped, p.parked, p.holds = make(chan struct{}), make(chan struct{}), 0, 0
	p.wanted.Store(true)
	p.m.followStops()
	err := p.m.kick()
	if err != nil {
		p.resume()
	}
	return err
}

// Hold pauses the machine, if it is not paused yet, and returns true once it is resumed. It is for
// a device that cannot continue without the user, such as a request to a disk that has no space
// left, and blocks that request too. It returns false when ctx or the machine's life ends, and when
// the machine does not run.
func (p *Pauser) Hold(ctx context.Context) (resumed bool) {
	p.mu.Lock()
	m := p.m
	if m == nil || p.release == nil && p.want() != nil {
		p.mu.Unlock()
		return false
	}
	release := p.release
	if p.holds++; p.giveUp != nil {
		p.giveUp(errHeld)
	}
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.release == release {
			p.holds--
		}
	}()
	select {
	case <-release:
		return true
	case <-m.ended:
	case <-ctx.Done():
	}
	return false
}

// Resume lets the devices and the vCPUs go on.
func (p *Pauser) Resume() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.m == nil:
		return ErrNotRunning
	case p.release == nil && p.debugger.Load().Halted():
		return ErrDebugged
	case p.release == nil:
		return ErrNotPaused
	}
	p.resume()
	return nil
}

// resume is Resume. The caller holds mu.
func (p *Pauser) resume() {
	p.m.panicked.resume()
	p.wanted.Store(false)
	close(p.release)
	p.release = nil
	if p.giveUp != nil {
		p.giveUp(ErrResumed)
	}
	p.m.followStops()
	for _, v := range p.m.virtio {
		v.Resume()
	}
}

// PowerButton presses the machine's power button, and reports whether the guest listens.
func (p *Pauser) PowerButton() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.m != nil && !p.m.stop.Load() && p.m.pm.PowerButton()
}

// SysRq sends a break and a key to COM1, which Linux takes for a key of SysRq. The error is
// ErrNotRunning, ErrPaused, or the cause of ctx if the guest does not take them before ctx ends.
func (p *Pauser) SysRq(ctx context.Context, key byte) error {
	p.mu.Lock()
	m, paused := p.m, p.release != nil
	p.mu.Unlock()
	switch {
	case m == nil:
		return ErrNotRunning
	case paused:
		return ErrPaused
	}
	err := m.coms[0].uart.Input().SysRq(ctx, key)
	if errors.Is(err, serial.ErrStopped) {
		return ErrNotRunning
	}
	return err
}

// Reset resets the machine, as its reset button does. The machine then starts again in place:
// Config.Rebooting is of a reset by the guest. It returns ErrNotRunning between two
// lives too.
func (p *Pauser) Reset() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.m == nil || !p.m.end(Outcome{Ending: GuestReset, restart: true}) {
		return ErrNotRunning
	}
	return nil
}

// Paused reports whether the machine is paused, by a debugger too, or about to be.
func (p *Pauser) Paused() bool { return p.wanted.Load() || p.debugger.Load().Halted() }

// stopped reports whether the machine is paused, or a debugger has stopped it, or about to be.
func (m *machine) stopped() bool {
	return m.cfg.Pauser != nil && m.cfg.Pauser.Paused() || m.cfg.Debugger.Halted()
}

// begin starts a life of the machine, before its vCPUs run.
func (p *Pauser) begin(m *machine) {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.over == nil {
		p.over = make(chan struct{})
	}
	p.m, p.parked = m, 0
	p.debugger.Store(m.cfg.Debugger)
}

// end marks the return of Run.
func (p *Pauser) end() {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.over == nil {
		return
	}
	close(p.over)
	p.wanted.Store(false)
	p.m, p.release, p.over = nil, nil, nil
}

// park blocks a vCPU while the machine is paused and not ended. The vCPU's own thread calls it,
// outside of KVM_RUN.
func (p *Pauser) park(m *machine, index int, c *kvmapi.VCPU) error {
	p.mu.Lock()
	release := p.release
	if release == nil {
		p.mu.Unlock()
		return nil
	}
	if p.parked++; p.parked == len(m.cpus) {
		select {
		case <-p.stopped: // closed in the life before a reset
		default:
			close(p.stopped)
		}
	}
	p.mu.Unlock()
	for {
		select {
		case <-m.ended:
			return nil
		case <-release:
			return c.StoppedByHost()
		case q := <-m.questions[index]:
			q()
		}
	}
}
