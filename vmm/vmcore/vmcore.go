// Package vmcore writes the memory and the CPUs of a stopped machine as an ELF core, as Linux's
// kdump and QEMU's dump-guest-memory do, for crash, gdb, drgn and makedumpfile.
//
// The core has a note NT_PRSTATUS and a note QEMU for each CPU, and the note VMCOREINFO of the
// guest's kernel. A segment for each region of RAM has its physical addresses. With VMCOREINFO they
// have its virtual addresses too, another before them has the kernel's image, as that of
// /proc/vmcore, and others after them have the stacks of the CPUs.
package vmcore

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"

	"github.com/bobuhiro11/gokvm/kvm"

	"gvm/guestmem"
)

// CPU is the state of a CPU.
type CPU struct {
	Regs         kvm.Regs
	Sregs        kvm.Sregs
	KernelGSBase uint64 // MSR_KERNEL_GS_BASE
	Lost         bool   // KVM has reset the CPU: see LostRegisters
}

// LostRegisters says why the registers of a CPU are not those of the guest.
const LostRegisters = "registers are lost: on AMD, KVM resets a CPU that had a triple fault"

const (
	pageSize   = 4096
	headerSize = 64 // of Elf64_Ehdr
	phdrSize   = 56 // of Elf64_Phdr
	maxRun     = 1 << 20
)

// Write writes the core by put, in ascending order and without the zeros of memory, and returns its
// size. release is the kernel's release by VMCOREINFO; "": the memory has no such note. The error
// may be that of ctx: the size of memory, and a host that has swapped it out, delay no end.
func Write(
	ctx context.Context, mem *guestmem.Memory, cpus []CPU, put func(off int64, p []byte) error,
) (size int64, release string, err error) {
	var notes bytes.Buffer
	for i := range cpus {
		writeNote(&notes, "CORE", uint32(elf.NT_PRSTATUS), prstatus(i+1, &cpus[i]))
	}
	for i := range cpus {
		writeNote(&notes, "QEMU", 0, qemuState(&cpus[i]))
	}
	info, err := findInfo(ctx, mem, cpus)
	if err != nil {
		return 0, "", err
	}
	regions := mem.Regions()
	progs := []elf.Prog64{{Type: uint32(elf.PT_NOTE)}}
	if info != nil {
		writeNote(&notes, infoName, 0, info.desc)
	}
	if image, ok := info.image(regions); ok {
		progs = append(progs, image)
	}
	direct := info.directMap(mem)
	first := len(progs)
	for _, r := range regions {
		n := uint64(len(r.Bytes))
		progs = append(progs, elf.Prog64{Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R | elf.PF_W | elf.PF_X),
			Vaddr: direct + r.Base, Paddr: r.Base, Filesz: n, Memsz: n})
	}
	progs = append(progs, info.stacks(mem, cpus, direct)...)
	notesAt := uint64(headerSize + phdrSize*len(progs))
	progs[0].Off, progs[0].Filesz, progs[0].Memsz = notesAt, uint64(notes.Len()), uint64(notes.Len())
	at := roundUp(notesAt + progs[0].Filesz)
	for _, r := range regions {
		for i := range progs[1:] {
			if p := &progs[1+i]; r.Base <= p.Paddr && p.Paddr < r.End() {
				p.Off = at + p.Paddr - r.Base
			}
		}
		at += uint64(len(r.Bytes))
	}
	var head bytes.Buffer
	header := elf.Header64{Type: uint16(elf.ET_CORE), Machine: uint16(elf.EM_X86_64), Version: uint32(elf.EV_CURRENT),
		Phoff: headerSize, Ehsize: headerSize, Phentsize: phdrSize, Phnum: uint16(len(progs))}
	copy(header.Ident[:], elf.ELFMAG+"\x02\x01\x01") // ELFCLASS64, ELFDATA2LSB, EV_CURRENT
	for _, v := range []any{header, progs, notes.Bytes()} {
		_ = binary.Write(&head, binary.LittleEndian, v) // a Buffer takes all
	}
	if err := put(0, head.Bytes()); err != nil {
		return 0, "", err
	}
	for i, r := range regions {
		off := int64(progs[first+i].Off)
		if err := r.Extents(ctx, func(from, to int) error {
			return putData(ctx, r.Bytes[from:to], off+int64(from), put)
		}); err != nil {
			return 0, "", err
		}
	}
	if info != nil {
		release = info.release()
	}
	return int64(at), release, nil
}

func roundUp(n uint64) uint64 { return (n + pageSize - 1) &^ (pageSize - 1) }

var zeros [pageSize]byte

// putData puts the pages of b that are not zero, by runs of maxRun bytes at most.
func putData(ctx context.Context, b []byte, off int64, put func(off int64, p []byte) error) error {
	for ; len(b) > 0; b, off = b[min(maxRun, len(b)):], off+maxRun {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		part := b[:min(maxRun, len(b))]
		for at := 0; at < len(part); at += pageSize {
			n := at
			for n < len(part) {
				page := part[n:min(n+pageSize, len(part))]
				if bytes.Equal(page, zeros[:len(page)]) {
					break
				}
				n += len(page)
			}
			if n > at {
				if err := put(off+int64(at), part[at:n]); err != nil {
					return err
				}
				at = n
			}
		}
	}
	return nil
}

// writeNote adds an Elf64_Nhdr with its name and content, which the kernel and its readers align
// to 4.
func writeNote(b *bytes.Buffer, name string, kind uint32, desc []byte) {
	_ = binary.Write(b, binary.LittleEndian, []uint32{uint32(len(name)) + 1, uint32(len(desc)), kind})
	b.WriteString(name)
	b.Write(zeros[:4-len(name)%4])
	b.Write(desc)
	b.Write(zeros[:-len(desc)&3])
}

// elfPrstatus is struct elf_prstatus of Linux (include/uapi/linux/elfcore.h), with the
// user_regs_struct of x86-64 (arch/x86/include/asm/user_64.h).
type elfPrstatus struct {
	_   [32]byte // pr_info, pr_cursig, pr_sigpend, pr_sighold
	PID uint32
	_   [76]byte // the rest of the IDs, and times
	Reg struct {
		R15, R14, R13, R12, RBP, RBX, R11, R10, R9, R8, RAX, RCX, RDX, RSI, RDI, OrigRAX uint64
		RIP, CS, Flags, RSP, SS, FSBase, GSBase, DS, ES, FS, GS                          uint64
	}
	_ [8]byte // pr_fpvalid
}

func prstatus(pid int, c *CPU) []byte {
	r, s := &c.Regs, &c.Sregs
	p := elfPrstatus{PID: uint32(pid)}
	g := &p.Reg
	g.RAX, g.RBX, g.RCX, g.RDX, g.RSI, g.RDI = r.RAX, r.RBX, r.RCX, r.RDX, r.RSI, r.RDI
	g.RBP, g.RSP, g.RIP, g.Flags, g.OrigRAX = r.RBP, r.RSP, r.RIP, r.RFLAGS, ^uint64(0)
	g.R8, g.R9, g.R10, g.R11, g.R12, g.R13, g.R14, g.R15 = r.R8, r.R9, r.R10, r.R11, r.R12, r.R13, r.R14, r.R15
	g.CS, g.SS, g.DS, g.ES = uint64(s.CS.Selector), uint64(s.SS.Selector), uint64(s.DS.Selector), uint64(s.ES.Selector)
	g.FS, g.GS, g.FSBase, g.GSBase = uint64(s.FS.Selector), uint64(s.GS.Selector), s.FS.Base, s.GS.Base
	return encode(p)
}

func encode(v any) []byte {
	var b bytes.Buffer
	_ = binary.Write(&b, binary.LittleEndian, v)
	return b.Bytes()
}

// qemuSegment is QEMUCPUSegment of QEMU (target/i386/arch_dump.c).
type qemuSegment struct {
	Selector, Limit, Flags, _ uint32
	Base                      uint64
}

// qemuCPUState is QEMUCPUState, version 1, in which crash and drgn find control registers.
type qemuCPUState struct {
	Version, Size                          uint32
	RAX, RBX, RCX, RDX, RSI, RDI, RSP, RBP uint64
	R8, R9, R10, R11, R12, R13, R14, R15   uint64
	RIP, RFLAGS                            uint64
	CS, DS, ES, FS, GS, SS                 qemuSegment
	LDT, TR, GDT, IDT                      qemuSegment
	CR                                     [5]uint64
	KernelGSBase                           uint64
}

func qemuState(c *CPU) []byte {
	r, s := &c.Regs, &c.Sregs
	q := qemuCPUState{Version: 1, RAX: r.RAX, RBX: r.RBX, RCX: r.RCX, RDX: r.RDX, RSI: r.RSI, RDI: r.RDI, RSP: r.RSP,
		RBP: r.RBP, R8: r.R8, R9: r.R9, R10: r.R10, R11: r.R11, R12: r.R12, R13: r.R13, R14: r.R14, R15: r.R15,
		RIP: r.RIP, RFLAGS: r.RFLAGS,
		CS: segment(s.CS), DS: segment(s.DS), ES: segment(s.ES), FS: segment(s.FS), GS: segment(s.GS), SS: segment(s.SS),
		LDT: segment(s.LDT), TR: segment(s.TR),
		GDT: qemuSegment{Limit: uint32(s.GDT.Limit), Base: s.GDT.Base},
		IDT: qemuSegment{Limit: uint32(s.IDT.Limit), Base: s.IDT.Base},
		CR:  [5]uint64{s.CR0, 0, s.CR2, s.CR3, s.CR4}, KernelGSBase: c.KernelGSBase}
	q.Size = uint32(binary.Size(q))
	return encode(q)
}

// segment has the flags where the upper half of a segment descriptor has them (Intel SDM 3, 3.4.5).
func segment(s kvm.Segment) qemuSegment {
	flags := uint32(s.Typ)<<8 | uint32(s.S)<<12 | uint32(s.DPL)<<13 | uint32(s.Present)<<15 | uint32(s.AVL)<<20 |
		uint32(s.L)<<21 | uint32(s.DB)<<22 | uint32(s.G)<<23
	return qemuSegment{Selector: uint32(s.Selector), Limit: s.Limit, Flags: flags, Base: s.Base}
}
