package disk

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"gvm/kvmapi/nowait"
)

// stops reports whether the machine pauses for err.
func (p ErrorPolicy) stops(err error) bool {
	full := errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)
	return p == Stop || p == StopOnFull && full
}

// maxTold bounds the remembered failures, as disks may come and go.
const maxTold = 1000

// mishaps reports failures of disks, and pauses the machine for them.
type mishaps struct {
	name string                     // the machine's, for a hint how to resume it
	hold func(context.Context) bool // vmm.Pauser's Hold; nil: nothing can resume the machine
	// note takes notes that a guest can cause again and again. paused takes the reason for a pause,
	// and must not drop it.
	note, paused func(string)

	opening atomic.Value // string: the wait that Open is in

	mu   sync.Mutex
	told map[string]bool // by disk and cause
	held map[string]int  // by disk: failures that hold the machine
}

// watch returns two functions for the unit of d, which work until ctx ends: tell reports a failure,
// and retry reports whether to repeat the failed request.
func (m *mishaps) watch(ctx context.Context, d Spec) (tell func(error), retry func(error) bool) {
	report := func(err error) { m.report(d.Name(), err) }
	if d.OnError == Report || m.hold == nil {
		return report, nil
	}
	return nil, func(err error) bool {
		if !d.OnError.stops(err) {
			report(err)
			return false
		}
		// All commands of a disk may fail at the same time: only the first is reported.
		if m.holds(d.Name(), 1) == 1 {
			m.paused(fmt.Sprintf("%s: %v%s; the machine is paused until: gvm resume %s", d.Name(), err, nowait.LimitMend(err),
				m.name))
		}
		defer m.holds(d.Name(), -1)
		return m.hold(ctx)
	}
}

// holds adds n to the disk's count of failures that hold the machine, and returns the count.
func (m *mishaps) holds(disk string, n int) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.held == nil {
		m.held = map[string]int{}
	}
	n += m.held[disk]
	if m.held[disk] = n; n == 0 {
		delete(m.held, disk)
	}
	return n
}

// report notes that the guest gets an error, once for each disk and cause, since a guest can repeat
// it at will.
func (m *mishaps) report(disk string, err error) {
	var cause unix.Errno
	_ = errors.As(err, &cause)
	key := fmt.Sprintf("%s %d", disk, cause)
	m.mu.Lock()
	said := m.told[key]
	if m.told == nil || len(m.told) >= maxTold {
		m.told = map[string]bool{}
	}
	m.told[key] = true
	m.mu.Unlock()
	if !said {
		m.note(fmt.Sprintf("%s: the guest gets an error: %v%s", disk, err, nowait.LimitMend(err)))
	}
}
