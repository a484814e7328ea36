package disk

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// stops tells whether the machine pauses for err.
func (p ErrorPolicy) stops(err error) bool {
	full := errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)
	return p == Stop || p == StopOnFull && full
}

// maxTold bounds the failures that are remembered, as disks may come and go.
const maxTold = 1000

// mishaps is what a machine does about disks that fail.
type mishaps struct {
	name string                     // of the machine, for who is to resume it
	hold func(context.Context) bool // vmm.Pauser's Hold; nil: there is nobody to resume it
	// note tells what a guest can make happen again and again, and paused why the machine is
	// paused, which is told whatever else was.
	note, paused func(string)

	opening atomic.Value // string: what Open waits for

	mu   sync.Mutex
	told map[string]bool // by disk and cause
	held map[string]int  // by disk: failures that hold the machine
}

// watch returns what the unit of d is to tell of failures, and to ask whether to do
// again what failed, until ctx ends.
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
		// All commands of a disk may fail at the same time: the first one is told.
		if m.holds(d.Name(), 1) == 1 {
			m.paused(fmt.Sprintf("%s: %v; the machine is paused until: gvm resume %s", d.Name(), err, m.name))
		}
		defer m.holds(d.Name(), -1)
		return m.hold(ctx)
	}
}

// holds adds n to the failures of a disk that hold the machine, and returns how many they are.
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

// report says that the guest gets an error, once for each disk and cause: a guest
// can repeat it as it likes.
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
		m.note(fmt.Sprintf("%s: the guest gets an error: %v", disk, err))
	}
}
