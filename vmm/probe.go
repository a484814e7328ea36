package vmm

import (
	"context"
	"fmt"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"gvm/kvmapi"
	"gvm/panics"
)

// probeLoops is the number of iterations of the probe's guest, 2 instructions each.
const probeLoops = 10_000

// EmulatedBelow is the speed, in million instructions per second, below which guest kernel code
// counts as emulated. Hardware is above 500, a KVM nested in a software emulator above 20; KVM's
// instruction emulator reaches 1 to 4.
const EmulatedBelow = 10

// probeRounds is how often the loop is timed. The fastest round counts: a busy host slows some of
// them.
const probeRounds = 4

// Speed runs a tiny loop in a guest of its own and returns how many million instructions of guest
// kernel code KVM executes a second on this host. Without hardware virtualization (kvm_pvm, for
// one) KVM emulates such code instruction by instruction, and fails at instructions that its
// emulator lacks: a stock Linux kernel does not run there.
func Speed(sys *kvmapi.System) (mips float64, err error) {
	vm, err := sys.CreateVM()
	if err != nil {
		return 0, err
	}
	defer vm.Close()
	ram, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return 0, fmt.Errorf("mmap of a page: %w", err)
	}
	defer unix.Munmap(ram)
	copy(ram, []byte{
		0x66, 0xb9, probeLoops & 0xff, probeLoops >> 8, 0, 0, // again: mov ecx, probeLoops
		0x66, 0x49, // dec ecx
		0x75, 0xfc, // jnz -4
		0xe6, 0x80, // out 0x80, al
		0xeb, 0xf2, // jmp again
	})
	if err := vm.SetMemory(0, 0, ram); err != nil {
		return 0, err
	}
	cpu, err := vm.CreateVCPU(0)
	if err != nil {
		return 0, err
	}
	defer cpu.Close()
	s, err := cpu.Sregs()
	if err != nil {
		return 0, err
	}
	s.CS.Base, s.CS.Selector = 0, 0
	if err := cpu.SetSregs(s); err != nil {
		return 0, err
	}
	r, err := cpu.Regs()
	if err != nil {
		return 0, err
	}
	r.RIP, r.RFLAGS = 0, 2
	if err := cpu.SetRegs(r); err != nil {
		return 0, err
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cpu.Bind()
	defer cpu.Unbind()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	defer context.AfterFunc(ctx, panics.Func(func() { _ = cpu.Kick() }))()
	best := time.Duration(1<<63 - 1)
	for round, start := 0, time.Now(); ctx.Err() == nil; {
		e, err := cpu.Run()
		switch {
		case err != nil:
			return 0, err
		case e.Reason == kvmapi.ExitInterrupted:
		case e.Reason != kvmapi.ExitIO:
			return 0, fmt.Errorf("the probe's guest ended with %s", e.String())
		case round == probeRounds:
			return 2 * probeLoops / best.Seconds() / 1e6, nil
		default:
			if took := time.Since(start); round > 0 { // the first round includes the start of the vCPU
				best = min(best, took)
			}
			round, start = round+1, time.Now()
		}
	}
	return 0, fmt.Errorf("the probe's guest did not finish in 5 s")
}

// RunsLinux reports whether this host's KVM runs a stock Linux kernel, and the reason as text for a
// log.
func RunsLinux() (bool, string) {
	sys, err := kvmapi.Open()
	if err != nil {
		return false, err.Error()
	}
	defer sys.Close()
	mips, err := Speed(sys)
	switch {
	case err != nil:
		return false, err.Error()
	case mips < EmulatedBelow:
		return false, fmt.Sprintf("this host's KVM emulates guest kernel code (%.1f MIPS)", mips)
	}
	return true, fmt.Sprintf("this host's KVM runs guest kernel code (%.0f MIPS)", mips)
}
