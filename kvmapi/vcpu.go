package kvmapi

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/bobuhiro11/gokvm/kvm"
	"golang.org/x/sys/unix"
)

// VCPU is a virtual CPU. Run and the register methods belong to one goroutine, locked to its OS
// thread (KVM ties a vCPU to a thread); Kick may be called from any.
type VCPU struct {
	fd   int
	page []byte // struct kvm_run and the data that follows it
	run  *kvm.RunData

	mu  sync.Mutex // guards tid, so that no signal goes to another thread
	tid int

	kicked atomic.Bool
	exits  Exits
}

// Close unmaps and closes the vCPU. It comes after the last Run.
func (c *VCPU) Close() error {
	c.run = nil
	if err := unix.Munmap(c.page); err != nil {
		return fmt.Errorf("munmap of vCPU: %w", err)
	}
	return unix.Close(c.fd)
}

// SetCPUID is KVM_SET_CPUID2.
func (c *VCPU) SetCPUID(entries []kvm.CPUIDEntry2) error {
	t := &cpuid2{Nent: uint32(len(entries))}
	if copy(t.Entries[:], entries) < len(entries) {
		return fmt.Errorf("KVM_SET_CPUID2: %d entries, at most %d", len(entries), MaxCPUIDEntries)
	}
	_, err := ioctl(c.fd, "KVM_SET_CPUID2", kvm.IIOW(nrSetCPUID2, 8), t)
	return err
}

// Regs is KVM_GET_REGS.
func (c *VCPU) Regs() (r kvm.Regs, err error) {
	_, err = ioctl(c.fd, "KVM_GET_REGS", ior[kvm.Regs](nrGetRegs), &r)
	return r, err
}

// SetRegs is KVM_SET_REGS.
func (c *VCPU) SetRegs(r kvm.Regs) error {
	_, err := ioctl(c.fd, "KVM_SET_REGS", iow[kvm.Regs](nrSetRegs), &r)
	return err
}

// Sregs is KVM_GET_SREGS.
func (c *VCPU) Sregs() (s kvm.Sregs, err error) {
	_, err = ioctl(c.fd, "KVM_GET_SREGS", ior[kvm.Sregs](nrGetSregs), &s)
	return s, err
}

// SetSregs is KVM_SET_SREGS.
func (c *VCPU) SetSregs(s kvm.Sregs) error {
	_, err := ioctl(c.fd, "KVM_SET_SREGS", iow[kvm.Sregs](nrSetSregs), &s)
	return err
}

// FPU is struct kvm_fpu.
type FPU struct {
	FPR        [8][16]byte
	FCW, FSW   uint16
	FTWX, _    uint8
	LastOpcode uint16
	LastIP     uint64
	LastDP     uint64
	XMM        [16][16]byte
	MXCSR, _   uint32
}

// FPU is KVM_GET_FPU.
func (c *VCPU) FPU() (f FPU, err error) {
	_, err = ioctl(c.fd, "KVM_GET_FPU", ior[FPU](nrGetFPU), &f)
	return f, err
}

// SetFPU is KVM_SET_FPU.
func (c *VCPU) SetFPU(f FPU) error {
	_, err := ioctl(c.fd, "KVM_SET_FPU", iow[FPU](nrSetFPU), &f)
	return err
}

// MSR is one entry of struct kvm_msrs.
type MSR struct {
	Index, _ uint32
	Data     uint64
}

type msrs struct {
	N, _    uint32
	Entries [64]MSR
}

// SetMSRs sets MSRs in order. KVM stops at the first one that it refuses; the error names it.
func (c *VCPU) SetMSRs(list []MSR) error {
	m := &msrs{}
	m.N = uint32(copy(m.Entries[:], list))
	n, err := ioctl(c.fd, "KVM_SET_MSRS", kvm.IIOW(nrSetMSRs, 8), m)
	if err == nil && n < len(list) {
		err = fmt.Errorf("KVM_SET_MSRS: MSR %#x = %#x refused", list[n].Index, list[n].Data)
	}
	return err
}

// MSR is KVM_GET_MSRS for one MSR.
func (c *VCPU) MSR(index uint32) (uint64, error) {
	m := &msrs{N: 1}
	m.Entries[0].Index = index
	n, err := ioctl(c.fd, "KVM_GET_MSRS", kvm.IIOWR(nrGetMSRs, 8), m)
	if err == nil && n != 1 {
		err = fmt.Errorf("KVM_GET_MSRS: MSR %#x refused", index)
	}
	return m.Entries[0].Data, err
}

// LAPIC returns the registers of the local APIC.
func (c *VCPU) LAPIC() (l kvm.LAPICState, err error) {
	_, err = ioctl(c.fd, "KVM_GET_LAPIC", ior[kvm.LAPICState](nrGetLAPIC), &l)
	return l, err
}

// SetLAPIC sets the registers of the local APIC.
func (c *VCPU) SetLAPIC(l kvm.LAPICState) error {
	_, err := ioctl(c.fd, "KVM_SET_LAPIC", iow[kvm.LAPICState](nrSetLAPIC), &l)
	return err
}

// MPState is KVM_GET_MP_STATE: one of gokvm's MPState constants.
func (c *VCPU) MPState() (uint32, error) {
	var s kvm.MPState
	_, err := ioctl(c.fd, "KVM_GET_MP_STATE", ior[kvm.MPState](nrGetMPState), &s)
	return s.State, err
}

// SetMPState is KVM_SET_MP_STATE.
func (c *VCPU) SetMPState(state uint32) error {
	_, err := ioctl(c.fd, "KVM_SET_MP_STATE", iow[kvm.MPState](nrSetMPState), &kvm.MPState{State: state})
	return err
}

// NMI is KVM_NMI: the processor gets a non-maskable interrupt.
func (c *VCPU) NMI() error {
	_, err := ioctlInt(c.fd, "KVM_NMI", kvm.IIO(nrNMI), 0)
	return err
}

// TSCKHz is KVM_GET_TSC_KHZ: the guest's TSC frequency, 0 if unknown.
func (c *VCPU) TSCKHz() (int, error) {
	return ioctlInt(c.fd, "KVM_GET_TSC_KHZ", kvm.IIO(nrGetTSCKHz), 0)
}

// StoppedByHost tells the guest's kvmclock that the host paused the vCPU, so that the guest's
// watchdogs do not report a lockup (KVM_KVMCLOCK_CTRL). It does nothing if the guest has no
// kvmclock or KVM lacks the request.
func (c *VCPU) StoppedByHost() error {
	_, err := ioctlInt(c.fd, "KVM_KVMCLOCK_CTRL", kvm.IIO(nrKVMClockCtrl), 0)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOTTY) {
		return nil
	}
	return err
}

// Translate returns the guest physical address of a linear address in the vCPU's current paging
// mode; ok is false if it is not mapped.
func (c *VCPU) Translate(linear uint64) (gpa uint64, ok bool, err error) {
	t := kvm.Translation{LinearAddress: linear}
	_, err = ioctl(c.fd, "KVM_TRANSLATE", iowr[kvm.Translation](nrTranslate), &t)
	return t.PhysicalAddress, t.Valid != 0, err
}

// GuestDebug is struct kvm_guest_debug for x86.
type GuestDebug struct {
	Control, _ uint32
	DebugReg   [8]uint64
}

// Bits of GuestDebug.Control (linux/kvm.h and asm/kvm.h).
const (
	GuestDebugEnable     = 1 << 0
	GuestDebugSingleStep = 1 << 1
	GuestDebugUseSWBP    = 1 << 16
	GuestDebugUseHWBP    = 1 << 17
	GuestDebugInjectDB   = 1 << 18
	GuestDebugInjectBP   = 1 << 19
	GuestDebugBlockIRQ   = 1 << 20 // of single steps, if CapSetGuestDebug2 has it
)

// SetGuestDebug is KVM_SET_GUEST_DEBUG; the zero value turns debugging off.
func (c *VCPU) SetGuestDebug(d GuestDebug) error {
	_, err := ioctl(c.fd, "KVM_SET_GUEST_DEBUG", iow[GuestDebug](nrSetGuestDebug), &d)
	return err
}

// DebugRegs is KVM_GET_DEBUGREGS: the guest's own debug registers.
func (c *VCPU) DebugRegs() (d kvm.DebugRegs, err error) {
	_, err = ioctl(c.fd, "KVM_GET_DEBUGREGS", ior[kvm.DebugRegs](nrGetDebugRegs), &d)
	return d, err
}

// SetDebugRegs is KVM_SET_DEBUGREGS.
func (c *VCPU) SetDebugRegs(d kvm.DebugRegs) error {
	_, err := ioctl(c.fd, "KVM_SET_DEBUGREGS", iow[kvm.DebugRegs](nrSetDebugRegs), &d)
	return err
}

// Bind registers the calling OS thread as the one that will call Run; the goroutine is locked to
// it. Unbind must undo it before the thread ends.
func (c *VCPU) Bind() {
	c.mu.Lock()
	c.tid = unix.Gettid()
	c.mu.Unlock()
}

// Unbind undoes Bind.
func (c *VCPU) Unbind() {
	c.mu.Lock()
	c.tid = 0
	c.mu.Unlock()
}

// kickSignal interrupts KVM_RUN. It is the Go runtime's signal for preemption: every Go program
// handles it and expects spurious ones, so no other signal is taken from the program.
const kickSignal = unix.SIGURG

// Kick makes the current or the next Run return with ExitInterrupted. It is the only place that
// sets immediate_exit and that sends the signal: the flag alone would miss a vCPU that is in the
// guest, the signal alone one that is about to enter it.
func (c *VCPU) Kick() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.kicked.Store(true)
	if c.tid == 0 {
		return nil
	}
	setImmediateExit(c.page, 1)
	if err := unix.Tgkill(unix.Getpid(), c.tid, kickSignal); err != nil {
		return fmt.Errorf("tgkill of a vCPU thread: %w", err)
	}
	return nil
}

// Run enters the guest until it exits to user space. If the exit asks for registers (the data of an
// IN or an MMIO read), set them in the Exit's Data before the next Run. At ExitInterrupted KVM has
// finished the instruction of the last exit.
func (c *VCPU) Run() (Exit, error) {
	if c.kicked.Load() {
		setImmediateExit(c.page, 1) // Kick does not before Bind
	}
	interrupted, err := enter(c.fd)
	if err != nil {
		return Exit{}, err
	}
	if interrupted {
		// Any signal to the thread ends KVM_RUN, not only Kick's.
		setImmediateExit(c.page, 0)
		c.kicked.Store(false)
		c.exits.Interrupted++
		return Exit{Reason: ExitInterrupted}, nil
	}
	return c.exit(), nil
}
