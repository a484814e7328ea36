package x86

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"gvm/text"
)

// FeatureChange turns one CPUID bit on or off.
type FeatureChange struct {
	Name   string
	Enable bool
	feature
}

type feature struct {
	leaf, index uint32
	reg         int
	bit         uint
}

// features names the CPUID bits that a kernel developer may want to mask, with
// the names that Linux shows in /proc/cpuinfo (Intel SDM 2, CPUID; AMD APM 3,
// appendix E; Documentation/virt/kvm/x86/cpuid.rst).
var features = sync.OnceValue(func() map[string]feature {
	features := make(map[string]feature, 320)
	for _, g := range []struct {
		leaf, index uint32
		reg         int
		names       string // from bit 0; "-" for bits without a name here
	}{
		{0x1, 0, edx, "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts " +
			"acpi mmx fxsr sse sse2 ss ht tm ia64 pbe"},
		{0x1, 0, ecx, "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid " +
			"dca sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor"},
		{0x7, 0, ebx, "fsgsbase tsc_adjust sgx bmi1 hle avx2 - smep bmi2 erms invpcid rtm cqm - mpx rdt_a avx512f " +
			"avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni " +
			"avx512bw avx512vl"},
		{0x7, 0, ecx, "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq " +
			"avx512_vnni avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid - bus_lock_detect cldemote - " +
			"movdiri movdir64b enqcmd sgx_lc pks"},
		{0x7, 0, edx, "- - avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear " +
			"rtm_always_abort - tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - amx_bf16 " +
			"avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities spec_ctrl_ssbd"},
		{0x7, 1, eax, "sha512 sm3 sm4 - avx_vnni avx512_bf16 lass cmpccxadd - - fzrm fsrs fsrc - - - - fred lkgs " +
			"wrmsrns - amx_fp16 - avx_ifma lam"},
		{0x7, 1, edx, "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - - prefetchiti - - " +
			"- - avx10 - apx"},
		{0xd, 1, eax, "xsaveopt xsavec xgetbv1 xsaves xfd"},
		{0x8000_0001, 0, ecx, "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw " +
			"ibs xop skinit wdt - lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc " +
			"perfctr_llc mwaitx"},
		{0x8000_0001, 0, edx, "- - - - - - - - - - - syscall - - - - - - - mp nx - mmxext - - fxsr_opt pdpe1gb " +
			"rdtscp - lm 3dnowext 3dnow"},
		{0x8000_0007, 0, edx, "- - - - - - - - constant_tsc"},
		{0x8000_0008, 0, ebx, "clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - ibpb - ibrs stibp - " +
			"stibp_always_on - - - - - - ssbd virt_ssbd"},
		{0x4000_0001, 0, eax, "kvmclock kvm_nopiodelay kvm_mmu kvmclock2 kvm_asyncpf kvm_steal_time kvm_pv_eoi " +
			"kvm_pv_unhalt - kvm_pv_tlb_flush kvm_asyncpf_vmexit kvm_pv_send_ipi kvm_poll_control kvm_pv_sched_yield " +
			"kvm_asyncpf_int kvm_msi_ext_dest_id kvm_hc_map_gpa_range kvm_migration_control - - - - - - kvmclock_stable"},
	} {
		for bit, name := range strings.Fields(g.names) {
			if name != "-" {
				features[name] = feature{g.leaf, g.index, g.reg, uint(bit)}
			}
		}
	}
	return features
})

// ParseFeatures reads a list such as "-x2apic,+avx2": names as in /proc/cpuinfo (kvm_ and its kin
// for the paravirtual ones), each with a sign.
func ParseFeatures(list string) ([]FeatureChange, error) {
	var out []FeatureChange
	if list == "" {
		return nil, nil
	}
	for word := range strings.SplitSeq(list, ",") {
		name, hidden := strings.CutPrefix(word, "-")
		if !hidden {
			var shown bool
			if name, shown = strings.CutPrefix(word, "+"); !shown {
				return nil, fmt.Errorf("CPU feature %q: want + or - before a name", word)
			}
		}
		f, ok := features()[name]
		if !ok {
			return nil, fmt.Errorf("CPU feature %q is not known; the names are those of /proc/cpuinfo%s",
				name, text.Suggest(name, slices.Collect(maps.Keys(features()))))
		}
		out = append(out, FeatureChange{Name: name, Enable: !hidden, feature: f})
	}
	return out, nil
}

// Masked reports whether changes leave a feature turned off.
func Masked(changes []FeatureChange, name string) bool {
	masked := false
	for _, f := range changes {
		if f.Name == name {
			masked = !f.Enable
		}
	}
	return masked
}
