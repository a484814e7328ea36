package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"gvm/control"
	"gvm/kvmapi/nowait"
	"gvm/machine"
	"gvm/panics"
	"gvm/text"
	"gvm/vmm"
)

// ending lets signals end a run: the machine once there is one, else its start.
type ending struct {
	stop  func(error)
	grace time.Duration

	mu       sync.Mutex
	machine  func(cause error, grace time.Duration) bool // the machine's Stop; nil: not started
	signaled bool
}

// begin makes later signals end a machine by its Stop.
func (e *ending) begin(machine func(error, time.Duration) bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.machine = machine
}

// signal ends the machine within its grace time on the first signal, and at once on the second.
func (e *ending) signal(cause error) {
	e.mu.Lock()
	machine, grace := e.machine, e.grace
	if e.signaled {
		grace = 0
	}
	e.signaled = true
	e.mu.Unlock()
	if machine == nil {
		e.stop(cause)
		return
	}
	machine(cause, grace)
}

// endError is the end of a run with an exit status of its own.
type endError struct {
	status int
	error
}

func (e endError) Unwrap() error { return e.error }

// ended converts an outcome to an error; nil if the guest powered off.
func ended(out vmm.Outcome) error {
	switch out.Ending {
	case vmm.PoweredOff, vmm.Halted:
		return nil
	case vmm.GuestReset:
		return endError{exitReset, errors.New("the guest asked for a reset (--on-reset=reboot starts it again)")}
	case vmm.GuestPanic:
		err := fmt.Errorf("guest panic: %w", out.Err)
		if out.Report != "" {
			err = fmt.Errorf("%w\n%s", err, strings.TrimRight(out.Report, "\n"))
		}
		return endError{exitPanic, err}
	case vmm.GuestCrashed:
		return endError{exitCrash, fmt.Errorf("the guest crashed: %w\n%s", out.Err,
			strings.TrimRight(out.Report, "\n"))}
	case vmm.Expired:
		return endError{exitWatchdog, fmt.Errorf("%w\n%s", out.Err, strings.TrimRight(out.Report, "\n"))}
	case vmm.Bug:
		return endError{exitBug, fmt.Errorf("a bug in gvm, please report it: %w\n%s", out.Err, out.Report)}
	case vmm.Stopped:
		if errors.Is(out.Err, errQuit) || errors.Is(out.Err, machine.ErrKilled) {
			return endError{exitQuit, out.Err}
		}
		if errors.Is(out.Err, context.DeadlineExceeded) && out.Report != "" {
			return errors.Join(out.Err, errors.New(out.Report)) // whose lines are kept
		}
	}
	return out.Err
}

// timeoutError is the end of --timeout.
type timeoutError time.Duration

func (e timeoutError) Error() string { return fmt.Sprintf("--timeout %s elapsed", time.Duration(e)) }

func endOfTimeout(d time.Duration) error { return endError{exitTimeout, timeoutError(d)} }

func (timeoutError) Is(target error) bool { return target == context.DeadlineExceeded }

// On fatalSignals the Go runtime dumps the goroutines and exits, without restoring the terminal.
// Faults of the process itself do not arrive on a channel, and stay with the runtime.
var fatalSignals = []os.Signal{syscall.SIGQUIT, syscall.SIGILL, syscall.SIGTRAP, syscall.SIGABRT, syscall.SIGBUS,
	syscall.SIGFPE, syscall.SIGSEGV, syscall.SIGSTKFLT, syscall.SIGSYS}

// catchSignals handles signals. Those that ask a process to end stop the run in order, or at once
// if the run is already ending. The returned function undoes this. Fatal ones stay with catchFatal.
// Others do nothing, as in the runtime.
func catchSignals(ctx context.Context, stop func(error)) func() {
	ch := make(chan os.Signal, 2)
	signal.Notify(ch, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	catchFatal()
	signal.Ignore(syscall.SIGPIPE) // a closed output gives a write error
	// In the background of a terminal gvm can write to it, reads from it fail, and neither stops
	// gvm.
	signal.Ignore(syscall.SIGTTOU, syscall.SIGTTIN)
	ignoreRealTime()
	panics.Go(func() {
		var last request
		for s := range ch {
			if last.repeated(s, time.Now()) {
				continue
			}
			status, name := 128+int(s.(syscall.Signal)), unix.SignalName(s.(syscall.Signal))
			stopped := fmt.Errorf("stopped by %s", name)
			switch {
			case ctx.Err() != nil && giveUp(stopped):
				continue
			case ctx.Err() != nil:
				endNow(status, "stopped at once by "+name)
			}
			stop(endError{status, stopped})
		}
	})
	return func() {
		signal.Stop(ch)
		close(ch)
	}
}

// catchFatal has fatalSignals dump the goroutines and end the process at once, from when the
// returned channel is closed: Go's runtime takes two switches of threads for each.
var catchFatal = sync.OnceValue(func() <-chan struct{} {
	caught := make(chan struct{})
	panics.Go(func() {
		ch := make(chan os.Signal, 1)
		signal.Notify(ch, fatalSignals...)
		close(caught)
		s := (<-ch).(syscall.Signal)
		exitNow(128+int(s), dumpPatience, func() {
			stderr.say(fmt.Sprintf("%s: %s\n\n", unix.SignalName(s), s))
			stderr.say(string(stacks()))
		})
	})
	return caught
})

// awaitFatal waits until the fatal signals are caught, so that they undo what comes behind: a raw
// terminal, a machine's name and sockets. A busy host can delay it until the guest runs.
func awaitFatal() { <-catchFatal() }

// sameRequest is the time within which a repeated signal is the same request: timeout(1) sends its
// signal to its child, and then to the process group that contains the child.
const sameRequest = 200 * time.Millisecond

// request is a signal and its time.
type request struct {
	signal os.Signal
	at     time.Time
}

// repeated reports whether a signal at the time now repeats r. Any other signal becomes r.
func (r *request) repeated(s os.Signal, now time.Time) bool {
	if s == r.signal && now.Sub(r.at) < sameRequest {
		return true
	}
	*r = request{s, now}
	return false
}

// stacks returns the stacks of all goroutines.
func stacks() []byte {
	for n := 1 << 20; ; n *= 2 {
		b := make([]byte, n)
		if m := runtime.Stack(b, true); m < n || n > 64<<20 {
			return b[:m]
		}
	}
}

// urgent has the steps that even an immediate end performs.
var urgent struct {
	sync.Mutex
	restore func() error // restores the terminal

	// making is held while a file or a socket is made and its removal is added, and from the last step
	// of such an end on: none is made behind that, and would stay. The end waits for it after all that
	// it can do without.
	making sync.Mutex

	files   sync.Mutex               // guards the fields below, for no longer than their use
	sockets map[*control.Server]bool // of the process's machines
	remove  []func() error           // remove files and other sockets
}

// removeAtEnd has an immediate end call remove. The caller has held urgent.making since before the
// file was made.
func removeAtEnd(remove func() error) {
	urgent.files.Lock()
	defer urgent.files.Unlock()
	urgent.remove = append(urgent.remove, remove)
}

// releaseAtEnd has an immediate end release a control socket. The caller has held urgent.making
// since before it was made.
func releaseAtEnd(s *control.Server) {
	urgent.files.Lock()
	defer urgent.files.Unlock()
	if urgent.sockets == nil {
		urgent.sockets = map[*control.Server]bool{}
	}
	urgent.sockets[s] = true
}

// forgetAtEnd undoes releaseAtEnd.
func forgetAtEnd(s *control.Server) {
	urgent.files.Lock()
	defer urgent.files.Unlock()
	delete(urgent.sockets, s)
}

// removeFiles removes the files and sockets that there are.
func removeFiles() {
	urgent.files.Lock()
	remove, sockets := urgent.remove, urgent.sockets
	urgent.remove, urgent.sockets = nil, nil
	urgent.files.Unlock()
	for _, remove := range remove {
		_ = remove()
	}
	for s := range sockets {
		_ = s.Release() // on failure the next gvm removes it
	}
}

// lateWork ends work that follows the end of the machine; nil: there is none. It is not in urgent,
// whose lock is held while its steps wait for storage: a second signal asks for it.
var lateWork atomic.Pointer[context.CancelCauseFunc]

// setGiveUp has the next signal end work that follows the end of the machine, and not the process.
func setGiveUp(f context.CancelCauseFunc) {
	if f == nil {
		lateWork.Store(nil)
		return
	}
	lateWork.Store(&f)
}

// giveUp ends such work, once, and reports whether there was any.
func giveUp(why error) bool {
	f := lateWork.Swap(nil)
	if f != nil {
		(*f)(why)
	}
	return f != nil
}

// endNow ends the process without waiting for its end in order. gvm lio gc removes kernel objects
// that are left.
func endNow(status int, why string) { endLate(status, why, patience) }

// endLate is endNow with a bound of its own.
func endLate(status int, why string, patience time.Duration) {
	exitNow(status, patience, func() { stderr.say(fmt.Sprintf("gvm: %s, before the orderly end was over\n", why)) })
}

// endWithin ends the process, after clean, when ctx has ended for patience, or for nowait.Left,
// unless the returned function is called before that: the storage or the reader of an output may
// take any time.
func endWithin(ctx context.Context, patience time.Duration, clean func()) (done func()) {
	ctx = nowait.WithOneEnd(ctx)
	over := make(chan struct{})
	stop := context.AfterFunc(ctx, panics.Func(func() {
		select {
		case <-over:
		case <-time.After(nowait.Left(ctx, patience)):
			clean()
			cause := context.Cause(ctx)
			endLate(exitStatus(cause), errorText(cause), nowait.Left(ctx, patience))
		}
	}))
	return func() {
		stop()
		close(over)
	}
}

// dumpPatience bounds the wait for the reader of a dump.
const dumpPatience = 10 * time.Second

// atOnce is set when an immediate end has begun.
var atOnce atomic.Bool

// awaitImmediateEnd waits for the end of the process, if an immediate end has begun: that has the
// last word, and the status.
func awaitImmediateEnd() {
	if atOnce.Load() {
		select {}
	}
}

// exitNow performs the steps of urgent and say and ends the process, or gives up on them after
// patience.
func exitNow(status int, patience time.Duration, say func()) {
	atOnce.Store(true)
	panics.Go(func() { // restoring may block, too
		tidy(say)
		stderr.flush(-1)
		os.Exit(status)
	})
	time.Sleep(patience)
	os.Exit(status)
}

// tidy performs the steps of urgent, and say. The caller releases both locks of urgent, or ends the
// process.
func tidy(say func()) {
	urgent.Lock()
	if urgent.restore != nil {
		_ = urgent.restore()
	}
	say()
	removeFiles()
	urgent.making.Lock()
	removeFiles() // those that were made meanwhile
}

// note prints one line to standard error, which may be a raw terminal.
func note(s string) {
	end := "\n"
	if term.IsTerminal(int(os.Stderr.Fd())) {
		end = "\r\n"
	}
	stderr.say("gvm: " + text.Printable(s) + end)
}
