package vmm

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"gvm/gdbstub"
	"gvm/kvmapi"
	"gvm/panics"
	"gvm/vmm/x86"
)

// Debugger is a machine as a debugger sees it: a gdbstub.Target whose threads are the vCPUs. It is
// for one Config, and for one client at a time.
//
// The vCPUs stop and continue together. A stopped vCPU's thread waits in sync, outside of the
// guest, and does all work on its vCPU and, for it, on guest memory. Devices do not stop. After a
// reset of the machine a client finds it stopped at its first instruction, without software
// breakpoints.
type Debugger struct {
	kill  func()
	ended chan struct{}

	halted atomic.Bool // vCPUs are to stop, or have stopped; written under mu

	mu       sync.Mutex
	m        *machine      // the current life
	begun    chan struct{} // closed when the first life begins
	over     bool          // ended is closed
	attached bool
	blockIRQ uint32 // GuestDebugBlockIRQ, if KVM has it
	cpus     []debuggedCPU
	parked   int           // of cpus
	all      chan struct{} // closed when all are parked
	stop     gdbstub.Stop  // the reason of halted
	stops    chan gdbstub.Stop
	soft     []softPoint
	lost     []softPoint // of a client that has gone: removed before a vCPU runs
	hard     []hardPoint
}

// debuggedCPU is a vCPU of a Debugger.
type debuggedCPU struct {
	action  gdbstub.Action
	parked  bool
	wake    chan struct{}     // has a token if action or halted may have changed
	applied kvmapi.GuestDebug // used by the vCPU's thread alone
	missed  *hardPoint        // a watchpoint's hit that came while another event stopped the machine
}

const (
	int3    = 0xcc
	dr6BS   = 1 << 14
	dr6Bits = 0xe00f // of a cause: BT, BS, BD, B0 to B3
	vectDB  = 1
	vectBP  = 3
)

// stopPatience bounds the wait for a vCPU that is in a device.
const stopPatience = time.Second

// errNotStopped is the error of an access to a vCPU that a device holds.
var errNotStopped = errors.New("this CPU is in a device and has not stopped")

// NewDebugger returns a Debugger. If stopped is set, the machine waits for a client before its
// first instruction. kill is called when the client wants the machine to end.
func NewDebugger(stopped bool, kill func()) *Debugger {
	d := &Debugger{kill: kill, ended: make(chan struct{}), begun: make(chan struct{})}
	d.halted.Store(stopped)
	d.stop = gdbstub.Stop{Signal: gdbstub.SIGTRAP, Thread: 1}
	return d
}

// begin starts a life of the machine, before its vCPUs run.
func (d *Debugger) begin(m *machine) {
	if d == nil {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.m == nil {
		close(d.begun)
	}
	d.m, d.parked, d.soft, d.lost = m, 0, nil, nil
	d.blockIRQ = uint32(m.sys.Check(kvmapi.CapSetGuestDebug2)) & kvmapi.GuestDebugBlockIRQ
	d.cpus = make([]debuggedCPU, len(m.cpus))
	for i := range d.cpus {
		d.cpus[i] = debuggedCPU{action: gdbstub.Action{Kind: gdbstub.Continue}, wake: make(chan struct{}, 1)}
	}
	if d.attached || d.halted.Load() {
		d.halt(gdbstub.Stop{Signal: gdbstub.SIGTRAP, Thread: 1})
	}
}

// end marks the return of Run.
func (d *Debugger) end() {
	if d == nil {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.over {
		d.over = true
		close(d.ended)
	}
}

// Halted reports whether the vCPUs have stopped for a debugger, or are about to.
func (d *Debugger) Halted() bool { return d != nil && d.halted.Load() }

// halt stops all vCPUs, and delivers stop when they have stopped. The caller holds mu.
func (d *Debugger) halt(stop gdbstub.Stop) {
	d.halted.Store(true)
	d.stop, d.all = stop, make(chan struct{})
	m, all, stops := d.m, d.all, d.stops
	m.followStops()
	if d.parked == len(d.cpus) {
		close(all)
	}
	m.check(m.kick())
	panics.Go(func() {
		ctx, cancel := context.WithTimeout(m.life, stopPatience)
		defer cancel()
		// A vCPU of a paused machine is outside of the guest and takes questions alone.
		for i, q := range m.questions {
			select {
			case q <- func() { m.check(d.sync(m, i, m.cpus[i])) }:
			case <-all:
			case <-ctx.Done():
			}
		}
		select {
		case <-all:
		case <-ctx.Done():
		}
		if m.stop.Load() { // the next life stops anew
			return
		}
		select {
		case stops <- stop:
		default: // nothing waits
		}
	})
}

// settle waits until all vCPUs have stopped, within a bound.
func (d *Debugger) settle() {
	d.mu.Lock()
	m, all := d.m, d.all
	d.mu.Unlock()
	select {
	case <-all:
	case <-m.ended:
	case <-time.After(stopPatience):
	}
}

// release lets the vCPUs go on as their actions tell. The caller holds mu.
func (d *Debugger) release() {
	if d.m != nil {
		d.m.panicked.resume()
		defer d.m.followStops()
	}
	d.halted.Store(false)
	for i := range d.cpus {
		select {
		case d.cpus[i].wake <- struct{}{}:
		default:
		}
	}
}

// sync keeps a vCPU where it is while the debugger wants it to, and gives KVM the breakpoints of
// the vCPU before it goes on. The vCPU's thread calls it, outside of KVM_RUN.
func (d *Debugger) sync(m *machine, i int, c *kvmapi.VCPU) error {
	if d == nil {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	cpu := &d.cpus[i]
	if cpu.parked { // in a question to a vCPU that waits below
		return nil
	}
	stays := func() bool { return d.halted.Load() || cpu.action.Kind == gdbstub.Stay }
	waited := stays()
	if waited {
		cpu.parked = true
		if d.parked++; d.parked == len(d.cpus) && d.halted.Load() {
			close(d.all)
		}
		for over := false; stays() && !over; {
			panics.Unlocked(&d.mu, func() {
				select {
				case <-m.ended:
					over = true
				case q := <-m.questions[i]:
					q()
				case <-cpu.wake:
				}
			})
		}
		cpu.parked = false
		d.parked--
	}
	d.removeLost(m)
	if g := d.guestDebug(cpu); g != cpu.applied {
		if err := c.SetGuestDebug(g); err != nil {
			return err
		}
		cpu.applied = g
	}
	if !waited {
		return nil
	}
	return c.StoppedByHost()
}

// guestDebug returns the debugging that KVM does for a vCPU. The caller holds mu.
func (d *Debugger) guestDebug(cpu *debuggedCPU) (g kvmapi.GuestDebug) {
	if len(d.soft) > 0 {
		g.Control |= kvmapi.GuestDebugUseSWBP
	}
	if len(d.hard) > 0 {
		g.Control |= kvmapi.GuestDebugUseHWBP
	}
	if k := cpu.action.Kind; k == gdbstub.Step || k == gdbstub.StepRange {
		g.Control |= kvmapi.GuestDebugSingleStep | d.blockIRQ
	}
	if g.Control == 0 {
		return g
	}
	g.Control |= kvmapi.GuestDebugEnable
	g.DebugReg[7] = 1 << 10 // reads as 1
	for i, p := range d.hard {
		// R/W: 0 execution, 1 writes, 3 reads and writes; LEN: 1, 2, 8 and 4 bytes (Intel SDM 3,
		// 18.2.4).
		access := map[gdbstub.PointKind]uint64{gdbstub.WriteWatchpoint: 1, gdbstub.ReadWatchpoint: 3,
			gdbstub.AccessWatchpoint: 3}[p.Kind]
		length := map[uint64]uint64{1: 0, 2: 1, 8: 2, 4: 3}[p.size]
		g.DebugReg[i] = p.addr
		g.DebugReg[7] |= 2<<(2*i) | (access|length<<2)<<(16+4*i)
	}
	return g
}

// exit takes a KVM_EXIT_DEBUG, on the vCPU's thread.
func (d *Debugger) exit(m *machine, i int, c *kvmapi.VCPU, e kvmapi.Exit) error {
	soft, err := d.softAt(m, c, e.PC)
	if err != nil {
		return err
	}
	d.mu.Lock()
	cpu := &d.cpus[i]
	stop, hit, inject := gdbstub.Stop{Signal: gdbstub.SIGTRAP, Thread: i + 1}, (*hardPoint)(nil), uint32(0)
	switch step := cpu.action; {
	case e.Exception == vectBP && soft == nil:
		inject = kvmapi.GuestDebugInjectBP
	case e.Exception == vectBP:
		stop.Point = &gdbstub.Point{Kind: gdbstub.SoftwareBreakpoint, Addr: soft.addr, Len: 1}
	case d.hit(e.DR6) >= 0:
		p := d.hard[d.hit(e.DR6)]
		if hit = &p; p.Kind <= gdbstub.HardwareBreakpoint {
			hit = nil // found again where it was missed
		}
		stop.Point = &p.Point
	case e.DR6&dr6BS != 0 && step.Kind == gdbstub.StepRange && step.Start <= e.PC && e.PC < step.End && !d.halted.Load():
		d.mu.Unlock()
		return nil
	case e.DR6&dr6BS != 0 && (step.Kind == gdbstub.Step || step.Kind == gdbstub.StepRange):
	default:
		inject = kvmapi.GuestDebugInjectDB
	}
	switch {
	case inject != 0:
	case !d.halted.Load():
		d.halt(stop)
	default:
		cpu.missed = hit
	}
	d.mu.Unlock()
	if inject != 0 {
		return cpu.inject(c, inject, e.DR6)
	}
	return d.sync(m, i, c)
}

// emulated takes an exit for a software breakpoint that KVM would have to emulate: it lacks int3,
// on hosts where it emulates the guest's kernel.
func (d *Debugger) emulated(m *machine, i int, c *kvmapi.VCPU, e kvmapi.Exit) (taken bool, err error) {
	if d == nil || e.Reason != kvmapi.ExitInternalError || e.Suberror != kvmapi.InternalErrorEmulation {
		return false, nil
	}
	r, err := c.Regs()
	if err != nil {
		return false, err
	}
	if p, err := d.softAt(m, c, r.RIP); p == nil || err != nil {
		return false, err
	}
	if err := c.SetRegs(r); err != nil { // drops the #UD that KVM has queued
		return false, err
	}
	return true, d.exit(m, i, c, kvmapi.Exit{Exception: vectBP, PC: r.RIP})
}

// inject gives the guest a debug exception of its own.
func (cpu *debuggedCPU) inject(c *kvmapi.VCPU, exception uint32, dr6 uint64) error {
	if exception == kvmapi.GuestDebugInjectDB {
		regs, err := c.DebugRegs()
		if err != nil {
			return err
		}
		regs.DR6 |= dr6 & dr6Bits
		if err := c.SetDebugRegs(regs); err != nil {
			return err
		}
	}
	g := cpu.applied
	g.Control |= exception
	return c.SetGuestDebug(g)
}

// do has the thread of a stopped vCPU do f.
func (d *Debugger) do(thread int, f func(m *machine, c *kvmapi.VCPU) error) error {
	d.mu.Lock()
	m, parked := d.m, thread <= len(d.cpus) && d.cpus[thread-1].parked
	d.mu.Unlock()
	if !parked {
		return errNotStopped
	}
	done := make(chan error, 1)
	select {
	case m.questions[thread-1] <- func() {
		d.mu.Lock()
		d.removeLost(m)
		d.mu.Unlock()
		done <- f(m, m.cpus[thread-1])
	}:
		return <-done
	case <-m.ended:
		return ErrNotRunning
	}
}

// Attach is of gdbstub.Target.
func (d *Debugger) Attach() (gdbstub.Stop, error) {
	select {
	case <-d.begun:
	case <-d.ended:
		return gdbstub.Stop{}, ErrNotRunning
	}
	d.mu.Lock()
	d.attached, d.stops = true, nil
	if !d.halted.Load() {
		d.halt(gdbstub.Stop{Signal: gdbstub.SIGTRAP, Thread: 1})
	}
	stop := d.stop
	d.mu.Unlock()
	d.settle()
	return stop, nil
}

// Detach is of gdbstub.Target.
func (d *Debugger) Detach() {
	d.mu.Lock()
	d.attached, d.stops = false, nil
	if !d.halted.Load() {
		d.halt(d.stop)
	}
	d.mu.Unlock()
	d.settle()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.lost, d.soft, d.hard = append(d.lost, d.soft...), nil, nil
	for i := range d.cpus {
		d.cpus[i].action, d.cpus[i].missed = gdbstub.Action{Kind: gdbstub.Continue}, nil
	}
	d.release()
}

// Kill is of gdbstub.Target.
func (d *Debugger) Kill() { d.kill() }

// Ended is of gdbstub.Target.
func (d *Debugger) Ended() <-chan struct{} { return d.ended }

// Description is of gdbstub.Target.
func (d *Debugger) Description() string { return x86.DebugDescription() }

// RegisterSizes is of gdbstub.Target.
func (d *Debugger) RegisterSizes() []int { return x86.DebugSizes() }

// Threads is of gdbstub.Target.
func (d *Debugger) Threads() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.cpus)
}

// Thread is of gdbstub.Target.
func (d *Debugger) Thread(thread int) (name, state string) {
	err := d.do(thread, func(_ *machine, c *kvmapi.VCPU) error {
		s, err := c.MPState()
		state = mpStates[min(int(s), len(mpStates)-1)]
		return err
	})
	if err != nil {
		state = "in a device"
	}
	return fmt.Sprint("CPU ", thread-1), state
}

// debugState reads the registers of a vCPU, on its thread.
func debugState(c *kvmapi.VCPU) (s x86.DebugState, err error) {
	var errs [4]error
	s.Regs, errs[0] = c.Regs()
	s.Sregs, errs[1] = c.Sregs()
	s.FPU, errs[2] = c.FPU()
	s.KernelGSBase, errs[3] = c.MSR(x86.MSRKernelGSBase)
	return s, errors.Join(errs[:]...)
}

// Registers is of gdbstub.Target.
func (d *Debugger) Registers(thread int) (b []byte, err error) {
	err = d.do(thread, func(_ *machine, c *kvmapi.VCPU) error {
		s, err := debugState(c)
		b = s.Bytes()
		return err
	})
	return b, err
}

// SetRegisters is of gdbstub.Target.
func (d *Debugger) SetRegisters(thread int, b []byte) error {
	return d.do(thread, func(_ *machine, c *kvmapi.VCPU) error {
		old, err := debugState(c)
		s := old
		if err == nil {
			err = s.SetBytes(b)
		}
		if err == nil && s.Sregs != old.Sregs {
			err = c.SetSregs(s.Sregs)
		}
		if err == nil && s.FPU != old.FPU {
			err = c.SetFPU(s.FPU)
		}
		if err == nil && s.KernelGSBase != old.KernelGSBase {
			err = c.SetMSRs([]kvmapi.MSR{{Index: x86.MSRKernelGSBase, Data: s.KernelGSBase}})
		}
		if err == nil && s.Regs != old.Regs {
			err = c.SetRegs(s.Regs)
		}
		return err
	})
}

const pageSize = 4096

// pages calls f for the part of each page of [addr, addr+n), as a stopped vCPU sees it, on the
// vCPU's thread and with mu held.
func (d *Debugger) pages(thread int, addr uint64, n int, f func(m *machine, gpa uint64, at, n int) error) error {
	return d.do(thread, func(m *machine, c *kvmapi.VCPU) error {
		s, err := c.Sregs()
		if err != nil {
			return err
		}
		d.mu.Lock()
		defer d.mu.Unlock()
		for at := 0; at < n; {
			linear := addr + uint64(at)
			part := min(n-at, int(pageSize-linear%pageSize))
			gpa, ok := x86.Translate(m.mem.Read, &s, linear)
			if !ok {
				return fmt.Errorf("address %#x is not mapped", linear)
			}
			if err := f(m, gpa, at, part); err != nil {
				return err
			}
			at += part
		}
		return nil
	})
}

// ReadMemory is of gdbstub.Target. It shows the guest's own bytes where a software breakpoint is.
func (d *Debugger) ReadMemory(thread int, addr uint64, p []byte) (read int, err error) {
	err = d.pages(thread, addr, len(p), func(m *machine, gpa uint64, at, n int) error {
		if err := m.mem.Read(gpa, p[at:at+n]); err != nil {
			return err
		}
		for _, s := range d.soft {
			if s.gpa >= gpa && s.gpa < gpa+uint64(n) {
				p[at+int(s.gpa-gpa)] = s.original
			}
		}
		read = at + n
		return nil
	})
	return read, err
}

// WriteMemory is of gdbstub.Target. Software breakpoints stay.
func (d *Debugger) WriteMemory(thread int, addr uint64, p []byte) error {
	p = slices.Clone(p)
	return d.pages(thread, addr, len(p), func(m *machine, gpa uint64, at, n int) error {
		for i := range d.soft {
			if s := &d.soft[i]; s.gpa >= gpa && s.gpa < gpa+uint64(n) {
				b := &p[at+int(s.gpa-gpa)]
				s.original, *b = *b, int3
			}
		}
		return m.mem.Write(gpa, p[at:at+n])
	})
}

// Moved is of gdbstub.Target.
func (d *Debugger) Moved(thread int) (text uint64, ok bool) {
	err := d.do(thread, func(m *machine, c *kvmapi.VCPU) error {
		r, err := c.Regs()
		s, err2 := c.Sregs()
		text, ok = x86.MovedKernel(m.mem.Read, s, r.RIP)
		return errors.Join(err, err2)
	})
	return text, ok && err == nil
}

// Resume is of gdbstub.Target.
func (d *Debugger) Resume(actions []gdbstub.Action) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !slices.ContainsFunc(actions, func(a gdbstub.Action) bool { return a.Kind != gdbstub.Stay }) {
		return errors.New("no thread would run")
	}
	d.stops = make(chan gdbstub.Stop, 1)
	for i, a := range actions {
		cpu := &d.cpus[i]
		if p := cpu.missed; p != nil && a.Kind != gdbstub.Stay {
			cpu.missed = nil
			if slices.Contains(d.hard, *p) {
				d.stops <- gdbstub.Stop{Signal: gdbstub.SIGTRAP, Thread: i + 1, Point: &p.Point}
				return nil
			}
		}
	}
	for i, a := range actions {
		d.cpus[i].action = a
	}
	d.release()
	return nil
}

// Interrupt is of gdbstub.Target.
func (d *Debugger) Interrupt() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.halted.Load() {
		d.halt(gdbstub.Stop{Signal: gdbstub.SIGINT, Thread: 1})
	}
}

// Stops is of gdbstub.Target.
func (d *Debugger) Stops() <-chan gdbstub.Stop {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.stops
}

// canDebug checks that KVM can debug guests.
func canDebug(sys *kvmapi.System) error {
	if sys.Check(kvmapi.CapSetGuestDebug) == 0 {
		return configErrorf("this host's KVM cannot debug guests (it lacks KVM_CAP_SET_GUEST_DEBUG)")
	}
	return nil
}
