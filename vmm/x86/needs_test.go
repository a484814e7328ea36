package x86

import (
	"slices"
	"strings"
	"testing"

	"github.com/bobuhiro11/gokvm/kvm"
)

// offering returns a table of supported leaves with every feature that gvm names except the given
// ones, and with the XSAVE layout of a processor with AVX-512, protection keys and AMX.
func offering(without ...string) []kvm.CPUIDEntry2 {
	var t []kvm.CPUIDEntry2
	for name, f := range features() {
		e := find(t, f.leaf, f.index)
		if e == nil {
			t = append(t, kvm.CPUIDEntry2{Function: f.leaf, Index: f.index, Flags: flagSignificantIndex})
			e = &t[len(t)-1]
		}
		if !slices.Contains(without, name) {
			*register(e, f.reg) |= 1 << f.bit
		}
	}
	leaf := func(e kvm.CPUIDEntry2) { e.Flags = flagSignificantIndex; t = append(t, e) }
	leaf(kvm.CPUIDEntry2{Function: 0xd, Eax: 0x602e7, Ebx: 0x340, Ecx: 0x2b00})
	find(t, 0xd, 1).Ecx = 0x1800
	for _, c := range [][3]uint32{
		{2, 256, 0x240}, {5, 64, 0x440}, {6, 512, 0x480}, {7, 1024, 0x680}, {9, 8, 0xa80},
		{11, 16, 0}, {12, 24, 0}, {17, 64, 0xac0}, {18, 8192, 0xb00},
	} {
		leaf(kvm.CPUIDEntry2{Function: 0xd, Index: c[0], Eax: c[1], Ebx: c[2]})
	}
	for _, l := range []uint32{0x12, 0x14, 0x1d, 0x1e, 0x24} {
		leaf(kvm.CPUIDEntry2{Function: l, Eax: 1})
	}
	t = append(t, kvm.CPUIDEntry2{Function: 0x8000_000a, Eax: 1})
	return t
}

func with(t *testing.T, supported []kvm.CPUIDEntry2, list string) []kvm.CPUIDEntry2 {
	t.Helper()
	changes, err := ParseFeatures(list)
	if err != nil {
		t.Fatal(err)
	}
	e, err := CPUID(supported, CPUIDConfig{CPUs: 1, Features: changes})
	if err != nil {
		t.Fatal(err)
	}
	return e
}

const needXSAVE = "xsaveopt xsavec xgetbv1 xsaves avx mpx pku apx ospke osxsave fma f16c avx2 vaes vpclmulqdq " +
	"xop fma4 avx_vnni avx_ifma avx512f avx512dq avx512bw avx512vl avx512_vbmi2 avx512_bf16 avx512_fp16 " +
	"avx512_vp2intersect xfd shstk amx_tile amx_bf16 amx_int8 amx_fp16 sha512"

// TestDependents: a feature is dropped if its dependency is missing, whether KVM lacks it or the
// user masks it, and no other feature is.
func TestDependents(t *testing.T) {
	for _, c := range []struct{ root, gone, stays string }{
		{"xsave", needXSAVE, "aes pclmulqdq sse4_2 gfni sha_ni ibt smap"},
		{"avx", "fma f16c avx2 vaes vpclmulqdq avx512f avx512vl avx512_vnni avx10 avx_vnni", "xsave xsaves pku amx_tile aes"},
		{"avx2", "avx512f avx512_fp16 avx_vnni_int16", "avx fma f16c vaes"},
		{"aes", "vaes", "avx2 pclmulqdq vpclmulqdq"},
		{"avx512f", "avx512cd avx512_4fmaps avx512_bitalg avx10", "avx2 avx_vnni"},
		{"xsaves", "xfd amx_tile amx_int8 shstk enqcmd", "xsave xsavec xgetbv1 avx512f ibt"},
		{"xgetbv1", "xfd amx_tile", "xsaves shstk"},
		{"pku", "ospke", "xsave"},
		{"sse2", "pni sse4a ssse3 aes vaes sha_ni gfni pclmulqdq", "sse xsave mmx"},
		{"fxsr", needXSAVE + " sse sse2 mmx mmxext 3dnow 3dnowext cmov fxsr_opt", "fpu tsc"},
		{"smap", "lass", "smep"},
		{"lkgs", "fred", "wrmsrns"},
		{"spec_ctrl", "spec_ctrl_ssbd intel_stibp", "ibrs stibp ssbd"},
		{"sgx", "sgx_lc", "xsave"},
	} {
		for how, e := range map[string][]kvm.CPUIDEntry2{
			"masked":  with(t, offering(), "-"+c.root),
			"missing": with(t, offering(c.root), ""),
		} {
			for name := range strings.FieldsSeq(c.gone + " " + c.root) {
				if features()[name] == (feature{}) || has(e, name) {
					t.Errorf("%s %s: %s is still there", c.root, how, name)
				}
			}
			for name := range strings.FieldsSeq(c.stays) {
				if !has(e, name) {
					t.Errorf("%s %s: %s is gone", c.root, how, name)
				}
			}
		}
	}
}

// TestNeedsOrder: dropOrphans makes one pass over needs.
func TestNeedsOrder(t *testing.T) {
	for i, n := range needs {
		for name := range strings.FieldsSeq(n.need + " " + n.dependents) {
			if features()[name] == (feature{}) {
				t.Errorf("%q is not a feature", name)
			}
		}
		for _, later := range needs[i:] {
			if slices.Contains(strings.Fields(later.dependents), n.need) {
				t.Errorf("%s comes before %s, which it needs", n.need, later.need)
			}
		}
	}
}

func TestXsaveLeaf(t *testing.T) {
	for list, want := range map[string][3]uint32{ // EAX and ECX of subleaf 0, ECX of subleaf 1
		"":                 {0x602e7, 0x2b00, 0x1800},
		"-amx_tile":        {0x002e7, 0xa88, 0x1800},
		"-xgetbv1":         {0x002e7, 0xa88, 0x1800},
		"-avx512f":         {0x60207, 0x2b00, 0x1800},
		"-avx,-amx_tile":   {0x00203, 0xa88, 0x1800},
		"-avx,-pku,-xfd":   {0x00003, 0x240, 0x1800},
		"-shstk":           {0x602e7, 0x2b00, 0x1800},
		"-shstk,-ibt":      {0x602e7, 0x2b00, 0},
		"-xsaves,-avx512f": {0x00207, 0xa88, 0x1800},
	} {
		e := with(t, offering(), list)
		user, super := find(e, 0xd, 0), find(e, 0xd, 1)
		if got := [3]uint32{user.Eax, user.Ecx, super.Ecx}; got != want {
			t.Errorf("%q: leaf 0xd %#x, want %#x", list, got, want)
		}
		for i := uint32(2); i < 32; i++ {
			if (find(e, 0xd, i) != nil) != ((user.Eax|super.Ecx)>>i&1 != 0) {
				t.Errorf("%q: subleaf %d of leaf 0xd does not go with its bit", list, i)
			}
		}
	}
	e := with(t, offering(), "-xsave,-sgx,-svm,-intel_pt")
	for _, l := range e {
		if name := leafNeeds[l.Function]; name != "" {
			t.Errorf("leaf %#x is there without %s", l.Function, name)
		}
	}
}

func TestDemandWithoutNeed(t *testing.T) {
	for _, c := range []struct {
		without, list, want string
	}{
		{"xsave", "+avx2", "CPU feature avx2 needs avx, which needs xsave, which this host's KVM does not offer"},
		{"", "-xsave,+avx2",
			"CPU feature avx2 needs avx, which needs xsave, which is masked: demand one or mask the other, not both"},
		{"", "+avx2,-avx", "CPU feature avx2 needs avx, which is masked"},
		{"xfd", "+amx_tile", "CPU feature amx_tile needs xfd, which this host's KVM does not offer"},
		{"avx2", "+avx2", "CPU feature avx2: this host's KVM does not offer it"},
	} {
		changes, err := ParseFeatures(c.list)
		if err != nil {
			t.Fatal(err)
		}
		_, err = CPUID(offering(c.without), CPUIDConfig{CPUs: 1, Features: changes})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s without %q: %v", c.list, c.without, err)
		}
	}
	with(t, offering(), "-avx,+avx,+avx2") // the last word counts
	own, err := ParseFeatures("+tsc_deadline_timer,+hypervisor,+kvm_msi_ext_dest_id")
	if err != nil {
		t.Fatal(err)
	}
	supported := offering("tsc_deadline_timer", "hypervisor", "kvm_msi_ext_dest_id")
	if _, err := CPUID(supported, CPUIDConfig{CPUs: 300, TSCDeadline: true, X2APIC: true, Features: own}); err != nil {
		t.Errorf("a bit that gvm itself adds: %v", err)
	}
}

func TestOrphans(t *testing.T) {
	if dropped, missing := Orphans(offering()); dropped != nil || missing != nil {
		t.Errorf("of a whole processor: %q for lack of %q", dropped, missing)
	}
	supported := offering("xsave", "smap")
	dropped, missing := Orphans(supported)
	if strings.Join(missing, " ") != "smap xsave" || !slices.IsSorted(dropped) {
		t.Errorf("missing %q, dropped %q", missing, dropped)
	}
	for name := range strings.FieldsSeq(needXSAVE + " lass") {
		if !slices.Contains(dropped, name) {
			t.Errorf("%s is not named", name)
		}
	}
	if !has(supported, "avx") {
		t.Error("the table itself was changed")
	}
}
