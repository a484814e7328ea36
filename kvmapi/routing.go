package kvmapi

import (
	"fmt"

	"github.com/bobuhiro11/gokvm/kvm"
)

// RoutingEntry is struct kvm_irq_routing_entry (48 bytes; gokvm's has only the
// first half of the union).
type RoutingEntry struct {
	GSI, Type, Flags, _ uint32
	// U is the union: for RoutingIRQChip chip and pin; for RoutingMSI address low,
	// address high, data and device ID.
	U [8]uint32
}

// Types of RoutingEntry, and the chips of RoutingIRQChip (linux/kvm.h).
const (
	RoutingIRQChip = 1
	RoutingMSI     = 2

	ChipPIC0   = 0 // GSIs 0 to 7
	ChipPIC1   = 1 // GSIs 8 to 15
	ChipIOAPIC = 2
)

// maxRoutes is KVM_MAX_IRQ_ROUTES.
const maxRoutes = 4096

// MaxGSI is one past the highest GSI that can be routed.
const MaxGSI = maxRoutes

// FirstMSIGSI is the first GSI that no pin of the PICs or the IOAPIC uses.
const FirstMSIGSI = 24

type routing struct {
	NR, Flags uint32
	Entries   [maxRoutes]RoutingEntry
}

// RouteMSI makes GSI gsi (FirstMSIGSI or above) a message-signalled interrupt: raising it writes
// data to addr. A route stays until it is replaced. The in-kernel interrupt controllers must exist.
func (v *VM) RouteMSI(gsi uint32, addr uint64, data uint32) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	e := RoutingEntry{GSI: gsi, Type: RoutingMSI, U: [8]uint32{uint32(addr), uint32(addr >> 32), data}}
	r := v.routes
	i := r.NR
	for j := range r.Entries[:r.NR] {
		if r.Entries[j].GSI == gsi {
			i = uint32(j)
			break
		}
	}
	if i == maxRoutes {
		return fmt.Errorf("KVM_SET_GSI_ROUTING: GSI %d: all %d routes are taken", gsi, maxRoutes)
	}
	old, n := r.Entries[i], r.NR
	if i < n && old == e {
		return nil
	}
	r.Entries[i], r.NR = e, max(n, i+1)
	if err := v.setRoutes(); err != nil { // undo a route that KVM refuses
		r.Entries[i], r.NR = old, n
		return err
	}
	return nil
}

// setRoutes is KVM_SET_GSI_ROUTING, which replaces the whole table.
func (v *VM) setRoutes() error {
	_, err := ioctl(v.fd, "KVM_SET_GSI_ROUTING", kvm.IIOW(nrSetGSIRouting, 8), v.routes)
	return err
}

// pinRoutes routes GSIs 0 to 15 to the PICs and 0 to 23 to the IOAPIC, as KVM_CREATE_IRQCHIP does,
// except for GSI 0: the PIT is at pin 2 of the IOAPIC, as in the MADT's override.
func pinRoutes() *routing {
	r := &routing{}
	add := func(gsi, chip, pin uint32) {
		r.Entries[r.NR] = RoutingEntry{GSI: gsi, Type: RoutingIRQChip, U: [8]uint32{chip, pin}}
		r.NR++
	}
	for gsi := range uint32(FirstMSIGSI) {
		if gsi < 16 {
			add(gsi, ChipPIC0+gsi/8, gsi%8)
		}
		switch gsi {
		case 0:
			add(gsi, ChipIOAPIC, 2)
		case 2: // the cascade
		default:
			add(gsi, ChipIOAPIC, gsi)
		}
	}
	return r
}
