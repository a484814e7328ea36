package vmcore

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"testing"

	"github.com/bobuhiro11/gokvm/kvm"

	"gvm/guestmem"
	"gvm/vmm/x86"
)

const (
	lowSize, highBase, highSize = 8 << 20, 4 << 30, 1 << 20
	textAt                      = 4 << 20 // physical
	text                        = x86.KernelMap + 0x1220_0000
	direct                      = 0xffff8880_40000000 // one step above its first place
	stack, stackAt              = 0xffffc900_00008000, 0x30_0000
	oldStack                    = stack + 0x10_000 // that of the task which an interrupt interrupted
)

func infoText(release string, stext uint64, base int64) string {
	return fmt.Sprintf(
		"OSRELEASE=%s\nPAGESIZE=4096\nSYMBOL(_stext)=%x\nNUMBER(phys_base)=%d\nKERNELOFFSET=%x\n",
		release, stext, base, stext-x86.KernelMap-(16<<20))
}

func infoNote(desc string) []byte {
	var b bytes.Buffer
	writeNote(&b, infoName, 0, []byte(desc))
	return b.Bytes()
}

// memory is that of a guest whose kernel's text is at textAt, and was elsewhere before kexec.
func memory(t *testing.T, notes map[uint64]string) *guestmem.Memory {
	t.Helper()
	low := guestmem.Heap(0, lowSize).Regions()[0]
	high := guestmem.Heap(highBase, highSize).Regions()[0]
	mem, err := guestmem.Of(low, high)
	if err != nil {
		t.Fatal(err)
	}
	const present, large = 1, 1 << 7
	v := uint64(text)
	for at, entry := range map[uint64]uint64{ // of page tables at 0x2000, 0x4000 and 0x5000
		0x2000 + v>>39&511*8: 0x4000 | present, 0x4000 + v>>30&511*8: 0x5000 | present,
		0x5000 + v>>21&511*8: textAt | present | large,
		// The direct map, with pages of a GiB, and two stacks of a page.
		0x2000 + direct>>39&511*8: 0x20_0000 | present, 0x20_0000 + direct>>30&511*8: present | large,
		0x20_0000 + (direct>>30+4)&511*8: highBase | present | large,
		0x2000 + stack>>39&511*8:         0x20_1000 | present, 0x20_1000 + stack>>30&511*8: 0x20_2000 | present,
		0x20_2000 + stack>>21&511*8: 0x20_3000 | present, 0x20_3000 + stack>>12&511*8: stackAt | present,
		0x20_3000 + oldStack>>12&511*8: (stackAt + 2*pageSize) | present,
		stackAt + pageSize - 8:         oldStack + 0x123,
	} {
		if err := mem.Write(at, binary.LittleEndian.AppendUint64(nil, entry)); err != nil {
			t.Fatal(err)
		}
	}
	for at, desc := range notes {
		if err := mem.Write(at, infoNote(desc)); err != nil {
			t.Fatal(err)
		}
	}
	copy(low.Bytes[textAt:], "the kernel's text")
	high.Bytes[highSize-1] = 0xee
	return mem
}

// kernelCPU is in the kernel's page table, or in that of a process under page-table isolation.
func kernelCPU(user bool) (c CPU) {
	c.Sregs.CR0, c.Sregs.CR4, c.Sregs.EFER, c.Sregs.CR3 = 1<<31|1, 1<<5, 1<<10|1<<8, 0x2000
	if user {
		c.Sregs.CR3 |= x86.UserPageTable
	}
	return c
}

// file is a core in memory.
type file struct{ b []byte }

func (f *file) put(off int64, p []byte) error {
	if off < int64(len(f.b)) {
		return errors.New("not in ascending order")
	}
	f.b = append(append(f.b, make([]byte, off-int64(len(f.b)))...), p...)
	return nil
}

func write(t *testing.T, mem *guestmem.Memory, cpus []CPU) (*elf.File, string) {
	t.Helper()
	var f file
	size, release, err := Write(t.Context(), mem, cpus, f.put)
	if err != nil {
		t.Fatal(err)
	}
	f.b = append(f.b, make([]byte, size-int64(len(f.b)))...)
	e, err := elf.NewFile(bytes.NewReader(f.b))
	if err != nil {
		t.Fatal(err)
	}
	if e.Type != elf.ET_CORE || e.Machine != elf.EM_X86_64 || e.Class != elf.ELFCLASS64 || e.Data != elf.ELFDATA2LSB {
		t.Errorf("header: %+v", e.FileHeader)
	}
	return e, release
}

type note struct {
	name string
	kind uint32
	desc []byte
}

func notesOf(t *testing.T, e *elf.File) (notes []note) {
	t.Helper()
	b, err := io.ReadAll(e.Progs[0].Open())
	if err != nil || e.Progs[0].Type != elf.PT_NOTE {
		t.Fatalf("%v: %v", e.Progs[0].ProgHeader, err)
	}
	for len(b) > 0 {
		name, size := int(binary.LittleEndian.Uint32(b)), int(binary.LittleEndian.Uint32(b[4:]))
		n := note{string(b[12 : 12+name-1]), binary.LittleEndian.Uint32(b[8:]), nil}
		b = b[12+(name+3)&^3:]
		n.desc, b = b[:size], b[(size+3)&^3:]
		notes = append(notes, n)
	}
	return notes
}

// TestWrite: the core has all memory, the registers at the offsets of struct elf_prstatus and
// QEMUCPUState, and the note of the kernel that runs, with its image.
func TestWrite(t *testing.T) {
	const base = textAt - (text - x86.KernelMap)
	mem := memory(t, map[uint64]string{
		0x10_0000:            infoText("5.0.0-before-kexec", x86.KernelMap+16<<20, 0),
		lowSize - 2*pageSize: infoText("6.1.0-test", text, base),
		highBase:             infoText("7.0.0-in-a-file", x86.KernelMap+16<<20, 0),
	})
	cpus := []CPU{kernelCPU(false), kernelCPU(true)}
	cpus[0].Regs = kvm.Regs{R15: 15, RBX: 3, RAX: 1, RDI: 6, RIP: 0xffff_ffff_8100_0042, RFLAGS: 0x246, RSP: stack + 0x77}
	cpus[0].Sregs.CS = kvm.Segment{Selector: 0x10, Limit: 0xffffffff, Typ: 0xb, Present: 1, S: 1, L: 1, G: 1}
	cpus[0].Sregs.SS.Selector, cpus[0].Sregs.GS.Base, cpus[0].Sregs.FS.Base = 0x18, 0x9999, 0x8888
	cpus[0].Sregs.IDT, cpus[0].Sregs.CR2, cpus[0].KernelGSBase = kvm.Descriptor{Base: 0x1234, Limit: 0xfff}, 0x22, 0x5555
	e, release := write(t, mem, cpus)
	if release != "6.1.0-test" {
		t.Errorf("release %q", release)
	}
	notes := notesOf(t, e)
	want := []note{{"CORE", 1, nil}, {"CORE", 1, nil}, {"QEMU", 0, nil}, {"QEMU", 0, nil}, {"VMCOREINFO", 0, nil}}
	if len(notes) != len(want) {
		t.Fatalf("%d notes", len(notes))
	}
	for i, n := range notes {
		if n.name != want[i].name || n.kind != want[i].kind {
			t.Errorf("note %d is %s, type %d", i, n.name, n.kind)
		}
	}
	if got := string(notes[4].desc); got != infoText("6.1.0-test", text, base) {
		t.Errorf("VMCOREINFO %q", got)
	}
	status, state := notes[0].desc, notes[2].desc
	if len(status) != 336 || len(state) != 440 {
		t.Fatalf("NT_PRSTATUS has %d bytes, QEMU %d", len(status), len(state))
	}
	at := func(b []byte, off int) uint64 { return binary.LittleEndian.Uint64(b[off:]) }
	for off, value := range map[int]uint64{112: 15, 112 + 5*8: 3, 112 + 10*8: 1, 112 + 14*8: 6, 112 + 15*8: 1<<64 - 1,
		112 + 16*8: 0xffff_ffff_8100_0042, 112 + 17*8: 0x10, 112 + 18*8: 0x246, 112 + 19*8: stack + 0x77, 112 + 20*8: 0x18,
		112 + 21*8: 0x8888, 112 + 22*8: 0x9999} {
		if got := at(status, off); got != value {
			t.Errorf("elf_prstatus at %d: %#x, want %#x", off, got, value)
		}
	}
	if one, two := status[32], notes[1].desc[32]; one != 1 || two != 2 {
		t.Errorf("pids %d and %d", one, two)
	}
	for off, value := range map[int]uint64{0: 440<<32 | 1, 8: 1, 16: 3, 128: 15,
		136: 0xffff_ffff_8100_0042, 144: 0x246, 152: 0xffffffff<<32 | 0x10, 160: 0xa09b00,
		392 - 24: 0xfff << 32, 392 - 8: 0x1234,
		392: 1<<31 | 1, 392 + 16: 0x22, 392 + 24: 0x2000, 392 + 32: 1 << 5, 432: 0x5555} {
		if got := at(state, off); got != value {
			t.Errorf("QEMUCPUState at %d: %#x, want %#x", off, got, value)
		}
	}
	image := e.Progs[1]
	if image.Type != elf.PT_LOAD || image.Vaddr != text || image.Paddr != textAt || image.Filesz != lowSize-textAt {
		t.Errorf("the image is %+v", image.ProgHeader)
	}
	b, err := io.ReadAll(image.Open())
	if err != nil || !bytes.Equal(b, mem.Regions()[0].Bytes[textAt:]) {
		t.Errorf("the image's segment has other bytes: %v", err)
	}
	for i, r := range mem.Regions() {
		p := e.Progs[2+i]
		b, err := io.ReadAll(p.Open())
		if p.Type != elf.PT_LOAD || p.Paddr != r.Base || p.Vaddr != direct+r.Base ||
			p.Memsz != p.Filesz || err != nil || !bytes.Equal(b, r.Bytes) {
			t.Errorf("region %d: %+v, %d bytes, %v", i, p.ProgHeader, len(b), err)
		}
	}
	if len(e.Progs) != 6 {
		t.Fatalf("%d segments", len(e.Progs))
	}
	for i, vaddr := range []uint64{stack, oldStack} {
		p, paddr := e.Progs[4+i], uint64(stackAt+2*pageSize*i)
		b, err := io.ReadAll(p.Open())
		if p.Type != elf.PT_LOAD || p.Vaddr != vaddr || p.Paddr != paddr || err != nil ||
			!bytes.Equal(b, mem.Regions()[0].Bytes[paddr:][:pageSize]) {
			t.Errorf("stack %d: %+v, %v", i, p.ProgHeader, err)
		}
	}
}

// TestWriteWithoutInfo: a guest without the note is dumped too; with a note that no CPU confirms,
// this is taken.
func TestWriteWithoutInfo(t *testing.T) {
	e, release := write(t, memory(t, nil), make([]CPU, 1))
	if release != "" || len(e.Progs) != 3 || len(notesOf(t, e)) != 2 {
		t.Errorf("%q, %d segments", release, len(e.Progs))
	}
	e, release = write(t, memory(t, map[uint64]string{0x7004: "OSRELEASE=2.6.32\n"}), make([]CPU, 1))
	if release != "2.6.32" || len(e.Progs) != 3 || len(notesOf(t, e)) != 3 {
		t.Errorf("%q, %d segments", release, len(e.Progs))
	}
	failed := errors.New("no space")
	if _, _, err := Write(t.Context(), memory(t, nil), nil, func(off int64, _ []byte) error {
		if off > 0 {
			return failed
		}
		return nil
	}); err != failed {
		t.Errorf("put fails: %v", err)
	}
}

// FuzzFindInfo: memory is the guest's, and a note in it may say anything.
func FuzzFindInfo(f *testing.F) {
	f.Add(infoNote(infoText("6.1.0", text, -4096)), uint16(0))
	f.Add(infoNote("OSRELEASE=1\nNUMBER(phys_base)=-9223372036854775808\nSYMBOL(_stext)=ffffffffffffffff\n"), uint16(4095))
	f.Add([]byte("\x0b\x00\x00\x00\xff\xff\xff\xff\x00\x00\x00\x00VMCOREINFO\x00\x00OSRELEASE="), uint16(8190))
	f.Fuzz(func(t *testing.T, note []byte, at uint16) {
		mem := guestmem.Heap(0, 4*pageSize)
		b := mem.Regions()[0].Bytes
		copy(b[int(at)%len(b):], note)
		var core file
		size, _, err := Write(t.Context(), mem, []CPU{kernelCPU(false)}, core.put)
		if err != nil {
			t.Fatal(err)
		}
		e, err := elf.NewFile(bytes.NewReader(append(core.b, make([]byte, size-int64(len(core.b)))...)))
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range e.Progs {
			if p.Off+p.Filesz > uint64(size) || p.Type == elf.PT_LOAD && p.Paddr+p.Filesz > uint64(len(b)) {
				t.Errorf("segment %+v of %d bytes", p.ProgHeader, size)
			}
		}
	})
}

// looks is a context that ends, with errLooks, when it has been looked at so often.
type looks struct {
	context.Context
	left int
	end  context.CancelCauseFunc
}

var errLooks = errors.New("looked at too often")

func (l *looks) Err() error {
	if l.left == 0 {
		l.end(errLooks)
	}
	l.left--
	return l.Context.Err()
}

// TestWriteEnds: the search in memory and its copy look for the end of the context at every MiB,
// although memory without data puts nothing.
func TestWriteEnds(t *testing.T) {
	const size = 8 << 20
	mem := guestmem.Heap(0, size)
	clear(mem.Regions()[0].Bytes) // touches it
	write := func(n int) (left int, err error) {
		ctx := &looks{left: n}
		ctx.Context, ctx.end = context.WithCancelCause(t.Context())
		defer ctx.end(nil)
		_, _, err = Write(ctx, mem, make([]CPU, 1), new(file).put)
		return ctx.left, err
	}
	const plenty = 1000
	left, err := write(plenty)
	if n := plenty - left; n < 2*size>>20 || err != nil {
		t.Errorf("%d looks at %d MiB, %v", n, size>>20, err)
	}
	for n := range plenty - left {
		if _, err := write(n); err != errLooks {
			t.Errorf("after %d looks: %v", n, err)
		}
	}
}
