package vmm

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"gvm/kvmapi"
	"gvm/vmm/bus"
)

// lifecycle is how a machine comes to its end. The first call of end decides;
// ended is closed by it, and stop is what the vCPU threads look at.
type lifecycle struct {
	once    sync.Once
	outcome Outcome
	ended   chan struct{}
	stop    atomic.Bool
	threads sync.WaitGroup // of the vCPUs
	closing atomic.Value   // string: what takeDown waits for
}

func (l *lifecycle) init() { l.ended = make(chan struct{}) }

// end makes o the outcome unless there is one. It does not wait.
func (l *lifecycle) end(o Outcome) {
	l.once.Do(func() {
		l.outcome = o
		l.stop.Store(true)
		close(l.ended)
	})
}

// check ends the machine for an error of the host that no caller can handle.
func (l *lifecycle) check(err error) {
	if err != nil {
		l.end(Outcome{Ending: HostFailed, Err: err})
	}
}

// reset is the guest asking for a reset.
func (l *lifecycle) reset() { l.end(Outcome{Ending: GuestReset}) }

// run runs every vCPU on a thread of its own until the machine ends. The threads may end later: see
// takeDown.
func (m *machine) run(ctx context.Context) Outcome {
	defer context.AfterFunc(ctx, func() { m.end(Outcome{Ending: Stopped, Err: context.Cause(ctx)}) })()
	m.cfg.Pauser.begin(m)
	for i, c := range m.cpus {
		m.threads.Go(func() {
			runtime.LockOSThread() // the thread ends with the goroutine: nothing of KVM's is left on it
			c.Bind()
			defer c.Unbind()
			m.check(m.runCPU(i, c))
		})
	}
	<-m.ended
	m.panicked.stopSilence()
	m.halt.stopHalt()
	m.uart.Stop()
	if err := m.kick(); err != nil {
		m.outcome.Err = errors.Join(m.outcome.Err, err)
	}
	return m.outcome
}

// endPatience is how long the end of a machine waits for its threads and devices: for a request that
// storage does not finish they could wait for ever. The end of a guest that ends by itself has longer,
// as a busy host can keep the threads from running, and the console's reader has any time that it wants
// (a pager), unless ctx ends meanwhile.
const (
	endPatience      = 700 * time.Millisecond
	guestEndPatience = 5 * time.Second
)

const closingConsole = "the console" // whose reader takes its time

// takeDown waits for the vCPUs' threads and closes the machine. The wait is bounded, from now on if the
// machine is not to start again, else from the end of ctx on. Then over is false: threads and devices go
// on, and all that they use stays (TestStuckDevice).
func (m *machine) takeDown(ctx context.Context, again bool) (over bool, err error) {
	done := make(chan error, 1)
	m.closing.Store("a vCPU")
	go func() { // ends with the process at the latest
		m.threads.Wait()
		done <- m.close()
	}()
	for late := time.After(guestEndPatience); late != nil; {
		select {
		case err := <-done:
			return true, err
		case <-ctx.Done():
			late = nil
		case <-late:
			if late = nil; again || m.closing.Load() == closingConsole {
				late = time.After(guestEndPatience)
			}
		}
	}
	select {
	case err := <-done:
		return true, err
	case <-time.After(endPatience):
		m.cfg.Note(fmt.Sprintf("%s waits for the host and does not end; gvm ends without it", m.closing.Load()))
		return false, nil
	}
}

// kick has every vCPU leave the guest and look why.
func (m *machine) kick() error {
	var errs []error
	for _, c := range m.cpus {
		errs = append(errs, c.Kick())
	}
	return errors.Join(errs...)
}

// runCPU is a vCPU's life. The error is the host's.
func (m *machine) runCPU(index int, c *kvmapi.VCPU) (err error) {
	defer func() {
		if r := recover(); r != nil {
			m.end(Outcome{Ending: Bug, Err: fmt.Errorf("vCPU %d: %v", index, r), Report: string(debug.Stack())})
		}
	}()
	if index == 0 {
		m.cfg.Phase(Entered)
	}
	for !m.stop.Load() {
		if p := m.cfg.Pauser; p != nil && p.wanted.Load() {
			if err := p.park(m, c); err != nil {
				return fmt.Errorf("vCPU %d: %w", index, err)
			}
			continue
		}
		if m.halt.asked.Load() {
			if err := m.sayHalted(index, c); err != nil {
				return fmt.Errorf("vCPU %d: %w", index, err)
			}
		}
		e, err := c.Run()
		if err != nil {
			return fmt.Errorf("vCPU %d: %w", index, err)
		}
		switch e.Reason {
		case kvmapi.ExitIO:
			for i := range e.Count {
				access(&m.pio, &e, e.Item(i))
			}
		case kvmapi.ExitMMIO:
			access(&m.mmio, &e, e.Data)
		case kvmapi.ExitInterrupted:
		default:
			m.end(m.crash(index, c, e))
		}
	}
	return nil
}

func access(b *bus.Bus, e *kvmapi.Exit, p []byte) {
	if e.Write {
		b.Write(e.Addr, p)
	} else {
		b.Read(e.Addr, p)
	}
}
