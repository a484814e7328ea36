package vmm

import (
	"context"
	"errors"
	"runtime"
	"strings"
	"testing"

	"gvm/devices/virtio"
	"gvm/devices/virtio/rng"
	"gvm/guestmem"
)

// shownConsole signals each write.
type shownConsole struct {
	testConsole
	wrote chan struct{}
}

func (c *shownConsole) Write(p []byte) (int, error) {
	n, err := c.testConsole.Write(p)
	select {
	case c.wrote <- struct{}{}:
	default:
	}
	return n, err
}

func (c *shownConsole) waitFor(text string) {
	for has := false; !has; {
		<-c.wrote
		c.mu.Lock()
		has = strings.Contains(c.out.String(), text)
		c.mu.Unlock()
	}
}

// pausable runs the embedded guest until the test stops it.
func pausable(t *testing.T, words string, cpus int) (p *Pauser, c *shownConsole, stop func() Outcome) {
	return pausableBy(t, words, cpus, true)
}

func pausableBy(t *testing.T, words string, cpus int, rebooting bool) (*Pauser, *shownConsole, func() Outcome) {
	t.Helper()
	return pausableWith(t, words, Config{CPUs: cpus, Rebooting: rebooting})
}

func pausableWith(t *testing.T, words string, cfg Config) (*Pauser, *shownConsole, func() Outcome) {
	t.Helper()
	p, c := &Pauser{}, &shownConsole{wrote: make(chan struct{}, 1)}
	sys := system(t)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan Outcome, 1)
	go func() {
		cfg.Memory, cfg.Kernel, cfg.CmdLine = guestmem.Config{Size: 64 << 20}, embeddedKernel(t), words
		cfg.Devices, cfg.Console, cfg.Pauser = []virtio.Device{rng.New()}, c, p
		out, err := Run(ctx, sys, cfg)
		if err != nil {
			t.Error(err)
		}
		ended <- out
	}()
	return p, c, func() Outcome { cancel(); return <-ended }
}

func TestPause(t *testing.T) {
	p, c, stop := pausable(t, "spin", 2)
	c.waitFor("spinning")
	cpus := p.m.cpus
	for range 3 {
		if err := p.Pause(t.Context()); err != nil {
			t.Fatal(err)
		}
		if !p.Paused() {
			t.Error("not paused")
		}
		if err := p.Pause(t.Context()); err != ErrPaused {
			t.Errorf("paused twice: %v", err)
		}
		// KVM_GET_REGS waits for a vCPU that is in KVM_RUN.
		for i, cpu := range cpus {
			a, err := cpu.Regs()
			if err != nil {
				t.Fatal(err)
			}
			if b, err := cpu.Regs(); err != nil || a != b {
				t.Errorf("vCPU %d runs: %+v became %+v, %v", i, a, b, err)
			}
		}
		if err := p.Resume(); err != nil {
			t.Fatal(err)
		}
		if err := p.Resume(); err != ErrNotPaused || p.Paused() {
			t.Errorf("resumed twice: %v", err)
		}
	}
	if err := p.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	// The end does not wait for a Resume.
	if out := stop(); out.Ending != Stopped {
		t.Errorf("%s, %v", out.Ending, out.Err)
	}
	if p.Paused() {
		t.Error("paused after the end")
	}
	if err := p.Pause(t.Context()); err != ErrNotRunning {
		t.Errorf("paused after the end: %v", err)
	}
	if err := p.Resume(); err != ErrNotRunning {
		t.Errorf("resumed after the end: %v", err)
	}
}

// TestPauseOverResets pauses a machine that resets itself all the time, in each of its states, and
// resumes it.
func TestPauseOverResets(t *testing.T) {
	p, c, stop := pausable(t, "crash=reset", 2)
	c.waitFor("reset next")
	for range 30 {
		if err := p.Pause(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := p.Resume(); err != nil {
			t.Fatal(err)
		}
	}
	c.mu.Lock()
	before := strings.Count(c.out.String(), "reset next")
	c.mu.Unlock()
	for after := before; after <= before+1; {
		<-c.wrote
		c.mu.Lock()
		after = strings.Count(c.out.String(), "reset next")
		c.mu.Unlock()
	}
	if out := stop(); out.Ending != Stopped {
		t.Errorf("%s, %v", out.Ending, out.Err)
	}
}

// TestReset: the host resets a machine whose own reset would end it, also while it is paused and
// after its guest panicked.
func TestReset(t *testing.T) {
	lives := func(c *shownConsole, n int, text string) {
		for has := 0; has < n; {
			<-c.wrote
			c.mu.Lock()
			has = strings.Count(c.out.String(), text)
			c.mu.Unlock()
		}
	}
	for words, text := range map[string]string{"spin": "spinning", "crash=panic": "event next"} {
		p, c, stop := pausableBy(t, words, 2, false)
		lives(c, 1, text)
		if err := p.Reset(); err != nil {
			t.Fatalf("%s: %v", words, err)
		}
		lives(c, 2, text)
		if err := p.Pause(t.Context()); err != nil {
			t.Fatalf("%s: %v", words, err)
		}
		if err := p.Reset(); err != nil || !p.Paused() {
			t.Fatalf("%s: paused: %v", words, err)
		}
		for p.Resume() == ErrNotRunning {
		}
		lives(c, 3, text)
		if out := stop(); out.Ending != Stopped && out.Ending != GuestPanic {
			t.Errorf("%s: %s, %v", words, out.Ending, out.Err)
		}
		if err := p.Reset(); err != ErrNotRunning {
			t.Errorf("%s: after the end: %v", words, err)
		}
	}
}

// TestPauseGivenUp ends a Pause by its context, by a Resume and by the machine's end, before the
// vCPUs have stopped.
func TestPauseGivenUp(t *testing.T) {
	begun := func() *Pauser {
		p := &Pauser{}
		p.begin(&machine{})
		return p
	}
	why := errors.New("enough")
	p := begun()
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(why)
	if err := p.Pause(ctx); err != why || p.Paused() {
		t.Errorf("%v, paused %v", err, p.Paused())
	}
	for want, do := range map[error]func(*Pauser) error{
		ErrResumed:    (*Pauser).Resume,
		ErrNotRunning: func(p *Pauser) error { p.end(); return nil },
	} {
		p := begun()
		done := make(chan error, 1)
		go func() { done <- p.Pause(context.Background()) }()
		for !p.Paused() {
			runtime.Gosched()
		}
		if err := do(p); err != nil {
			t.Error(err)
		}
		if err := <-done; err != want {
			t.Errorf("%v, want %v", err, want)
		}
	}
	p = &Pauser{}
	p.end() // of a machine that could not be built
	if err := p.Pause(t.Context()); err != ErrNotRunning {
		t.Error(err)
	}
}

// TestHold: Hold returns when the machine is resumed, however it was paused, when its context ends,
// and when the machine's life ends.
func TestHold(t *testing.T) {
	p, c, stop := pausable(t, "spin", 2)
	c.waitFor("spinning")
	hold := func(ctx context.Context) chan bool {
		held := make(chan bool, 1)
		go func() { held <- p.Hold(ctx) }()
		return held
	}
	paused := func() {
		for !p.Paused() {
			runtime.Gosched()
		}
	}
	a := hold(t.Context())
	paused()
	ctx, cancel := context.WithCancel(t.Context())
	b := hold(ctx)
	cancel()
	if <-b || !p.Paused() {
		t.Error("let go by its context, it was resumed, or the machine was")
	}
	if err := p.Pause(t.Context()); err != ErrPaused {
		t.Error(err)
	}
	if err := p.Resume(); err != nil {
		t.Error(err)
	}
	if !<-a {
		t.Error("not resumed")
	}
	if err := p.Pause(t.Context()); err != nil {
		t.Error(err)
	}
	a = hold(t.Context())
	if out := stop(); out.Ending != Stopped {
		t.Errorf("%s, %v", out.Ending, out.Err)
	}
	if <-a {
		t.Error("resumed by the end")
	}
	if p.Hold(t.Context()) {
		t.Error("held after the end")
	}
}

// TestPauseInput: input typed while the guest is paused is not lost.
func TestPauseInput(t *testing.T) {
	p, c, stop := pausable(t, "echo", 1)
	c.waitFor("ready")
	if err := p.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := p.m.coms[0].uart.Input().Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	if err := p.Resume(); err != nil {
		t.Fatal(err)
	}
	c.waitFor("hello")
	if out := stop(); out.Ending != Stopped {
		t.Errorf("%s, %v", out.Ending, out.Err)
	}
}
