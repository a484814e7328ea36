package vmm

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"

	"gvm/kvmapi"
)

// Pauser stops the vCPUs of a running machine and lets them go on, and presses its power button. The zero
// value is for one Config. Its methods may be called from any goroutine.
//
// A machine that is paused stays so over a reset; it can end meanwhile, by
// cancelling Run's context. Its devices finish what they were asked to do, unless they
// Hold it.
type Pauser struct {
	wanted atomic.Bool // whether release is there, for vCPUs to look at

	mu      sync.Mutex
	m       *machine      // the present life, nil: the machine does not run
	release chan struct{} // closed by Resume; nil: not paused
	stopped chan struct{} // closed when every vCPU has stopped
	parked  int           // vCPUs of m that have stopped for release
	over    chan struct{} // closed when Run returns
}

// Errors of a Pauser.
var (
	ErrNotRunning = errors.New("the machine does not run")
	ErrPaused     = errors.New("the machine is paused")
	ErrNotPaused  = errors.New("the machine is not paused")
)

// Pause returns when no vCPU is in the guest. If ctx ends first they all go on;
// ErrNotPaused is a Resume that came first.
func (p *Pauser) Pause(ctx context.Context) error {
	p.mu.Lock()
	if p.m == nil || p.release != nil {
		defer p.mu.Unlock()
		if p.m == nil {
			return ErrNotRunning
		}
		return ErrPaused
	}
	err := p.want()
	release, stopped, over := p.release, p.stopped, p.over
	p.mu.Unlock()
	if err != nil {
		return err
	}
	select {
	case <-stopped:
		return nil
	case <-over:
		return ErrNotRunning
	case <-release:
		return ErrNotPaused
	case <-ctx.Done():
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.release == release {
		p.resume()
	}
	return context.Cause(ctx)
}

// want has every vCPU stop, with mu held.
func (p *Pauser) want() error {
	p.release, p.stopped, p.parked = make(chan struct{}), make(chan struct{}), 0
	p.wanted.Store(true)
	err := p.m.kick()
	if err != nil {
		p.resume()
	}
	return err
}

// Hold pauses the machine, if it is not paused yet, and returns true when it is
// resumed. It is for what cannot go on before somebody has seen to it, such as a
// request to a disk that has no space left, and holds that back too. It returns
// false when ctx ends, or the life of the machine does: then, and when the machine
// does not run, there is nothing to wait for.
func (p *Pauser) Hold(ctx context.Context) (resumed bool) {
	p.mu.Lock()
	m := p.m
	if m == nil || p.release == nil && p.want() != nil {
		p.mu.Unlock()
		return false
	}
	release := p.release
	p.mu.Unlock()
	select {
	case <-release:
		return true
	case <-m.ended:
	case <-ctx.Done():
	}
	return false
}

// Resume lets the vCPUs go on.
func (p *Pauser) Resume() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.m == nil:
		return ErrNotRunning
	case p.release == nil:
		return ErrNotPaused
	}
	p.resume()
	return nil
}

// resume is Resume with mu held.
func (p *Pauser) resume() {
	p.wanted.Store(false)
	close(p.release)
	p.release = nil
}

// PowerButton presses the machine's power button, and reports whether the guest listens.
func (p *Pauser) PowerButton() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.m != nil && p.m.pm.PowerButton()
}

// Paused tells whether the machine is paused, or about to be.
func (p *Pauser) Paused() bool { return p.wanted.Load() }

// begin is told of each life of the machine before its vCPUs run.
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
}

// end is told that Run returns.
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

// park holds a vCPU back while the machine is paused. It is called by the vCPU's
// own thread, outside of KVM_RUN; m ends it too.
func (p *Pauser) park(m *machine, c *kvmapi.VCPU) error {
	p.mu.Lock()
	release := p.release
	if release == nil {
		p.mu.Unlock()
		return nil
	}
	if p.parked++; p.parked == len(m.cpus) {
		select {
		case <-p.stopped: // by the life before a reset
		default:
			close(p.stopped)
		}
	}
	p.mu.Unlock()
	select {
	case <-m.ended:
		return nil
	case <-release:
	}
	return c.StoppedByHost()
}
