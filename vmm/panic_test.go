package vmm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"gvm/devices/pvpanic"
)

// TestPanicVerdict: the signs of a panic and the end of the guest determine the ending, and the
// console is complete.
func TestPanicVerdict(t *testing.T) {
	line := "<0>[   12.345678][    T1] " + panicked + "\r\n"
	more := strings.Repeat("[   12.345679] output of panic_print=\r\n", 48)
	told := script{}.print(line).pvpanic(pvpanic.Panicked)
	for _, tt := range []struct {
		name        string
		script      script
		tripleFault bool
		want        Ending
		err         string
	}{
		{"reset", script{}.print(line).reset(), false, GuestPanic, panicked + "; the guest then reset"},
		{"reset in the middle of the line", script{}.print("/ # <0>[ 1.2] " + panicked).reset(), false, GuestPanic,
			panicked + "; the guest then reset"},
		{"a printed panic, then a triple fault", script{}.print(line), true, GuestCrashed,
			"vCPU 0: KVM_EXIT_SHUTDOWN (triple fault)"},
		{"triple fault as a reset", script{}.print(line + offset), true, GuestPanic,
			panicked + "; the guest then crashed: vCPU 0: KVM_EXIT_SHUTDOWN (triple fault)"},
		{"end marker", script{}.print(line + offset + endMarker + "\r\n"), false, GuestPanic,
			panicked + "; its console was then silent for 1s"},
		{"power-off", script{}.print(line).powerOff(), false, PoweredOff, ""},
		{"restart in order", script{}.print(line + restarting).reset(), false, GuestReset, ""},
		{"reset without a panic", script{}.print("hello\r\n").reset(), false, GuestReset, ""},
		{"triple fault without a panic", script{}.print("hello\r\n"), true, GuestCrashed,
			"vCPU 0: KVM_EXIT_SHUTDOWN (triple fault)"},
		{"a log with an end marker, power-off", script{}.print(line + endMarker + "\r\n").powerOff(), false, PoweredOff, ""},

		{"pvpanic, reset", told.print(more).reset(), false, GuestPanic, panicked + "; the guest then reset"},
		{"pvpanic, end marker", told.print(more + endMarker + "\r\n"), false, GuestPanic,
			panicked + "; its console was then silent for 1s"},
		{"pvpanic, silence", told.print(more), false, GuestPanic, panicked + "; its console was then silent for 5s"},
		{"pvpanic, triple fault", told.print(more), true, GuestPanic,
			panicked + "; the guest then crashed: vCPU 0: KVM_EXIT_SHUTDOWN (triple fault)"},
		{"pvpanic, power-off", told.print(more).powerOff(), false, GuestPanic, panicked + "; the guest then powered off"},
		{"pvpanic, no console", script{}.pvpanic(pvpanic.Panicked).reset(), false, GuestPanic,
			"the guest's kernel panicked; the guest then reset"},
		{"crash kernel, reset", script{}.print(line).pvpanic(pvpanic.CrashLoaded).print(more + restarting).reset(), false,
			GuestPanic, panicked + "; the guest then reset"},
		{"crash kernel, power-off", script{}.pvpanic(pvpanic.CrashLoaded).print(more).powerOff(), false, GuestPanic,
			"the guest's kernel panicked; the guest then powered off"},
		{"pvpanic, shutdown", script{}.pvpanic(pvpanic.Shutdown).print(more).powerOff(), false, PoweredOff, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			out, console := tt.script.run(t, tt.tripleFault, Config{})
			if err := fmt.Sprint(out.Err); out.Ending != tt.want || err != cmp.Or(tt.err, "<nil>") {
				t.Errorf("%s, %s, want %s, %s", out.Ending, err, tt.want, tt.err)
			}
			if want := tt.script.printed(); console != want {
				t.Errorf("console %q, want %q", console, want)
			}
			if tt.tripleFault && out.Report == "" {
				t.Error("no registers")
			}
		})
	}
}

// TestPanicStopped: a run that is stopped while the guest handles its panic ends as a panic.
func TestPanicStopped(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	s := script{}.pvpanic(pvpanic.CrashLoaded).stamp(1)
	out, _ := s.runContext(ctx, t, false, Config{Stamp: func(byte) { cancel(errors.New("asked to")) }})
	if out.Ending != GuestPanic || out.Err.Error() != "the guest's kernel panicked; the guest was then stopped: asked to" {
		t.Errorf("%s, %v", out.Ending, out.Err)
	}
}

// TestPanicSilence waits for a guest that panicked, on a fake clock.
func TestPanicSilence(t *testing.T) {
	for _, tt := range []struct {
		name  string
		guest func(m *machine, pauser *Pauser)
		want  string
		after time.Duration
	}{
		{"silent", func(m *machine, _ *Pauser) {}, "its console was then silent for 5s", 5 * time.Second},
		{"prints for a while", func(m *machine, _ *Pauser) { chatter(m, 10, 4*time.Second) },
			"its console was then silent for 5s", 45 * time.Second},
		{"prints for ever", func(m *machine, _ *Pauser) { chatter(m, 1000, time.Second) },
			"its console was still busy 1m0s later", 64 * time.Second},
		{"paused", func(m *machine, p *Pauser) {
			p.wanted.Store(true)
			time.Sleep(10 * time.Minute)
			p.wanted.Store(false)
		}, "its console was then silent for 5s", 10*time.Minute + 5*time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				pauser := new(Pauser)
				m := &machine{cfg: Config{Pauser: pauser}, console: &consoleWatch{out: io.Discard}}
				m.lifecycle.init()
				start := time.Now()
				m.pvpanic(pvpanic.Panicked)
				var guest sync.WaitGroup
				guest.Go(func() { tt.guest(m, pauser) })
				<-m.ended
				if got := time.Since(start); m.outcome.Err.Error() != tt.want || got > tt.after || got < tt.after-panicSilence {
					t.Errorf("%v after %v, want %s in the %v before %v", m.outcome.Err, got, tt.want, panicSilence, tt.after)
				}
				m.panicked.stopSilence()
				guest.Wait()
			})
		})
	}
}

// wantSilence checks that the machine ends because it is silent for panicSilence from now on.
func wantSilence(t *testing.T, m *machine) {
	t.Helper()
	start := time.Now()
	<-m.ended
	const want = "its console was then silent for 5s"
	if got := time.Since(start); m.outcome.Err.Error() != want || got != panicSilence {
		t.Errorf("%v after %v, want %s after %v", m.outcome.Err, got, want, panicSilence)
	}
	m.panicked.stopSilence()
}

// TestPanicResumed: the time of a pause, also of one between two looks at the console, is no
// silence of the guest. It gets all of panicSilence after the resume.
func TestPanicResumed(t *testing.T) {
	pause := func(m *machine) (resume func()) {
		p := m.cfg.Pauser
		p.mu.Lock()
		defer p.mu.Unlock()
		m.check(p.want())
		return func() { m.check(p.Resume()) }
	}
	debug := func(m *machine) (resume func()) {
		d := m.cfg.Debugger
		d.mu.Lock()
		defer d.mu.Unlock()
		d.halted.Store(true)
		return func() {
			d.mu.Lock()
			defer d.mu.Unlock()
			d.release()
		}
	}
	for name, pause := range map[string]func(*machine) func(){"paused": pause, "debugged": debug} {
		for _, d := range []time.Duration{4 * time.Second, 8 * time.Second, 10 * time.Minute} {
			t.Run(fmt.Sprint(name, " ", d), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					m := &machine{console: &consoleWatch{out: io.Discard}}
					m.cfg.Pauser, m.cfg.Debugger = new(Pauser), NewDebugger(false, nil)
					m.lifecycle.init()
					m.cfg.Pauser.begin(m)
					m.cfg.Debugger.m = m
					m.pvpanic(pvpanic.Panicked)
					time.Sleep(time.Second / 2)
					resume := pause(m)
					time.Sleep(d)
					resume()
					wantSilence(t, m)
				})
			})
		}
	}
}

// TestPanicStoppedProcess: the time in which gvm itself was stopped, so that its timer came late,
// is no silence of the guest.
func TestPanicStoppedProcess(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &machine{console: &consoleWatch{out: io.Discard}}
		m.lifecycle.init()
		m.pvpanic(pvpanic.Panicked)
		m.panicked.mu.Lock()
		m.panicked.due = m.panicked.due.Add(-2 * tooLate)
		m.panicked.mu.Unlock()
		time.Sleep(panicSilence)
		wantSilence(t, m)
	})
}

// TestPanicAfterPrinted: a program printed a panic's last line, and nearly panicLimit later the
// kernel panics. The bounds of its own panic hold.
func TestPanicAfterPrinted(t *testing.T) {
	for _, e := range []pvpanic.Event{pvpanic.Panicked, pvpanic.CrashLoaded} {
		synctest.Test(t, func(t *testing.T) {
			m := &machine{console: &consoleWatch{out: io.Discard, on: true}}
			m.console.final = m.panicFinal
			m.lifecycle.init()
			fmt.Fprint(m.console, panicked+"\r\n"+endMarker+"\r\n")
			chatter(m, 119, time.Second/2)
			m.pvpanic(e)
			time.Sleep(4 * time.Second)
			fmt.Fprintln(m.console, "more")
			m.pvpanic(e)                  // again, which begins nothing anew
			if e == pvpanic.CrashLoaded { // a crash kernel may be silent
				time.Sleep(time.Hour)
				if m.stop.Load() {
					t.Errorf("crash kernel: %s, %v", m.outcome.Ending, m.outcome.Err)
				}
				return
			}
			wantSilence(t, m)
		})
	}
}

// TestCrashKernelSilence: a guest that starts its crash kernel may be silent.
func TestCrashKernelSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &machine{console: &consoleWatch{out: io.Discard}}
		m.lifecycle.init()
		m.pvpanic(pvpanic.Panicked | pvpanic.CrashLoaded)
		time.Sleep(time.Hour)
		if m.stop.Load() {
			t.Errorf("%s, %v", m.outcome.Ending, m.outcome.Err)
		}
		m.panicked.stopSilence()
	})
}

func chatter(m *machine, lines int, every time.Duration) {
	for range lines {
		if m.stop.Load() {
			return
		}
		fmt.Fprintln(m.console, "more")
		time.Sleep(every)
	}
}

// TestPanicOnlyPrinted: a guest that keeps printing after a panic's last line, without a pvpanic
// event, runs on, and its later end is not a panic.
func TestPanicOnlyPrinted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &machine{console: &consoleWatch{out: io.Discard, on: true}}
		m.console.final = m.panicFinal
		m.lifecycle.init()
		fmt.Fprint(m.console, panicked+"\r\n"+endMarker+"\r\n")
		chatter(m, 150, time.Second/2)
		if m.stop.Load() || m.verdict(Outcome{Ending: GuestReset}).Ending != GuestReset {
			t.Errorf("%s, %v", m.outcome.Ending, m.outcome.Err)
		}
		m.panicked.stopSilence()
	})
}

// stuckConsole blocks writes until free is closed.
type stuckConsole struct{ free chan struct{} }

func (c stuckConsole) Connect(Input) {}
func (c stuckConsole) Write(p []byte) (int, error) {
	<-c.free
	return len(p), nil
}

// TestPanicBehindSlowConsole: a guest that resets before the console has taken its panic panicked.
func TestPanicBehindSlowConsole(t *testing.T) {
	free := make(chan struct{})
	s := script{}.print("first\r\n").stamp(1).print("[    1.234567] " + panicked + "\r\n").stamp(2).reset()
	out, _ := s.run(t, false, Config{Console: stuckConsole{free}, Stamp: func(code byte) {
		switch code {
		case 1:
			time.Sleep(10 * time.Millisecond) // "first" is being written alone
		case 2:
			time.AfterFunc(100*time.Millisecond, func() { close(free) })
		}
	}})
	if out.Ending != GuestPanic {
		t.Errorf("%s, %v", out.Ending, out.Err)
	}
}
