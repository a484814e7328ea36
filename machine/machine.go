// Package machine runs virtual machines: a kernel, or gvm's own embedded guest, with virtio-scsi
// disks that gvm's SCSI target or the kernel's serves.
//
// Start makes a machine from a Spec and runs it. The machine can be paused, given disks and stopped
// while it runs; Wait returns how its guest ended. The package prints nothing and reads no flags: a
// Spec has functions for notes to the user and for the guest's console. When Wait returns, every
// goroutine and descriptor of the machine has ended, except those that wait for storage which does
// not answer (vmm.Outcome.Left). A panic of any goroutine that gvm started ends every machine of
// the program with the outcome vmm.Bug.
//
// IsConfig reports whether an error of Start or Wait is about the Spec. Any other error is about
// the host.
package machine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"gvm/control"
	"gvm/devices/block"
	"gvm/devices/scsi/trace"
	"gvm/devices/statusport"
	"gvm/devices/virtio"
	"gvm/devices/virtio/balloon"
	"gvm/devices/virtio/console"
	"gvm/devices/virtio/fs"
	"gvm/devices/virtio/vhostscsi"
	"gvm/devices/virtio/vhostvsock"
	"gvm/devices/virtio/vsock"
	"gvm/gdbstub"
	"gvm/guest/embedded"
	"gvm/guestmem"
	"gvm/inspect"
	"gvm/kvmapi"
	"gvm/kvmapi/nowait"
	"gvm/machine/disk"
	"gvm/panics"
	"gvm/sandbox"
	"gvm/text"
	"gvm/vmm"
	"gvm/vmm/boot"
	"gvm/vmm/vmcore"
	"gvm/vmm/x86"
)

// EmbeddedDisk is the size in bytes of the embedded guest's disk in memory, used if the Spec has no
// disks.
const EmbeddedDisk = 16 << 20

// Spec describes a machine. The zero value has no memory: Memory.Size is needed.
type Spec struct {
	Name   string // the machine's name in messages
	Memory guestmem.Config
	CPUs   int // 0 is 1
	// APICIDs are the CPUs' local APIC IDs, ascending; nil: 0 to CPUs-1.
	APICIDs     []uint32
	CPUFeatures []x86.FeatureChange
	Watchdog    vmm.WatchdogAction // 0: the guest has no watchdog
	Rebooting   bool               // a reset by the guest starts the machine again in place

	// Kernel and Initrds belong to the caller, which closes them after Wait. A nil Kernel is the
	// embedded guest, and GuestArgs are its words.
	Kernel    *boot.Image
	GuestArgs []string
	Initrds   []*boot.File
	// CmdLine is the kernel's. Unless BareCmdLine is set, it follows console=ttyS0, panic=-1, Words,
	// nokaslr for a debugged kernel that decompresses itself, and, if the first disk can be named
	// reliably, root= for that disk.
	CmdLine     string
	BareCmdLine bool
	Words       []string
	BootMode    boot.Mode
	Protocol    boot.Protocol // entry protocol of an ELF kernel; 0: PVH if the kernel supports it
	KernelCache string        // directory for decompressed kernels, such as boot.CacheDir(); "": none

	Disks    []disk.Spec
	Files    block.Files   // opens the disks' files, now and later; nil: block.System
	Queues   int           // request queues of a SCSI device; 0: one per CPU, disk.MaxQueues at most
	Poll     time.Duration // how long a request queue's thread polls before it sleeps
	VhostABI vhostscsi.ABIPolicy
	Trace    string // file to record every SCSI request in; "": none
	Version  string // the program's version, for Trace

	// Vsock is a socket device that this program serves, VhostVsock one that the kernel serves. nil:
	// the guest has none, as it has one at most.
	Vsock      *vsock.Config
	VhostVsock *vhostvsock.Config
	// Ports are streams that the guest finds by their names, as ports of a virtio console. They are
	// closed when the machine has ended.
	Ports []console.Port
	// HVC gives the guest a virtio console, which Linux calls hvc0, beside COM1: AttachHVC is its
	// other side. With Ports, it is the first port of their device, and most versions of Linux take
	// the columns of a terminal for its rows then (package console).
	HVC bool
	// Balloon gives the guest a balloon device: the guest reports its free memory, which then is the
	// host's again, and ResizeBalloon takes more.
	Balloon bool
	// Shares are directories of the host, a file system device each. Start sets their Files.
	Shares []fs.Share

	// Nets are network devices.
	Nets []Net

	// Console is COM1; nil: no input, and output is dropped.
	Console vmm.Console
	// Debug lets ServeDebugger serve debuggers. StartStopped has the machine wait for one before
	// its first instruction, and needs Debug.
	Debug, StartStopped bool
	// COM2 is a second serial port, which exists only if it is set: the guest's output goes to its
	// Write, and its Read's bytes to the guest. It is closed when the machine has ended, which ends
	// a Read and a Write.
	COM2 io.ReadWriteCloser
	// Status is that of vmm.Config.
	Status func(statusport.Report)
	// Ready is called when everything is open, before the guest runs; its error ends Start. The
	// context is done when the machine is to end. nil: no call.
	Ready func(context.Context) error
	Note  func(string) // takes one line for the user; nil drops it
	// Phase and Stamp are those of vmm.Config.
	Phase func(name string)
	Stamp func(code byte)

	KeepState bool // Wait's outcome has the state at the end: see vmm.Outcome
	// Final is called at the end, while the guest's memory is there: see vmm.Config.
	Final func(out vmm.Outcome, mem *guestmem.Memory, cpus []vmcore.CPU, alive func())

	Sandbox *Sandbox       // nil: none
	Jail    []inspect.Node // tells of the jail of this process, in which disk.Provision has been called; nil: none

	begun    *vmm.Begun
	prepared *vmm.Prepared
}

// Begin begins to make the virtual machine, so that the caller can open files meanwhile. It needs
// Memory, CPUs, APICIDs and CPUFeatures, which must not change afterwards. The caller calls Close
// after Wait, or instead of Start. b is KVM, already begun; Close closes it too.
func (s *Spec) Begin(b *vmm.Begun) {
	s.begun = b
	if _, err := b.System(); err == nil {
		s.prepared = b.Prepare(s.config())
	}
}

// Close releases everything that Begin made.
func (s *Spec) Close() (err error) {
	if s.prepared != nil {
		err = s.prepared.Close()
	}
	if s.begun != nil {
		err = errors.Join(err, s.begun.Close())
	}
	s.begun, s.prepared = nil, nil
	return err
}

// RequestQueues returns the number of request queues of a SCSI device of the machine.
func (s *Spec) RequestQueues() int {
	if s.Queues > 0 {
		return s.Queues
	}
	return min(max(s.CPUs, 1), disk.MaxQueues)
}

// config returns the part of the machine's vmm.Config that needs no file.
func (s *Spec) config() vmm.Config {
	return vmm.Config{
		Memory:      s.Memory,
		CPUs:        s.CPUs,
		APICIDs:     s.APICIDs,
		CPUFeatures: s.CPUFeatures,
		BootMode:    s.BootMode,
		Protocol:    s.Protocol,
		KernelCache: s.KernelCache,
		Rebooting:   s.Rebooting,
		Watchdog:    s.Watchdog,
		Kernel:      s.Kernel,
		Initrds:     s.Initrds,
		PanicText:   s.Kernel != nil,
		Console:     s.Console,
		Status:      s.Status,
		Stamp:       s.Stamp,
		KeepState:   s.KeepState,
		Final:       s.Final,
	}
}

// Machine is a running or ended machine.
type Machine struct {
	name      string
	memory    uint64 // bytes
	pauser    *vmm.Pauser
	console   *sharedConsole
	inspector *vmm.Inspector
	stopper   *stopper
	debugger  *vmm.Debugger // nil: none
	disks     *disk.Set
	vsock     *vsock.Device   // nil: none
	hvc       *hvc            // nil: none
	ports     *console.Device // nil: none
	balloon   *balloon.Device // nil: none
	sealed    atomic.Pointer[sandbox.Report]
	brokered  bool           // Spec.Files is set
	undo      []func() error // closes all that Start opened; run in reverse

	dump    sync.Mutex
	dumping bool // a Core is under way; written under dump

	ended, done chan struct{}
	outcome     vmm.Outcome
	err         error
	panicked    atomic.Pointer[panics.Panic] // the first panic of a goroutine of this program
	unhandle    func()                       // ends the setting of panicked
}

// Start opens the files that s names and runs the machine until its guest ends, ctx is done or Stop
// is called. A done ctx stops the machine with the cause of ctx. After an error nothing is left
// open, except storage that disk.Open waited for when ctx ended.
func Start(ctx context.Context, s Spec) (_ *Machine, err error) {
	if s.Note == nil {
		s.Note = func(string) {}
	}
	m := &Machine{name: s.Name, brokered: s.Files != nil, memory: s.Memory.Size, pauser: new(vmm.Pauser),
		inspector: new(vmm.Inspector), ended: make(chan struct{}), done: make(chan struct{})}
	ctx, cancel := context.WithCancelCause(ctx)
	m.later(func() error { cancel(nil); return nil })
	m.unhandle = panics.Handle(func(p *panics.Panic) {
		m.panicked.CompareAndSwap(nil, p)
		cancel(p)
	})
	defer func() {
		if err != nil {
			err = errors.Join(err, m.close())
			m.unhandle()
		}
	}()
	notes := &guestNotes{say: s.Note}
	m.later(func() error { notes.close(); return nil })
	m.stopper = &stopper{pauser: m.pauser, stop: cancel, note: s.Note}
	m.later(func() error { m.stopper.close(); return nil })
	if s.begun == nil {
		s.Begin(vmm.Begin())
		m.later(s.Close)
	}
	sys, sysErr := s.begun.System() // errors of the user's files come first
	cfg := s.config()
	if s.Debug {
		m.debugger = vmm.NewDebugger(s.StartStopped, func() { cancel(ErrKilled) })
		cfg.Debugger = m.debugger
	}
	m.console = newSharedConsole(s.Console)
	m.later(m.console.close)
	cfg.Console = m.console
	if s.COM2 != nil {
		port := newStreamPort(s.COM2)
		cfg.COM2 = port
		m.later(port.close)
	}
	cfg.Note, cfg.Pauser, cfg.Inspector, cfg.Prepared = notes.note, m.pauser, m.inspector, s.prepared
	if s.Kernel == nil {
		if cfg.Kernel, err = embeddedKernel(); err != nil {
			return nil, err
		}
	}
	m.disks, err = disk.Open(ctx, s.Disks, disk.Config{
		Queues: s.RequestQueues(), QueuesChosen: s.Queues > 0, ABI: s.VhostABI, Files: s.Files, Provisioned: s.Jail != nil,
		Machine: s.Name, Hold: m.pauser.Hold, Note: notes.note, Paused: s.Note,
	})
	if err != nil {
		return nil, err
	}
	mode := sandbox.Off
	if s.Sandbox != nil {
		mode = s.Sandbox.Policy.Mode
	}
	cfg.Inspect = func() []inspect.Node { return append(m.disks.Inspect(), m.inspectSandbox(mode, s.Jail)) }
	var started atomic.Bool // the guest has run, even if a reboot failed
	cfg.Phase = func(name string) {
		if name == vmm.Entered {
			started.Store(true)
		}
		if s.Phase != nil {
			s.Phase(name)
		}
	}
	m.later(func() error { return m.disks.Close(ctx, started.Load()) })
	if s.Kernel == nil {
		if len(s.Disks) == 0 {
			if err := m.disks.Attach(disk.Spec{Serial: "gvm-memory-disk"}, block.NewMem(EmbeddedDisk)); err != nil {
				return nil, err
			}
			s.GuestArgs = append(slices.Clip(s.GuestArgs), "write") // the caller keeps its slice
		}
		cfg.CmdLine = strings.Join(s.GuestArgs, " ")
	} else {
		cfg.CmdLine = s.cmdLine(m.disks.Root)
	}
	file, err := m.trace(ctx, &s)
	if err != nil {
		return nil, err
	}
	var sockets virtio.Device
	if s.Vsock != nil {
		if m.vsock, err = vsock.New(*s.Vsock); err != nil {
			return nil, configError{err}
		}
		sockets = m.vsock
	}
	if s.VhostVsock != nil {
		d, err := openVhostVsock(s)
		if err != nil {
			return nil, err
		}
		m.later(d.Close)
		sockets = d
	}
	if err := m.openPorts(&s); err != nil {
		return nil, err
	}
	if s.Balloon {
		if s.Memory.Hugepages {
			return nil, configError{errors.New("a balloon and huge pages: the host takes back no page of its pool")}
		}
		m.balloon = balloon.New()
	}
	shares, err := m.openShares(ctx, s.Shares)
	if err != nil {
		return nil, err
	}
	nets, err := m.openNets(s.Nets, s.Note)
	if err != nil {
		return nil, err
	}
	cfg.Devices, err = makeDevices(deviceConfig{
		scsiDevice: scsiDevice{queues: s.RequestQueues(), poll: s.Poll, trace: file, disks: m.disks},
		vsock:      sockets,
		console:    m.ports,
		balloon:    m.balloon,
		shares:     shares,
		nets:       nets,
	})
	if err != nil {
		return nil, err
	}
	if sysErr != nil {
		return nil, sysErr
	}
	if s.Ready != nil {
		if err := s.Ready(ctx); err != nil {
			return nil, err
		}
	}
	cfg.Seal = m.prepareSandbox(&s)
	panics.Go(func() { m.run(ctx, sys, cfg) })
	return m, nil
}

func embeddedKernel() (*boot.Image, error) {
	return boot.NewImage(&boot.File{Name: "the embedded guest", ReaderAt: bytes.NewReader(embedded.Image),
		Size: int64(len(embedded.Image))})
}

// trace starts recording to s.Trace.
func (m *Machine) trace(ctx context.Context, s *Spec) (*trace.File, error) {
	if s.Trace == "" {
		return nil, nil
	}
	header := m.disks.TraceHeader(s.Version, s.RequestQueues())
	f, err := nowait.Until(ctx, func() string { return s.Trace + " was opened" },
		func() (*trace.File, error) { return createTrace(s.Trace, header) }, func(f *trace.File) { _ = f.Close() })
	if err != nil {
		return nil, err
	}
	m.later(func() error { return closeTrace(ctx, s.Trace, f) })
	stop, err := m.disks.TraceKernels(f)
	if err != nil {
		return nil, err
	}
	m.later(stop)
	return f, nil
}

// closeTrace closes a trace. An end that was asked for, which ends ctx, does not wait for storage
// that does not answer.
func closeTrace(ctx context.Context, path string, f io.Closer) error {
	_, err := nowait.Until(ctx, func() string { return path + " was closed" },
		func() (struct{}, error) { return struct{}{}, f.Close() }, func(struct{}) {})
	if cause := context.Cause(ctx); cause != nil && errors.Is(err, cause) {
		err = fmt.Errorf("trace %s: its storage does not answer; gvm ends without the end of the trace", path)
	}
	return err
}

// createTrace creates the trace file of a run, before the run starts.
func createTrace(path string, h trace.Header) (*trace.File, error) {
	f, err := trace.Create(path, h)
	switch {
	case errors.Is(err, trace.ErrRefused):
		return nil, configError{err}
	case err != nil:
		return nil, disk.ImageError{Err: err}
	}
	return f, nil
}

// run is the goroutine of the machine.
func (m *Machine) run(ctx context.Context, sys *kvmapi.System, cfg vmm.Config) {
	defer close(m.done)
	defer m.unhandle()
	panics.Func(func() { m.outcome, m.err = vmm.Run(ctx, sys, cfg) })()
	if p := m.panicked.Load(); p != nil && errors.Is(m.err, p) { // the cause of ctx
		m.err = nil
	}
	close(m.ended)
	panics.Func(func() { m.err = errors.Join(m.err, m.close()) })()
	if p := m.panicked.Load(); p != nil {
		m.outcome = vmm.Outcome{Ending: vmm.Bug, Err: p, Report: p.Stack + m.outcome.Report, State: m.outcome.State,
			Left: m.outcome.Left}
	}
}

// later registers undo to be called at the end, before earlier registrations.
func (m *Machine) later(undo func() error) { m.undo = append(m.undo, undo) }

func (m *Machine) close() error {
	var errs []error
	for i := len(m.undo) - 1; i >= 0; i-- {
		errs = append(errs, m.undo[i]())
	}
	return errors.Join(errs...)
}

// Ended returns a channel that is closed when the guest has ended. The machine then makes its disks
// durable and closes them; Wait returns after that.
func (m *Machine) Ended() <-chan struct{} { return m.ended }

// Wait waits until the machine has ended and is closed, and returns how its guest ended. The
// outcome is valid even with an error, unless vmm.Run failed.
func (m *Machine) Wait() (vmm.Outcome, error) {
	<-m.done
	return m.outcome, m.err
}

// Name returns the machine's name.
func (m *Machine) Name() string { return m.name }

// Paused reports whether the machine is paused.
func (m *Machine) Paused() bool { return m.pauser.Paused() }

// Pause stops the CPUs and the devices, and returns when all that they have begun is finished. If
// ctx ends first, the machine runs on. Errors are those of vmm.Pauser.Pause.
func (m *Machine) Pause(ctx context.Context) error { return m.pauser.Pause(ctx) }

// Resume continues the machine after Pause or after a failure of a disk with error=stop. Errors are
// ErrDumping and those of vmm.Pauser.Resume.
func (m *Machine) Resume() error {
	m.dump.Lock()
	defer m.dump.Unlock()
	if m.dumping {
		return ErrDumping
	}
	return m.pauser.Resume()
}

// Stop presses the guest's power button, and stops the machine with cause when the guest has not
// powered itself off within grace. Of two calls the one that gives less time counts. Without a
// grace time, or when the guest is paused or has no driver for the button, Stop stops the machine
// at once and returns false. Wait returns when the machine has ended.
func (m *Machine) Stop(cause error, grace time.Duration) bool { return m.stopper.ask(cause, grace) }

// Reset starts the guest again in place, as a reset button does: also with Rebooting unset, or
// after a panic. It does not wait for that. The error is vmm.ErrNotRunning between two lives of the
// guest.
func (m *Machine) Reset() error { return m.pauser.Reset() }

// NMI raises a non-maskable interrupt on each CPU that the guest has started. Errors are those of
// vmm.Inspector.NMI.
func (m *Machine) NMI(ctx context.Context) error { return m.inspector.NMI(ctx) }

// SysRq sends a break and a key to COM1. Errors are those of vmm.Pauser.SysRq.
func (m *Machine) SysRq(ctx context.Context, key byte) error { return m.pauser.SysRq(ctx, key) }

// ErrKilled is the cause of a machine's end that a debugger asked for.
var ErrKilled = errors.New("killed by the debugger")

// ServeDebugger serves a debugger that speaks GDB's Remote Serial Protocol, until it has left or
// the machine has ended, and closes conn: see gdbstub.Serve. One at a time can be served, of a
// machine with Spec.Debug.
func (m *Machine) ServeDebugger(conn io.ReadWriteCloser) error {
	return gdbstub.Serve(conn, m.debugger)
}

// Disks describes the machine's disks.
func (m *Machine) Disks() []control.Disk { return m.disks.List() }

// AddDisk adds a disk to the machine and tells the guest. Paths are relative to this process.
// Errors are *control.Error.
func (m *Machine) AddDisk(ctx context.Context, d disk.Spec) (control.Change, error) {
	if err := m.canOpen(d); err != nil {
		return control.Change{}, err
	}
	return m.disks.Add(ctx, d)
}

// RemoveDisk tells the guest that a disk is going, and removes the disk. id is a LUN, a serial
// number or an absolute path.
func (m *Machine) RemoveDisk(ctx context.Context, id string) (control.Change, error) {
	return m.disks.Remove(ctx, id)
}

// ResizeDisk changes the size of a disk and tells the guest.
func (m *Machine) ResizeDisk(ctx context.Context, id string, r control.ResizeDisk) (control.Change, error) {
	return m.disks.Resize(ctx, id, r)
}

// statsPatience bounds the wait for the guest's statistics.
const statsPatience = 500 * time.Millisecond

// Balloon describes the balloon. It asks the guest for statistics, and waits for them for half a
// second. The error is a *control.Error: there is no balloon.
func (m *Machine) Balloon(ctx context.Context) (control.Balloon, error) {
	if m.balloon == nil {
		return control.Balloon{}, errNoBalloon
	}
	ctx, cancel := context.WithTimeout(ctx, statsPatience)
	defer cancel()
	s := m.balloon.State(ctx)
	b := control.Balloon{Size: s.Size, Actual: s.Actual, Stats: inspect.Group("stats", s.Stats...), Guest: control.Absent}
	if s.Driven {
		b.Guest = control.Told
	}
	return b, nil
}

var errNoBalloon = control.Errorf(http.StatusNotFound, "the machine has no balloon: start it with gvm run --balloon")

// ResizeBalloon asks the guest for a balloon of another size. Errors are *control.Error.
func (m *Machine) ResizeBalloon(r control.ResizeBalloon) (control.Balloon, error) {
	if m.balloon == nil {
		return control.Balloon{}, errNoBalloon
	}
	if r.Size > m.memory {
		return control.Balloon{}, control.Errorf(http.StatusBadRequest, "a balloon of %s: the machine has %s of memory",
			text.FormatSize(r.Size), text.FormatSize(m.memory))
	}
	m.balloon.Resize(r.Size)
	over, cancel := context.WithCancel(context.Background())
	cancel() // without new statistics
	return m.Balloon(over)
}

// DialVsock connects to a port of the guest's vsock. It waits for the answer of the guest's driver
// until ctx ends. The error is syscall.ECONNREFUSED if nothing listens there, and vsock.ErrNoDriver
// if the guest has no driver yet or any more, or the machine has no socket device. The connection
// ends with the machine.
func (m *Machine) DialVsock(ctx context.Context, port uint32) (*vsock.Conn, error) {
	if m.vsock == nil {
		return nil, fmt.Errorf("dial vsock port %d: %w: the machine has no socket device", port, vsock.ErrNoDriver)
	}
	return m.vsock.Dial(ctx, port)
}

// Inspect returns the machine's state at a path, such as disk/0 or vcpu/1/rip: a group of nodes or
// one value. The path "" is all of it:
//
//	paused
//	memory/N         guest RAM
//	vcpu/N           registers, N counts from 0
//	ioapic/pin/N     the I/O APIC
//	pci/00:SS.0      a function: config, intx, msix, and for a virtio device virtio/queue/N
//	com1, com2, status_port, rtc, acpi_pm, generation_id
//	sandbox          the mode of the sandbox, and its parts; jail, if the machine is in one
//	disk/N           the disk of LUN N that this program serves: counters, task/N (the commands
//	                 that are not answered, the oldest first) and last/N (the newest first)
//	lio/WWN/N        a disk that the kernel serves
//	disk_change/N    changes of disks while the machine runs, the newest first
//
// Inspect takes half a second at most. A part that cannot be read meanwhile, because a device is
// stopping or a CPU waits for a device, is inspect.Busy. The error is an *inspect.PathError, or
// vmm.ErrNotRunning before the guest's first instruction, after its last, and between them during a
// reset.
func (m *Machine) Inspect(ctx context.Context, path string) (inspect.Node, error) {
	return m.inspector.Read(ctx, path)
}

// Output returns a console without input, whose output goes to w.
func Output(w io.Writer) vmm.Console { return output{w} }

type output struct{ io.Writer }

func (output) Connect(vmm.Input) {}

// configError is an error in a value that the user gave.
type configError struct{ error }

func (e configError) Unwrap() error { return e.error }

// IsConfig reports whether err is about the Spec, which the user can change. Any other error is a
// failure of the host.
func IsConfig(err error) bool {
	var config configError
	var vc *vmm.ConfigError
	var image *boot.ImageError
	return errors.As(err, &config) || errors.As(err, &vc) || errors.As(err, &image) || disk.IsConfig(err)
}
