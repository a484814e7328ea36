package testrun

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"gvm/guest/agent/wire"
	"gvm/text"
	"gvm/verdict"
	"gvm/verdict/klog"
	"gvm/vmm"
)

// Kind is the kind of a verdict.
type Kind string

// The kinds of verdicts.
const (
	Exited     Kind = "exited"      // the command ended with a status
	Signaled   Kind = "signaled"    // a signal ended the command
	NotStarted Kind = "not-started" // the command is missing, or is no program
	Panic      Kind = "panic"       // the guest's kernel panicked
	Fault      Kind = "fault"       // it reported another fault that fails the run, such as an oops
	Crash      Kind = "crash"       // triple fault, or KVM could not go on
	Ended      Kind = "ended"       // the guest powered off, reset or halted before the command's end
	Hang       Kind = "hang"        // the guest made no progress
	Timeout    Kind = "timeout"     // the time was over
	Stopped    Kind = "stopped"     // the caller ended the run
	NotTested  Kind = "not-tested"  // the host, the kernel's image or its configuration
)

// ExitNotTested is the status of a run that could not test.
const ExitNotTested = 125

// Statuses of other kinds that are not the command's own.
const (
	exitFault      = 120
	exitCrash      = 121
	exitHang       = 122
	exitTimeout    = 124
	exitNotStarted = 126
	exitMissing    = 127
	exitSignal     = 128 // and the signal's number
)

var kindStatus = map[Kind]int{Panic: exitFault, Fault: exitFault, Crash: exitCrash, Ended: exitCrash,
	Hang: exitHang, Timeout: exitTimeout, NotTested: ExitNotTested, Stopped: ExitNotTested}

// Format is the form of a Result in JSON.
const Format = "gvm-test-1"

// Millis is a time since the start of a run, in JSON in milliseconds; 0: it did not happen.
type Millis time.Duration

// MarshalJSON writes milliseconds with a fraction.
func (m Millis) MarshalJSON() ([]byte, error) {
	return fmt.Appendf(nil, "%.3f", time.Duration(m).Seconds()*1000), nil
}

// UnmarshalJSON reads milliseconds.
func (m *Millis) UnmarshalJSON(b []byte) error {
	ms, err := strconv.ParseFloat(string(b), 64)
	*m = Millis(math.Round(ms * float64(time.Millisecond)))
	return err
}

// Times are those of a run, since its start.
type Times struct {
	Start   time.Time `json:"start"`
	Entered Millis    `json:"first_instruction_ms"` // of the guest
	Hello   Millis    `json:"hello_ms"`             // of the agent
	Started Millis    `json:"command_start_ms"`
	Exit    Millis    `json:"command_exit_ms"`
	Hang    Millis    `json:"hang_ms"` // the hang was seen
	Ended   Millis    `json:"end_ms"`  // of the guest
}

// Result is the verdict of a run. It is also the verdict file.
type Result struct {
	Format string `json:"format"`
	Kind   Kind   `json:"kind"`
	Status int    `json:"status"` // for the caller to exit with; of Stopped the caller knows a better one
	Text   string `json:"text"`   // the reason in a line; "" for a command that exited

	// Command is the end of the command, for each kind; nil: it is not known.
	Command *CommandEnd `json:"command"`
	Rung    string      `json:"rung"` // by which the agent said hello; "": it did not

	Kernel  text.Name `json:"kernel"`  // the image; set by the caller, like the next two
	Release string    `json:"release"` // "": not known
	Missing []string  `json:"missing"` // options of the kernel's configuration, with the reason

	// Reports are those of the guest's kernel, with fingerprints; Failing of them fail the run.
	Reports []verdict.Report `json:"reports"`
	Failing int              `json:"failing_reports"`
	Dropped int              `json:"dropped_reports"`
	Lost    int              `json:"lost_messages"` // that the kernel dropped: see verdict.LostText

	Times  Times    `json:"times"`
	Log    []string `json:"log"`    // the end of the kernel's log
	Detail []string `json:"detail"` // registers and the like, of a crash and a hang

	// Err is the error of a run that was not tested, Cause that of one that was stopped.
	Err   error `json:"-"`
	Cause error `json:"-"`
}

// CommandEnd is the end of a command: a status, a signal, or the error of a failed start.
type CommandEnd struct {
	Status     *int   `json:"status,omitempty"` // nil: it did not exit
	Signal     int    `json:"signal,omitempty"`
	SignalName string `json:"signal_name,omitempty"`
	Error      string `json:"error,omitempty"` // it did not start
}

// JSON writes the verdict file.
func (r *Result) JSON(w io.Writer) error {
	for _, list := range []*[]string{&r.Missing, &r.Log, &r.Detail} {
		if *list == nil {
			*list = []string{} // not null
		}
	}
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(r)
}

// Untested is the result of a run that did not begin.
func Untested(err error) *Result {
	return &Result{Format: Format, Kind: NotTested, Status: ExitNotTested, Text: err.Error(), Err: err,
		Reports: []verdict.Report{}}
}

// TimedOut is the result of a run whose timeout elapsed without a word of the guest.
func TimedOut(err error) *Result {
	r := Untested(err)
	r.Kind, r.Status, r.Err = Timeout, exitTimeout, nil
	return r
}

// NoCommand is the result of a command that the host does not have, or may not run.
func NoCommand(name string, err unix.Errno) *Result {
	r := &Result{Format: Format, Reports: []verdict.Report{}}
	e := wire.Exit{Status: exitNotStarted, Err: err.Error()}
	if err == unix.ENOENT || err == unix.ENOTDIR {
		e.Status = exitMissing
	}
	r.command(e, name)
	return r
}

// Bisect makes the status one that git bisect run takes for its meaning: a command that a signal
// ended, or whose own status is 128 or more, is bad; a missing command cannot be tested, nor one
// that a shell of the guest misses. A run that was stopped keeps its status, which ends the
// bisection.
func (r *Result) Bisect() {
	switch {
	case r.Status == exitMissing, r.Status == exitNotStarted:
		r.Status = ExitNotTested
	case r.Kind != Stopped && r.Status >= exitSignal:
		r.Status = 1
	}
}

// command sets the verdict to the end of the command.
func (r *Result) command(e wire.Exit, name string) {
	r.Kind, r.Status = Exited, e.Status
	r.Command = &CommandEnd{Signal: e.Signal, Error: e.Err}
	switch {
	case e.Err != "":
		r.Kind, r.Text = NotStarted, fmt.Sprintf("%s: %s", name, e.Err)
	case e.Signal != 0:
		r.Command.SignalName = signalName(e.Signal)
		r.Kind, r.Status = Signaled, exitSignal+e.Signal
		r.Text = fmt.Sprintf("the command was ended by %s", r.Command.SignalName)
	default:
		r.Command.Status = &e.Status
	}
}

func signalName(n int) string {
	if s := unix.SignalName(unix.Signal(n)); s != "" {
		return s
	}
	return fmt.Sprintf("signal %d", n)
}

// bootFaults match panics of a kernel that cannot run the initramfs, before the agent's hello.
var bootFaults = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`No working init found|Requested init .* failed|Unable to mount root fs|` +
		`Attempted to kill init|No init found`)
})

// decide makes the verdict of a machine that has ended. cut is the reason for which output of the
// command or the kernel's log is lost, or nil.
func (r *Run) decide(out vmm.Outcome, err, cut error) *Result {
	r.log.mu.Lock()
	reports := r.log.reader.Close()
	res := &Result{Format: Format, Reports: reports.Reports, Failing: reports.Failing, Dropped: reports.Dropped,
		Lost: reports.Lost,
		Log:  tailLines(r.log.tail)}
	logErr := r.log.err
	if r.log.writing {
		logErr = errors.New("its reader takes no more")
	}
	r.log.mu.Unlock()
	r.mu.Lock()
	defer r.mu.Unlock()
	res.Times = r.times
	res.Times.Start = r.start
	hello := r.rung != 0
	if hello {
		res.Rung = r.rung.String()
	}
	set := func(k Kind, format string, args ...any) {
		res.Kind, res.Status, res.Text = k, kindStatus[k], fmt.Sprintf(format, args...)
	}
	untested := func(err error) {
		set(NotTested, "%v", err)
		res.Err = err
	}
	if r.exit != nil {
		res.command(*r.exit, r.cfg.Command)
		if r.exit.Err != "" && r.exit.Status == ExitNotTested { // the agent could not try
			untested(errors.New(r.exit.Err))
			res.Command = nil
		}
	}
	var timeout TimeoutError
	silent := ""
	if !hello {
		silent = " before the agent said hello"
	}
	fault := func(f *verdict.Report) {
		set(Fault, "the guest's kernel reported %s: %s (fingerprint %s)", f.Kind, f.Title, f.Fingerprint)
	}
	// A guest that cannot test may do so for a fault of its kernel.
	unable := func(err error) {
		if f := res.First(); f != nil {
			fault(f)
		} else {
			untested(err)
		}
	}
	switch {
	case out.Ending == vmm.GuestPanic && !hello && res.First() == nil && bootFaults().MatchString(out.Err.Error()):
		untested(fmt.Errorf("the kernel does not run the initramfs: %w", out.Err))
	case out.Ending == vmm.GuestPanic:
		set(Panic, "guest panic%s: %v", silent, out.Err)
		res.Detail = append(res.Detail, lines(out.Report)...)
	case out.Ending == vmm.GuestCrashed:
		set(Crash, "the guest crashed%s: %v", silent, out.Err)
		res.Detail = append(res.Detail, lines(out.Report)...)
	case out.Ending == vmm.Bug:
		untested(fmt.Errorf("a bug in gvm, please report it: %w", out.Err))
		res.Detail = append(res.Detail, lines(out.Report)...)
	case out.Ending == vmm.Stopped && errors.As(out.Err, &timeout):
		set(Timeout, "%v%s", timeout, silent)
		res.Detail = append(res.Detail, lines(out.Report)...)
	case out.Ending == vmm.Stopped && errors.Is(out.Err, errHang):
		set(Hang, "the guest hangs: no progress for %s%s", r.cfg.Hang, silent)
		res.Detail = append(res.Detail, lines(out.Report)...)
	case out.Ending == vmm.Stopped && errors.Is(out.Err, errAgent):
		unable(r.agentErr)
	case out.Ending == vmm.Stopped && !errors.Is(out.Err, errOver):
		set(Stopped, "%v", out.Err)
		res.Cause = out.Err
	case out.Ending == 0 || out.Ending == vmm.HostFailed:
		untested(errors.Join(out.Err, err))
	case r.exit == nil && r.agentErr != nil && !hello:
		unable(r.agentErr)
	case r.exit == nil && !hello:
		unable(fmt.Errorf("the guest %s%s", out.Ending, silent))
	case r.exit == nil:
		set(Ended, "the guest %s before the command ended", out.Ending)
	case res.First() != nil:
		fault(res.First())
	}
	if res.Kind == NotTested || res.Kind == Stopped {
		return res
	}
	var lost error
	switch {
	case r.exit != nil && r.outErr != nil:
		lost = fmt.Errorf("write the command's output: %w", r.outErr)
	case r.exit != nil && r.inErr != nil:
		lost = fmt.Errorf("read the command's input: %w", r.inErr)
	case logErr != nil:
		lost = fmt.Errorf("write the kernel's log: %w", logErr)
	}
	switch ended := res.Kind == Exited || res.Kind == Signaled || res.Kind == NotStarted; {
	case ended && errors.As(cut, &timeout):
		set(Timeout, "%v before all output was read", timeout)
	case ended && cut != nil:
		set(Stopped, "%v", cut)
		res.Cause = cut
	case ended && lost != nil:
		untested(lost)
	case lost != nil:
		res.Text = fmt.Sprintf("%s; %v", res.Text, lost)
	}
	return res
}

// First returns the first report that fails the run, or nil.
func (r *Result) First() *verdict.Report { return (&verdict.Results{Reports: r.Reports}).First() }

// lines splits a report of several lines.
func lines(s string) []string {
	if s = strings.TrimRight(s, "\n"); s == "" {
		return nil
	}
	return strings.Split(s, "\n")
}

// maxLog is the number of lines of the kernel's log in a Result.
const maxLog = 100

// tailLines returns the last lines of a console, without printk's time stamps being touched.
func tailLines(b []byte) (all []string) {
	var l klog.Line
	add := func() {
		if s := text.Printable(strings.TrimRight(string(l.Take()), " ")); s != "" {
			all = append(all, s)
		}
	}
	for _, c := range b {
		if l.Add(c) {
			add()
		}
	}
	add()
	return all[max(0, len(all)-maxLog):]
}
