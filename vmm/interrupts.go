package vmm

import (
	"errors"
	"fmt"
	"sync"

	"gvm/devices/pci"
	"gvm/kvmapi"
	"gvm/kvmapi/eventfd"
)

// interrupts allocates GSIs for message-signalled interrupts.
type interrupts struct {
	vm       *kvmapi.VM
	extended bool // messages carry 15 bits of destination ID

	mu   sync.Mutex
	next uint32
	free []uint32
}

// vector is a pci.Vector: an eventfd that is an irqfd of its GSI while the vector is unmasked.
// While masked, the eventfd keeps a signal as the pending bit.
type vector struct {
	of    *interrupts
	gsi   uint32
	event *eventfd.FD

	mu        sync.Mutex
	connected bool
}

// vector makes one masked vector.
func (in *interrupts) vector() (pci.Vector, error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	gsi := in.next
	if n := len(in.free); n > 0 {
		gsi, in.free = in.free[n-1], in.free[:n-1]
	} else if gsi = max(gsi, kvmapi.FirstMSIGSI); gsi >= kvmapi.MaxGSI-2*kvmapi.FirstMSIGSI {
		// The pins of the PICs and the IOAPIC take entries of the same table.
		return nil, fmt.Errorf("MSI-X: all %d interrupt routes of KVM are taken", kvmapi.MaxGSI)
	} else {
		in.next = gsi + 1
	}
	e, err := eventfd.New()
	if err != nil {
		in.free = append(in.free, gsi)
		return nil, err
	}
	return &vector{of: in, gsi: gsi, event: e}, nil
}

func (v *vector) Event() *eventfd.FD { return v.event }

func (v *vector) Unmask(m pci.Message) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.of.extended {
		m.Addr = extendedDestination(m.Addr)
	}
	if err := v.of.vm.RouteMSI(v.gsi, m.Addr, m.Data); err != nil || v.connected {
		return err
	}
	if err := v.of.vm.AssignIRQFD(v.event, v.gsi); err != nil {
		return err
	}
	v.connected = true
	_, err := v.event.Drain() // KVM has delivered a pending signal once
	return err
}

func (v *vector) Mask() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if !v.connected {
		return nil
	}
	v.connected = false
	return v.of.vm.DeassignIRQFD(v.event, v.gsi)
}

func (v *vector) Close() error {
	err := errors.Join(v.Mask(), v.event.Close())
	v.of.mu.Lock()
	v.of.free = append(v.of.free, v.gsi)
	v.of.mu.Unlock()
	return err
}

// intxLine is a level-triggered interrupt line that the INTx# of several slots drive.
type intxLine struct {
	set func(level bool) // sets the level of the pin
	// again says that raisePin may turn the pin's level into edges. Each slot that still asserts
	// the line then needs an edge of its own, because nothing checks the level at the end of an
	// interrupt.
	again bool

	mu   sync.Mutex
	high int // slots that assert it
}

func (l *intxLine) drive(level bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	was := l.high > 0
	if level {
		l.high++
	} else {
		l.high--
	}
	if is := l.high > 0; is != was || is && l.again {
		l.set(is)
	}
}

// intxLines returns the lines of the slots' INTA#: those of intxIRQs, in turn.
func (m *machine) intxLines() func(slot int) pci.Line {
	var lines [len(intxIRQs)]intxLine
	for i, irq := range intxIRQs {
		lines[i].set = func(level bool) { m.check(m.setPin(uint32(irq), level)) }
		lines[i].again = m.irqs.extended
	}
	return func(slot int) pci.Line {
		i := (slot - 1) % len(lines)
		return pci.Line{IRQ: intxIRQs[i], Set: lines[i].drive}
	}
}

// doorbells makes guest writes to an address signal an eventfd in the kernel.
type doorbells struct{ vm *kvmapi.VM }

// at returns the doorbell at a notify address. With length 0 KVM need not decode the instruction
// where the processor supports that, which is faster. Otherwise the length is the two bytes that a
// virtio driver writes (virtio 1.3, 4.1.5.2), and other widths reach the device's handler.
func (d doorbells) at(addr uint64) kvmapi.Doorbell {
	b := kvmapi.Doorbell{Addr: addr}
	if d.vm.Check(kvmapi.CapIOEventFDAnyLen) == 0 {
		b.Len = 2
	}
	return b
}

func (d doorbells) AddDoorbell(addr uint64, fd *eventfd.FD) error {
	return d.vm.AssignDoorbell(d.at(addr), fd)
}

func (d doorbells) RemoveDoorbell(addr uint64, fd *eventfd.FD) error {
	return d.vm.DeassignDoorbell(d.at(addr), fd)
}
