package vmm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/bobuhiro11/gokvm/kvm"

	"gvm/devices/acpipm"
	"gvm/devices/debugport"
	"gvm/devices/i6300esb"
	"gvm/devices/i8042"
	"gvm/devices/pci"
	"gvm/devices/pvpanic"
	"gvm/devices/rtc"
	"gvm/devices/serial"
	"gvm/devices/statusport"
	"gvm/devices/virtio"
	"gvm/devices/virtio/vpci"
	"gvm/guestmem"
	"gvm/inspect"
	"gvm/kvmapi"
	"gvm/kvmapi/eventfd"
	"gvm/vmm/acpi"
	"gvm/vmm/boot"
	"gvm/vmm/bus"
	"gvm/vmm/x86"
)

// machine is one life of a virtual machine, from its first instruction to its power-off or reset.
// The next life gets a new one; only the virtio devices, which are the Config's, stay.
type machine struct {
	cfg      Config
	sys      *kvmapi.System
	vm       *kvmapi.VM
	mem      *guestmem.Memory
	pio      bus.Bus
	mmio     bus.Bus
	coms     []*comPort
	status   *statusport.Device // nil: none
	rtc      *rtc.RTC
	console  *consoleWatch
	irqs     interrupts
	bus      *pci.Bus
	virtio   []*vpci.Device
	watchdog *i6300esb.Device // nil: none
	stops    sync.Mutex       // serializes followStops
	ids      []uint32         // local APIC IDs of cpus
	cpus     []*kvmapi.VCPU
	// questions are for the threads of cpus: each takes them where it is not in the guest.
	questions []chan question
	cpuid     []kvm.CPUIDEntry2 // supported by KVM
	entry     boot.Entry

	troubles troubles

	lifecycle
	panicked panicState
	halt     haltState
	pm       *acpipm.PM
	last     *inspect.Node // for Outcome.State
}

// newMachine builds a machine up to the point where its vCPUs can run. On an error it leaves
// nothing behind but what Prepared.load does.
func newMachine(ctx context.Context, sys *kvmapi.System, cfg Config) (_ *machine, err error) {
	m := &machine{cfg: cfg, sys: sys}
	m.lifecycle.init()
	if cfg.Debugger != nil {
		if err := canDebug(sys); err != nil {
			return nil, err
		}
	}
	if m.cfg.Console == nil {
		m.cfg.Console = nullConsole{}
	}
	if m.cfg.Note == nil {
		m.cfg.Note = func(string) {}
	}
	if m.cfg.Phase == nil {
		m.cfg.Phase = func(string) {}
	}
	if m.cfg.Prepared == nil {
		m.cfg.Prepared = Prepare(sys, m.cfg)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.close(), m.cfg.Prepared.Close())
		}
	}()
	for _, step := range []struct {
		name string
		do   func() error
	}{
		// Loading needs only the memory; meanwhile KVM makes the rest.
		{"ACPI tables, kernel, initrd", func() error { return m.loadKernel(ctx) }},
		{"virtual machine and memory", m.createVM},
		{"platform", m.addPlatform},
		{"PCI devices", m.addPCI},
		{"CPUs", m.startCPUs},
	} {
		if err := step.do(); err != nil {
			return nil, err
		}
		m.cfg.Phase(step.name)
	}
	return m, nil
}

// createVM moves the virtual machine, its memory and its vCPUs from Prepared to the machine.
func (m *machine) createVM() error {
	p := m.cfg.Prepared
	<-p.done
	if p.err != nil {
		return p.err
	}
	m.vm, m.irqs.vm, m.cpus = p.vm, p.vm, p.cpus
	for range m.cpus {
		m.questions = append(m.questions, make(chan question))
	}
	p.vm, p.mem, p.cpus = nil, nil, nil
	return nil
}

// addPlatform puts the devices of a PC at their ports.
func (m *machine) addPlatform() error {
	m.console = &consoleWatch{out: m.cfg.Console, on: m.cfg.PanicText, final: m.panicFinal, halt: m.haltSaid}
	if err := m.addCOM("COM1", serial.COM1, serial.COM1IRQ, m.cfg.Console, m.console); err != nil {
		return err
	}
	if c := m.cfg.COM2; c != nil {
		if err := m.addCOM("COM2", serial.COM2, serial.COM2IRQ, c, c); err != nil {
			return err
		}
	}
	if s := m.cfg.Status; s != nil {
		m.status = statusport.New(s)
		if err := m.pio.Add("status port", statusport.Port, statusport.Size, m.status); err != nil {
			return err
		}
	}

	m.pm = acpipm.New(acpipm.Config{
		PowerOff: func() { m.end(Outcome{Ending: PoweredOff}) },
		Reset:    m.reset,
		SCI:      func(level bool) { m.check(m.setPin(sciGSI, level)) },
	})
	m.rtc = rtc.New(rtc.Config{
		IRQ:     func(level bool) { m.check(m.setPin(rtc.IRQ, level)) },
		Alarm:   m.pm.RTCAlarm,
		Battery: m.cfg.battery,
	})
	m.bus = pci.NewBus(&space{&m.mmio}, m.pm.ResetControl())
	m.bus.Wire(m.intxLines())
	stamp := m.cfg.Stamp
	if stamp == nil {
		stamp = func(byte) {}
	}
	for _, d := range []struct {
		name       string
		base, size uint64
		bus.Handler
	}{
		{"RTC", rtc.Port, rtc.Size, m.rtc},
		{"i8042", i8042.Port, 1, i8042.Handler(m.reset)},
		{"ACPI PM", acpipm.Port, acpipm.Size, m.pm},
		{"pvpanic", pvpanic.Port, 1, pvpanic.Handler(m.pvpanic)},
		{"debug port", debugport.Port, 1, debugport.Handler(stamp)},
		{"PCI configuration", pci.PortBase, pci.PortSize, m.bus.Ports()},
	} {
		if err := m.pio.Add(d.name, d.base, d.size, d); err != nil {
			return err
		}
	}
	return m.mmio.Add("ECAM", ecamBase, ecamSize, m.bus.ECAM())
}

// comPort is a serial port.
type comPort struct {
	name    string
	pin     uint32
	irq     *eventfd.FD
	uart    *serial.UART
	console Console
}

// addCOM adds a serial port, whose output goes to out.
func (m *machine) addCOM(name string, base uint64, pin uint32, c Console, out io.Writer) error {
	irq, err := eventfd.New()
	if err != nil {
		return err
	}
	p := &comPort{name: name, pin: pin, irq: irq, console: c}
	p.uart = serial.New(serial.Config{Out: out, Raise: func() { m.check(m.raise(p)) }})
	m.coms = append(m.coms, p)
	if err := m.vm.AssignIRQFD(irq, pin); err != nil {
		return err
	}
	c.Connect(p.uart.Input())
	return m.pio.Add(name, base, serial.Size, p.uart)
}

// space maps BARs into the machine's memory-mapped address space. A window of the bus never reaches
// RAM, so an address chosen by the guest can only overlap devices.
type space struct{ bus *bus.Bus }

func (s *space) Map(name string, base, size uint64, h pci.Handler) error {
	return s.bus.Add(name, base, size, h)
}

func (s *space) Unmap(base uint64) error { return s.bus.Remove(base) }

func deviceName(i int, d virtio.Device) string {
	return fmt.Sprintf("virtio device %d (type %d)", i, d.ID())
}

// addPCI puts the virtio devices on the PCI bus and assigns their addresses.
func (m *machine) addPCI() error {
	for i, d := range m.cfg.Devices {
		if p, ok := d.(PowerCycler); ok {
			p.PowerOn()
		}
		v, err := vpci.New(vpci.Config{
			Name:      deviceName(i, d),
			Device:    d,
			Mem:       m.mem,
			Vectors:   m.irqs.vector,
			Doorbells: doorbells{m.vm},
			Log:       m.deviceTrouble,
			Context:   m.life,
		})
		if err != nil {
			return err
		}
		m.virtio = append(m.virtio, v)
		if _, err := m.bus.Add(v.Function()); err != nil {
			return err
		}
	}
	if err := m.addWatchdog(); err != nil {
		return err
	}
	return m.bus.Assign(pci.Window{Base: mmio32Base, Size: mmio32Size}, mmio64(m.mem, physBits(m.cpuid)))
}

// loadKernel writes the ACPI tables and the kernel into memory.
func (m *machine) loadKernel(ctx context.Context) error {
	p := m.cfg.Prepared
	<-p.mapped
	if p.mem == nil {
		<-p.done
		return p.err
	}
	m.mem, m.cpuid = p.mem, p.cpuid
	m.ids = m.cfg.apicIDs()
	m.irqs.extended = x2apic(m.ids)
	w := mmio64(m.mem, physBits(m.cpuid))
	tables, rsdp, err := acpi.Build(acpi.Config{
		Area:    acpi.Range{Base: acpiBase, Size: acpiSize},
		APICIDs: m.ids,
		ECAM:    ecamBase,
		Buses:   ecamSize / pci.ECAMSize,
		MMIO32:  acpi.Range{Base: mmio32Base, Size: mmio32Size},
		MMIO64:  acpi.Range{Base: w.Base, Size: w.Size},
		IOAPIC:  ioapicBase,
		SCI:     sciGSI,
		INTx:    intxIRQs[:],
		COM2:    m.cfg.COM2 != nil,

		GenerationID: &m.cfg.generation,
	})
	if err != nil {
		return fmt.Errorf("ACPI tables: %w", err)
	}
	if err := m.mem.Write(acpiBase, tables); err != nil {
		return fmt.Errorf("ACPI tables: %w", err)
	}
	m.entry, err = p.load(ctx, boot.Config{
		Kernel:   m.cfg.Kernel,
		Initrds:  m.cfg.Initrds,
		CmdLine:  m.cfg.CmdLine,
		Mode:     m.cfg.BootMode,
		Protocol: m.cfg.Protocol,
		Cache:    m.cfg.KernelCache,
		RSDP:     rsdp,
		E820:     boot.E820(m.mem, boot.E820Entry{Addr: ecamBase, Size: ecamSize, Type: boot.E820Reserved}),
		Note:     m.cfg.Note,
	})
	return err
}

// startCPUs sets the first vCPU to the kernel's entry.
func (m *machine) startCPUs() error {
	c := m.cpus[0]
	s, err := c.Sregs()
	if err != nil {
		return err
	}
	var r kvm.Regs
	switch m.entry.Protocol {
	case boot.PVH32:
		r, s = x86.StartPVH32(s, m.entry.RIP, m.entry.StartInfo)
	case boot.Linux64:
		r, s = x86.StartLong64(s, m.entry.RIP, m.entry.ZeroPage, m.entry.CR3, m.entry.GDT, m.entry.GDTLimit)
	default:
		return fmt.Errorf("boot protocol %v", m.entry.Protocol)
	}
	if err := c.SetSregs(s); err != nil {
		return err
	}
	return c.SetRegs(r)
}

// close undoes newMachine in reverse: devices first, so that none writes to freed memory.
func (m *machine) close() error {
	var errs []error
	m.watchdog.Close()
	for _, p := range m.coms {
		if m.closing.Store(p.name); p.console == m.cfg.Console {
			m.closing.Store(closingConsole)
		}
		p.console.Connect(nil)
		errs = append(errs, p.uart.Close())
	}
	if m.rtc != nil {
		m.rtc.Close()
	}
	for i, v := range m.virtio {
		m.closing.Store(deviceName(i, m.cfg.Devices[i]))
		errs = append(errs, v.Close())
	}
	m.closing.Store(closingKVM)
	m.tellMore()
	for _, c := range m.cpus {
		errs = append(errs, c.Close())
	}
	for _, p := range m.coms {
		errs = append(errs, p.irq.Close())
	}
	if m.vm != nil { // else Prepared owns both
		errs = append(errs, m.vm.Close(), m.mem.Close())
	}
	return errors.Join(errs...)
}
