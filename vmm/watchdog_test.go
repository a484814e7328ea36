package vmm

import (
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"gvm/devices/i6300esb"
	"gvm/devices/pci"
	"gvm/devices/pci/pcitest"
	"gvm/gdbstub"
)

// TestWatchdogStops: the guest's watchdog does not count while the machine is paused or a debugger
// has stopped it, in any order of the two.
func TestWatchdogStops(t *testing.T) {
	const pause, resume, halt, release = 'p', 'r', 'h', 'c'
	for _, steps := range []string{"pr", "hc", "phcr", "hprc", "phrc", "hpcr", "hchc"} {
		t.Run(steps, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var expired atomic.Bool
				m := &machine{}
				m.cfg.Pauser, m.cfg.Debugger = new(Pauser), NewDebugger(false, nil)
				m.lifecycle.init()
				m.cfg.Pauser.begin(m)
				p, d := m.cfg.Pauser, m.cfg.Debugger
				d.m = m
				var err error
				m.watchdog, err = i6300esb.New(i6300esb.Config{Kept: new(i6300esb.Kept), Expired: func() { expired.Store(true) }})
				if err != nil {
					t.Fatal(err)
				}
				defer m.watchdog.Close()
				bus := pci.NewBus(&space{&m.mmio}, nil)
				if _, err := bus.Add(m.watchdog.Function()); err != nil {
					t.Fatal(err)
				}
				pcitest.CF8(bus, 1).Write(0x68, 1, 2) // enable it; two stages of 1041 s
				time.Sleep(time.Minute)
				for i, step := range steps {
					switch step {
					case pause:
						p.mu.Lock()
						m.check(p.want())
						p.mu.Unlock()
					case resume:
						m.check(p.Resume())
					case halt:
						d.mu.Lock()
						d.halt(gdbstub.Stop{})
						d.mu.Unlock()
					case release:
						d.mu.Lock()
						d.release()
						d.mu.Unlock()
					}
					if p.Paused() {
						time.Sleep(time.Hour)
						if expired.Load() {
							t.Fatalf("it expired after %s", steps[:i+1])
						}
					}
				}
				time.Sleep(time.Hour)
				if !expired.Load() {
					t.Error("it does not count afterwards")
				}
			})
		})
	}
}
