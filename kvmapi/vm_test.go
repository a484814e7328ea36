package kvmapi

import (
	"bytes"
	"encoding/binary"
	"errors"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvm/kvmapi/eventfd"
)

// testVM runs real-mode code at 0x1000 on one vCPU of a VM with 64 KiB of RAM.
// The goroutine is locked to its thread until the test ends.
type testVM struct {
	*VM
	cpu *VCPU
	ram []byte
}

func newTestVM(t *testing.T, code []byte, irqchip bool) *testVM {
	t.Helper()
	sys, err := Open()
	must(t, err)
	defer sys.Close()
	vm, err := sys.CreateVM()
	if err != nil {
		t.Fatal(err)
	}
	ram, err := unix.Mmap(-1, 0, 64<<10, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	copy(ram[0x1000:], code)
	if irqchip {
		must(t, vm.CreateIRQChip())
	}
	must(t, vm.SetMemory(0, 0, ram))
	cpu, err := vm.CreateVCPU(0)
	if err != nil {
		t.Fatal(err)
	}
	s, err := cpu.Sregs()
	if err != nil {
		t.Fatal(err)
	}
	s.CS.Base, s.CS.Selector = 0, 0
	must(t, cpu.SetSregs(s))
	r, err := cpu.Regs()
	if err != nil {
		t.Fatal(err)
	}
	r.RIP, r.RFLAGS = 0x1000, 2
	must(t, cpu.SetRegs(r))
	runtime.LockOSThread()
	cpu.Bind()
	t.Cleanup(func() {
		cpu.Unbind()
		runtime.UnlockOSThread()
		must(t, cpu.Close())
		must(t, vm.Close())
		must(t, unix.Munmap(ram))
	})
	return &testVM{vm, cpu, ram}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestInterruptedIsComplete: at ExitInterrupted the instruction of the last exit is finished.
func TestInterruptedIsComplete(t *testing.T) {
	v := newTestVM(t, []byte{
		0xe4, 0x42, // 1000: in al, 0x42
		0xf4, // 1002: hlt
	}, false)
	e := v.run(t)
	if e.Reason != ExitIO || e.Write {
		t.Fatal(e.String())
	}
	e.Data[0] = 0x5a
	must(t, v.cpu.Kick())
	if e, err := v.cpu.Run(); err != nil || e.Reason != ExitInterrupted {
		t.Fatalf("%+v, %v", e, err)
	}
	r, err := v.cpu.Regs()
	if must(t, err); r.RIP != 0x1002 || r.RAX&0xff != 0x5a {
		t.Errorf("rip %#x, al %#x after a kick behind IN", r.RIP, r.RAX&0xff)
	}
}

// TestExits counts the exits of a guest: those that Run returned, and KVM's own.
func TestExits(t *testing.T) {
	v := newTestVM(t, []byte{
		0xe6, 0x42, // out 0x42, al
		0xe4, 0x42, // in al, 0x42
		0xb8, 0x00, 0xf0, // mov ax, 0xf000
		0x8e, 0xd8, // mov ds, ax
		0xa2, 0x08, 0x00, // mov [8], al     (0xf0008: no RAM)
		0xf4, // hlt
	}, false)
	must(t, v.cpu.Kick())
	if e, err := v.cpu.Run(); err != nil || e.Reason != ExitInterrupted {
		t.Fatalf("%+v, %v", e, err)
	}
	for v.run(t).Reason != ExitHLT {
	}
	if e := v.cpu.Exits(); e.IO != 2 || e.MMIO != 1 || e.Interrupted == 0 {
		t.Errorf("%+v", e)
	}
	stats, err := v.cpu.Stats()
	must(t, err)
	if stats == nil {
		t.Skip("this KVM has no KVM_CAP_BINARY_STATS_FD (Linux 5.14)")
	}
	have := map[string]uint64{}
	for _, s := range stats {
		have[s.Name] = s.Value
	}
	// A KVM that emulates counts only some of the exits.
	if have["exits"] == 0 || have["mmio_exits"] == 0 {
		t.Errorf("%+v", stats)
	}
}

// TestParseStats: statistics of several values are left out, those that only grow are counters, and
// a file that ends early is an error.
func TestParseStats(t *testing.T) {
	le := binary.LittleEndian
	b := make([]byte, 0, 128)
	for _, v := range []uint32{0, 8, 3, 24, 24, 96} { // flags, name_size, num_desc, and offsets
		b = le.AppendUint32(b, v)
	}
	desc := func(name string, flags uint32, size uint16, offset uint32) {
		b = le.AppendUint16(le.AppendUint32(b, flags), 0)
		b = le.AppendUint32(le.AppendUint32(le.AppendUint16(b, size), offset), 0)
		b = append(b, (name + strings.Repeat("\x00", 8))[:8]...)
	}
	desc("hist", 0, 2, 0)
	desc("exits", 0x10, 1, 16) // KVM_STATS_UNIT_BYTES and other bits besides the type
	desc("mode", 1, 1, 8)      // KVM_STATS_TYPE_INSTANT
	for _, v := range []uint64{7, 8, 9} {
		b = le.AppendUint64(b, v)
	}
	got, err := parseStats(b)
	if err != nil || !slices.Equal(got, []Stat{{"exits", 9, true}, {"mode", 8, false}}) {
		t.Errorf("%+v, %v", got, err)
	}
	for n := range b {
		if got, err := parseStats(b[:n]); err == nil {
			t.Errorf("%d bytes of %d: %+v", n, len(b), got)
		}
	}
}

// run runs until an exit that is not a stray signal.
func (v *testVM) run(t *testing.T) Exit {
	t.Helper()
	for {
		e, err := v.cpu.Run()
		must(t, err)
		if e.Reason != ExitInterrupted {
			return e
		}
	}
}

func TestPortAndMemoryExits(t *testing.T) {
	v := newTestVM(t, []byte{
		0xb0, 0x5a, // mov al, 0x5a
		0xe6, 0x42, // out 0x42, al
		0xba, 0x34, 0x12, // mov dx, 0x1234
		0xed,             // in ax, dx
		0xa3, 0x00, 0x20, // mov [0x2000], ax
		0xb8, 0x00, 0xf0, // mov ax, 0xf000
		0x8e, 0xd8, // mov ds, ax
		0xa1, 0x08, 0x00, // mov ax, [8]     (0xf0008: no RAM)
		0xa3, 0x0c, 0x00, // mov [0xc], ax
		0xbe, 0x00, 0x30, // mov si, 0x3000
		0xb9, 0x03, 0x00, // mov cx, 3
		0x31, 0xc0, // xor ax, ax
		0x8e, 0xd8, // mov ds, ax
		0xf3, 0x6e, // rep outsb
		0xf4, // hlt
	}, false)
	copy(v.ram[0x3000:], "xyz")
	e := v.run(t)
	if e.Reason != ExitIO || !e.Write || e.Addr != 0x42 || e.Size != 1 || !bytes.Equal(e.Data, []byte{0x5a}) {
		t.Fatalf("OUT: %+v", e)
	}
	e = v.run(t)
	if e.Reason != ExitIO || e.Write || e.Addr != 0x1234 || e.Size != 2 || len(e.Data) != 2 {
		t.Fatalf("IN: %+v", e)
	}
	copy(e.Data, []byte{0xcd, 0xab})
	e = v.run(t)
	if !bytes.Equal(v.ram[0x2000:0x2002], []byte{0xcd, 0xab}) {
		t.Errorf("IN gave the guest % x", v.ram[0x2000:0x2002])
	}
	if e.Reason != ExitMMIO || e.Write || e.Addr != 0xf0008 || e.Size != 2 {
		t.Fatalf("MMIO read: %+v", e)
	}
	copy(e.Data, []byte{0x11, 0x22})
	e = v.run(t)
	if e.Reason != ExitMMIO || !e.Write || e.Addr != 0xf000c || !bytes.Equal(e.Data, []byte{0x11, 0x22}) {
		t.Fatalf("MMIO write: %+v", e)
	}
	// REP OUTSB: KVM may report the items one by one or together.
	var got []byte
	for len(got) < 3 {
		e = v.run(t)
		if e.Reason != ExitIO || !e.Write || e.Addr != 0x1234 || e.Size != 1 {
			t.Fatalf("REP OUTSB: %+v", e)
		}
		for i := range e.Count {
			got = append(got, e.Item(i)...)
		}
	}
	if string(got) != "xyz" {
		t.Errorf("REP OUTSB wrote %q", got)
	}
	if e = v.run(t); e.Reason != ExitHLT {
		t.Errorf("HLT: %+v", e)
	}
}

func TestKickStopsASpinningGuest(t *testing.T) {
	v := newTestVM(t, []byte{0xeb, 0xfe}, false) // jmp $
	must(t, v.cpu.Kick())                        // before Run: not lost
	e, err := v.cpu.Run()
	must(t, err)
	if e.Reason != ExitInterrupted {
		t.Fatalf("a kick before Run: %+v", e)
	}
	for range 3 {
		var stop atomic.Bool // set before the kick, read after Run, as in a machine
		kicked := make(chan error, 1)
		go func() {
			time.Sleep(20 * time.Millisecond)
			stop.Store(true)
			kicked <- v.cpu.Kick()
		}()
		for !stop.Load() {
			e, err := v.cpu.Run()
			must(t, err)
			if e.Reason != ExitInterrupted {
				t.Fatalf("spinning guest: %+v", e)
			}
		}
		must(t, <-kicked)
	}
}

func TestDoorbellAndInterrupt(t *testing.T) {
	v := newTestVM(t, []byte{
		0xb8, 0x00, 0xf0, 0x8e, 0xd8, // ds = 0xf000
		0xb8, 0x07, 0x00, // mov ax, 7
		0xa3, 0x00, 0x00, // mov [0], ax: the doorbell of 7
		0xb8, 0x08, 0x00, // mov ax, 8
		0xa3, 0x00, 0x00, // mov [0], ax: not matched, exits
		0xe6, 0x80, // out 0x80, al
	}, true)
	bell, err := eventfd.New()
	must(t, err)
	defer bell.Close()
	seven := uint64(7)
	d := Doorbell{Addr: 0xf0000, Len: 2, Match: &seven}
	must(t, v.AssignDoorbell(d, bell))
	if err := v.AssignDoorbell(d, bell); !errors.Is(err, unix.EEXIST) {
		t.Errorf("the same doorbell twice: %v", err)
	}
	e := v.run(t)
	if e.Reason != ExitMMIO || !e.Write || e.Data[0] != 8 {
		t.Fatalf("%+v", e)
	}
	if !bell.Pending() {
		t.Error("the doorbell of 7 did not ring")
	}
	must(t, v.DeassignDoorbell(d, bell))

	call, err := eventfd.New()
	must(t, err)
	defer call.Close()
	must(t, v.RouteMSI(FirstMSIGSI, 0xfee00000, 0x41))
	must(t, v.AssignIRQFD(call, FirstMSIGSI))
	must(t, v.DeassignIRQFD(call, FirstMSIGSI))
	must(t, call.Signal())
	if !call.Pending() {
		t.Error("a deassigned irqfd lost its event")
	}
	// Assigning delivers the pending signal and does not change the counter.
	must(t, v.AssignIRQFD(call, FirstMSIGSI))
	if was, err := call.Drain(); !was || err != nil {
		t.Errorf("drain: %v, %v", was, err)
	}
	must(t, call.Signal())
	must(t, v.DeassignIRQFD(call, FirstMSIGSI)) // KVM consumes it now, or from Linux 5.11 on with the signal
	if call.Pending() {
		t.Error("an assigned irqfd did not take its event")
	}
	must(t, v.RouteMSI(FirstMSIGSI, 0xfee01000, 0x42))
	must(t, v.RouteMSI(FirstMSIGSI+1, 0xfee00000, 0x43))
	if n := v.routes.NR; n != 16+23+2 {
		t.Errorf("%d routes", n)
	}
}

// TestMessageForNobody: a guest chooses the destinations of its I/O APIC's pins, so a message that
// no CPU takes is not an error.
func TestMessageForNobody(t *testing.T) {
	sys, err := Open()
	must(t, err)
	defer sys.Close()
	vm, err := sys.CreateVM()
	if err != nil {
		t.Fatal(err)
	}
	defer vm.Close()
	must(t, vm.CreateIRQChip())
	must(t, vm.SignalMSI(0xfee0_9000, 0x40))
	entry, err := vm.IOAPICEntry(4)
	if must(t, err); entry>>16&1 != 1 {
		t.Errorf("entry %#x of the I/O APIC is not masked after reset", entry)
	}
}

// TestELCR: an interrupt that ELCR makes level-triggered comes again after its end, as long as its
// line is high. One that is edge-triggered comes once.
func TestELCR(t *testing.T) {
	const interrupted, waiting = 0x42, 0x43
	for _, level := range []bool{false, true} {
		v := newTestVM(t, []byte{
			0xb0, 0x11, 0xe6, 0x20, 0xe6, 0xa0, // ICW1 of both PICs
			0xb0, 0x20, 0xe6, 0x21, 0xb0, 0x28, 0xe6, 0xa1, // ICW2: IRQ n is vector 0x20+n
			0xb0, 0x04, 0xe6, 0x21, 0xb0, 0x02, 0xe6, 0xa1, // ICW3: the cascade
			0xb0, 0x01, 0xe6, 0x21, 0xe6, 0xa1, // ICW4
			0xb0, 0xfb, 0xe6, 0x21, 0xe6, 0xa1, // all but 2 and 10 are masked
			0xfb,          // sti
			0xe6, waiting, // 1: out waiting, al
			0xeb, 0xfc, // jmp 1b
		}, true)
		copy(v.ram[0x1100:], []byte{
			0xe6, interrupted, // out interrupted, al
			0xb0, 0x20, 0xe6, 0xa0, 0xe6, 0x20, // EOI
			0xcf, // iret
		})
		binary.LittleEndian.PutUint32(v.ram[4*0x2a:], 0x1100)
		if level {
			must(t, v.SetELCR(1<<10))
		}
		count := func() (n int) {
			for range 10 {
				e := v.run(t)
				if e.Reason != ExitIO || e.Addr != interrupted && e.Addr != waiting {
					t.Fatal(e.String())
				}
				if e.Addr == interrupted {
					n++
				}
			}
			return n
		}
		if n := count(); n != 0 {
			t.Errorf("level-triggered %v: %d interrupts with the line low", level, n)
		}
		must(t, v.SetIRQ(10, true))
		if n := count(); level && n < 2 || !level && n != 1 {
			t.Errorf("level-triggered %v: %d interrupts with the line high", level, n)
		}
		must(t, v.SetIRQ(10, false))
		if n := count(); n > 1 { // one may be on its way
			t.Errorf("level-triggered %v: %d interrupts with the line low again", level, n)
		}
	}
}

func TestSupportedCPUIDAndCaps(t *testing.T) {
	sys, err := Open()
	must(t, err)
	defer sys.Close()
	ids, err := sys.SupportedCPUID()
	must(t, err)
	var kvmLeaf bool
	for _, e := range ids {
		kvmLeaf = kvmLeaf || e.Function == 0x4000_0000 && e.Ebx == 0x4b4d564b // "KVMK"
	}
	if !kvmLeaf {
		t.Error("no KVM signature leaf")
	}
	if sys.Check(CapMaxVCPUs) < 1 || sys.Check(CapImmediateExit) != 1 {
		t.Errorf("max vCPUs %d, immediate_exit %d", sys.Check(CapMaxVCPUs), sys.Check(CapImmediateExit))
	}
}

func TestSingleStepAndBreakpoint(t *testing.T) {
	v := newTestVM(t, []byte{
		0xb0, 0x01, // 1000: mov al, 1
		0xb0, 0x02, // 1002: mov al, 2
		0xb0, 0x03, // 1004: mov al, 3
		0xb0, 0x04, // 1006: mov al, 4
		0xf4, // 1008: hlt
	}, false)
	at := func() (rip, al uint64) {
		t.Helper()
		r, err := v.cpu.Regs()
		must(t, err)
		return r.RIP, r.RAX & 0xff
	}
	must(t, v.cpu.SetGuestDebug(GuestDebug{Control: GuestDebugEnable | GuestDebugSingleStep}))
	for i := range uint64(2) {
		e := v.run(t)
		if rip, al := at(); e.Reason != ExitDebug || rip != 0x1002+2*i || al != 1+i {
			t.Fatalf("step %d: %s at %#x, al %d", i, e.String(), rip, al)
		}
	}
	// A hardware breakpoint on execution: DR7 enables DR0.
	must(t, v.cpu.SetGuestDebug(GuestDebug{Control: GuestDebugEnable | GuestDebugUseHWBP,
		DebugReg: [8]uint64{0: 0x1006, 7: 0x401}}))
	e := v.run(t)
	if rip, al := at(); e.Reason != ExitDebug || rip != 0x1006 || al != 3 {
		t.Fatalf("breakpoint: %s at %#x, al %d", e.String(), rip, al)
	}
	must(t, v.cpu.SetGuestDebug(GuestDebug{}))
	if e := v.run(t); e.Reason != ExitHLT {
		t.Errorf("without debugging: %s", e.String())
	}
}
