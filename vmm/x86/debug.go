package x86

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"github.com/bobuhiro11/gokvm/kvm"

	"gvm/kvmapi"
)

// MSRKernelGSBase is IA32_KERNEL_GS_BASE.
const MSRKernelGSBase = 0xc000_0102

// DebugState are the registers of a CPU that a debugger sees.
type DebugState struct {
	Regs         kvm.Regs
	Sregs        kvm.Sregs
	FPU          kvmapi.FPU
	KernelGSBase uint64
}

// debugRegisters are the registers in the order of DebugDescription.
type debugRegisters struct {
	General [16]uint64 // rax, rbx, rcx, rdx, rsi, rdi, rbp, rsp, r8 to r15
	RIP     uint64
	EFLAGS  uint32
	Segment [6]uint32 // cs, ss, ds, es, fs, gs
	ST      [8][10]byte
	FPU     [8]uint32 // fctrl, fstat, ftag, fiseg, fioff, foseg, fooff, fop
	XMM     [16][16]byte
	MXCSR   uint32
	Base    [2]uint64 // fs_base, gs_base
	System  [7]uint64 // k_gs_base, cr0, cr2, cr3, cr4, cr8, efer
}

// Bytes returns the registers in the order of DebugDescription.
func (s *DebugState) Bytes() []byte {
	r, sr := &s.Regs, &s.Sregs
	d := debugRegisters{
		General: [16]uint64{r.RAX, r.RBX, r.RCX, r.RDX, r.RSI, r.RDI, r.RBP, r.RSP, r.R8, r.R9, r.R10, r.R11, r.R12, r.R13,
			r.R14, r.R15},
		RIP:    r.RIP,
		EFLAGS: uint32(r.RFLAGS),
		Segment: [6]uint32{uint32(sr.CS.Selector), uint32(sr.SS.Selector), uint32(sr.DS.Selector), uint32(sr.ES.Selector),
			uint32(sr.FS.Selector), uint32(sr.GS.Selector)},
		FPU: [8]uint32{uint32(s.FPU.FCW), uint32(s.FPU.FSW), fullTags(s.FPU.FTWX), uint32(s.FPU.LastIP >> 32 & 0xffff),
			uint32(s.FPU.LastIP), uint32(s.FPU.LastDP >> 32 & 0xffff), uint32(s.FPU.LastDP), uint32(s.FPU.LastOpcode)},
		XMM:    s.FPU.XMM,
		MXCSR:  s.FPU.MXCSR,
		Base:   [2]uint64{sr.FS.Base, sr.GS.Base},
		System: [7]uint64{s.KernelGSBase, sr.CR0, sr.CR2, sr.CR3, sr.CR4, sr.CR8, sr.EFER},
	}
	for i := range d.ST {
		copy(d.ST[i][:], s.FPU.FPR[i][:])
	}
	b, err := binary.Append(nil, binary.LittleEndian, &d)
	if err != nil {
		panic(err) // the structure has a fixed size
	}
	return b
}

// SetBytes sets the registers from the form of Bytes. Segment selectors cannot change: a CPU would
// load their descriptors.
func (s *DebugState) SetBytes(b []byte) error {
	var d, old debugRegisters
	if err := binary.Read(bytes.NewReader(b), binary.LittleEndian, &d); err != nil {
		return fmt.Errorf("registers: %w", err)
	}
	if _, err := binary.Decode(s.Bytes(), binary.LittleEndian, &old); err != nil {
		panic(err)
	}
	if d.Segment != old.Segment {
		return errors.New("segment registers are read-only")
	}
	r, sr := &s.Regs, &s.Sregs
	for i, p := range []*uint64{&r.RAX, &r.RBX, &r.RCX, &r.RDX, &r.RSI, &r.RDI, &r.RBP, &r.RSP, &r.R8, &r.R9, &r.R10,
		&r.R11, &r.R12, &r.R13, &r.R14, &r.R15} {
		*p = d.General[i]
	}
	r.RIP, r.RFLAGS = d.RIP, uint64(d.EFLAGS)
	if d.FPU != old.FPU {
		s.FPU.FCW, s.FPU.FSW, s.FPU.FTWX = uint16(d.FPU[0]), uint16(d.FPU[1]), shortTags(d.FPU[2])
		s.FPU.LastIP = uint64(d.FPU[3]&0xffff)<<32 | uint64(d.FPU[4])
		s.FPU.LastDP = uint64(d.FPU[5]&0xffff)<<32 | uint64(d.FPU[6])
		s.FPU.LastOpcode = uint16(d.FPU[7])
	}
	for i := range d.ST {
		copy(s.FPU.FPR[i][:], d.ST[i][:])
	}
	s.FPU.XMM, s.FPU.MXCSR = d.XMM, d.MXCSR
	sr.FS.Base, sr.GS.Base = d.Base[0], d.Base[1]
	for i, p := range []*uint64{&s.KernelGSBase, &sr.CR0, &sr.CR2, &sr.CR3, &sr.CR4, &sr.CR8, &sr.EFER} {
		*p = d.System[i]
	}
	return nil
}

// fullTags returns the x87 tag word of FXSAVE's, which knows only empty registers (Intel SDM 1,
// 10.5.1.1): the others count as valid.
func fullTags(short uint8) (full uint32) {
	for i := range 8 {
		if short>>i&1 == 0 {
			full |= 3 << (2 * i)
		}
	}
	return full
}

func shortTags(full uint32) (short uint8) {
	for i := range 8 {
		if full>>(2*i)&3 != 3 {
			short |= 1 << i
		}
	}
	return short
}

// DebugSizes are the sizes in bytes of the registers of DebugDescription.
func DebugSizes() (sizes []int) {
	for _, run := range []struct{ n, size int }{{17, 8}, {7, 4}, {8, 10}, {8, 4}, {16, 16}, {1, 4}, {9, 8}} {
		for range run.n {
			sizes = append(sizes, run.size)
		}
	}
	return sizes
}

// DebugDescription returns the description of the registers for GDB. The first three features and
// their registers are GDB's ("Debugging with GDB", G.5.19); the names in the last one are QEMU's,
// so that scripts work with either.
func DebugDescription() string {
	var b description
	const core = "org.gnu.gdb.i386."
	b.WriteString(`<?xml version="1.0"?>
<!DOCTYPE target SYSTEM "gdb-target.dtd">
<target>
<architecture>i386:x86-64</architecture>
<feature name="` + core + "core\">\n")
	b.flags("i386_eflags", 4, "CF - PF - AF - ZF SF TF IF DF OF - - NT - RF VM AC VIF VIP ID")
	b.reg(64, "int64", "rax rbx rcx rdx rsi rdi")
	b.reg(64, "data_ptr", "rbp rsp")
	b.reg(64, "int64", "r8 r9 r10 r11 r12 r13 r14 r15")
	b.reg(64, "code_ptr", "rip")
	b.reg(32, "i386_eflags", "eflags")
	b.reg(32, "int32", "cs ss ds es fs gs")
	b.reg(80, "i387_ext", "st0 st1 st2 st3 st4 st5 st6 st7")
	b.reg(32, "int", "fctrl fstat ftag fiseg fioff foseg fooff fop")
	b.WriteString("</feature>\n<feature name=\"" + core + "sse" + "\">\n")
	b.WriteString(`<vector id="v4f" type="ieee_single" count="4"/>
<vector id="v2d" type="ieee_double" count="2"/>
<vector id="v16i8" type="int8" count="16"/>
<vector id="v8i16" type="int16" count="8"/>
<vector id="v4i32" type="int32" count="4"/>
<vector id="v2i64" type="int64" count="2"/>
<union id="vec128">
<field name="v4_float" type="v4f"/>
<field name="v2_double" type="v2d"/>
<field name="v16_int8" type="v16i8"/>
<field name="v8_int16" type="v8i16"/>
<field name="v4_int32" type="v4i32"/>
<field name="v2_int64" type="v2i64"/>
<field name="uint128" type="uint128"/>
</union>
`)
	b.flags("i386_mxcsr", 4, "IE DE ZE OE UE PE DAZ IM DM ZM OM UM PM - - FZ")
	for i := range 16 {
		b.reg(128, "vec128", fmt.Sprint("xmm", i))
	}
	b.reg(32, "i386_mxcsr", "mxcsr")
	b.WriteString("</feature>\n<feature name=\"" + core + "segments" + "\">\n")
	b.reg(64, "int", "fs_base gs_base")
	b.WriteString("</feature>\n<feature name=\"" + "org.gvm.system" + "\">\n")
	b.flags("cr0", 8, "PE MP EM TS ET NE - - - - - - - - - - WP - AM - - - - - - - - - - NW CD PG")
	b.flags("cr4", 8, "VME PVI TSD DE PSE PAE MCE PGE PCE OSFXSR OSXMMEXCPT UMIP LA57 VMXE SMXE - FSGSBASE PCIDE OSXSAVE "+
		"- SMEP SMAP PKE CET PKS")
	b.flags("efer", 8, "SCE - - - - - - - LME - LMA NXE SVME LMSLE FFXSR")
	b.reg(64, "int", "k_gs_base")
	b.reg(64, "cr0", "cr0")
	b.reg(64, "int", "cr2 cr3")
	b.reg(64, "cr4", "cr4")
	b.reg(64, "int", "cr8")
	b.reg(64, "efer", "efer")
	b.WriteString("</feature>\n</target>\n")
	return b.String()
}

// description is a target description in the making.
type description struct{ strings.Builder }

// reg adds registers of one type.
func (b *description) reg(bits int, kind, names string) {
	for _, name := range strings.Fields(names) {
		fmt.Fprintf(b, "<reg name=%q bitsize=\"%d\" type=%q/>\n", name, bits, kind)
	}
}

// flags adds a type of flags from bit 0 on; "-" is none.
func (b *description) flags(id string, size int, fields string) {
	fmt.Fprintf(b, "<flags id=%q size=\"%d\">\n", id, size)
	for at, name := range strings.Fields(fields) {
		if name != "-" {
			fmt.Fprintf(b, "<field name=%q start=\"%d\" end=\"%d\"/>\n", name, at, at)
		}
	}
	b.WriteString("</flags>\n")
}
