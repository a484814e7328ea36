// Package testrun runs one command in a test machine: a kernel with an initramfs, whose init is the
// agent of package agent. It connects the command's standard streams, keeps the kernel's log apart
// from them, and decides the verdict.
//
// The agent reaches the host by the best rung of a ladder that its kernel has: see Rung. The first
// that says hello is taken. A run without a word of the command's end is never a success.
//
// The package prints nothing and reads no flags.
package testrun

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"gvm/devices/statusport"
	"gvm/devices/virtio/vsock"
	"gvm/guest/agent/wire"
	"gvm/kvmapi/nowait"
	"gvm/machine"
	"gvm/panics"
	"gvm/verdict"
	"gvm/vmm"
)

// Config describes a run.
type Config struct {
	// Spec is the machine, with its kernel and the agent's initramfs. Start sets Console, Status and
	// the devices of the rungs, and calls Phase at the agent's hello, at the command's start and end
	// and at the guest's end too.
	Spec  machine.Spec
	Build string // of the agent: see wire.BuildID
	Rungs []Rung // ways to the agent; nil: all

	Command string // its name, for messages
	// Stdin may return from Read after Wait; nil: empty. A command whose input has failed, with
	// another error than io.EOF, is not tested.
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Log            io.Writer      // takes the kernel's log; nil: only its end is kept
	Policy         verdict.Policy // which of the kernel's reports fail the run

	Hang time.Duration // the time without progress that is a hang; 0: none

	Chosen func(Rung)        // the agent said hello; nil: no call
	Say    func(line string) // a line of the agent for the user; nil: none
}

// Causes of the end of a run, besides those of the caller's context. With DeadlineExceeded the
// outcome's report has the state of the machine.
var (
	errHang  = fmt.Errorf("no progress: %w", context.DeadlineExceeded)
	errAgent = errors.New("the connection to the agent is lost")
	errOver  = errors.New("the guest did not power off after the command's end")
)

// TimeoutError is a timeout that has elapsed. As the cause of the end of Start's context it makes
// the verdict Timeout: the caller counts the time, as most of its own start comes first.
type TimeoutError time.Duration

func (e TimeoutError) Error() string {
	return fmt.Sprintf("the timeout of %s elapsed", time.Duration(e))
}

// Is makes a TimeoutError a context.DeadlineExceeded.
func (TimeoutError) Is(target error) bool { return target == context.DeadlineExceeded }

// powerOffPatience is how long a guest may take to power off after the end of its command.
const powerOffPatience = 10 * time.Second

// drainPatience bounds the wait for the readers of the command's output once the run is stopped.
const drainPatience = 500 * time.Millisecond

// Run is a run that has begun.
type Run struct {
	cfg     Config
	machine guest
	whole   *machine.Machine // machine; nil in tests
	began   chan struct{}    // closed once machine is set
	conns   atomic.Int32     // of vsock
	log     *kernelLog
	stop    context.CancelCauseFunc // for the caller: the output is not waited for either
	end     context.CancelCauseFunc // of the machine alone
	start   time.Time
	exited  chan struct{} // closed once exit is set
	done    chan struct{} // closed once result is set
	result  *Result

	phase    func(name string)
	progress atomic.Uint64 // changes with each sign of progress

	mu       sync.Mutex
	host     *wire.Host // nil: the agent has not said hello, or has only the status port
	rung     Rung
	rows     uint16 // of the command's terminal
	columns  uint16
	signals  []int       // for the command, before the hello
	killer   *time.Timer // ends the run after Terminate; nil: not called
	deadline time.Time   // when killer fires
	exit     *wire.Exit  // nil: the command has not ended
	agentErr error       // of the connection
	outErr   error       // of Stdout and Stderr
	inErr    error       // of Stdin, before the command's end
	times    Times
	copies   sync.WaitGroup // of the command's output
	sessions sync.WaitGroup // of the listeners
}

// guest is the part of *machine.Machine that a run uses.
type guest interface {
	Ended() <-chan struct{}
	Wait() (vmm.Outcome, error)
	Paused() bool
	DialVsock(ctx context.Context, port uint32) (*vsock.Conn, error)
}

// Start starts the machine. When ctx is done, its cause ends the run. After an error nothing is
// left open; errors are those of machine.Start.
func Start(ctx context.Context, cfg Config) (*Run, error) {
	var m *machine.Machine
	r, err := begin(ctx, cfg, func(ctx context.Context, s machine.Spec) (_ guest, err error) {
		if m, err = machine.Start(ctx, s); err != nil {
			return nil, err // not a guest that is a nil *Machine
		}
		return m, nil
	})
	if err == nil {
		r.whole = m
	}
	return r, err
}

// Machine returns the machine of the run.
func (r *Run) Machine() *machine.Machine { return r.whole }

func begin(user context.Context, cfg Config, start func(context.Context, machine.Spec) (guest, error)) (*Run, error) {
	over, stop := context.WithCancelCause(user)
	ctx, end := context.WithCancelCause(over)
	r := &Run{cfg: cfg, stop: stop, end: end, start: time.Now(), began: make(chan struct{}),
		exited: make(chan struct{}), done: make(chan struct{})}
	r.log = newKernelLog(cfg.Log, cfg.Policy, r.touch)
	if r.phase = cfg.Spec.Phase; r.phase == nil {
		r.phase = func(string) {}
	}
	spec := &r.cfg.Spec
	spec.Console = r.log
	spec.Phase = func(name string) {
		if name == vmm.Entered {
			r.mark(&r.times.Entered)
		}
		r.phase(name)
	}
	listeners := r.listen(spec)
	m, err := start(ctx, *spec)
	if err != nil {
		stop(nil)
		for _, l := range listeners {
			l.close()
		}
		return nil, err
	}
	r.machine = m
	close(r.began)
	for _, l := range listeners {
		r.sessions.Go(panics.Func(func() { r.serve(l) }))
	}
	panics.Go(func() { r.watch(ctx) })
	panics.Go(func() {
		defer close(r.done)
		r.finish(over, listeners)
	})
	return r, nil
}

// Wait waits for the end of the run.
func (r *Run) Wait() *Result {
	<-r.done
	return r.result
}

// touch notes a sign of progress.
func (r *Run) touch() { r.progress.Add(1) }

// mark sets a time of the run, once.
func (r *Run) mark(t *Millis) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.markLocked(t)
}

func (r *Run) markLocked(t *Millis) {
	if *t == 0 {
		*t = Millis(time.Since(r.start))
	}
}

// Signal sends a signal to the command's process group, once there is one. It reports whether the
// agent has said hello, and can send it. It does not wait for the guest.
func (r *Run) Signal(number int) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	h := r.host
	if h == nil {
		r.signals = append(r.signals, number)
		return false
	}
	panics.Go(func() { _ = h.Signal(number) }) // ends with the connection, whose end is told elsewhere
	return true
}

// Winsize sets the size of the command's terminal. It does not wait for the guest.
func (r *Run) Winsize(rows, columns uint16) {
	r.mu.Lock()
	defer r.mu.Unlock()
	h := r.host
	if r.rows, r.columns = rows, columns; h != nil {
		panics.Go(func() {
			r.mu.Lock()
			rows, columns := r.rows, r.columns
			r.mu.Unlock()
			_ = h.Winsize(rows, columns)
		})
	}
}

// Terminate sends a signal to the command's process group, and ends the run with cause if it has
// not ended within grace. Of two calls the one that gives less time counts. Without a grace time,
// before the agent's hello, or when only the readers of the output are waited for, Terminate ends
// the run at once and returns false.
func (r *Run) Terminate(number int, cause error, grace time.Duration) bool {
	select {
	case <-r.machine.Ended():
		grace = 0
	default:
	}
	if grace <= 0 || !r.Signal(number) {
		r.stop(cause)
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	deadline := time.Now().Add(grace)
	if r.killer != nil {
		if !deadline.Before(r.deadline) {
			return true
		}
		r.killer.Stop()
	}
	r.deadline = deadline
	r.killer = time.AfterFunc(grace, panics.Func(func() { r.stop(cause) }))
	return true
}

// Stop ends the run at once.
func (r *Run) Stop(cause error) { r.stop(cause) }

// watch ends a machine that makes no progress, or does not power off. It counts ticks and not time,
// so that a gvm that was stopped itself sees no hang.
func (r *Run) watch(ctx context.Context) {
	var tick <-chan time.Time
	if r.cfg.Hang > 0 {
		t := time.NewTicker(max(r.cfg.Hang/hangTicks, time.Millisecond))
		defer t.Stop()
		tick = t.C
	}
	exited := r.exited
	seen, idle := r.progress.Load(), 0
	for {
		select {
		case <-r.machine.Ended():
			return
		case <-ctx.Done():
			return
		case <-exited:
			exited, tick = nil, nil
			t := time.AfterFunc(powerOffPatience, panics.Func(func() { r.end(errOver) }))
			defer t.Stop()
		case <-tick:
			if now := r.progress.Load(); now != seen || r.machine.Paused() {
				seen, idle = now, 0
				continue
			}
			if idle++; idle > hangTicks {
				r.hung(ctx)
				return
			}
		}
	}
}

// hangTicks is the number of looks at the progress in the time of a hang.
const hangTicks = 20

// hung ends a run without progress. It first has a kernel that still takes interrupts print the
// call traces of its CPUs and of blocked tasks.
func (r *Run) hung(ctx context.Context) {
	r.mark(&r.times.Hang)
	panics.Go(func() { r.log.sysRq("lw") }) // ends with the machine
	select {
	case <-ctx.Done():
	case <-r.machine.Ended():
	case <-time.After(hungPatience):
		r.end(errHang)
	}
}

// hungPatience is the time in which a guest that hangs may print the call traces.
const hungPatience = time.Second

// finish waits for the end of the machine and of the output, and decides the verdict. over ends
// with the caller's patience for both.
func (r *Run) finish(over context.Context, listeners []*listener) {
	<-r.machine.Ended()
	r.mark(&r.times.Ended)
	r.phase("the guest's end")
	out, err := r.machine.Wait()
	for _, l := range listeners {
		l.close()
	}
	r.sessions.Wait()
	drained := make(chan struct{})
	panics.Go(func() { r.copies.Wait(); close(drained) })
	stopped := over.Done()
	if out.Ending == vmm.Stopped && !errors.Is(out.Err, errOver) {
		now := make(chan struct{})
		close(now)
		stopped = now
	}
	var cut error // why output is lost
	select {
	case <-drained:
	case <-stopped:
		select {
		case <-drained:
		case <-time.After(nowait.Left(over, drainPatience)):
			cut = context.Cause(over)
		}
	}
	r.mu.Lock()
	h := r.host
	if r.killer != nil {
		r.killer.Stop()
	}
	r.mu.Unlock()
	if h != nil {
		_ = h.Close()
	}
	if cut == nil && r.log.isWriting() {
		cut = context.Cause(over)
	}
	r.stop(nil)
	r.result = r.decide(out, err, cut)
}

// takeStatus takes a report from the status port. Where the agent has a better way, or has not said
// that it lives, another program or the kernel wrote to the port.
func (r *Run) takeStatus(s statusport.Report) {
	rung := r.chosen()
	if rung == 0 && s == (statusport.Report{Kind: statusport.Alive, Value: wire.Version}) {
		r.hello(Status, nil)
		return
	}
	if rung != Status {
		return
	}
	r.touch()
	exit := wire.Exit{Status: int(s.Value)}
	switch {
	case s.Kind == statusport.Exited:
	case s.Kind == statusport.Signaled && s.Value > 0 && s.Value <= wire.MaxSignal:
		exit = wire.Exit{Signal: int(s.Value)}
	case s.Kind == statusport.Failed:
		exit.Err = unix.Errno(s.Value).Error()
		switch unix.Errno(s.Value) {
		case unix.ENOENT:
			exit.Status = exitMissing
		case unix.EACCES:
			exit.Status = exitNotStarted
		default:
			exit.Status = ExitNotTested
		}
	default:
		return
	}
	r.ended(exit)
}

// chosen returns the rung by which the agent said hello, or 0.
func (r *Run) chosen() Rung {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.rung
}

// hello takes the agent that says hello first, and reports whether it is this one.
func (r *Run) hello(rung Rung, h *wire.Host) bool {
	r.mu.Lock()
	if r.rung != 0 {
		r.mu.Unlock()
		return false
	}
	r.rung, r.host = rung, h
	r.markLocked(&r.times.Hello)
	signals, rows, columns := r.signals, r.rows, r.columns
	r.mu.Unlock()
	r.touch()
	r.phase("the agent's hello")
	if r.cfg.Chosen != nil {
		r.cfg.Chosen(rung)
	}
	if h != nil && rows > 0 {
		_ = h.Winsize(rows, columns)
	}
	for _, n := range signals {
		if h != nil {
			_ = h.Signal(n)
		}
	}
	return true
}

// ended takes the end of the command.
func (r *Run) ended(exit wire.Exit) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.exit == nil {
		r.exit = &exit
		r.markLocked(&r.times.Exit)
		r.phase("the command's end")
		close(r.exited)
	}
}

// lost takes the end of the connection to the agent without the end of the command. A kernel that
// panics for it has some time to say so.
func (r *Run) lost(err error) {
	r.mu.Lock()
	r.agentErr = err
	r.mu.Unlock()
	select {
	case <-r.machine.Ended():
	case <-time.After(lostPatience):
		r.end(errAgent)
	}
}

// lostPatience is how long a guest may take to end without its agent.
const lostPatience = 3 * time.Second
