package vmm

import (
	"context"
	"encoding/binary"
	"os"
	"strings"
	"testing"

	"gvm/gdbstub"
	"gvm/guest-tests/lab"
)

// Addresses in the program of a script.
const (
	scriptStart = 2 << 20
	scriptLoop  = scriptStart + 7 // mov (%rsi), %dx
	scriptNext  = scriptStart + 10
)

// debugged runs a script under a Debugger, which is attached.
type debugged struct {
	*Debugger
	t       *testing.T
	pauser  Pauser
	console testConsole
	done    chan Outcome
	stop    context.CancelFunc
}

func underDebugger(t *testing.T, s script, cfg Config) *debugged {
	d := &debugged{t: t, done: make(chan Outcome, 1)}
	ctx, stop := context.WithCancel(t.Context())
	d.stop = stop
	d.Debugger = NewDebugger(true, stop)
	cfg.Debugger, cfg.Pauser, cfg.Console = d.Debugger, &d.pauser, &d.console
	go func() {
		out, _ := s.runContext(ctx, t, false, cfg)
		d.done <- out
	}()
	d.attach()
	return d
}

func (d *debugged) attach() {
	d.t.Helper()
	if stop, err := d.Attach(); err != nil || stop.Signal != gdbstub.SIGTRAP {
		d.t.Fatalf("attach: %+v, %v", stop, err)
	}
}

func (d *debugged) must(err error) {
	d.t.Helper()
	if err != nil {
		d.t.Fatal(err)
	}
}

// resume lets the first CPU do something, and returns the stop and where it is.
func (d *debugged) resume(kind gdbstub.ActionKind) (gdbstub.Stop, uint64) {
	d.t.Helper()
	actions := make([]gdbstub.Action, d.Threads())
	actions[0].Kind = kind
	d.must(d.Resume(actions))
	select {
	case stop := <-d.Stops():
		return stop, d.rip()
	case out := <-d.done:
		d.t.Fatalf("the machine has ended: %+v", out)
	}
	panic("not reached")
}

func (d *debugged) rip() uint64 {
	d.t.Helper()
	regs, err := d.Registers(1)
	d.must(err)
	return binary.LittleEndian.Uint64(regs[16*8:])
}

func (d *debugged) bytes(addr uint64, n int) []byte {
	d.t.Helper()
	b := make([]byte, n)
	_, err := d.ReadMemory(1, addr, b)
	d.must(err)
	return b
}

// wantEnd detaches, and wants the guest to end with all its output.
func (d *debugged) wantEnd(text string) {
	d.t.Helper()
	d.Detach()
	out := <-d.done
	if out.Ending != PoweredOff || d.console.out.String() != text {
		d.t.Errorf("%v, %v: %q; want %q", out.Ending, out.Err, d.console.out.String(), text)
	}
}

// breakpoint is a software breakpoint that the guest reaches. In the lab it is one in hardware: the
// lab's processor does not intercept int3.
func breakpoint(addr uint64) gdbstub.Point {
	p := gdbstub.Point{Addr: addr, Len: 1}
	if os.Getenv(lab.InLabEnv) == "1" {
		p.Kind = gdbstub.HardwareBreakpoint
	}
	return p
}

func TestDebugger(t *testing.T) {
	d := underDebugger(t, script{}.print("abc").powerOff(), Config{CPUs: 2})
	if rip := d.rip(); rip != scriptStart {
		t.Fatalf("the first instruction is at %#x", rip)
	}
	stop, rip := d.resume(gdbstub.Step)
	if rip != scriptLoop || stop.Signal != gdbstub.SIGTRAP || stop.Thread != 1 || stop.Point != nil {
		t.Errorf("after a step: %+v at %#x", stop, rip)
	}
	own := d.bytes(scriptNext, 16)
	soft, reached := gdbstub.Point{Addr: scriptNext, Len: 1}, breakpoint(scriptNext)
	hard := gdbstub.Point{Kind: gdbstub.HardwareBreakpoint, Addr: scriptLoop, Len: 1}
	d.must(d.Insert(1, soft))
	d.must(d.Insert(1, soft)) // once more changes nothing
	if got := d.bytes(scriptNext, 16); string(got) != string(own) {
		t.Errorf("a breakpoint is visible: % x", got)
	}
	d.must(d.Remove(1, soft))
	d.must(d.Insert(1, reached))
	if stop, rip := d.resume(gdbstub.Continue); rip != scriptNext || stop.Point == nil || *stop.Point != reached {
		t.Errorf("at a software breakpoint: %+v, %+v at %#x", stop, stop.Point, rip)
	}
	d.must(d.Remove(1, reached))
	d.must(d.Insert(1, hard))
	if stop, rip := d.resume(gdbstub.Continue); rip != scriptLoop || stop.Point == nil || *stop.Point != hard {
		t.Errorf("at a hardware breakpoint: %+v at %#x", stop, rip)
	}
	d.must(d.Insert(1, reached))
	d.must(d.WriteMemory(1, scriptNext-1, d.bytes(scriptNext-1, 2))) // the breakpoint stays
	d.must(d.Remove(1, hard))
	if stop, rip := d.resume(gdbstub.Continue); rip != scriptNext {
		t.Errorf("at a software breakpoint: %+v, %+v at %#x", stop, stop.Point, rip)
	}

	regs, err := d.Registers(1)
	d.must(err)
	if got, want := len(regs), sum(d.RegisterSizes()); got != want {
		t.Errorf("%d bytes of registers; want %d", got, want)
	}
	if n := strings.Count(d.Description(), "<reg "); n != len(d.RegisterSizes()) {
		t.Errorf("%d registers are described, %d have a size", n, len(d.RegisterSizes()))
	}
	regs[8*8], regs[17*8+4+6*4] = 0x5a, 0x77 // r8, st0
	d.must(d.SetRegisters(1, regs))
	again, err := d.Registers(1)
	d.must(err)
	if string(again) != string(regs) {
		t.Errorf("registers were set to % x, and are % x", regs, again)
	}
	regs[17*8+4]++ // cs
	if err := d.SetRegisters(1, regs); err == nil {
		t.Error("a segment register was set")
	}
	if name, state := d.Thread(2); name != "CPU 1" || state != "uninitialized" {
		t.Errorf("thread 2: %s, %s", name, state)
	}
	if _, err := d.Registers(3); err == nil {
		t.Error("thread 3 has registers")
	}
	d.wantEnd("abc")
	if _, err := d.Attach(); err != nil { // Run has returned
		return
	}
	<-d.Ended()
}

func sum(sizes []int) (n int) {
	for _, size := range sizes {
		n += size
	}
	return n
}

// TestDebuggerUnmapped: a breakpoint where nothing is mapped takes a debug register, of which a CPU
// has four.
func TestDebuggerUnmapped(t *testing.T) {
	d := underDebugger(t, script{}.print("a").powerOff(), Config{})
	for i := range uint64(4) {
		d.must(d.Insert(1, gdbstub.Point{Addr: 0xffff_8000_0000_0000 + i<<12, Len: 1}))
	}
	if err := d.Insert(1, gdbstub.Point{Addr: 0xffff_8000_0001_0000, Len: 1}); err == nil {
		t.Error("a fifth was taken")
	}
	if err := d.Insert(1, gdbstub.Point{Kind: gdbstub.WriteWatchpoint, Addr: 0x1000, Len: 8}); err == nil {
		t.Error("a watchpoint was taken")
	}
	d.must(d.Remove(1, gdbstub.Point{Addr: 0xffff_8000_0000_0000, Len: 1}))
	if err := d.Insert(1, gdbstub.Point{Kind: gdbstub.WriteWatchpoint, Addr: 0x1001, Len: 8}); err == nil {
		t.Error("a watchpoint that takes four registers was taken")
	}
	d.must(d.Insert(1, gdbstub.Point{Kind: gdbstub.WriteWatchpoint, Addr: 0x1000, Len: 8}))
	if n, err := d.ReadMemory(1, 0xffff_8000_0000_0000, make([]byte, 8)); n != 0 || err == nil {
		t.Errorf("%d bytes were read where nothing is mapped: %v", n, err)
	}
	d.wantEnd("a")
}

// TestDebuggerLost: a client that leaves while the guest runs takes its breakpoints along.
func TestDebuggerLost(t *testing.T) {
	d := underDebugger(t, script{}.print(strings.Repeat("0123456789", 20)).powerOff(), Config{CPUs: 2})
	own := d.bytes(scriptStart, 64)
	for range 5 {
		// The guest hits this one at once, or never.
		d.must(d.Insert(1, breakpoint(scriptLoop)))
		d.must(d.Resume([]gdbstub.Action{{Kind: gdbstub.Continue}, {Kind: gdbstub.Continue}}))
		d.Detach()
		d.attach()
		if got := d.bytes(scriptStart, 64); string(got) != string(own) {
			t.Fatalf("the program is % x; want % x", got, own)
		}
	}
	d.wantEnd(strings.Repeat("0123456789", 20))
}

// TestDebuggerReset: after a reset a client has the machine at its first instruction again.
func TestDebuggerReset(t *testing.T) {
	d := underDebugger(t, script{}.print("a").reset(), Config{Rebooting: true})
	for range 3 {
		d.must(d.Insert(1, breakpoint(scriptNext)))
		if _, rip := d.resume(gdbstub.Continue); rip != scriptNext {
			t.Errorf("at the breakpoint: %#x", rip)
		}
		d.must(d.Remove(1, breakpoint(scriptNext)))
		if stop, rip := d.resume(gdbstub.Continue); rip != scriptStart || stop.Signal != gdbstub.SIGTRAP {
			t.Errorf("after the reset: %+v at %#x", stop, rip)
		}
	}
	d.Kill()
	if out := <-d.done; out.Ending != Stopped {
		t.Errorf("killed: %v", out.Ending)
	}
	<-d.Ended()
}

// TestDebuggerPause: a stopped machine counts as paused, and a paused one can be debugged.
func TestDebuggerPause(t *testing.T) {
	d := underDebugger(t, script{}.print("ab").powerOff(), Config{CPUs: 2})
	if err := d.pauser.Pause(t.Context()); err != ErrDebugged || !d.pauser.Paused() {
		t.Errorf("paused: %v", err)
	}
	if err := d.pauser.Resume(); err != ErrDebugged {
		t.Errorf("resumed: %v", err)
	}
	d.Detach()
	if out := <-d.done; out.Ending != PoweredOff {
		t.Error(out)
	}

	p, c, stop := pausableWith(t, "spin", Config{CPUs: 2, Rebooting: true, Debugger: NewDebugger(false, nil)})
	c.waitFor("spinning")
	if err := p.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	debugger := p.debugger.Load()
	if _, err := debugger.Attach(); err != nil {
		t.Fatal(err)
	}
	for i := range 2 {
		if _, err := debugger.Registers(i + 1); err != nil {
			t.Errorf("thread %d: %v", i+1, err)
		}
	}
	debugger.Detach()
	if err := p.Resume(); err != nil {
		t.Error(err)
	}
	if out := stop(); out.Ending != Stopped {
		t.Error(out)
	}
}

// TestHardParts divides watchpoints into what debug registers can watch.
func TestHardParts(t *testing.T) {
	for _, c := range []struct {
		addr, n uint64
		want    []uint64 // sizes
	}{
		{0x1000, 8, []uint64{8}}, {0x1004, 4, []uint64{4}}, {0x1002, 4, []uint64{2, 2}}, {0x1001, 8, []uint64{1, 2, 4, 1}},
		{0x1000, 16, []uint64{8, 8}}, {0x1000, 0, nil}, {1<<64 - 8, 8, []uint64{8}}, {1<<64 - 1, 2, []uint64{1, 1}},
	} {
		at := c.addr
		parts := hardParts(gdbstub.Point{Kind: gdbstub.WriteWatchpoint, Addr: c.addr, Len: c.n})
		if len(parts) != len(c.want) {
			t.Errorf("%#x, %d: %v", c.addr, c.n, parts)
			continue
		}
		for i, p := range parts {
			if p.addr != at || p.size != c.want[i] {
				t.Errorf("%#x, %d: %v; want the sizes %d", c.addr, c.n, parts, c.want)
			}
			at += p.size
		}
	}
}
