package x86

import (
	"encoding/binary"
	"testing"

	"github.com/bobuhiro11/gokvm/kvm"

	"gvm/guestmem"
)

// tables writes paging entries to memory: address and value.
func tables(t *testing.T, size int, entries map[uint64]uint64) *guestmem.Memory {
	t.Helper()
	m := guestmem.Heap(0, 64<<10)
	for at, v := range entries {
		var b [8]byte
		binary.LittleEndian.PutUint64(b[:], v)
		if err := m.Write(at, b[:size]); err != nil {
			t.Fatal(err)
		}
	}
	return m
}

func TestTranslate(t *testing.T) {
	const none = ^uint64(0)
	long := kvm.Sregs{CR0: cr0PG | cr0PE, CR3: 0x1000 | 0x18, CR4: cr4PAE, EFER: eferLME | eferLMA}
	five := long
	five.CR3, five.CR4 = 0x6000, cr4PAE|cr4LA57
	pae := kvm.Sregs{CR0: cr0PG | cr0PE, CR3: 0x1020, CR4: cr4PAE}
	old := kvm.Sregs{CR0: cr0PG | cr0PE, CR3: 0x1000, CR4: cr4PSE}
	small := old
	small.CR4 = 0
	for _, c := range []struct {
		name    string
		s       kvm.Sregs
		size    int
		entries map[uint64]uint64
		want    map[uint64]uint64 // none: not mapped
	}{
		{"no paging", kvm.Sregs{CR0: cr0PE}, 8, nil, map[uint64]uint64{
			0x1234: 0x1234, 0xffff_ffff: 0xffff_ffff, 1 << 32: none}},
		{"4 levels", long, 8, map[uint64]uint64{
			0x1000: 0x2003, 0x1ff8: 0x2003, 0x2000: 0x3003,
			0x2008: 0x8000_0000_c000_1083, // 1 GiB, with NX and PAT
			0x3000: 0x4003, 0x3008: 0x1234_0000_0083 | 0x1000, 0x4008: 0x8000_0000_0005_6003, 0x4010: 0x5002,
		}, map[uint64]uint64{
			0x1abc: 0x56abc, 0x2000: none, 0x0: none, 0x20_0000: 0x1234_0000_0000, 0x3f_ffff: 0x1234_001f_ffff,
			0x4000_1234: 0xc000_1234, 0x8000_0000: none, 0x80_0000_0000: none,
			0xffff_ff80_0000_1abc: 0x56abc, 0x8000_0000_0000: none, 0xffff_7fff_ffff_ffff: none,
		}},
		{"5 levels", five, 8, map[uint64]uint64{
			0x6000: 0x1003, 0x6ff8: 0x1003, 0x1000: 0x2003, 0x2000: 0x3003, 0x3000: 0x4003,
			0x4008: 0x5_6003},
			map[uint64]uint64{0x1abc: 0x56abc,
				0xffff_0000_0000_1abc: 0x56abc, 1 << 56: none}},
		{"PAE", pae, 8, map[uint64]uint64{
			0x1020: 0x3001, 0x1038: 0x3001, 0x3000: 0x4003, 0x3008: 0x4_0000_0083, 0x4008: 0x5_6003},
			map[uint64]uint64{0x1abc: 0x56abc, 0x20_1234: 0x4_0000_1234,
				0xc000_1abc: 0x56abc, 0x4000_0000: none, 1 << 32: none}},
		{"32 bits", old, 4, map[uint64]uint64{0x1000: 0x2003, 0x1004: 0x0080_2083, 0x2004: 0x5_6003},
			map[uint64]uint64{0x1abc: 0x56abc, 0x40_1234: 0x1_0080_1234, 0x80_0000: none}},
		{"32 bits without large pages", small, 4, map[uint64]uint64{0x1000: 0x2083, 0x2004: 0x5_6003},
			map[uint64]uint64{0x1abc: 0x56abc}},
		{"tables outside of memory", long, 8, map[uint64]uint64{0x1000: 0xf_ffff_ffff_f003},
			map[uint64]uint64{0x1abc: none}},
	} {
		m := tables(t, c.size, c.entries)
		for linear, want := range c.want {
			gpa, ok := Translate(m.Read, &c.s, linear)
			if !ok {
				gpa = none
			}
			if gpa != want {
				t.Errorf("%s: %#x is at %#x; want %#x", c.name, linear, gpa, want)
			}
		}
	}
}

// FuzzTranslate: page tables and control registers are the guest's.
func FuzzTranslate(f *testing.F) {
	f.Add(uint64(0x1abc), uint64(cr0PG|cr0PE), uint64(0x1000), uint64(cr4PAE), uint64(eferLMA), []byte{0x03, 0x10})
	f.Add(uint64(0x1abc), uint64(cr0PG|cr0PE), uint64(0x1000), uint64(cr4PSE), uint64(0), []byte{0x83})
	f.Fuzz(func(t *testing.T, linear, cr0, cr3, cr4, efer uint64, entries []byte) {
		m := guestmem.Heap(0, 16<<10)
		if err := m.Write(0x1000, entries[:min(len(entries), 12<<10)]); err != nil {
			t.Fatal(err)
		}
		reads := 0
		gpa, ok := Translate(func(gpa uint64, p []byte) error { reads++; return m.Read(gpa, p) },
			&kvm.Sregs{CR0: cr0, CR3: cr3, CR4: cr4, EFER: efer}, linear)
		if reads > 5 {
			t.Errorf("%d reads", reads)
		}
		if ok && gpa>>52 != 0 {
			t.Errorf("%#x is no address", gpa)
		}
	})
}

// TestDebugState: the state set is the state read, and belongs to the description.
func TestDebugState(t *testing.T) {
	var s DebugState
	n := 0
	for _, size := range DebugSizes() {
		n += size
	}
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i)
	}
	segments := 17*8 + 4
	clear(b[segments : segments+6*4])
	fpu := segments + 6*4 + 8*10
	clear(b[fpu : fpu+8*4])
	if err := s.SetBytes(b); err != nil {
		t.Fatal(err)
	}
	if err := s.SetBytes(b[:n-1]); err == nil {
		t.Error("too few bytes were taken")
	}
	copy(b[fpu:], s.Bytes()[fpu:fpu+8*4])
	if got := s.Bytes(); string(got) != string(b) {
		t.Errorf("% x; want % x", got, b)
	}
	if s.Regs.RBX != 0x0f0e0d0c0b0a0908 || s.Regs.RIP&0xff != 16*8 {
		t.Errorf("rbx %#x, rip %#x", s.Regs.RBX, s.Regs.RIP)
	}
	if full := fullTags(0x81); full != 0x3ffc || shortTags(full) != 0x81 {
		t.Errorf("tags %#x", full)
	}
}
