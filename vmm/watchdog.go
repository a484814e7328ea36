package vmm

import (
	"errors"
	"fmt"

	"gvm/devices/i6300esb"
)

// WatchdogAction is the action when the guest's watchdog expires.
type WatchdogAction int

// Actions. The watchdog expires again only after the guest has reloaded it.
const (
	WatchdogReset WatchdogAction = iota + 1 // the machine starts again in place, also with Rebooting unset
	WatchdogPause                           // the Pauser pauses the machine
	WatchdogExit                            // the machine ends with the outcome Expired
	WatchdogNMI                             // every CPU gets an NMI
)

// addWatchdog puts the watchdog on the PCI bus.
func (m *machine) addWatchdog() (err error) {
	if m.cfg.Watchdog == 0 {
		return nil
	}
	if m.watchdog, err = i6300esb.New(i6300esb.Config{Kept: m.cfg.watchdog, Expired: m.watchdogExpired}); err != nil {
		return err
	}
	_, err = m.bus.Add(m.watchdog.Function())
	return err
}

// followStops stops the watchdog's clock while the guest is stopped, and lets it go on. It is
// called after each change of a pause or of a debugger's stop, in any order: the last call sees
// them all.
func (m *machine) followStops() {
	m.stops.Lock()
	defer m.stops.Unlock()
	if m.stopped() {
		m.watchdog.Pause()
	} else {
		m.watchdog.Resume()
	}
}

// watchdogExpired returns soon after the end of the machine's life at the latest.
func (m *machine) watchdogExpired() {
	if m.stop.Load() {
		return
	}
	const said = "the guest's watchdog expired"
	switch m.cfg.Watchdog {
	case WatchdogReset:
		m.cfg.Note(said + ": it starts again")
		m.end(Outcome{Ending: GuestReset, restart: true})
	case WatchdogPause:
		m.cfg.Note(said + ": it is paused until gvm resume")
		if p := m.cfg.Pauser; p != nil {
			_ = p.Pause(m.life) // an error: it is paused already, or resumed again, or ends
		}
	case WatchdogExit:
		m.end(Outcome{Ending: Expired, Err: errors.New(said), Report: m.stateReport()})
	case WatchdogNMI:
		m.cfg.Note(said + ": it gets an NMI")
		if err := m.nmi(m.life); err != nil && !errors.Is(err, ErrNotRunning) {
			m.cfg.Note(fmt.Sprintf("the NMI of the watchdog: %v", err))
		}
	}
}
