package vmm

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/bobuhiro11/gokvm/kvm"

	"gvm/inspect"
	"gvm/kvmapi"
	"gvm/panics"
	"gvm/vmm/vmcore"
)

// inspectTime bounds one reading of a machine's state: what takes longer is busy.
const inspectTime = 500 * time.Millisecond

// Inspector reads the state of a running machine, and raises NMIs. The zero value is for one
// Config. Its methods may be called from any goroutine.
type Inspector struct {
	mu sync.RWMutex // held for reading while the state is read, which the end of a life cuts short
	m  *machine     // the current life; nil: the machine does not run
}

// Read returns the part of the machine's state at a path: see inspect.Node.Read. It takes half a
// second at most, and less if ctx or the machine's life ends. The error is ErrNotRunning, also if
// that life has ended meanwhile, or an *inspect.PathError.
func (i *Inspector) Read(ctx context.Context, path string) (inspect.Node, error) {
	i.mu.RLock()
	defer i.mu.RUnlock()
	m := i.m
	if m == nil {
		return inspect.Node{}, ErrNotRunning
	}
	ctx, cancel := context.WithTimeout(ctx, inspectTime)
	defer cancel()
	panics.Go(func() {
		select {
		case <-m.ended:
			cancel()
		case <-ctx.Done():
		}
	})
	n, err := m.state().Read(ctx, path)
	if m.life.Err() != nil { // which made parts busy
		return inspect.Node{}, ErrNotRunning
	}
	return n, err
}

// nmiPatience bounds the wait of an NMI for the vCPUs. A busy host may not run their threads for a
// while.
const nmiPatience = 5 * time.Second

// NMI raises a non-maskable interrupt on each vCPU that the guest has started, as the button of a
// server does. It takes five seconds at most, which only a vCPU that waits for a device needs. The
// error is ErrNotRunning, or context.DeadlineExceeded for such a vCPU; the others have the
// interrupt.
func (i *Inspector) NMI(ctx context.Context) error {
	i.mu.RLock()
	defer i.mu.RUnlock()
	if i.m == nil {
		return ErrNotRunning
	}
	return i.m.nmi(ctx)
}

// nmi raises an NMI on all vCPUs at once: see Inspector.NMI.
func (m *machine) nmi(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, nmiPatience)
	defer cancel()
	defer context.AfterFunc(m.life, panics.Func(cancel))()
	errs, waits := make([]error, len(m.cpus)), make([]bool, len(m.cpus))
	var asked sync.WaitGroup
	for i, c := range m.cpus {
		asked.Go(panics.Func(func() {
			waits[i] = !m.askUntil(ctx, i, func() { errs[i] = raiseNMI(c) })
		}))
	}
	asked.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	switch i := slices.Index(waits, true); {
	case m.life.Err() != nil && !slices.Contains(waits, false):
		return ErrNotRunning
	case m.life.Err() == nil && i >= 0: // else the interrupt ended the guest
		return fmt.Errorf("vCPU %d does not stop: %w", i, context.DeadlineExceeded)
	}
	return nil
}

// raiseNMI raises an NMI on a vCPU, on its thread. One that waits for its start ignores it.
func raiseNMI(c *kvmapi.VCPU) error {
	state, err := c.MPState()
	if err != nil || state == kvm.MPStateUninitialized || state == kvm.MPStateInitReceived {
		return err
	}
	return c.NMI()
}

// set sets the machine to read; nil when a life is over, before anything of it goes.
func (i *Inspector) set(m *machine) {
	if i == nil {
		return
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.m = m
}

// finalState returns the state of a machine whose vCPUs' threads have ended; nil if a bug has left
// it unreadable.
func (m *machine) finalState() (n *inspect.Node) {
	ctx, cancel := context.WithTimeout(context.Background(), reportTime)
	defer cancel()
	defer func() {
		if recover() != nil {
			n = nil
		}
	}()
	root, err := m.stateBy(func(_ context.Context, _ int, f func()) bool { f(); return true }).Read(ctx, "")
	if err != nil {
		return nil
	}
	return &root
}

// state returns the tree of the machine's state, which is read later.
func (m *machine) state() inspect.Node { return m.stateBy(m.ask) }

// stateBy is state with another way to ask the thread of a vCPU.
func (m *machine) stateBy(ask func(ctx context.Context, i int, f func()) bool) inspect.Node {
	root := inspect.Group("", inspect.Bool("paused", m.cfg.Pauser != nil && m.cfg.Pauser.Paused()),
		m.inspectMemory(), m.inspectCPUs(ask), m.inspectIOAPIC(), m.bus.Inspect())
	for _, p := range m.coms {
		root.Nodes = append(root.Nodes, p.uart.Inspect(strings.ToLower(p.name)))
	}
	if m.status != nil {
		value, reports, last := m.status.State()
		root.Nodes = append(root.Nodes, inspect.Group("status_port", inspect.Bits("value", value),
			inspect.Count("reports", reports), inspect.Int("last_kind", last.Kind), inspect.Int("last_value", last.Value)))
	}
	root.Nodes = append(root.Nodes, m.rtc.Inspect("rtc"), m.pm.Inspect("acpi_pm"),
		inspect.Text("generation_id", hex.EncodeToString(m.cfg.generation[:])))
	if m.cfg.Inspect != nil {
		root.Nodes = append(root.Nodes, m.cfg.Inspect()...)
	}
	return root
}

func (m *machine) inspectMemory() inspect.Node {
	memory := inspect.Group("memory")
	for i, r := range m.mem.Regions() {
		memory.Nodes = append(memory.Nodes, inspect.Lazy(fmt.Sprint(i), func(ctx context.Context) ([]inspect.Node, bool) {
			nodes := []inspect.Node{inspect.Bits("base", r.Base), inspect.Int("size", len(r.Bytes))}
			if n, ok := r.Resident(ctx); ok {
				nodes = append(nodes, inspect.Int("resident", n))
			}
			return nodes, true
		}))
	}
	return memory
}

// question is work for a vCPU's thread.
type question func()

// askPatience bounds the wait for a vCPU whose state is read with that of others: one that is in
// the guest stops within microseconds, unless the host is busy, and one that waits in a device does
// not. It is a variable for tests.
var askPatience = 50 * time.Millisecond

// ask is askUntil for askPatience.
func (m *machine) ask(ctx context.Context, i int, f func()) bool {
	ctx, cancel := context.WithTimeout(ctx, askPatience)
	defer cancel()
	return m.askUntil(ctx, i, f)
}

// askUntil has the thread of vCPU i do f outside of the guest, and reports whether it did before
// the end of ctx. Before the end of f it does not return.
func (m *machine) askUntil(ctx context.Context, i int, f func()) bool {
	done := make(chan struct{})
	for {
		// The thread may have returned from the guest before it can be asked: kick it again.
		if m.cpus[i].Kick() != nil {
			return false
		}
		select {
		case m.questions[i] <- func() { defer close(done); f() }:
			<-done
			return true
		case <-time.After(time.Millisecond):
		case <-ctx.Done():
			return false
		}
	}
}

// answer does the requests to vCPU i, on its thread.
func (m *machine) answer(i int) {
	select {
	case q := <-m.questions[i]:
		q()
	default:
	}
}

// mpStates are the names of the KVM_MP_STATE_ values that an x86 vCPU has.
var mpStates = [...]string{kvm.MPStateRunnable: "runnable", kvm.MPStateUninitialized: "uninitialized",
	kvm.MPStateInitReceived: "init_received", kvm.MPStateHalted: "halted", kvm.MPStateSipiReceived: "sipi_received"}

func (m *machine) inspectCPUs(ask func(ctx context.Context, i int, f func()) bool) inspect.Node {
	cpus := inspect.Group("vcpu")
	for i, c := range m.cpus {
		read := func(ctx context.Context) (nodes []inspect.Node, ok bool) {
			ok = ask(ctx, i, func() { nodes = inspectCPU(c, m.ids[i]) })
			return nodes, ok
		}
		cpus.Nodes = append(cpus.Nodes, inspect.Lazy(fmt.Sprint(i), read))
	}
	return cpus
}

// inspectCPU returns the registers of a vCPU, on its thread.
func inspectCPU(c *kvmapi.VCPU, id uint32) []inspect.Node {
	state, err := c.MPState()
	r, err2 := c.Regs()
	s, err3 := c.Sregs()
	if err := errors.Join(err, err2, err3); err != nil {
		return []inspect.Node{inspect.Text("error", err.Error())}
	}
	nodes := []inspect.Node{
		inspect.Int("apic_id", id), inspect.Text("mp_state", mpStates[min(int(state), len(mpStates)-1)]),
	}
	nodes = append(nodes, inspectRegisters(state, r, s)...)
	if !registersLost(state, r, s) || generalKept(r) { // else KVM has reset the APIC too
		nodes = append(nodes, inspectAPIC(c))
	}
	return append(nodes, inspectExits(c), inspectStats(c))
}

// inspectRegisters returns the registers of a vCPU, or an error in the place of those that are
// lost.
func inspectRegisters(mpState uint32, r kvm.Regs, s kvm.Sregs) []inspect.Node {
	bits := inspect.Bits[uint64]
	place := []inspect.Node{bits("rip", r.RIP), bits("rflags", r.RFLAGS)}
	general := []inspect.Node{
		bits("rax", r.RAX), bits("rbx", r.RBX), bits("rcx", r.RCX), bits("rdx", r.RDX),
		bits("rsi", r.RSI), bits("rdi", r.RDI), bits("rbp", r.RBP), bits("rsp", r.RSP),
		bits("r8", r.R8), bits("r9", r.R9), bits("r10", r.R10), bits("r11", r.R11),
		bits("r12", r.R12), bits("r13", r.R13), bits("r14", r.R14), bits("r15", r.R15),
	}
	if registersLost(mpState, r, s) {
		text := []inspect.Node{inspect.Text("error", vmcore.LostRegisters)}
		if generalKept(r) {
			return append(text, general...)
		}
		return text
	}
	return append(append(place, general...),
		bits("cr0", s.CR0), bits("cr2", s.CR2), bits("cr3", s.CR3), bits("cr4", s.CR4), bits("cr8", s.CR8),
		bits("efer", s.EFER), bits("apic_base", s.ApicBase),
		inspect.Int("cpl", s.SS.DPL),
		bits("cs", uint64(s.CS.Selector)), bits("cs_base", s.CS.Base),
		bits("fs_base", s.FS.Base), bits("gs_base", s.GS.Base),
		bits("gdt_base", s.GDT.Base), bits("idt_base", s.IDT.Base), bits("tr", uint64(s.TR.Selector)),
	)
}

// inspectAPIC returns registers of a vCPU's local APIC (Intel SDM volume 3, 12.4.1), on its thread.
func inspectAPIC(c *kvmapi.VCPU) inspect.Node {
	l, err := c.LAPIC()
	if err != nil {
		return inspect.Group("apic", inspect.Text("error", err.Error()))
	}
	word := func(at int) uint32 { return binary.LittleEndian.Uint32(l.Regs[at:]) }
	reg := func(name string, at int) inspect.Node { return inspect.Bits(name, word(at)) }
	vectors := func(name string, at int) inspect.Node {
		var set []string
		for v := range 256 {
			if word(at+v/32*16)>>(v%32)&1 != 0 {
				set = append(set, fmt.Sprintf("%#x", v))
			}
		}
		return inspect.Text(name, strings.Join(set, " ")).As(inspect.Passing)
	}
	return inspect.Group("apic", vectors("isr", 0x100), vectors("irr", 0x200), reg("tpr", 0x80), reg("ppr", 0xa0),
		reg("svr", 0xf0), reg("esr", 0x280), reg("lvt_timer", 0x320), reg("lvt_lint0", 0x350), reg("lvt_lint1", 0x360),
		reg("lvt_error", 0x370), reg("timer_initial", 0x380), reg("timer_current", 0x390), reg("timer_divide", 0x3e0))
}

// inspectIOAPIC returns the pins of the I/O APIC.
func (m *machine) inspectIOAPIC() inspect.Node {
	return inspect.Lazy("ioapic", func(context.Context) ([]inspect.Node, bool) {
		io, err := m.vm.IOAPIC()
		if err != nil {
			return []inspect.Node{inspect.Text("error", err.Error())}, true
		}
		pins := inspect.Group("pin")
		for i, e := range io.Redirection {
			pins.Nodes = append(pins.Nodes, inspect.Group(fmt.Sprint(i),
				inspect.Bits("redirection", e), inspect.Bits("vector", byte(e)), inspect.Bool("masked", e>>16&1 != 0),
				inspect.Bool("remote_irr", e>>14&1 != 0), inspect.Bool("requested", io.Requested>>i&1 != 0)))
		}
		return []inspect.Node{pins}, true
	})
}

// inspectExits returns the counts of the exits that a vCPU's thread took.
func inspectExits(c *kvmapi.VCPU) inspect.Node {
	e := c.Exits()
	return inspect.Group("exit", inspect.Count("io", e.IO), inspect.Count("mmio", e.MMIO),
		inspect.Count("interrupted", e.Interrupted))
}

// inspectStats returns KVM's statistics of a vCPU, on its thread.
func inspectStats(c *kvmapi.VCPU) inspect.Node {
	stats, err := c.Stats()
	kvm := inspect.Group("kvm")
	for _, s := range stats {
		n := inspect.Int(s.Name, s.Value)
		if s.Counter {
			n.Kind = inspect.Counter
		}
		kvm.Nodes = append(kvm.Nodes, n)
	}
	if err != nil {
		kvm.Nodes = []inspect.Node{inspect.Text("error", err.Error())}
	}
	return kvm
}

// Bounds of a report.
const (
	reportCPUs  = 16
	reportLines = 100
)

// reportTime bounds a report of a timeout or of a bug, which delays the end by that at most. It is
// a variable for tests.
var reportTime = 200 * time.Millisecond

// stateReport describes the machine at an end that its guest did not choose. It runs on no vCPU's
// thread.
func (m *machine) stateReport() string {
	ctx, cancel := context.WithTimeout(m.life, reportTime)
	defer cancel()
	var b strings.Builder
	cpus := m.inspectCPUs(m.ask).Nodes
	for _, cpu := range cpus[:min(len(cpus), reportCPUs)] {
		cpu, _ = cpu.Read(ctx, "")
		reportCPU(&b, cpu)
	}
	if n := len(cpus) - reportCPUs; n > 0 {
		fmt.Fprintf(&b, "%d more vCPUs\n", n)
	}
	m.reportDevices(ctx, &b)
	return b.String()
}

// vcpuReport describes a vCPU's part in an end that it caused, and the devices. It runs on
// the vCPU's thread, and asks no other.
func (m *machine) vcpuReport(index int, c *kvmapi.VCPU) string {
	ctx, cancel := context.WithTimeout(context.Background(), reportTime)
	defer cancel()
	var b strings.Builder
	reportCPU(&b, inspect.Group(fmt.Sprint(index), inspectExits(c), inspectStats(c)))
	m.reportDevices(ctx, &b)
	return b.String()
}

// reportLine adds a line with the values of n that keep selects, if there are any.
func reportLine(b *strings.Builder, path string, n inspect.Node, keep func(inspect.Node) bool) {
	var words []string
	for _, c := range n.Nodes {
		if c.Value != nil && keep(c) {
			words = append(words, fmt.Sprintf("%s %v", c.Name, c.Value))
		}
	}
	if len(words) > 0 {
		fmt.Fprintf(b, "%s: %s\n", path, strings.Join(words, ", "))
	}
}

// named selects values by name.
func named(names ...string) func(inspect.Node) bool {
	return func(n inspect.Node) bool { return slices.Contains(names, n.Name) }
}

// reportCPU adds lines about a vCPU: where it is, and its exits.
func reportCPU(b *strings.Builder, cpu inspect.Node) {
	path := "vcpu/" + cpu.Name
	if cpu.Value == inspect.Busy {
		fmt.Fprintf(b, "%s: busy\n", path)
	}
	reportLine(b, path, cpu, named("mp_state", "rip", "rflags", "cpl", "error"))
	for _, part := range cpu.Nodes {
		switch part.Name {
		case "exit":
			reportLine(b, path+"/exit", part, func(inspect.Node) bool { return true })
		case "kvm":
			reportLine(b, path+"/kvm", part, func(n inspect.Node) bool {
				return strings.HasSuffix(n.Name, "exits") && n.Value != uint64(0) || n.Name == "error"
			})
		}
	}
}

// reportDevices adds lines about the devices: the status of each, and the queues and disks that
// have work.
func (m *machine) reportDevices(ctx context.Context, b *strings.Builder) {
	var lines strings.Builder
	for _, group := range m.state().Nodes {
		if group.Name != "pci" && group.Name != "disk" {
			continue
		}
		group, _ = inspect.Group("", group).Read(ctx, group.Name)
		for _, d := range group.Nodes {
			reportDevice(&lines, group.Name+"/"+d.Name, d)
		}
	}
	n := 0
	for line := range strings.Lines(lines.String()) {
		if n++; n <= reportLines {
			b.WriteString(line)
		}
	}
	if n > reportLines {
		fmt.Fprintf(b, "%d more lines about devices\n", n-reportLines)
	}
}

// reportDevice adds lines about a device or a disk.
func reportDevice(b *strings.Builder, path string, d inspect.Node) {
	for path, v := range d.Values(path) {
		if v == inspect.Busy {
			fmt.Fprintf(b, "%s: busy\n", path)
		}
	}
	for _, part := range d.Nodes {
		switch at := path + "/" + part.Name; {
		case part.Name == "virtio" && part.Value == nil:
			reportLine(b, at, part, named("device_type", "device_status", "error"))
			for i := 0; ; i++ {
				q, err := part.Read(context.Background(), fmt.Sprintf("queue/%d", i))
				if err != nil {
					break
				}
				if n, ok := q.Get("in_flight").(int); ok && n > 0 || q.Get("avail_idx") != q.Get("used_idx") {
					reportLine(b, fmt.Sprintf("%s/queue/%d", at, i), q,
						named("avail_idx", "used_idx", "last_avail_idx", "in_flight"))
				}
			}
		case part.Name == "task":
			for _, task := range part.Nodes {
				reportLine(b, at+"/"+task.Name, task, named("command", "lba", "blocks", "age", "tag"))
			}
		}
	}
}
