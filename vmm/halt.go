package vmm

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/bobuhiro11/gokvm/kvm"

	"gvm/kvmapi"
	"gvm/panics"
)

// haltState detects a guest that has halted for good. The kernel's message on the console starts
// the check; the CPUs decide, because a program can print the same text. They are checked once,
// after the console has been silent for haltSilence: an idle guest is not woken for it.
type haltState struct {
	asked atomic.Bool // every vCPU must report whether it has halted

	mu    sync.Mutex
	timer *time.Timer // nil: no message that the kernel halts
	said  []bool      // by vCPU, since the last request
	left  int         // vCPUs that have not reported
}

// haltSaid is called when the console shows that the guest halts.
func (m *machine) haltSaid() {
	h := &m.halt
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.timer == nil {
		h.timer = time.AfterFunc(haltSilence, panics.Func(m.askHalted))
	} else {
		h.timer.Reset(haltSilence)
	}
}

// askHalted asks every vCPU, unless the guest is still printing.
func (m *machine) askHalted() {
	h := &m.halt
	h.mu.Lock()
	defer h.mu.Unlock()
	if m.stop.Load() {
		return
	}
	if silent := m.console.silent(); silent < haltSilence {
		h.timer.Reset(haltSilence - silent)
		return
	}
	h.said, h.left = make([]bool, len(m.cpus)), len(m.cpus)
	h.asked.Store(true)
	m.check(m.kick())
}

// sayHalted takes a vCPU's answer, on its thread. The last answer ends the machine; a CPU that
// runs, or waits for an interrupt, cancels the check.
func (m *machine) sayHalted(index int, c *kvmapi.VCPU) error {
	h := &m.halt
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.asked.Load() || h.said[index] {
		return nil
	}
	halted, err := haltedForGood(c)
	if err != nil {
		return fmt.Errorf("look whether the guest has halted: %w", err)
	}
	if !halted {
		h.asked.Store(false)
		return nil
	}
	h.said[index] = true
	if h.left--; h.left == 0 {
		m.end(Outcome{Ending: Halted})
	}
	return nil
}

// stopHalt stops the timer, once the machine has ended.
func (h *haltState) stopHalt() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.timer != nil {
		h.timer.Stop()
	}
}

// rflagsIF is the interrupt flag (Intel SDM 1, 3.4.3.3).
const rflagsIF = 1 << 9

// haltedForGood reports whether the vCPU was never started, or has halted with interrupts disabled.
func haltedForGood(c *kvmapi.VCPU) (bool, error) {
	state, err := c.MPState()
	if err != nil {
		return false, err
	}
	switch state {
	case kvm.MPStateUninitialized, kvm.MPStateInitReceived:
		return true, nil
	case kvm.MPStateHalted:
		r, err := c.Regs()
		return r.RFLAGS&rflagsIF == 0, err
	}
	return false, nil
}
