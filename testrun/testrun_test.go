package testrun

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"gvm/devices/statusport"
	"gvm/devices/virtio/vsock"
	"gvm/guest/agent/wire"
	"gvm/machine"
	"gvm/verdict"
	"gvm/vmm"
)

const build = "this build"

// fakeGuest is a machine whose guest is a function of the test.
type fakeGuest struct {
	spec  machine.Spec
	ctx   context.Context
	ended chan struct{}
	known chan struct{} // closed once the run knows its agent
	out   vmm.Outcome
}

func (g *fakeGuest) Ended() <-chan struct{}     { return g.ended }
func (g *fakeGuest) Wait() (vmm.Outcome, error) { <-g.ended; return g.out, nil }
func (g *fakeGuest) Paused() bool               { return false }
func (g *fakeGuest) DialVsock(context.Context, uint32) (*vsock.Conn, error) {
	return nil, vsock.ErrNoDriver
}

// print prints a line on the console.
func (g *fakeGuest) print(line string) { _, _ = io.WriteString(g.spec.Console, line+"\r\n") }

// agent is the agent's end on COM2.
func (g *fakeGuest) agent(t *testing.T, cfg wire.AgentConfig) *wire.Agent {
	cfg.Hello = wire.Hello{Build: build, Rung: "com2"}
	a, err := wire.Dial(g.spec.COM2, cfg)
	if err != nil {
		t.Error(err)
	}
	<-g.known
	return a
}

// run runs a guest and returns the verdict. A guest that returns 0 runs until it is stopped.
func run(t *testing.T, cfg Config, live func(*fakeGuest) vmm.Outcome, during ...func(*Run)) *Result {
	t.Helper()
	cfg.Build = build
	known, chosen := make(chan struct{}), cfg.Chosen
	cfg.Chosen = func(r Rung) {
		close(known)
		if chosen != nil {
			chosen(r)
		}
	}
	if cfg.Stdout == nil {
		cfg.Stdout, cfg.Stderr = io.Discard, io.Discard
	}
	r, err := begin(t.Context(), cfg, func(ctx context.Context, s machine.Spec) (guest, error) {
		g := &fakeGuest{spec: s, ctx: ctx, ended: make(chan struct{}), known: known}
		s.Phase(vmm.Entered)
		go func() {
			defer close(g.ended)
			over := make(chan vmm.Outcome, 1)
			go func() {
				if out := live(g); out.Ending != 0 {
					over <- out
				}
			}()
			select {
			case g.out = <-over:
			case <-ctx.Done():
				g.out = vmm.Outcome{Ending: vmm.Stopped, Err: context.Cause(ctx), Report: "vcpu/0: halted"}
			}
			if s.COM2 != nil {
				s.COM2.Close()
			}
		}()
		return g, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range during {
		f(r)
	}
	return r.Wait()
}

var off = vmm.Outcome{Ending: vmm.PoweredOff}

// TestStreams: the command's streams pass every byte, apart from each other, and its status is the
// run's.
func TestStreams(t *testing.T) {
	in := make([]byte, 64<<20)
	rand.NewChaCha8([32]byte{}).Read(in)
	var out, errs bytes.Buffer
	cfg := Config{Stdin: bytes.NewReader(in), Stdout: &out, Stderr: &errs, Policy: verdict.Policy{Fail: true}}
	var chosen Rung
	cfg.Chosen = func(r Rung) { chosen = r }
	res := run(t, cfg, func(g *fakeGuest) vmm.Outcome {
		g.print("[    0.000000] Linux version 6.1.0")
		a := g.agent(t, wire.AgentConfig{})
		if err := a.Started(77); err != nil {
			t.Error(err)
		}
		if _, err := io.Copy(a.Stdout, a.Stdin); err != nil {
			t.Error(err)
		}
		_, _ = a.Stderr.Write([]byte("to standard error"))
		a.Stdout.Close()
		a.Stderr.Close()
		if err := a.Exit(wire.Exit{Status: 7}, time.Minute); err != nil {
			t.Error(err)
		}
		return off
	})
	if res.Kind != Exited || res.Status != 7 || res.Text != "" || res.Rung != "com2" || chosen != COM2 {
		t.Errorf("%+v, rung %v", res, chosen)
	}
	if !bytes.Equal(out.Bytes(), in) || errs.String() != "to standard error" {
		t.Errorf("%d bytes of %d came back; standard error %q", out.Len(), len(in), errs.String())
	}
	x := res.Times
	if x.Entered == 0 || x.Hello < x.Entered || x.Started < x.Hello || x.Exit < x.Started || x.Ended < x.Exit {
		t.Errorf("times %+v", x)
	}
	if len(res.Log) != 1 || res.Log[0] != "[    0.000000] Linux version 6.1.0" {
		t.Errorf("log %q", res.Log)
	}
}

const oops = "[    1.000000] BUG: kernel NULL pointer dereference, address: 0000000000000010\r\n" +
	"[    1.000001] ---[ end trace 0000000000000000 ]---"

// TestVerdicts: every end has its kind and status, and none without the command's own is a success.
func TestVerdicts(t *testing.T) {
	exits := func(e wire.Exit, console ...string) func(*fakeGuest) vmm.Outcome {
		return func(g *fakeGuest) vmm.Outcome {
			a := g.agent(t, wire.AgentConfig{})
			for _, line := range console {
				g.print(line)
			}
			_ = a.Exit(e, time.Minute)
			return off
		}
	}
	hello := func(out vmm.Outcome) func(*fakeGuest) vmm.Outcome {
		return func(g *fakeGuest) vmm.Outcome {
			g.agent(t, wire.AgentConfig{})
			return out
		}
	}
	silent := func(out vmm.Outcome) func(*fakeGuest) vmm.Outcome {
		return func(*fakeGuest) vmm.Outcome { return out }
	}
	reports := func(all ...statusport.Report) func(*fakeGuest) vmm.Outcome {
		return func(g *fakeGuest) vmm.Outcome {
			for _, r := range all {
				g.spec.Status(r)
			}
			return off
		}
	}
	after := func(line string, out vmm.Outcome) func(*fakeGuest) vmm.Outcome {
		return func(g *fakeGuest) vmm.Outcome {
			g.print(line)
			return out
		}
	}
	panicked := func(text string) vmm.Outcome { return vmm.Outcome{Ending: vmm.GuestPanic, Err: errors.New(text)} }
	fail := Config{Policy: verdict.Policy{Fail: true}}
	for _, c := range []struct {
		name   string
		cfg    Config
		guest  func(*fakeGuest) vmm.Outcome
		kind   Kind
		status int
		bisect int
		text   string
	}{
		{"success", fail, exits(wire.Exit{}), Exited, 0, 0, ""},
		{"a status", fail, exits(wire.Exit{Status: 200}), Exited, 200, 1, ""},
		{"skip", fail, exits(wire.Exit{Status: 125}), Exited, 125, 125, ""},
		{"its own 120", fail, exits(wire.Exit{Status: 120}), Exited, 120, 120, ""},
		{"a shell that misses it", fail, exits(wire.Exit{Status: 127}), Exited, 127, 125, ""},
		{"a signal", fail, exits(wire.Exit{Signal: 9}), Signaled, 137, 1, "the command was ended by SIGKILL"},
		{"missing", fail, exits(wire.Exit{Status: 127, Err: "no such file"}), NotStarted, 127, 125, "make: no such file"},
		{"the agent fails", fail, exits(wire.Exit{Status: 125, Err: "no pipe"}), NotTested, 125, 125, "no pipe"},
		{"an oops", fail, exits(wire.Exit{}, oops), Fault, 120, 120, "the guest's kernel reported oops: BUG: kernel NULL"},
		{"an oops that does not count", Config{}, exits(wire.Exit{}, oops), Exited, 0, 0, ""},
		{"a panic", fail, hello(panicked("Kernel panic - not syncing: x")), Panic, 120, 120, "guest panic: Kernel panic"},
		{"a panic of init", fail, hello(panicked("Kernel panic - not syncing: Attempted to kill init!")), Panic, 120, 120,
			"guest panic: "},
		{"a panic at boot", fail, silent(panicked("Kernel panic - not syncing: x")), Panic, 120, 120,
			"guest panic before the agent said hello: "},
		{"no init", fail, silent(panicked("Kernel panic - not syncing: No working init found")), NotTested, 125, 125,
			"the kernel does not run the initramfs: "},
		{"a panic of init by an oops", fail,
			after(oops, panicked("Kernel panic - not syncing: Attempted to kill init!")),
			Panic, 120, 120, "guest panic before the agent said hello: "},
		{"a reset by an oops", fail, after(oops, vmm.Outcome{Ending: vmm.GuestReset}), Fault, 120, 120,
			"the guest's kernel reported oops: "},
		{"a triple fault", fail, hello(vmm.Outcome{Ending: vmm.GuestCrashed, Err: errors.New("triple fault")}), Crash,
			121, 121, "the guest crashed: triple fault"},
		{"power-off by the command", fail, hello(off), Ended, 121, 121, "the guest powered off before the command ended"},
		{"no hello", fail, silent(off), NotTested, 125, 125, "the guest powered off before the agent said hello"},
		{"the host fails", fail, hello(vmm.Outcome{Ending: vmm.HostFailed, Err: errors.New("KVM_RUN")}), NotTested, 125, 125,
			"KVM_RUN"},
		{"timeout", fail, func(g *fakeGuest) vmm.Outcome {
			return vmm.Outcome{Ending: vmm.Stopped, Err: TimeoutError(time.Millisecond)}
		}, Timeout, 124, 124, "the timeout of 1ms elapsed before the agent said hello"},
		{"hang at boot", Config{Hang: 100 * time.Millisecond}, silent(vmm.Outcome{}), Hang, 122, 122,
			"the guest hangs: no progress for 100ms before the agent said hello"},
		{"the status port", Config{Rungs: []Rung{Status}}, reports(statusport.Report{Kind: statusport.Alive, Value: 1},
			statusport.Report{Kind: statusport.Exited, Value: 3}), Exited, 3, 3, ""},
		{"a signal by the status port", fail, reports(statusport.Report{Kind: statusport.Alive, Value: 1},
			statusport.Report{Kind: statusport.Signaled, Value: 11}), Signaled, 139, 1, "the command was ended by SIGSEGV"},
		{"a missing file by the status port", fail, reports(statusport.Report{Kind: statusport.Alive, Value: 1},
			statusport.Report{Kind: statusport.Failed, Value: 2}), NotStarted, 127, 125, "make: no such file or directory"},
		{"a hello by the status port", fail, reports(statusport.Report{Kind: statusport.Alive, Value: 1}), Ended, 121, 121,
			"the guest powered off before the command ended"},
		{"an end by the status port without a hello", fail, reports(statusport.Report{Kind: statusport.Exited}),
			NotTested, 125, 125, "the guest powered off before the agent said hello"},
		{"a hello of another version", fail, reports(statusport.Report{Kind: statusport.Alive, Value: 9},
			statusport.Report{Kind: statusport.Exited}), NotTested, 125, 125,
			"the guest powered off before the agent said hello"},
		{"signal 0 by the status port", fail, reports(statusport.Report{Kind: statusport.Alive, Value: 1},
			statusport.Report{Kind: statusport.Signaled}), Ended, 121, 121,
			"the guest powered off before the command ended"},
		{"signal 128 by the status port", fail, reports(statusport.Report{Kind: statusport.Alive, Value: 1},
			statusport.Report{Kind: statusport.Signaled, Value: 128}), Ended, 121, 121,
			"the guest powered off before the command ended"},
		{"the status port beside the agent", fail, func(g *fakeGuest) vmm.Outcome {
			g.agent(t, wire.AgentConfig{})
			g.spec.Status(statusport.Report{Kind: statusport.Exited})
			return off
		}, Ended, 121, 121, "the guest powered off before the command ended"},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.cfg.Command = "make"
			res := run(t, c.cfg, c.guest)
			if res.Kind != c.kind || res.Status != c.status || !strings.HasPrefix(res.Text, c.text) ||
				(c.text == "") != (res.Text == "") {
				t.Errorf("%s %d %q, want %s %d %q", res.Kind, res.Status, res.Text, c.kind, c.status, c.text)
			}
			if res.Bisect(); res.Status != c.bisect {
				t.Errorf("--bisect: %d, want %d", res.Status, c.bisect)
			}
		})
	}
}

// keyboard is the input of a kernel that prints the SysRq that it gets.
type keyboard struct {
	console io.Writer
	broken  bool // the last input was a break
}

func (k *keyboard) Break() error { k.broken = true; return nil }

func (k *keyboard) Write(p []byte) (int, error) {
	if k.broken {
		fmt.Fprintf(k.console, "sysrq %s\r\n", p)
	}
	k.broken = false
	return len(p), nil
}

// TestHang: a command that is silent is no hang while the agent is alive; CPUs are described when
// nothing moves any more.
func TestHang(t *testing.T) {
	res := run(t, Config{Hang: 3 * wire.AlivePeriod}, func(g *fakeGuest) vmm.Outcome {
		a := g.agent(t, wire.AgentConfig{})
		time.Sleep(5 * wire.AlivePeriod)
		_ = a.Exit(wire.Exit{}, time.Minute)
		return off
	})
	if res.Kind != Exited {
		t.Errorf("an idle command: %+v", res)
	}
	var keys keyboard
	res = run(t, Config{Hang: 100 * time.Millisecond}, func(g *fakeGuest) vmm.Outcome {
		keys.console = g.spec.Console
		g.spec.Console.Connect(&keys)
		return vmm.Outcome{}
	})
	if log := strings.Join(res.Log, ","); log != "sysrq l,sysrq w" {
		t.Errorf("the log is %q", log)
	}
	// The kernel's own reports that it hangs are no progress.
	stalled := run(t, Config{Hang: 100 * time.Millisecond}, func(g *fakeGuest) vmm.Outcome {
		for i := range 10_000 {
			select {
			case <-g.ctx.Done():
				return vmm.Outcome{}
			case <-time.After(time.Millisecond):
				g.print(fmt.Sprintf("[%5d.000000] watchdog: BUG: soft lockup - CPU#0 stuck for %[1]ds! [init:1]\r\n", 26*(i+1)))
			}
		}
		return off
	})
	if stalled.Kind != Hang {
		t.Errorf("a soft lockup: %s, %s", stalled.Kind, stalled.Text)
	}
	if res.Kind != Hang || len(res.Detail) != 1 || res.Detail[0] != "vcpu/0: halted" || res.Times.Hang == 0 {
		t.Errorf("a hang: %+v", res)
	}
}

// TestSignal: signals and sizes from before the hello arrive too, and a stop ends the run with its
// cause.
func TestSignal(t *testing.T) {
	stopped := errors.New("the test stops it")
	signals, sizes := make(chan int, 4), make(chan uint16, 4)
	ready := make(chan struct{})
	early := make(chan struct{})
	res := run(t, Config{}, func(g *fakeGuest) vmm.Outcome {
		<-early
		g.agent(t, wire.AgentConfig{
			Signal:  func(n int) { signals <- n },
			Winsize: func(rows, columns uint16) { sizes <- rows },
		})
		close(ready)
		return vmm.Outcome{}
	}, func(r *Run) {
		if r.Signal(2) {
			t.Error("a signal was sent before the hello")
		}
		r.Winsize(24, 80)
		close(early)
		<-ready
		if n := <-signals; n != 2 {
			t.Errorf("signal %d", n)
		}
		if rows := <-sizes; rows != 24 {
			t.Errorf("%d rows", rows)
		}
		if !r.Signal(15) || <-signals != 15 {
			t.Error("signal 15 did not arrive")
		}
		r.Stop(stopped)
	})
	if res.Kind != Stopped || !errors.Is(res.Cause, stopped) {
		t.Errorf("%+v", res)
	}
}

// TestTerminate: the command gets the signal, and the shortest of two grace times ends the run;
// without an agent or a grace time it ends at once.
func TestTerminate(t *testing.T) {
	cause := errors.New("the test stops it")
	for name, calls := range map[string][]time.Duration{
		"before the hello": {time.Hour}, "no grace": {0}, "shorter": {time.Hour, time.Millisecond},
	} {
		signals, ready := make(chan int, 4), make(chan struct{})
		res := run(t, Config{}, func(g *fakeGuest) vmm.Outcome {
			if name != "before the hello" {
				g.agent(t, wire.AgentConfig{Signal: func(n int) { signals <- n }})
			}
			close(ready)
			return vmm.Outcome{}
		}, func(r *Run) {
			<-ready
			for _, grace := range calls {
				if asked := r.Terminate(15, cause, grace); asked != (name == "shorter") {
					t.Errorf("%s: asked %v", name, asked)
				}
				if grace == time.Hour && name == "shorter" && <-signals != 15 {
					t.Error("another signal")
				}
			}
		})
		if res.Kind != Stopped || !errors.Is(res.Cause, cause) {
			t.Errorf("%s: %+v", name, res)
		}
	}
}

// TestTerminateAfterEnd: once the guest has ended, no grace time holds up the end of the run.
func TestTerminateAfterEnd(t *testing.T) {
	out := stuck{make(chan struct{}, 9), t.Context().Done()}
	cause := errors.New("the test stops it")
	res := run(t, Config{Stdout: out, Stderr: io.Discard}, func(g *fakeGuest) vmm.Outcome {
		a := g.agent(t, wire.AgentConfig{})
		_, _ = io.WriteString(a.Stdout, "output")
		_ = a.Stdout.Close()
		_ = a.Exit(wire.Exit{}, time.Minute)
		return off
	}, func(r *Run) {
		<-r.machine.Ended()
		if r.Terminate(15, cause, time.Hour) {
			t.Error("a guest that has ended was asked")
		}
	})
	if res.Kind != Stopped || !errors.Is(res.Cause, cause) {
		t.Errorf("%+v", res)
	}
}

// TestVersion: an agent of another build is not taken.
func TestVersion(t *testing.T) {
	res := run(t, Config{}, func(g *fakeGuest) vmm.Outcome {
		if _, err := wire.Dial(g.spec.COM2, wire.AgentConfig{Hello: wire.Hello{Build: "another"}}); err == nil {
			t.Error("the host took it")
		}
		return off
	})
	if res.Kind != NotTested || !strings.Contains(res.Text, "of different builds") {
		t.Errorf("%+v", res)
	}
}

// TestSecondHello: a program of the guest that says a wrong hello does not end the agent's run.
func TestSecondHello(t *testing.T) {
	res := run(t, Config{}, func(g *fakeGuest) vmm.Outcome {
		a := g.agent(t, wire.AgentConfig{})
		if _, err := wire.Dial(g.spec.Ports[0].Stream, wire.AgentConfig{Hello: wire.Hello{Build: "another"}}); err == nil {
			t.Error("the host took it")
		}
		time.Sleep(lostPatience + time.Second)
		_ = a.Exit(wire.Exit{Status: 3}, time.Minute)
		return off
	})
	if res.Kind != Exited || res.Status != 3 {
		t.Errorf("%+v", res)
	}
}

// TestOutput: a command whose reader has gone gets a closed pipe; one whose output cannot be
// written is not tested.
func TestOutput(t *testing.T) {
	guest := func(g *fakeGuest) vmm.Outcome {
		a := g.agent(t, wire.AgentConfig{})
		for range 100 {
			if _, err := a.Stdout.Write(make([]byte, 32<<10)); err != nil {
				_ = a.Exit(wire.Exit{Signal: 13}, time.Minute)
				return off
			}
		}
		t.Error("the writes did not fail")
		return off
	}
	r, w := io.Pipe()
	r.CloseWithError(errors.New("no space left on device"))
	res := run(t, Config{Stdout: w, Stderr: io.Discard}, guest)
	if res.Kind != NotTested || !strings.Contains(res.Text, "write the command's output: no space left") {
		t.Errorf("%+v", res)
	}
}

// TestInput: the status of a command whose input was cut off by an error is no success. An error
// that comes after the command's end is none of its affair.
func TestInput(t *testing.T) {
	failed := errors.New("input/output error")
	for _, late := range []bool{false, true} {
		r, w := io.Pipe()
		res := run(t, Config{Stdin: r}, func(g *fakeGuest) vmm.Outcome {
			a := g.agent(t, wire.AgentConfig{})
			if _, err := w.Write([]byte("beg")); err != nil {
				t.Error(err)
			}
			if !late {
				w.CloseWithError(failed)
				if b, err := io.ReadAll(a.Stdin); string(b) != "beg" || err != nil {
					t.Errorf("%q, %v", b, err)
				}
			}
			a.Stdout.Close()
			a.Stderr.Close()
			if err := a.Exit(wire.Exit{}, time.Minute); err != nil {
				t.Error(err)
			}
			w.CloseWithError(failed)
			return off
		})
		if late && (res.Kind != Exited || res.Status != 0) ||
			!late && (res.Kind != NotTested || res.Text != "read the command's input: input/output error") {
			t.Errorf("late %t: %+v", late, res)
		}
	}
}

// TestLostMessages: a verdict tells of messages that the kernel dropped.
func TestLostMessages(t *testing.T) {
	res := run(t, Config{}, func(g *fakeGuest) vmm.Outcome {
		g.print("[    1.000000] Linux version 6.12\r\n** 57 printk messages dropped **\r\n")
		a := g.agent(t, wire.AgentConfig{})
		a.Stdout.Close()
		a.Stderr.Close()
		if err := a.Exit(wire.Exit{}, time.Minute); err != nil {
			t.Error(err)
		}
		return off
	})
	if res.Kind != Exited || res.Lost != 57 {
		t.Errorf("%+v", res)
	}
}

// stuck is a writer whose reader takes nothing until the test ends.
type stuck struct {
	writes chan struct{} // a Write waits
	done   <-chan struct{}
}

func (s stuck) Write(p []byte) (int, error) {
	s.writes <- struct{}{}
	<-s.done
	return len(p), nil
}

// TestStuckOutput: a status of a command is no success while its output is not taken, and neither
// the timeout nor the caller's stop waits for the reader.
func TestStuckOutput(t *testing.T) {
	stopped := errors.New("the test stops it")
	for _, c := range []struct {
		cfg    Config
		stop   func(*Run)
		kind   Kind
		status int
		text   string
	}{
		{Config{}, func(r *Run) { <-r.machine.Ended(); r.Stop(stopped) }, Stopped, 125, "the test stops it"},
		{Config{}, func(r *Run) { <-r.machine.Ended(); r.Stop(TimeoutError(time.Second)) }, Timeout, 124,
			"the timeout of 1s elapsed before all output was read"},
	} {
		c.cfg.Stdout, c.cfg.Stderr = stuck{make(chan struct{}, 9), t.Context().Done()}, io.Discard
		res := run(t, c.cfg, func(g *fakeGuest) vmm.Outcome {
			a := g.agent(t, wire.AgentConfig{})
			_, _ = a.Stdout.Write([]byte("output"))
			_ = a.Exit(wire.Exit{}, time.Minute)
			return off
		}, c.stop)
		if res.Kind != c.kind || res.Status != c.status || !strings.HasPrefix(res.Text, c.text) {
			t.Errorf("%s %d %q", res.Kind, res.Status, res.Text)
		}
		if res.Command == nil || res.Command.Status == nil || *res.Command.Status != 0 {
			t.Errorf("the command's end: %+v", res.Command)
		}
	}
}

// TestStuckLog: a reader of the kernel's log that takes no more holds up no verdict, and the loss
// is told.
func TestStuckLog(t *testing.T) {
	for _, c := range []struct {
		exit   bool
		kind   Kind
		status int
		text   string
	}{
		{true, NotTested, 125, "write the kernel's log: its reader takes no more"},
		{false, Panic, 120, "guest panic: x; write the kernel's log: its reader takes no more"},
	} {
		log := stuck{make(chan struct{}, 9), t.Context().Done()}
		res := run(t, Config{Log: log}, func(g *fakeGuest) vmm.Outcome {
			a := g.agent(t, wire.AgentConfig{})
			go g.print("a line")
			<-log.writes
			if c.exit {
				_ = a.Exit(wire.Exit{}, time.Minute)
				return off
			}
			return vmm.Outcome{Ending: vmm.GuestPanic, Err: errors.New("x")}
		})
		if res.Kind != c.kind || res.Status != c.status || res.Text != c.text {
			t.Errorf("%s %d %q", res.Kind, res.Status, res.Text)
		}
	}
}

// TestDialEnds: a session that meets the end of the test has its error, and not one of the rest of
// the guest.
func TestDialEnds(t *testing.T) {
	exited, ended, runs := make(chan struct{}), make(chan struct{}), make(chan struct{})
	close(exited)
	close(ended)
	for name, tt := range map[string]struct {
		exited, ended chan struct{}
		rung          Rung
		want          error
	}{
		"runs":                   {runs, runs, Vsock, vsock.ErrNoDriver},
		"the command has ended":  {exited, runs, Vsock, ErrOver},
		"the machine has ended":  {runs, ended, Vsock, ErrOver},
		"ended before the hello": {runs, ended, 0, ErrOver},
		"runs before the hello":  {runs, runs, 0, ErrNoHello},
	} {
		r := &Run{machine: &fakeGuest{ended: tt.ended}, exited: tt.exited, rung: tt.rung}
		if _, err := r.Dial(t.Context()); err != tt.want {
			t.Errorf("%s: %v, want %v", name, err, tt.want)
		}
	}
}
