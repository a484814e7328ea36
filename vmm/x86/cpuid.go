// Package x86 defines a virtual CPU as the guest sees it: CPUID, MSRs, and registers at its first
// instruction.
package x86

import (
	"math/bits"
	"slices"

	"github.com/bobuhiro11/gokvm/kvm"
)

// Registers of a CPUID leaf, as Feature names them.
const (
	eax = iota
	ebx
	ecx
	edx
)

// flagSignificantIndex is KVM_CPUID_FLAG_SIGNIFCANT_INDEX: the leaf has subleaves.
const flagSignificantIndex = 1

// CPUIDConfig holds the parameters of a vCPU's CPUID.
type CPUIDConfig struct {
	APICID uint32
	CPUs   int // in the machine, all in one package, one thread a core
	// MaxAPICID is the highest APIC ID in the machine, at least CPUs-1.
	MaxAPICID uint32
	// X2APIC says that the machine has IDs above 254, and message-signalled interrupts with
	// extended destination IDs.
	X2APIC bool
	// TSCDeadline: KVM offers the TSC deadline timer with the in-kernel APIC.
	TSCDeadline bool
	Features    []FeatureChange
}

// CPUID returns a vCPU's CPUID table: the features that KVM supports on this host, with the guest's
// topology instead of the host's, and the user's changes of features. A feature that depends on a
// missing one is dropped. Demanding such a feature, or one that the host lacks, is an error.
func CPUID(supported []kvm.CPUIDEntry2, c CPUIDConfig) ([]kvm.CPUIDEntry2, error) {
	t := slices.Clone(supported)
	if c.X2APIC {
		t = wideIDs(t)
	}
	idBits := c.idBits()
	cores := uint32(c.CPUs)
	for i := range t {
		e := &t[i]
		switch e.Function {
		case 0x1:
			e.Ecx |= 1 << 31 // hypervisor present
			if c.TSCDeadline {
				e.Ecx |= 1 << 24
			}
			e.Ebx = e.Ebx&0xffff | min(uint32(1)<<idBits, 255)<<16 | c.APICID<<24
			e.Edx &^= 1 << 28 // HTT: more than one logical processor in the package
			if c.CPUs > 1 {
				e.Edx |= 1 << 28
			}
		case 0x4, 0x8000_001d: // caches: levels 1 and 2 are a core's own, level 3 is shared by all
			if e.Eax&0x1f == 0 {
				break
			}
			e.Eax &= 0x3fff
			if level := e.Eax >> 5 & 7; level >= 3 {
				e.Eax |= (uint32(1)<<idBits - 1) & 0xfff << 14
			}
			if e.Function == 0x4 {
				e.Eax |= (uint32(1)<<idBits - 1) & 0x3f << 26
			}
		case 0xb, 0x1f:
			e.Edx = c.APICID
		case 0x8000_0001:
			// CMP_LEGACY belongs to AMD's way of counting cores (0x80000008).
			if c.CPUs == 1 {
				e.Ecx &^= 1 << 1
			}
		case 0x8000_0008:
			e.Ecx = idBits<<12 | min(cores-1, 0xff)
		case 0x8000_001e:
			e.Eax, e.Ebx, e.Ecx = c.APICID, c.APICID&0xff, 0
		}
	}
	t = extendedTopology(t, 0xb, c)
	t = extendedTopology(t, 0x1f, c)
	return applyFeatures(t, supported, c.Features)
}

// idBits returns the width of the core number in an APIC ID.
func (c *CPUIDConfig) idBits() uint32 {
	return uint32(bits.Len(uint(max(c.MaxAPICID, uint32(c.CPUs-1)))))
}

// wideIDs adds the CPUID bits that a guest needs for APIC IDs above 254: leaf 0xb, which alone has
// 32 bits of the ID, and the bit that lets Linux use them without interrupt remapping.
func wideIDs(t []kvm.CPUIDEntry2) []kvm.CPUIDEntry2 {
	if find(t, 0xb, 0) == nil {
		t = append(t, kvm.CPUIDEntry2{Function: 0xb, Flags: flagSignificantIndex})
		if e := find(t, 0, 0); e != nil {
			e.Eax = max(e.Eax, 0xb)
		}
	}
	if e := find(t, 0x4000_0001, 0); e != nil {
		f := features()["kvm_msi_ext_dest_id"]
		*register(e, f.reg) |= 1 << f.bit
	}
	return t
}

// extendedTopology replaces leaf 0xb or 0x1f, where the host has it, by the
// guest's: one thread a core (level 0), all cores in one package (level 1).
func extendedTopology(t []kvm.CPUIDEntry2, leaf uint32, c CPUIDConfig) []kvm.CPUIDEntry2 {
	n := len(t)
	t = slices.DeleteFunc(t, func(e kvm.CPUIDEntry2) bool { return e.Function == leaf })
	if len(t) == n {
		return t
	}
	const thread, core = 1 << 8, 2 << 8 // level types in ECX
	idBits := c.idBits()
	return append(t,
		kvm.CPUIDEntry2{Function: leaf, Index: 0, Flags: flagSignificantIndex, Eax: 0, Ebx: 1, Ecx: thread, Edx: c.APICID},
		kvm.CPUIDEntry2{Function: leaf, Index: 1, Flags: flagSignificantIndex, Eax: idBits, Ebx: uint32(c.CPUs),
			Ecx: core | 1, Edx: c.APICID},
		kvm.CPUIDEntry2{Function: leaf, Index: 2, Flags: flagSignificantIndex, Ecx: 2, Edx: c.APICID},
	)
}

// find returns the entry of a leaf and subleaf, or nil.
func find(t []kvm.CPUIDEntry2, leaf, index uint32) *kvm.CPUIDEntry2 {
	for i := range t {
		if t[i].Function == leaf && (t[i].Index == index || t[i].Flags&flagSignificantIndex == 0) {
			return &t[i]
		}
	}
	return nil
}

func register(e *kvm.CPUIDEntry2, r int) *uint32 {
	return []*uint32{&e.Eax, &e.Ebx, &e.Ecx, &e.Edx}[r]
}
