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
	"gvm/kvmapi/nowait"
	"gvm/panics"
	"gvm/vmm/bus"
	"gvm/vmm/vmcore"
)

// lifecycle tracks the machine's end. The first call of end sets the outcome and closes ended; vCPU
// threads check stop.
type lifecycle struct {
	once    sync.Once
	outcome Outcome
	ended   chan struct{}
	life    context.Context // done when ended is closed, with ErrNotRunning
	endLife context.CancelCauseFunc
	stop    atomic.Bool
	threads sync.WaitGroup // of the vCPUs
	closing atomic.Value   // string: the thread or device that takeDown waits for
	alive   atomic.Uint64  // signs of life of Config.Final
}

func (l *lifecycle) init() {
	l.ended = make(chan struct{})
	l.life, l.endLife = context.WithCancelCause(context.Background())
}

// end sets the outcome unless there is one, and reports whether it did. It does not wait.
func (l *lifecycle) end(o Outcome) (set bool) {
	l.once.Do(func() {
		l.outcome, set = o, true
		l.stop.Store(true)
		close(l.ended)
		l.endLife(ErrNotRunning)
	})
	return set
}

// check ends the machine for an error of the host that no caller can handle.
func (l *lifecycle) check(err error) {
	if err != nil {
		l.end(Outcome{Ending: HostFailed, Err: err})
	}
}

// reset ends the machine with a reset that the guest asked for.
func (l *lifecycle) reset() { l.end(Outcome{Ending: GuestReset}) }

// run runs every vCPU on a thread of its own until the machine ends. The threads may end later: see
// takeDown.
func (m *machine) run(ctx context.Context) Outcome {
	stopped := make(chan struct{})
	defer func(cancel func() bool) {
		if !cancel() {
			<-stopped // it may read the state
		}
	}(context.AfterFunc(ctx, panics.Func(func() {
		defer close(stopped)
		m.end(m.stopOutcome(context.Cause(ctx)))
	})))
	m.cfg.Pauser.begin(m)
	m.cfg.Debugger.begin(m)
	m.cfg.Inspector.set(m)
	for i, c := range m.cpus {
		m.threads.Go(panics.Func(func() {
			runtime.LockOSThread() // the thread ends with the goroutine, and KVM's state with it
			c.Bind()
			defer c.Unbind()
			m.check(m.runCPU(i, c))
		}))
	}
	<-m.ended
	m.cfg.Inspector.set(nil)
	m.panicked.stopSilence()
	m.halt.stopHalt()
	for _, p := range m.coms {
		p.uart.Stop()
	}
	if err := m.kick(); err != nil {
		m.outcome.Err = errors.Join(m.outcome.Err, err)
	}
	return m.outcome
}

// stopOutcome is the end for a cause of Run's context. If the time was over or gvm has a bug, its
// report has the state of the machine.
func (m *machine) stopOutcome(cause error) Outcome {
	out := Outcome{Ending: Stopped, Err: cause}
	if errors.Is(cause, context.DeadlineExceeded) || errors.As(cause, new(*panics.Panic)) {
		out.Report = afterBug(m.stateReport)
	}
	return out
}

// afterBug returns a report of the state, which a bug may have left unreadable.
func afterBug(report func() string) (text string) {
	defer func() {
		if r := recover(); r != nil {
			text = fmt.Sprintf("no state of the machine: %v\n", r)
		}
	}()
	return report()
}

// endPatience bounds the wait for threads and devices at a machine's end: a request that storage
// does not finish would block it for ever. A guest that ends by itself gets longer, because a busy
// host can delay the threads, and the console's reader (a pager) gets unlimited time, unless ctx
// ends meanwhile.
const (
	endPatience      = 700 * time.Millisecond
	guestEndPatience = 5 * time.Second
	kvmPatience      = 5 * time.Second // for KVM's release of the machine, beside that
)

// Parts that takeDown waits for in a way of their own.
const (
	closingConsole = "the console" // whose reader may take any time
	closingKVM     = "KVM"         // which a busy host frees late
)

// takeDown waits for the vCPUs' threads and closes the machine. The wait is bounded: from now on if
// the machine will not start again, else from the end of ctx on. Config.Final can extend it. After
// the bound over is false, and threads, devices and the resources they use stay (TestStuckDevice).
func (m *machine) takeDown(ctx context.Context, again bool) (over bool, err error) {
	done := make(chan error, 1)
	m.closing.Store("a vCPU")
	panics.Go(func() { // ends at the latest with the process
		m.threads.Wait()
		if m.cfg.KeepState && !again {
			m.last = m.finalState()
		}
		if m.cfg.Final != nil && !again {
			m.closing.Store("the record of the CPUs")
			m.final()
		}
		done <- m.close()
	})
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
	for alive := m.alive.Load(); ; {
		select {
		case err := <-done:
			return true, err
		case <-time.After(nowait.Left(ctx, endPatience)):
		}
		if now := m.alive.Load(); now != alive {
			nowait.Extend(ctx)
			alive = now
			continue
		}
		if part := m.closing.Load(); part != closingKVM {
			m.cfg.Note(fmt.Sprintf("%s waits for the host and does not end; gvm ends without it", part))
			return false, nil
		}
		// Nothing else is left, and the end of the process would wait for the same.
		select {
		case err := <-done:
			nowait.Extend(ctx) // for the rest of the end
			return true, err
		case <-time.After(kvmPatience):
			return false, nil
		}
	}
}

// final calls Config.Final. A vCPU that cannot be read has no registers.
func (m *machine) final() {
	defer func() { _ = recover() }() // a bug may have left anything
	cpus := make([]vmcore.CPU, len(m.cpus))
	for i := range cpus {
		cpus[i], _ = m.coreCPU(i)
	}
	out := m.verdict(m.outcome)
	out.State = m.last
	m.cfg.Final(out, m.mem, cpus, func() { m.alive.Add(1) })
}

// kick makes every vCPU leave the guest and check for a request.
func (m *machine) kick() error {
	var errs []error
	for _, c := range m.cpus {
		errs = append(errs, c.Kick())
	}
	return errors.Join(errs...)
}

// runCPU runs a vCPU until the machine ends. An error is the host's.
func (m *machine) runCPU(index int, c *kvmapi.VCPU) (err error) {
	defer func() {
		if r := recover(); r != nil {
			stack := string(debug.Stack())
			m.end(Outcome{Ending: Bug, Err: fmt.Errorf("vCPU %d: %v", index, r),
				Report: stack + afterBug(func() string { return m.vcpuReport(index, c) })})
		}
	}()
	if err := m.cfg.Debugger.sync(m, index, c); err != nil {
		return fmt.Errorf("vCPU %d: %w", index, err)
	}
	if index == 0 {
		m.cfg.Phase(Entered)
	}
	for !m.stop.Load() {
		if p := m.cfg.Pauser; p != nil && p.wanted.Load() {
			if err := p.park(m, index, c); err != nil {
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
			m.answer(index)
			if err := m.cfg.Debugger.sync(m, index, c); err != nil {
				return fmt.Errorf("vCPU %d: %w", index, err)
			}
		case kvmapi.ExitDebug:
			if err := m.cfg.Debugger.exit(m, index, c, e); err != nil {
				return fmt.Errorf("vCPU %d: %w", index, err)
			}
		default:
			taken, err := m.cfg.Debugger.emulated(m, index, c, e)
			if err != nil {
				return fmt.Errorf("vCPU %d: %w", index, err)
			}
			if !taken {
				m.end(m.crash(index, c, e))
			}
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
