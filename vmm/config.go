// Package vmm builds a machine from a kernel and devices and runs it: guest memory, the platform of
// a small PC with ACPI and PCI, and virtual CPUs. It is a library: it reads no flags, prints
// nothing and does not exit.
package vmm

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"

	"gvm/devices/i6300esb"
	"gvm/devices/rtc"
	"gvm/devices/statusport"
	"gvm/devices/virtio"
	"gvm/guestmem"
	"gvm/inspect"
	"gvm/kvmapi"
	"gvm/vmm/boot"
	"gvm/vmm/vmcore"
	"gvm/vmm/x86"
)

// Config describes a machine. The zero value of every field but Kernel and Memory is useful.
type Config struct {
	Memory guestmem.Config
	CPUs   int // 0 is 1
	// APICIDs are the CPUs' local APIC IDs, ascending, the boot CPU first; nil: 0 to CPUs-1.
	APICIDs     []uint32
	CPUFeatures []x86.FeatureChange
	// Prepared, from Prepare for this Config, is used for the first machine of one Run; nil: Run
	// makes its own. The caller closes it, after Run.
	Prepared *Prepared

	Kernel   *boot.Image
	Initrds  []*boot.File
	CmdLine  string
	BootMode boot.Mode
	Protocol boot.Protocol // forces how an ELF kernel is entered; 0: PVH where it has it
	// KernelCache is a directory for decompressed kernels, such as
	// boot.CacheDir(); "" keeps none.
	KernelCache string

	// Devices become PCI functions in this order, from slot 1. They outlive the
	// machine: Run resets them, and a machine that reboots activates them again.
	Devices []virtio.Device

	Console Console // COM1; nil has no input and drops output
	COM2    Console // nil: there is no second UART
	// Status takes the reports of a program in the guest at the port of package statusport, on the
	// vCPU's thread; nil: there is no such port.
	Status func(statusport.Report)
	// Watchdog is the action when the guest's watchdog expires; 0: the guest has none.
	Watchdog WatchdogAction
	// Rebooting makes a reset by the guest start the machine again in place,
	// with fresh memory, until it ends otherwise.
	Rebooting bool
	// Pauser pauses the machine; nil: the machine is never paused.
	Pauser *Pauser
	// Debugger stops and steps the machine for a debugger; nil: none can.
	Debugger *Debugger
	// Inspector reads the machine's state; nil: only the report of a crash does.
	Inspector *Inspector
	// Inspect returns state beside that of this package; nil: none.
	Inspect func() []inspect.Node
	// KeepState keeps the state at the machine's end, in Outcome.State.
	KeepState bool
	// Final is called at an end that no other life follows, after the last instruction of each vCPU,
	// while the memory is there; nil: no call. It delays the end, by a second at most, and further as
	// long as it calls alive twice in a second.
	Final func(out Outcome, mem *guestmem.Memory, cpus []vmcore.CPU, alive func())
	// PanicText takes a Linux kernel's panic message on the console for a panic,
	// for guests without a pvpanic driver.
	PanicText bool

	Note  func(string)    // one-line remarks for the user; nil drops them
	Stamp func(code byte) // a guest write to port 0x80; nil drops it
	// Phase is called at the end of each phase of building the machine, and on the first vCPU's
	// thread just before it enters the guest; nil drops it. A reboot repeats the phases.
	Phase func(name string)
	// Seal is called once, when the machine is built and no thread of a vCPU runs yet; its error ends
	// Run. nil: no call.
	Seal func() error

	battery  *rtc.Battery   // the clock's state, kept by Run over a reboot
	watchdog *i6300esb.Kept // and the watchdog's
	// generation is the Virtual Machine Generation ID, another one for each Run. Microsoft's
	// specification has it stay over a reboot.
	generation [16]byte
}

// Entered is the last phase: the first vCPU is about to run its first instruction.
const Entered = "first instruction"

// PowerCycler is a virtio.Device with state that a power cycle of the machine resets. PowerOn is
// called before each life of the machine.
type PowerCycler interface{ PowerOn() }

// Console is the terminal of a serial port.
type Console interface {
	io.Writer // the guest's output, from one goroutine
	// Connect sets the destination of the guest's input; nil: none. A Write to the previous one
	// that waits for the guest has returned with an error.
	Connect(Input)
}

// Input is the terminal's side of a serial port. Both methods wait until the guest takes the input.
type Input interface {
	io.Writer
	Break() error // sends a break, which Linux takes as SysRq
}

type nullConsole struct{}

func (nullConsole) Write(p []byte) (int, error) { return len(p), nil }
func (nullConsole) Connect(Input)               {}

// Ending classifies how a run ended.
type Ending int

const (
	PoweredOff   Ending = iota + 1 // the guest turned itself off (ACPI S5)
	GuestReset                     // the guest asked for a reset, and Rebooting is false
	GuestPanic                     // the guest's kernel panicked
	GuestCrashed                   // triple fault, or KVM could not go on
	Stopped                        // the context was cancelled
	HostFailed                     // an operation on the host failed
	Bug                            // gvm has a bug
	Halted                         // Linux printed that it halts, and every CPU halted with interrupts disabled
	Expired                        // the guest's watchdog expired, with WatchdogExit
)

func (e Ending) String() string {
	return [...]string{"?", "powered off", "reset", "panicked", "crashed", "stopped", "host failed", "bug", "halted",
		"hung"}[e]
}

// Outcome is the end of a run.
type Outcome struct {
	Ending Ending
	// Err is the reason; nil for PoweredOff, GuestReset and Halted. For Stopped it is the context's
	// cause.
	Err error
	// Report has several lines of detail for GuestCrashed and Bug, and for GuestPanic if the guest
	// then crashed: registers and instruction bytes, or a stack; and the state of the devices. For
	// Stopped it has the state of CPUs and devices if Err is context.DeadlineExceeded.
	Report string

	// State is the machine's state at its end, after the last instruction of each vCPU, if
	// Config.KeepState is set and Left is not; else nil.
	State *inspect.Node

	// Left says that threads of vCPUs or devices did not end in time because they wait for the
	// host. They keep using guest memory and the devices' resources until the process ends.
	Left bool

	tripleFault bool
	restart     bool // GuestReset by Pauser.Reset, after which the machine starts again
}

// Run builds the machine of cfg and runs it until it ends or ctx is cancelled. It releases
// everything it made before it returns, unless Outcome.Left is set, or the storage of the kernel or
// an initrd did not answer when ctx ended: then that read and the guest's memory stay until it
// does. An error is a failure to build the machine: *boot.ImageError and *ConfigError are the
// user's, everything else the host's.
func Run(ctx context.Context, sys *kvmapi.System, cfg Config) (Outcome, error) {
	defer cfg.Pauser.end()
	defer cfg.Debugger.end()
	cfg.battery, cfg.watchdog = &rtc.Battery{}, &i6300esb.Kept{}
	rand.Read(cfg.generation[:])
	for {
		m, err := newMachine(ctx, sys, cfg)
		if cause := context.Cause(ctx); cause != nil && errors.Is(err, cause) {
			return Outcome{Ending: Stopped, Err: err}, nil
		}
		if err != nil {
			return Outcome{}, err
		}
		cfg.Prepared = nil // a reboot makes its own
		if cfg.Seal != nil {
			if err := cfg.Seal(); err != nil {
				_, closeErr := m.takeDown(ctx, false)
				return Outcome{}, errors.Join(err, closeErr)
			}
			cfg.Seal = nil
		}
		out := m.run(ctx)
		again := out.restart || out.Ending == GuestReset && cfg.Rebooting
		over, err := m.takeDown(ctx, again)
		if err != nil && out.Err == nil {
			out = Outcome{Ending: HostFailed, Err: err}
		}
		if !over && again {
			out = Outcome{Ending: Stopped, Err: context.Cause(ctx)}
		}
		if !out.restart {
			out = m.verdict(out)
		}
		if out.Left = !over; out.Left {
			return out, nil
		}
		out.State = m.last
		if out.Ending != GuestReset || !again {
			return out, nil
		}
		if ctx.Err() != nil {
			return Outcome{Ending: Stopped, Err: context.Cause(ctx)}, nil
		}
	}
}

// ConfigError reports a Config that this host or gvm does not support.
type ConfigError struct{ What string }

func (e *ConfigError) Error() string { return e.What }

func configErrorf(format string, args ...any) error {
	return &ConfigError{fmt.Sprintf(format, args...)}
}
