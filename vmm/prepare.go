package vmm

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/bobuhiro11/gokvm/kvm"

	"gvm/guestmem"
	"gvm/kvmapi"
	"gvm/kvmapi/nowait"
	"gvm/panics"
	"gvm/vmm/boot"
	"gvm/vmm/x86"
)

// Begun is an open KVM and a virtual machine without memory or devices.
type Begun struct {
	opened  chan struct{} // closed once sys or openErr is set
	sys     *kvmapi.System
	openErr error

	done  chan struct{} // closed once vm and cpuid, or err, are set
	vm    *kvmapi.VM
	cpuid []kvm.CPUIDEntry2 // supported by KVM
	err   error
}

// Begin starts the work that needs no Config, for a caller that does not know its machine yet.
// Errors come from System and from Run.
func Begin() *Begun { return begin(kvmapi.Open) }

func begin(open func() (*kvmapi.System, error)) *Begun {
	b := &Begun{opened: make(chan struct{}), done: make(chan struct{})}
	panics.Go(func() {
		defer close(b.done)
		b.sys, b.openErr = open()
		close(b.opened)
		if b.openErr != nil {
			return
		}
		if b.cpuid, b.err = b.sys.SupportedCPUID(); b.err == nil {
			b.vm, b.err = b.sys.CreateVM()
		}
	})
	return b
}

// System returns KVM as soon as it is open. It stays open until Close.
func (b *Begun) System() (*kvmapi.System, error) {
	<-b.opened
	return b.sys, b.openErr
}

// Prepare is like the function Prepare, with this virtual machine. It may be called once, after
// System has succeeded.
func (b *Begun) Prepare(cfg Config) *Prepared {
	p := &Prepared{mapped: make(chan struct{}), done: make(chan struct{})}
	panics.Go(func() {
		defer close(p.done)
		<-b.done
		p.vm, b.vm, p.cpuid, p.err = b.vm, nil, b.cpuid, b.err
		if p.err == nil {
			p.err = p.mapMemory(b.sys, cfg)
		}
		close(p.mapped)
		if p.err == nil {
			p.err = p.fillVM(cfg.apicIDs())
		}
		if p.err == nil {
			p.err = p.makeCPUs(b.sys, cfg)
		}
	})
	return p
}

// Close releases everything that Prepare has not taken. A Prepared is closed first.
func (b *Begun) Close() (err error) {
	<-b.done
	if b.vm != nil {
		err = b.vm.Close()
	}
	if b.sys != nil {
		err = errors.Join(err, b.sys.Close())
	}
	return err
}

// Prepared is a virtual machine with memory, KVM's own devices and its vCPUs.
type Prepared struct {
	mapped chan struct{} // closed once mem and cpuid are set, or nil because of err
	mem    *guestmem.Memory
	cpuid  []kvm.CPUIDEntry2 // supported by KVM

	done chan struct{} // closed once vm and cpus, or err, are set
	vm   *kvmapi.VM
	cpus []*kvmapi.VCPU // one for each APIC ID
	err  error

	released atomic.Bool // by Close, for which makeCPUs ends early
}

// Prepare starts making the virtual machine and memory of Run's first machine, so that the caller
// can do other work meanwhile. It reads only Memory, CPUs, APICIDs and CPUFeatures of cfg. The
// result is for Config.Prepared; errors come from Run.
func Prepare(sys *kvmapi.System, cfg Config) *Prepared {
	return begin(func() (*kvmapi.System, error) { return sys, nil }).Prepare(cfg)
}

// mapMemory maps the memory that loading a kernel needs, if KVM supports the processors.
func (p *Prepared) mapMemory(sys *kvmapi.System, cfg Config) (err error) {
	if err := checkCPUs(cfg, sys.Check, p.cpuid); err != nil {
		return err
	}
	mem, err := guestmem.Map(cfg.Memory)
	if err != nil {
		return err
	}
	if err := checkRAM(mem, physBits(p.cpuid)); err != nil {
		return errors.Join(err, mem.Close())
	}
	p.mem = mem
	return nil
}

// physBits returns the width of the guest's physical addresses.
func physBits(cpuid []kvm.CPUIDEntry2) uint {
	for _, e := range cpuid {
		if e.Function == 0x8000_0008 {
			return uint(e.Eax & 0xff)
		}
	}
	return 36 // the width of a processor without that leaf
}

// fillVM gives the virtual machine its memory, and KVM's own devices.
func (p *Prepared) fillVM(ids []uint32) (err error) {
	// Memory comes before KVM's own devices: since Linux 6.18 (7d9a0273c459) each of those starts
	// an SRCU grace period that is not expedited, and adding a memory region waits for its end,
	// which takes a few ticks.
	for i, r := range p.mem.Regions() {
		if err := p.vm.SetMemory(uint32(i), r.Base, r.Bytes); err != nil {
			return err
		}
	}
	if err := p.vm.SetTSSAddr(tssAddr); err != nil {
		return err
	}
	if err := p.vm.SetIdentityMapAddr(identityMapAddr); err != nil {
		return err
	}
	if err := p.vm.CreateIRQChip(); err != nil {
		return err
	}
	if err := p.vm.SetELCR(levelIRQs()); err != nil {
		return err
	}
	if err := p.vm.CreatePIT(); err != nil {
		return err
	}
	if x2apic(ids) {
		if err := p.vm.EnableCap(kvmapi.CapX2APICAPI, x2apicAPI); err != nil {
			return err
		}
	}
	if ids[0] != 0 { // 0 is KVM's default
		return p.vm.SetBootCPU(ids[0])
	}
	return nil
}

// errReleased is the error of a Prepared that nothing runs.
var errReleased = errors.New("the virtual machine was released")

// makeCPUs makes the vCPUs, which wait for the start-up IPI.
func (p *Prepared) makeCPUs(sys *kvmapi.System, cfg Config) error {
	ids := cfg.apicIDs()
	for _, id := range ids {
		if p.released.Load() { // 1,024 take half a second
			return errReleased
		}
		c, err := p.vm.CreateVCPU(int(id))
		if err != nil {
			return err
		}
		p.cpus = append(p.cpus, c)
		cpuid, err := x86.CPUID(p.cpuid, x86.CPUIDConfig{
			APICID:      id,
			MaxAPICID:   ids[len(ids)-1],
			CPUs:        len(ids),
			X2APIC:      x2apic(ids),
			TSCDeadline: sys.Check(kvmapi.CapTSCDeadline) != 0,
			Features:    cfg.CPUFeatures,
		})
		if err != nil {
			return &ConfigError{err.Error()}
		}
		if err := initCPU(c, cpuid, x2apic(ids)); err != nil {
			return fmt.Errorf("vCPU %d: %w", id, err)
		}
	}
	return nil
}

func initCPU(c *kvmapi.VCPU, cpuid []kvm.CPUIDEntry2, x2apic bool) error {
	if err := c.SetCPUID(cpuid); err != nil {
		return err
	}
	if err := c.SetMSRs(x86.MSRs()); err != nil {
		return err
	}
	if err := c.SetFPU(x86.InitialFPU()); err != nil {
		return err
	}
	if x2apic {
		s, err := c.Sregs()
		if err != nil {
			return err
		}
		s.ApicBase |= x86.X2APICMode
		if err := c.SetSregs(s); err != nil {
			return err
		}
	}
	lapic, err := c.LAPIC()
	if err != nil {
		return err
	}
	return c.SetLAPIC(x86.WireLAPIC(lapic))
}

// load has boot.Load write the kernel and the initrds into the memory. It does not wait for storage
// that does not answer when ctx has ended. The read of it goes on then, and the memory stays until
// the end of that.
func (p *Prepared) load(ctx context.Context, cfg boot.Config) (boot.Entry, error) {
	mem := p.mem
	var file atomic.Pointer[string] // that is being read
	cfg.Reading = func(name string) { file.Store(&name) }
	cfg.Reading(cfg.Kernel.Name)
	over := make(chan struct{})
	entry, err := nowait.Until(ctx, func() string { return *file.Load() + " was read" }, func() (boot.Entry, error) {
		defer close(over)
		return boot.Load(mem, cfg)
	}, func(boot.Entry) {})
	select {
	case <-over:
	default:
		<-p.done // which uses the memory
		p.mem = nil
		panics.Go(func() { // ends with the process at the latest
			<-over
			_ = mem.Close()
		})
	}
	return entry, err
}

// Close waits until the machine has been made, but for vCPUs that are left, and releases it unless
// Run has taken it.
func (p *Prepared) Close() (err error) {
	p.released.Store(true)
	<-p.done
	for _, c := range p.cpus {
		err = errors.Join(err, c.Close())
	}
	if p.vm != nil {
		err = errors.Join(err, p.vm.Close())
	}
	if p.mem != nil {
		err = errors.Join(err, p.mem.Close())
	}
	p.cpus, p.vm, p.mem = nil, nil, nil
	return err
}
