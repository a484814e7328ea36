package x86

import (
	"fmt"
	"slices"
	"strings"

	"github.com/bobuhiro11/gokvm/kvm"
)

// needs lists features and the feature that they depend on, as in Linux
// (arch/x86/kernel/cpu/cpuid-deps.c) and in the definitions of the instruction sets (Intel SDM 1,
// 13.1 and 14.3; AMD APM 3, appendix D). A row comes after those in which its first word is a
// dependent, so that one pass finds every feature to drop.
var needs = []struct{ need, dependents string }{
	{"fpu", "fxsr"},
	{"fxsr", "cmov mmx fxsr_opt sse xsave"},
	{"mmx", "mmxext 3dnow"},
	{"3dnow", "3dnowext"},
	{"sse", "sse2"},
	{"sse2", "pni ssse3 sse4_1 sse4_2 pclmulqdq aes sha_ni gfni"},
	{"pni", "sse4a"},
	{"xsave", "osxsave xsaveopt xsavec xgetbv1 xsaves avx mpx pku apx"},
	{"pku", "ospke"},
	{"aes", "vaes"},
	{"pclmulqdq", "vpclmulqdq"},
	{"avx", "fma f16c avx2 vaes vpclmulqdq xop fma4"},
	{"avx2", "avx512f avx_vnni avx_ifma avx_vnni_int8 avx_vnni_int16 avx_ne_convert sha512 sm3 sm4"},
	{"avx512f", "avx512dq avx512ifma avx512pf avx512er avx512cd avx512bw avx512vl avx512vbmi " +
		"avx512_vpopcntdq avx512_4vnniw avx512_4fmaps avx10"},
	{"avx512vl", "avx512_vbmi2 avx512_vnni avx512_bitalg avx512_vp2intersect avx512_bf16"},
	{"avx512bw", "avx512_fp16"},
	{"xgetbv1", "xfd"},
	{"xsaves", "xfd shstk enqcmd"},
	{"xfd", "amx_tile"},
	{"amx_tile", "amx_bf16 amx_int8 amx_fp16 amx_complex"},
	{"sgx", "sgx_lc"},
	{"smap", "lass"},
	{"lkgs", "fred"},
	{"spec_ctrl", "spec_ctrl_ssbd intel_stibp"}, // bits of its MSR
}

// leafNeeds lists the leaves that describe a single feature.
var leafNeeds = map[uint32]string{
	0xd: "xsave", 0x12: "sgx", 0x14: "intel_pt", 0x1d: "amx_tile", 0x1e: "amx_tile", 0x24: "avx10", 0x8000_000a: "svm",
}

// xstate lists the XSAVE state components (Intel SDM 1, 13.1) and the features that use each.
// Components 0 and 1, x87 and SSE, are always there.
var xstate = map[uint32][]string{
	2: {"avx"}, 3: {"mpx"}, 4: {"mpx"}, 5: {"avx512f"}, 6: {"avx512f"}, 7: {"avx512f"}, 9: {"pku"},
	11: {"shstk", "ibt"}, 12: {"shstk", "ibt"}, 17: {"amx_tile"}, 18: {"amx_tile"}, 19: {"apx"},
}

// Offers reports whether KVM supports a feature, by its name in /proc/cpuinfo.
func Offers(supported []kvm.CPUIDEntry2, name string) bool { return has(supported, name) }

func has(t []kvm.CPUIDEntry2, name string) bool {
	f := features()[name]
	e := find(t, f.leaf, f.index)
	return e != nil && *register(e, f.reg)>>f.bit&1 != 0
}

func drop(t []kvm.CPUIDEntry2, name string) {
	f := features()[name]
	if e := find(t, f.leaf, f.index); e != nil {
		*register(e, f.reg) &^= 1 << f.bit
	}
}

// dropOrphans drops the features that lack a dependency, and returns each with the missing feature.
func dropOrphans(t []kvm.CPUIDEntry2) map[string]string {
	lacks := map[string]string{}
	for _, n := range needs {
		if has(t, n.need) {
			continue
		}
		for name := range strings.FieldsSeq(n.dependents) {
			if has(t, name) {
				drop(t, name)
				lacks[name] = n.need
			}
		}
	}
	return lacks
}

// Orphans returns the features that KVM offers without one that they depend on, in alphabetical
// order, and the missing ones. CPUID hides such features from the guest.
func Orphans(supported []kvm.CPUIDEntry2) (dropped, missing []string) {
	lacks := dropOrphans(slices.Clone(supported))
	for name, need := range lacks {
		dropped = append(dropped, name)
		if lacks[need] == "" {
			missing = append(missing, need)
		}
	}
	slices.Sort(dropped)
	slices.Sort(missing)
	return dropped, slices.Compact(missing)
}

// applyFeatures makes the user's changes in t, drops the features that lack a dependency, and
// removes the leaves and state components of absent features.
func applyFeatures(t, supported []kvm.CPUIDEntry2, changes []FeatureChange) ([]kvm.CPUIDEntry2, error) {
	own := slices.Clone(t) // bits that gvm adds to KVM's, such as the TSC deadline timer
	for _, f := range changes {
		if !f.Enable {
			drop(t, f.Name)
			continue
		}
		e := find(t, f.leaf, f.index)
		if e == nil || !has(supported, f.Name) && !has(own, f.Name) {
			return nil, fmt.Errorf("CPU feature %s: this host's KVM does not offer it", f.Name)
		}
		*register(e, f.reg) |= 1 << f.bit
	}
	lacks := dropOrphans(t)
	for _, f := range changes {
		if lacks[f.Name] == "" || Masked(changes, f.Name) {
			continue
		}
		chain, need := "", f.Name
		for lacks[need] != "" {
			need = lacks[need]
			chain += " needs " + need + ", which"
		}
		if Masked(changes, need) {
			return nil, fmt.Errorf("CPU feature %s%s is masked: demand one or mask the other, not both", f.Name, chain)
		}
		return nil, fmt.Errorf("CPU feature %s%s this host's KVM does not offer", f.Name, chain)
	}
	t = slices.DeleteFunc(t, func(e kvm.CPUIDEntry2) bool {
		name := leafNeeds[e.Function]
		return name != "" && !has(t, name)
	})
	return trimXstate(t), nil
}

// trimXstate removes the state components of absent features from leaf 0xd, and reduces the size of
// the XSAVE area (ECX; KVM counts EBX itself).
func trimXstate(t []kvm.CPUIDEntry2) []kvm.CPUIDEntry2 {
	user, super := find(t, 0xd, 0), find(t, 0xd, 1)
	if user == nil {
		return t
	}
	const legacyAndHeader = 512 + 64
	user.Ecx = legacyAndHeader
	gone := map[uint32]bool{}
	for i := range uint32(32) {
		if names := xstate[i]; names != nil && !slices.ContainsFunc(names, func(n string) bool { return has(t, n) }) {
			gone[i] = true
			user.Eax &^= 1 << i
			if super != nil {
				super.Ecx &^= 1 << i
			}
		}
		if e := find(t, 0xd, i); i > 1 && user.Eax>>i&1 != 0 && e != nil {
			user.Ecx = max(user.Ecx, e.Ebx+e.Eax) // its offset and size
		}
	}
	return slices.DeleteFunc(t, func(e kvm.CPUIDEntry2) bool { return e.Function == 0xd && gone[e.Index] })
}
