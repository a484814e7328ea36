package vmm

import (
	"context"
	"errors"
	"fmt"
	"time"

	"gvm/guestmem"
	"gvm/panics"
	"gvm/vmm/vmcore"
	"gvm/vmm/x86"
)

// corePatience bounds the wait for a vCPU of a paused machine. A busy host may not run its thread
// for a while.
const corePatience = 5 * time.Second

// Core calls write with the memory and the CPUs of a paused machine, for vmcore.Write. When the
// machine ends meanwhile, the context of write ends and Core calls cut, after which write returns
// before long: the machine's end waits for it. The error is ErrNotRunning, context.DeadlineExceeded
// if a vCPU has not stopped, or that of write.
func (i *Inspector) Core(cut func(), write func(context.Context, *guestmem.Memory, []vmcore.CPU) error) error {
	i.mu.RLock()
	defer i.mu.RUnlock()
	m := i.m
	if m == nil {
		return ErrNotRunning
	}
	defer context.AfterFunc(m.life, panics.Func(cut))()
	cpus := make([]vmcore.CPU, len(m.cpus))
	for i := range cpus {
		if err := m.askPaused(i, func() (err error) { cpus[i], err = m.coreCPU(i); return err }); err != nil {
			return err
		}
	}
	return write(m.life, m.mem, cpus)
}

// askPaused has the thread of vCPU i, which is paused, do f.
func (m *machine) askPaused(i int, f func() error) error {
	done := make(chan error, 1)
	select {
	case m.questions[i] <- func() { done <- f() }:
		return <-done
	case <-m.ended:
		return ErrNotRunning
	case <-time.After(corePatience):
		return fmt.Errorf("vCPU %d does not stop: %w", i, context.DeadlineExceeded)
	}
}

// coreCPU returns the state of a vCPU for a core, on its thread.
func (m *machine) coreCPU(i int) (c vmcore.CPU, err error) {
	var errs [4]error
	c.Regs, errs[0] = m.cpus[i].Regs()
	c.Sregs, errs[1] = m.cpus[i].Sregs()
	c.KernelGSBase, errs[2] = m.cpus[i].MSR(x86.MSRKernelGSBase)
	state, err := m.cpus[i].MPState()
	errs[3] = err
	err = errors.Join(errs[:]...)
	c.Lost = err == nil && registersLost(state, c.Regs, c.Sregs)
	return c, err
}
