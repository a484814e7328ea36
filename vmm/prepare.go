package vmm

import (
	"errors"

	"github.com/bobuhiro11/gokvm/kvm"

	"gvm/guestmem"
	"gvm/kvmapi"
)

// Prepared is a virtual machine that has its memory and nothing else.
type Prepared struct {
	mapped chan struct{} // closed when mem and cpuid are there, or nil because of err
	mem    *guestmem.Memory
	cpuid  []kvm.CPUIDEntry2 // what KVM supports

	done chan struct{} // closed when vm is there, or err
	vm   *kvmapi.VM
	err  error
}

// Prepare begins to make what the first machine of Run stands on, for a caller that has
// something else to do meanwhile. It needs Memory, CPUs, APICIDs and CPUFeatures of cfg alone. The
// result is for Config.Prepared; errors come from Run.
func Prepare(sys *kvmapi.System, cfg Config) *Prepared {
	p := &Prepared{mapped: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(p.done)
		p.err = p.mapMemory(sys, cfg)
		close(p.mapped)
		if p.err == nil {
			p.err = p.makeVM(sys, cfg.apicIDs())
		}
	}()
	return p
}

// mapMemory makes what loading a kernel needs: memory, and what KVM says of its processors.
func (p *Prepared) mapMemory(sys *kvmapi.System, cfg Config) (err error) {
	if p.cpuid, err = sys.SupportedCPUID(); err != nil {
		return err
	}
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
	return 36 // what a processor without that leaf has
}

func (p *Prepared) makeVM(sys *kvmapi.System, ids []uint32) (err error) {
	if p.vm, err = sys.CreateVM(); err != nil {
		return err
	}
	// Memory comes before KVM's own devices: since Linux 6.18 (7d9a0273c459) each of those
	// begins an SRCU grace period that is not expedited, and a memory region that is
	// made meanwhile waits for its end, which takes a few ticks.
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
	if err := p.vm.CreatePIT(); err != nil {
		return err
	}
	if x2apic(ids) {
		if err := p.vm.EnableCap(kvmapi.CapX2APICAPI, x2apicAPI); err != nil {
			return err
		}
	}
	if ids[0] != 0 { // KVM's own choice
		return p.vm.SetBootCPU(ids[0])
	}
	return nil
}

// Close waits until the machine has been made, and takes it down unless Run has taken it.
func (p *Prepared) Close() (err error) {
	<-p.done
	if p.vm != nil {
		err = p.vm.Close()
	}
	if p.mem != nil {
		err = errors.Join(err, p.mem.Close())
	}
	p.vm, p.mem = nil, nil
	return err
}
