package vmcore

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"strconv"
	"strings"

	"github.com/bobuhiro11/gokvm/kvm"

	"gvm/guestmem"
	"gvm/vmm/x86"
)

const (
	infoName = "VMCOREINFO"
	// infoHeader is the size of the note's Elf64_Nhdr, and of its name with padding.
	infoHeader, infoNameSize = 12, 12
	// maxInfo bounds the note's content. Linux gives it a page (VMCOREINFO_BYTES).
	maxInfo = 16 * pageSize
	// maxInfos bounds the notes that are looked at: a guest may fill its memory with them.
	maxInfos = 1000
	// maxImage is more than any image has, and ends before the modules of a kernel without KASLR.
	maxImage = 256 << 20
	// directMaps bounds the places of a direct map that are tried: those of 64 TiB, a GiB apart
	// (CONFIG_RANDOMIZE_MEMORY).
	directMaps = 64 << 10
	// maxStacks bounds the stacks of a CPU: those of a task and of interrupts and exceptions on it.
	maxStacks = 8
)

// vmcoreinfo is a note VMCOREINFO: Documentation/admin-guide/kdump/vmcoreinfo.rst.
type vmcoreinfo struct {
	desc   []byte
	values map[string]string
	space  *kvm.Sregs // a paging state that maps the kernel where the note says; nil: no CPU has it
}

// findInfo finds the note that Linux keeps in its memory; nil: none. The kernel tells its address
// to its own user space alone (/sys/kernel/vmcoreinfo), so all memory is searched. Memory may have
// more than one, of a kernel before kexec or in a file: the note is that whose kernel a CPU has
// mapped where it says, else the first.
func findInfo(ctx context.Context, mem *guestmem.Memory, cpus []CPU) (found *vmcoreinfo, err error) {
	const begins = infoName + "\x00\x00OSRELEASE="
	seen := 0
	for _, r := range mem.Regions() {
		err := r.Extents(ctx, func(from, to int) error {
			for at := from; at < to && seen < maxInfos; {
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				i := bytes.Index(r.Bytes[at:min(at+maxRun+len(begins)-1, to)], []byte(begins))
				if i < 0 {
					at += maxRun
					continue
				}
				note := at + i - infoHeader
				if at += i + 1; note < 0 {
					continue
				}
				seen++
				info := parseInfo(r.Bytes[note:min(note+infoHeader+infoNameSize+maxInfo, len(r.Bytes))])
				if info == nil {
					continue
				}
				if info.space = info.mapped(mem, cpus); info.space != nil {
					found, seen = info, maxInfos
				} else if found == nil {
					found = info
				}
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return found, nil
}

// parseInfo parses the note at the beginning of b, if it is one.
func parseInfo(b []byte) *vmcoreinfo {
	if len(b) < infoHeader+infoNameSize || binary.LittleEndian.Uint32(b) != uint32(len(infoName)+1) ||
		binary.LittleEndian.Uint32(b[8:]) != 0 || string(b[infoHeader:infoHeader+infoNameSize]) != infoName+"\x00\x00" {
		return nil
	}
	size := binary.LittleEndian.Uint32(b[4:])
	if b = b[infoHeader+infoNameSize:]; size > maxInfo || int(size) > len(b) {
		return nil
	}
	info := &vmcoreinfo{desc: bytes.Clone(b[:size]), values: map[string]string{}}
	for line := range strings.Lines(string(info.desc)) {
		if name, value, ok := strings.Cut(strings.TrimSuffix(line, "\n"), "="); ok {
			info.values[name] = value
		}
	}
	if info.release() == "" {
		return nil
	}
	return info
}

func (i *vmcoreinfo) release() string { return i.values["OSRELEASE"] }

// text returns the virtual and the physical address of the kernel's text.
func (i *vmcoreinfo) text() (virtual, physical uint64, ok bool) {
	virtual, err := strconv.ParseUint(i.values["SYMBOL(_stext)"], 16, 64)
	base, err2 := strconv.ParseInt(i.values["NUMBER(phys_base)"], 10, 64)
	return virtual, virtual - x86.KernelMap + uint64(base), err == nil && err2 == nil && virtual >= x86.KernelMap &&
		virtual-x86.KernelMap < x86.KernelSize
}

// mapped returns the paging state of a CPU that has the kernel's text mapped where the note says;
// nil: none has.
func (i *vmcoreinfo) mapped(mem *guestmem.Memory, cpus []CPU) *kvm.Sregs {
	virtual, physical, ok := i.text()
	if !ok {
		return nil
	}
	for _, c := range cpus {
		s := c.Sregs
		for _, cr3 := range []uint64{s.CR3, s.CR3 &^ x86.UserPageTable} {
			s.CR3 = cr3
			if at, ok := x86.Translate(mem.Read, &s, virtual); ok && at == physical {
				return &s
			}
		}
	}
	return nil
}

// directMap returns the virtual address of the kernel's mapping of all memory; 0: it is not known.
func (i *vmcoreinfo) directMap(mem *guestmem.Memory) uint64 {
	if i == nil || i.space == nil {
		return 0
	}
	_, physical, _ := i.text()
	for _, base := range [...]uint64{0xffff8880_00000000, 0xff110000_00000000} { // with 4 and 5 levels of page tables
		for range directMaps {
			if at, ok := x86.Translate(mem.Read, i.space, base+physical); ok && at == physical {
				return base
			}
			base += 1 << 30
		}
	}
	return 0
}

// stacks returns segments for the stacks of the CPUs, without their places in the file, as far as
// no other segment has them: CONFIG_VMAP_STACK puts stacks into an area of their own, and a
// debugger follows one by its virtual addresses. direct is the direct map.
func (i *vmcoreinfo) stacks(mem *guestmem.Memory, cpus []CPU, direct uint64) (progs []elf.Prog64) {
	if i == nil || i.space == nil {
		return nil
	}
	seen := map[uint64]bool{}
	for _, c := range cpus {
		if c.Sregs.SS.DPL != 0 { // in user space
			continue
		}
		next := []uint64{c.Regs.RSP}
		for n := 0; n < len(next) && n < maxStacks; n++ {
			at, mapped := next[n]&^(pageSize-1), 0
			for ; mapped < stackSize/pageSize && at >= 1<<63 && at < x86.KernelMap; mapped, at = mapped+1, at+pageSize {
				gpa, ok := x86.Translate(mem.Read, i.space, at)
				if _, err := mem.Slice(gpa, pageSize); !ok || err != nil || at == direct+gpa {
					break
				}
				if !seen[at] {
					seen[at] = true
					progs = append(progs, elf.Prog64{Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R | elf.PF_W), Vaddr: at,
						Paddr: gpa, Filesz: pageSize, Memsz: pageSize})
				}
			}
			if mapped == 0 {
				continue
			}
			// The stack of an interrupt has the stack pointer before it in its last word, that of an
			// exception has it in the one before, in struct pt_regs.
			var words [16]byte
			last := progs[len(progs)-1].Paddr + pageSize
			if mem.Read(last-16, words[:]) == nil {
				next = append(next, binary.LittleEndian.Uint64(words[8:]), binary.LittleEndian.Uint64(words[:]))
			}
		}
	}
	return progs
}

// image returns the segment of the kernel's image, without its place in the file. It begins at the
// 2 MiB page of the text.
func (i *vmcoreinfo) image(regions []guestmem.Region) (p elf.Prog64, ok bool) {
	if i == nil {
		return p, false
	}
	virtual, physical, ok := i.text()
	if !ok {
		return p, false
	}
	physical -= virtual & (2<<20 - 1)
	virtual &^= 2<<20 - 1
	for _, r := range regions {
		if r.Base <= physical && physical < r.End() {
			n := min(r.End()-physical, x86.KernelMap+x86.KernelSize-virtual, maxImage)
			return elf.Prog64{Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R | elf.PF_W | elf.PF_X),
				Vaddr: virtual, Paddr: physical, Filesz: n, Memsz: n}, true
		}
	}
	return p, false
}
