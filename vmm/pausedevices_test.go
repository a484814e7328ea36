package vmm

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/virtio"
	"gvm/devices/virtio/rng"
	"gvm/devices/virtio/vscsi"
	"gvm/guestmem"
)

// watched is a device that counts its starts and stops, and tells of each attempt to stop it.
type watched struct {
	virtio.Device
	active   atomic.Bool
	stopping chan struct{}
}

func (w *watched) Activate(a virtio.Activation) error {
	w.active.Store(true)
	return w.Device.Activate(a)
}

func (w *watched) Stop(ctx context.Context) ([]uint16, error) {
	select {
	case w.stopping <- struct{}{}:
	default:
	}
	bases, err := w.Device.Stop(ctx)
	if err == nil {
		w.active.Store(false)
	}
	return bases, err
}

// hooked is storage whose writes a test can delay and fail.
type hooked struct {
	block.Backend
	write  atomic.Pointer[func() error]
	writes atomic.Int64
}

func (h *hooked) WriteAt(p []byte, off int64) (int, error) {
	h.writes.Add(1)
	if do := h.write.Load(); do != nil {
		if err := (*do)(); err != nil {
			return 0, err
		}
	}
	return h.Backend.WriteAt(p, off)
}

// writing runs a guest that writes to a disk for ever. retry is the unit's Retry.
func writing(t *testing.T, p *Pauser, retry func(error) bool) (*watched, *hooked, *shownConsole, func() Outcome) {
	t.Helper()
	storage := &hooked{Backend: block.NewVolatile(1 << 20)}
	unit, err := scsi.NewUnit(scsi.UnitConfig{Backend: storage, Serial: "A", Retry: retry})
	if err != nil {
		t.Fatal(err)
	}
	target := scsi.NewTarget()
	if err := target.Attach(0, unit); err != nil {
		t.Fatal(err)
	}
	disk, err := vscsi.New(vscsi.Config{Target: target})
	if err != nil {
		t.Fatal(err)
	}
	dev, c := &watched{Device: disk, stopping: make(chan struct{}, 1)}, &shownConsole{wrote: make(chan struct{}, 1)}
	sys := system(t)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan Outcome, 1)
	go func() {
		out, err := Run(ctx, sys, Config{
			Memory: guestmem.Config{Size: 64 << 20}, Kernel: embeddedKernel(t), CmdLine: "write journal",
			Devices: []virtio.Device{dev, rng.New()}, Console: c, Pauser: p,
			Note: func(s string) {
				if t.Log(s); strings.HasPrefix(s, "virtio device") { // a busy host may delay a vCPU
					t.Error("the machine's end waits for a device")
				}
			},
		})
		if err != nil {
			t.Error(err)
		}
		ended <- out
	}()
	c.waitFor("wrote ")
	return dev, storage, c, func() Outcome {
		cancel()
		out := <-ended
		if c.mu.Lock(); strings.Contains(c.out.String(), "FAIL") {
			t.Error(c.out.String())
		}
		c.mu.Unlock()
		return out
	}
}

// progress waits until the guest has written more.
func (c *shownConsole) progress() {
	count := func() int {
		c.mu.Lock()
		defer c.mu.Unlock()
		return strings.Count(c.out.String(), "wrote ")
	}
	for before := count(); count() <= before; {
		<-c.wrote
	}
}

// TestPauseDevices: in a pause no device is active, and everything in flight is finished.
func TestPauseDevices(t *testing.T) {
	p := &Pauser{}
	dev, storage, c, stop := writing(t, p, nil)
	for range 50 {
		c.progress()
		if err := p.Pause(t.Context()); err != nil {
			t.Fatal(err)
		}
		before := storage.writes.Load()
		if dev.active.Load() {
			t.Error("the device is active in a pause")
		}
		if after := storage.writes.Load(); after != before {
			t.Errorf("%d writes in a pause", after-before)
		}
		if err := p.Resume(); err != nil {
			t.Fatal(err)
		}
	}
	c.progress()
	if out := stop(); out.Ending != Stopped {
		t.Errorf("%+v", out)
	}
}

// TestPauseHeld: a request that fails during a pause, and holds the machine, goes on after the
// resume. The pause does not wait for it.
func TestPauseHeld(t *testing.T) {
	p := &Pauser{}
	held := make(chan struct{}, 1)
	dev, storage, c, stop := writing(t, p, func(error) bool {
		held <- struct{}{}
		return p.Hold(t.Context())
	})
	for range 10 {
		flying, fails := make(chan struct{}), make(chan struct{})
		once := func() error {
			storage.write.Store(nil)
			close(flying)
			<-fails
			return syscall.ENOSPC
		}
		storage.write.Store(&once)
		<-flying
		select {
		case <-dev.stopping: // of the last round
		default:
		}
		paused := make(chan error, 1)
		go func() { paused <- p.Pause(t.Context()) }()
		<-dev.stopping
		close(fails)
		<-held
		if err := <-paused; err != nil || !p.Paused() {
			t.Errorf("paused %v, %v", p.Paused(), err)
		}
		if err := p.Pause(t.Context()); err != ErrPaused {
			t.Error(err)
		}
		if err := p.Resume(); err != nil {
			t.Error(err)
		}
		c.progress()
	}
	if out := stop(); out.Ending != Stopped {
		t.Errorf("%+v", out)
	}
}

// TestPauseBusy ends a Pause while a device waits for its storage: by its context, by Resume and by
// the machine's end. The machine runs on, unless it ended.
func TestPauseBusy(t *testing.T) {
	p := &Pauser{}
	dev, storage, c, stop := writing(t, p, nil)
	why := errors.New("enough")
	for _, tt := range []struct {
		name string
		do   func(context.CancelCauseFunc)
		want error
	}{
		{"context", func(cancel context.CancelCauseFunc) { cancel(why) }, why},
		{"resume", func(context.CancelCauseFunc) {
			if err := p.Resume(); err != nil {
				t.Error(err)
			}
		}, ErrResumed},
		{"end", nil, ErrNotRunning},
	} {
		flying, free := make(chan struct{}), make(chan struct{})
		once := func() error {
			storage.write.Store(nil)
			close(flying)
			<-free
			return nil
		}
		storage.write.Store(&once)
		<-flying
		select {
		case <-dev.stopping: // of the last round
		default:
		}
		ctx, cancel := context.WithCancelCause(t.Context())
		paused := make(chan error, 1)
		go func() { paused <- p.Pause(ctx) }()
		<-dev.stopping
		ended := make(chan Outcome, 1)
		if tt.do != nil {
			tt.do(cancel)
		} else {
			go func() { ended <- stop() }()
		}
		err := <-paused
		if !errors.Is(err, tt.want) {
			t.Errorf("%s: %v", tt.name, err)
		}
		var busy *BusyError
		if is := errors.As(err, &busy); is != (tt.want == why) || is && busy.Device != "virtio device 0 (type 8)" {
			t.Errorf("%s: %v", tt.name, err)
		}
		close(free)
		cancel(nil)
		if tt.do == nil {
			if out := <-ended; out.Ending != Stopped {
				t.Errorf("%+v", out)
			}
			break
		}
		if p.Paused() {
			t.Errorf("%s: still paused", tt.name)
		}
		c.progress()
	}
}
