package x86

import (
	"strings"
	"testing"

	"github.com/bobuhiro11/gokvm/kvm"
)

// host is a small supported table: an Intel host with four threads and an
// extended topology leaf of its own.
var host = []kvm.CPUIDEntry2{
	{Function: 0x1, Ebx: 0x07_08_08_00, Ecx: 1 << 21, Edx: 1 << 28},
	{Function: 0x4, Index: 0, Flags: 1, Eax: 0xfc00_4121},
	{Function: 0x4, Index: 3, Flags: 1, Eax: 0xfc03_c163},
	{Function: 0x4, Index: 4, Flags: 1},
	{Function: 0x7, Index: 0, Flags: 1, Ebx: 1 << 5},
	{Function: 0xb, Index: 0, Flags: 1, Eax: 1, Ebx: 2, Ecx: 0x100, Edx: 7},
	{Function: 0x8000_0008, Eax: 0x3030, Ecx: 0x2007},
}

func TestCPUIDTopology(t *testing.T) {
	for _, c := range []struct {
		cpus             int
		id               uint32
		ebx1, htt        uint32
		l1, l3, bits, nc uint32
	}{
		{1, 0, 0x0001_0800, 0, 0x121, 0x163, 0, 0},
		{4, 3, 0x0304_0800, 1, 0x0c00_0121, 0x0c00_c163, 2, 0x2003},
		{5, 4, 0x0408_0800, 1, 0x1c00_0121, 0x1c01_c163, 3, 0x3004},
		{300, 299, 0x2bff_0800, 1, 0xfc00_0121, 0xfc7f_c163, 9, 0x90ff},
	} {
		e, err := CPUID(host, CPUIDConfig{APICID: c.id, CPUs: c.cpus, TSCDeadline: true})
		if err != nil {
			t.Fatal(err)
		}
		one := find(e, 1, 0)
		if one.Ebx != c.ebx1 || one.Edx>>28&1 != c.htt {
			t.Errorf("%d CPUs: leaf 1 EBX %#x EDX %#x", c.cpus, one.Ebx, one.Edx)
		}
		if one.Ecx != 1<<31|1<<24|1<<21 {
			t.Errorf("%d CPUs: leaf 1 ECX %#x", c.cpus, one.Ecx)
		}
		if l1, l3 := find(e, 4, 0).Eax, find(e, 4, 3).Eax; l1 != c.l1 || l3 != c.l3 {
			t.Errorf("%d CPUs: caches %#x %#x", c.cpus, l1, l3)
		}
		if find(e, 4, 4).Eax != 0 {
			t.Errorf("%d CPUs: the end of leaf 4 is %#x", c.cpus, find(e, 4, 4).Eax)
		}
		th, co := find(e, 0xb, 0), find(e, 0xb, 1)
		if th.Eax != 0 || th.Ebx != 1 || th.Ecx != 0x100 || th.Edx != c.id || co.Eax != c.bits ||
			co.Ebx != uint32(c.cpus) || co.Ecx != 0x201 {
			t.Errorf("%d CPUs: leaf 0xb %+v %+v", c.cpus, th, co)
		}
		if find(e, 0x1f, 0) != nil {
			t.Errorf("%d CPUs: leaf 0x1f appeared, which the host lacks", c.cpus)
		}
		if got := find(e, 0x8000_0008, 0).Ecx; got != c.nc {
			t.Errorf("%d CPUs: 0x80000008 ECX %#x", c.cpus, got)
		}
	}
	if host[0].Ebx != 0x07_08_08_00 {
		t.Error("the host's own table was changed")
	}
}

func TestFeatures(t *testing.T) {
	e := with(t, offering(), "-x2apic,+avx2")
	if find(e, 1, 0).Ecx>>21&1 != 0 || find(e, 7, 0).Ebx>>5&1 != 1 {
		t.Errorf("leaf 1 ECX %#x, leaf 7 EBX %#x", find(e, 1, 0).Ecx, find(e, 7, 0).Ebx)
	}
	for list, want := range map[string]string{
		"x2apic":  "want + or - before a name",
		"-avx51":  "did you mean avx512f?",
		"+nosuch": "is not known",
		"-":       `"" is not known`,
	} {
		if _, err := ParseFeatures(list); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", list, err)
		}
	}
	fs, _ := ParseFeatures("+pku")
	if _, err := CPUID(host, CPUIDConfig{CPUs: 1, Features: fs}); err == nil ||
		!strings.Contains(err.Error(), "does not offer") {
		t.Errorf("a feature that the host lacks: %v", err)
	}
	for name, want := range map[string]feature{"hypervisor": {1, 0, ecx, 31}, "avx512vl": {7, 0, ebx, 31},
		"pks": {7, 0, ecx, 31}, "lm": {0x8000_0001, 0, edx, 29}, "kvmclock_stable": {0x4000_0001, 0, eax,
			24}, "spec_ctrl_ssbd": {7, 0, edx, 31}, "ibpb": {0x8000_0008, 0, ebx, 12}, "pdpe1gb": {0x8000_0001, 0, edx, 26}} {
		if features()[name] != want {
			t.Errorf("%s is %+v, want %+v", name, features()[name], want)
		}
	}
}

func TestStartStates(t *testing.T) {
	r, s := StartPVH32(kvm.Sregs{EFER: 0x500}, 0x100_0000, 0x7000)
	if r.RIP != 0x100_0000 || r.RBX != 0x7000 || s.CR0 != 0x11 || s.CR4 != 0 || s.EFER != 0 || s.CS.DB != 1 ||
		s.CS.L != 0 || s.TR.Limit != 0x67 {
		t.Errorf("PVH: %+v %+v", r, s)
	}
	r, s = StartLong64(kvm.Sregs{}, 0x20_0200, 0x8000, 0x9000, 0x500, 31)
	if r.RIP != 0x20_0200 || r.RSI != 0x8000 || s.CR3 != 0x9000 || s.EFER != 0x500 || s.CR4 != 0x20 || s.CS.L != 1 ||
		s.CS.DB != 0 || s.CS.Selector != 0x10 || s.SS.Selector != 0x18 || s.GDT.Base != 0x500 || s.GDT.Limit != 31 {
		t.Errorf("64-bit: %+v %+v", r, s)
	}
}

// TestTopology: a guest finds the same package and IDs in every leaf.
func TestTopology(t *testing.T) {
	amd := []kvm.CPUIDEntry2{
		{Function: 0x0, Eax: 0x1f},
		{Function: 0x1, Ebx: 0x07_08_08_00, Edx: 1 << 28},
		{Function: 0x4, Index: 3, Flags: 1, Eax: 0xfc03_c163},
		{Function: 0xb, Flags: 1, Eax: 1, Ebx: 2, Ecx: 0x100, Edx: 7},
		{Function: 0x1f, Flags: 1, Eax: 1, Ebx: 2, Ecx: 0x100, Edx: 7},
		{Function: 0x4000_0001, Eax: 1},
		{Function: 0x8000_0008, Ecx: 0x2007},
		{Function: 0x8000_001d, Index: 3, Flags: 1, Eax: 0x1c163},
		{Function: 0x8000_001e, Eax: 7, Ebx: 0x107, Ecx: 0x100},
	}
	for _, c := range []struct {
		cpus  int
		ids   []uint32 // of some CPUs, including the last
		shift uint32
	}{
		{1, []uint32{0}, 0},
		{2, []uint32{0, 1}, 1},
		{8, []uint32{0, 5, 7}, 3},
		{64, []uint32{0, 63}, 6},
		{255, []uint32{0, 254}, 8},
		{256, []uint32{0, 254, 255}, 8},
		{300, []uint32{0, 44, 255, 256, 299}, 9},
		{1024, []uint32{0, 255, 256, 1023}, 10},
		{2, []uint32{0, 300}, 9},
		{3, []uint32{1, 254, 255}, 8},
		{4, []uint32{0, 4095}, 12},
		{2, []uint32{0, 32767}, 15},
	} {
		last := c.ids[len(c.ids)-1]
		for _, id := range c.ids {
			e, err := CPUID(amd, CPUIDConfig{APICID: id, MaxAPICID: last, CPUs: c.cpus, X2APIC: last > 254})
			if err != nil {
				t.Fatal(err)
			}
			count := uint32(c.cpus)
			for _, leaf := range []uint32{0xb, 0x1f} {
				thread, core := find(e, leaf, 0), find(e, leaf, 1)
				if thread.Eax != 0 || thread.Ebx != 1 || thread.Edx != id || core.Eax != c.shift || core.Ebx != count ||
					core.Edx != id {
					t.Errorf("%d CPUs, ID %d: leaf %#x %+v %+v", c.cpus, id, leaf, thread, core)
				}
			}
			one := find(e, 1, 0)
			if one.Ebx>>24 != id&0xff || one.Ebx>>16&0xff != min(uint32(1)<<c.shift, 255) || one.Edx>>28&1 != min(count-1, 1) {
				t.Errorf("%d CPUs, ID %d: leaf 1 EBX %#x EDX %#x", c.cpus, id, one.Ebx, one.Edx)
			}
			if got, want := find(e, 0x8000_0008, 0).Ecx, c.shift<<12|min(count-1, 255); got != want {
				t.Errorf("%d CPUs: leaf 0x80000008 ECX %#x, want %#x", c.cpus, got, want)
			}
			if got := find(e, 0x8000_001e, 0); got.Eax != id || got.Ebx != id&0xff || got.Ecx != 0 {
				t.Errorf("%d CPUs, ID %d: leaf 0x8000001e %+v", c.cpus, id, got)
			}
			for _, leaf := range []uint32{0x4, 0x8000_001d} {
				if got, want := find(e, leaf, 3).Eax>>14&0xfff, min(uint32(1)<<c.shift-1, 0xfff); got != want {
					t.Errorf("%d CPUs: leaf %#x: %d processors share level 3, want %d", c.cpus, leaf, got+1, want+1)
				}
			}
			if got := has(e, "kvm_msi_ext_dest_id"); got != (last > 254) {
				t.Errorf("%d CPUs, highest ID %d: extended destination IDs %v", c.cpus, last, got)
			}
		}
	}
	old := []kvm.CPUIDEntry2{{Function: 0, Eax: 7}, {Function: 1}}
	e, err := CPUID(old, CPUIDConfig{APICID: 299, CPUs: 300, X2APIC: true})
	if err != nil {
		t.Fatal(err)
	}
	if find(e, 0, 0).Eax != 0xb || find(e, 0xb, 1) == nil || find(e, 0xb, 1).Edx != 299 || old[0].Eax != 7 {
		t.Errorf("a host without leaf 0xb: %+v", e)
	}
}
