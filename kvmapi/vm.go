package kvmapi

import (
	"errors"
	"fmt"
	"sync"

	"github.com/bobuhiro11/gokvm/kvm"
	"golang.org/x/sys/unix"

	"gvm/kvmapi/eventfd"
)

// VM is a virtual machine's descriptor. Its methods may be called from several
// goroutines.
type VM struct {
	fd      int
	runSize int

	mu     sync.Mutex // guards routes
	routes *routing   // KVM's table, from CreateIRQChip on
}

// Close closes the VM. The kernel frees it once its vCPUs are closed too.
func (v *VM) Close() error { return unix.Close(v.fd) }

// Check is KVM_CHECK_EXTENSION for this VM.
func (v *VM) Check(capability int) int { return checkExtension(v.fd, capability) }

// enableCap is struct kvm_enable_cap.
type enableCap struct {
	Cap, Flags uint32
	Args       [4]uint64
	_          [64]byte
}

// EnableCap is KVM_ENABLE_CAP with one argument.
func (v *VM) EnableCap(capability int, arg uint64) error {
	_, err := ioctl(v.fd, fmt.Sprintf("KVM_ENABLE_CAP %d", capability), iow[enableCap](nrEnableCap),
		&enableCap{Cap: uint32(capability), Args: [4]uint64{arg}})
	return err
}

// SetTSSAddr gives KVM on Intel three guest physical pages for the TSS, which it uses while a vCPU
// is in real mode. They must be outside RAM and below 4 GiB.
func (v *VM) SetTSSAddr(gpa uint32) error {
	_, err := ioctlInt(v.fd, "KVM_SET_TSS_ADDR", kvm.IIO(nrSetTSSAddr), uintptr(gpa))
	return err
}

// SetIdentityMapAddr gives KVM on Intel a page as SetTSSAddr does, for a page table. It comes
// before the first vCPU.
func (v *VM) SetIdentityMapAddr(gpa uint64) error {
	_, err := ioctl(v.fd, "KVM_SET_IDENTITY_MAP_ADDR", iow[uint64](nrSetIdentityMapAddr), &gpa)
	return err
}

// SetBootCPU is KVM_SET_BOOT_CPU_ID: the vCPU with APIC ID id runs first, and the others wait for
// the start-up IPI. It comes before the first vCPU.
func (v *VM) SetBootCPU(id uint32) error {
	_, err := ioctlInt(v.fd, "KVM_SET_BOOT_CPU_ID", kvm.IIO(nrSetBootCPUID), uintptr(id))
	return err
}

// CreateIRQChip makes the in-kernel PIC, IOAPIC and local APICs, with the
// IOAPIC's pins as on a PC: the PIT at pin 2.
func (v *VM) CreateIRQChip() error {
	if _, err := ioctlInt(v.fd, "KVM_CREATE_IRQCHIP", kvm.IIO(nrCreateIRQChip), 0); err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.routes = pinRoutes()
	return v.setRoutes()
}

// pitConfig is struct kvm_pit_config.
type pitConfig struct {
	Flags uint32
	_     [15]uint32
}

const pitSpeakerDummy = 1 // KVM_PIT_SPEAKER_DUMMY

// CreatePIT makes the in-kernel 8254. The kernel also handles port 0x61, which Linux reads to
// calibrate the TSC.
func (v *VM) CreatePIT() error {
	_, err := ioctl(v.fd, "KVM_CREATE_PIT2", iow[pitConfig](nrCreatePIT2), &pitConfig{Flags: pitSpeakerDummy})
	return err
}

// SetMemory maps ram at guest physical address gpa as memory slot number slot.
// ram is mmapped memory that outlives the VM; its address, length and gpa are
// multiples of the page size. An empty ram removes the slot.
func (v *VM) SetMemory(slot uint32, gpa uint64, ram []byte) error {
	r := kvm.UserspaceMemoryRegion{Slot: slot, GuestPhysAddr: gpa, MemorySize: uint64(len(ram))}
	if len(ram) > 0 {
		r.UserspaceAddr = address(ram)
	}
	_, err := ioctl(v.fd, fmt.Sprintf("KVM_SET_USER_MEMORY_REGION slot %d at %#x, %#x bytes", slot, gpa, len(ram)),
		iow[kvm.UserspaceMemoryRegion](nrSetUserMemoryRegion), &r)
	return err
}

// irqLevel is struct kvm_irq_level.
type irqLevel struct{ IRQ, Level uint32 }

// SetIRQ sets the level of GSI irq: for level-triggered lines such as the SCI.
func (v *VM) SetIRQ(irq uint32, level bool) error {
	l := irqLevel{IRQ: irq}
	if level {
		l.Level = 1
	}
	_, err := ioctl(v.fd, "KVM_IRQ_LINE", iow[irqLevel](nrIRQLine), &l)
	return err
}

// pic is struct kvm_irqchip with struct kvm_pic_state in its union.
type pic struct {
	ID, _ uint32
	_     [14]byte
	ELCR  byte
	_     [497]byte // the union has 512 bytes
}

// SetELCR sets the edge/level control registers of the PICs, ports 0x4d0 and 0x4d1: they take the
// interrupts of the bits that are set as level-triggered. KVM_CREATE_IRQCHIP leaves all of them
// edge-triggered.
func (v *VM) SetELCR(levels uint16) error {
	for _, chip := range []uint32{ChipPIC0, ChipPIC1} {
		c := &pic{ID: chip}
		if _, err := ioctl(v.fd, "KVM_GET_IRQCHIP", iowr[pic](nrGetIRQChip), c); err != nil {
			return err
		}
		c.ELCR = byte(levels >> (8 * chip))
		if _, err := ioctl(v.fd, "KVM_SET_IRQCHIP", ior[pic](nrSetIRQChip), c); err != nil {
			return err
		}
	}
	return nil
}

// irqchip is struct kvm_irqchip with struct kvm_ioapic_state in its union.
type irqchip struct {
	ID, _            uint32
	Base             uint64
	Select, APICID   uint32
	IRR, _           uint32
	RedirectionTable [IOAPICPins]uint64
	_                [296]byte // the union has 512 bytes
}

// IOAPICPins is the number of the I/O APIC's pins.
const IOAPICPins = 24

// IOAPIC is the state of the I/O APIC.
type IOAPIC struct {
	Requested   uint32             // by pin: an interrupt waits
	Redirection [IOAPICPins]uint64 // the redirection table (82093AA, 3.2.4), with the bits that KVM itself ignores
}

// IOAPIC returns the state of the I/O APIC.
func (v *VM) IOAPIC() (IOAPIC, error) {
	c := &irqchip{ID: ChipIOAPIC}
	_, err := ioctl(v.fd, "KVM_GET_IRQCHIP", iowr[irqchip](nrGetIRQChip), c)
	return IOAPIC{c.IRR, c.RedirectionTable}, err
}

// IOAPICEntry returns the redirection table entry of a pin.
func (v *VM) IOAPICEntry(pin uint32) (uint64, error) {
	io, err := v.IOAPIC()
	return io.Redirection[pin], err
}

// msi is struct kvm_msi.
type msi struct {
	AddrLo, AddrHi, Data, Flags, DevID uint32
	_                                  [12]byte
}

// SignalMSI is KVM_SIGNAL_MSI: it sends one message-signalled interrupt. A message that no CPU
// takes (KVM returns -1, EPERM) is lost as on any machine.
func (v *VM) SignalMSI(addr uint64, data uint32) error {
	m := &msi{AddrLo: uint32(addr), AddrHi: uint32(addr >> 32), Data: data}
	_, err := ioctl(v.fd, "KVM_SIGNAL_MSI", iow[msi](nrSignalMSI), m)
	if errors.Is(err, unix.EPERM) {
		return nil
	}
	return err
}

// irqfd is struct kvm_irqfd.
type irqfd struct {
	FD, GSI, Flags, ResampleFD uint32
	_                          [16]byte
}

const irqfdDeassign = 1 // KVM_IRQFD_FLAG_DEASSIGN

// AssignIRQFD makes every signal of e raise GSI gsi, as an edge. A pending event is delivered at
// once, but stays in e's counter: drain e afterwards.
func (v *VM) AssignIRQFD(e *eventfd.FD, gsi uint32) error {
	_, err := ioctl(v.fd, fmt.Sprintf("KVM_IRQFD gsi %d", gsi), iow[irqfd](nrIRQFD), &irqfd{FD: uint32(e.Fd()), GSI: gsi})
	return err
}

// DeassignIRQFD undoes AssignIRQFD: after it returns, signals stay in e.
func (v *VM) DeassignIRQFD(e *eventfd.FD, gsi uint32) error {
	_, err := ioctl(v.fd, fmt.Sprintf("KVM_IRQFD gsi %d (deassign)", gsi), iow[irqfd](nrIRQFD),
		&irqfd{FD: uint32(e.Fd()), GSI: gsi, Flags: irqfdDeassign})
	return err
}

// ioeventfd is struct kvm_ioeventfd.
type ioeventfd struct {
	Datamatch, Addr uint64
	Len             uint32
	FD              int32
	Flags           uint32
	_               [36]byte
}

// Flags of KVM_IOEVENTFD.
const (
	ioeventfdDatamatch = 1 << 0
	ioeventfdPIO       = 1 << 1
	ioeventfdDeassign  = 1 << 2
)

// Doorbell selects the guest writes that signal an eventfd.
type Doorbell struct {
	Addr  uint64
	Len   uint32  // 1, 2, 4 or 8 bytes; 0 matches any length (needs CapIOEventFDAnyLen)
	Match *uint64 // the value written must equal it; nil: any value. Invalid with Len 0.
	PIO   bool    // Addr is an I/O port
}

func (v *VM) ioeventfd(d Doorbell, e *eventfd.FD, flags uint32, verb string) error {
	a := ioeventfd{Addr: d.Addr, Len: d.Len, FD: int32(e.Fd()), Flags: flags}
	if d.Match != nil {
		a.Flags |= ioeventfdDatamatch
		a.Datamatch = *d.Match
	}
	if d.PIO {
		a.Flags |= ioeventfdPIO
	}
	_, err := ioctl(v.fd, fmt.Sprintf("KVM_IOEVENTFD at %#x%s", d.Addr, verb), iow[ioeventfd](nrIOEventFD), &a)
	return err
}

// AssignDoorbell makes the guest's matching writes signal e in the kernel,
// without an exit to this process.
func (v *VM) AssignDoorbell(d Doorbell, e *eventfd.FD) error { return v.ioeventfd(d, e, 0, "") }

// DeassignDoorbell undoes AssignDoorbell with the same arguments.
func (v *VM) DeassignDoorbell(d Doorbell, e *eventfd.FD) error {
	return v.ioeventfd(d, e, ioeventfdDeassign, " (deassign)")
}

// CreateVCPU makes the vCPU whose APIC ID is id.
func (v *VM) CreateVCPU(id int) (*VCPU, error) {
	fd, err := ioctlInt(v.fd, fmt.Sprintf("KVM_CREATE_VCPU %d", id), kvm.IIO(nrCreateVCPU), uintptr(id))
	if err != nil {
		return nil, err
	}
	unix.CloseOnExec(fd)
	page, err := unix.Mmap(fd, 0, v.runSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("mmap of vCPU %d: %w", id, err)
	}
	return &VCPU{fd: fd, page: page, run: runData(page)}, nil
}
