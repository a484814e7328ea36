package vmm

import (
	"fmt"

	"github.com/bobuhiro11/gokvm/kvm"

	"gvm/devices/pci"
	"gvm/kvmapi"
	"gvm/vmm/x86"
)

const (
	// maxXAPICID is the highest ID of a local APIC in xAPIC mode; 255 is the broadcast (Intel SDM
	// 3, 11.6.2.1).
	maxXAPICID = 254
	// maxMSIID is the highest ID that a message-signalled interrupt can be sent to, by the extended
	// destination ID (Documentation/virt/kvm/x86/cpuid.rst, KVM_FEATURE_MSI_EXT_DEST_ID).
	maxMSIID = 1<<15 - 1
	// x2apicAPI is KVM_X2APIC_API_USE_32BIT_IDS and KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK.
	x2apicAPI = 3
)

// apicIDs returns the CPUs' local APIC IDs.
func (c *Config) apicIDs() []uint32 {
	if c.APICIDs != nil {
		return c.APICIDs
	}
	ids := make([]uint32, max(c.CPUs, 1))
	for i := range ids {
		ids[i] = uint32(i)
	}
	return ids
}

// x2apic reports whether the machine has IDs that xAPIC mode cannot hold. Its CPUs then start in
// x2APIC mode, as firmware leaves such a machine: Linux ignores the MADT's x2APIC entries unless
// its boot CPU is in that mode.
func x2apic(ids []uint32) bool { return ids[len(ids)-1] > maxXAPICID }

// checkCPUs rejects CPUs that this host's KVM cannot make, and those that a guest could not start
// or interrupt.
func checkCPUs(cfg Config, check func(capability int) int, supported []kvm.CPUIDEntry2) error {
	limit := check(kvmapi.CapMaxVCPUs)
	if cfg.APICIDs != nil && len(cfg.APICIDs) != max(cfg.CPUs, 1) {
		return configErrorf("%d APIC IDs for %d CPUs: give each CPU one", len(cfg.APICIDs), max(cfg.CPUs, 1))
	}
	if cfg.CPUs < 0 || cfg.CPUs > limit {
		return configErrorf("%d CPUs: this host's KVM gives a guest 1 to %d", cfg.CPUs, limit)
	}
	ids := cfg.apicIDs()
	for i, id := range ids[1:] {
		if id <= ids[i] {
			return configErrorf("APIC ID %d after %d: give them in ascending order", id, ids[i])
		}
	}
	// KVM_CAP_MAX_VCPU_ID is one past the highest; without it IDs end with KVM_CAP_MAX_VCPUS.
	end := check(kvmapi.CapMaxVCPUID)
	if end == 0 {
		end = limit
	}
	last := ids[len(ids)-1]
	fewer := fmt.Sprintf("give the guest at most %d CPUs", maxXAPICID+1)
	if cfg.APICIDs != nil {
		fewer = "give its CPUs lower IDs"
	}
	switch {
	case last > maxMSIID:
		return configErrorf("APIC ID %d: interrupts reach IDs up to %d", last, maxMSIID)
	case int(last) >= end:
		return configErrorf("APIC ID %d: this host's KVM gives IDs up to %d", last, end-1)
	case !x2apic(ids):
		return nil
	case check(kvmapi.CapX2APICAPI)&x2apicAPI != x2apicAPI:
		return configErrorf("APIC ID %d: this host's KVM (without KVM_CAP_X2APIC_API) sends interrupts "+
			"to IDs up to %d; %s", last, maxXAPICID, fewer)
	case !x86.Offers(supported, "x2apic"):
		return configErrorf("APIC ID %d needs the CPU feature x2apic, which this host's KVM does not offer; %s", last, fewer)
	case x86.Masked(cfg.CPUFeatures, "x2apic"):
		return configErrorf("APIC ID %d needs the CPU feature x2apic, which is masked: keep it, or %s", last, fewer)
	}
	return nil
}

// pinMessage returns the message that the I/O APIC would send for a pin, by the pin's redirection
// table entry, if it goes to an ID above 255. KVM's own I/O APIC has 8 bits of the ID and would
// interrupt another CPU. The entry has bits 8 to 14 of the ID in bits 49 to 55, where Linux writes
// them. A masked entry sends nothing: KVM keeps a level and delivers it at the unmask, which gvm
// does not see, to 8 bits of the ID (docs/limits.md).
func pinMessage(entry uint64) (m pci.Message, ok bool) {
	const (
		masked      = 1 << 16
		logical     = 1 << 11
		vectorMode  = 0x7ff // vector and delivery mode
		messageBase = 0xfee0_0000
	)
	ext := entry >> 49 & 0x7f
	if ext == 0 || entry&masked != 0 {
		return pci.Message{}, false
	}
	addr := messageBase | entry>>56<<12 | ext<<5 | entry&logical>>(11-2)
	return pci.Message{Addr: addr, Data: uint32(entry & vectorMode)}, true
}

// raisePin raises an I/O APIC pin that leads to a CPU with an ID above 255, and reports whether the
// pin does. Such an interrupt is edge-triggered with any entry.
func (m *machine) raisePin(pin uint32) (bool, error) {
	if !m.irqs.extended {
		return false, nil
	}
	entry, err := m.vm.IOAPICEntry(pin)
	if err != nil {
		return false, err
	}
	msg, ok := pinMessage(entry)
	if !ok {
		return false, nil
	}
	return true, m.vm.SignalMSI(extendedDestination(msg.Addr), msg.Data)
}

// setPin sets the level of an I/O APIC pin.
func (m *machine) setPin(pin uint32, level bool) error {
	if level {
		if done, err := m.raisePin(pin); done || err != nil {
			return err
		}
	}
	return m.vm.SetIRQ(pin, level)
}

// raise raises the interrupt of a UART.
func (m *machine) raise(p *comPort) error {
	if done, err := m.raisePin(p.pin); done || err != nil {
		return err
	}
	return p.irq.Signal()
}

// extendedDestination returns the address that KVM takes for a message to addr under
// KVM_CAP_X2APIC_API: KVM expects bits 8 to 31 of the destination ID in bits 40 to 63 of the
// address, and the guest puts bits 8 to 14 in bits 5 to 11.
func extendedDestination(addr uint64) uint64 {
	const ext = 0x7f << 5
	return addr&0xffff_ffff&^ext | addr&ext<<(40-5)
}
