package disk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"

	"gvm/control"
	"gvm/devices/block"
	"gvm/devices/scsi/lio"
	"gvm/devices/scsi/trace"
	"gvm/devices/virtio/vhostscsi"
	"gvm/panics"
	"gvm/text"
)

// kernelOptions are the options that all disks with backend=vhost or auto share.
type kernelOptions struct {
	queues int
	chosen bool // the user chose queues
	abi    vhostscsi.ABIPolicy
	note   func(string)

	targets     Targets
	provisioned bool // Config.Provisioned
	fixed       bool // kernelTarget.fixed
}

// Targets changes the targets that this process has made in the kernel while the machine runs, if
// Config.Files has these methods too.
type Targets interface {
	// AddTo is t.Add. It returns the notes of the change.
	AddTo(t *lio.Target, u lio.Unit) (notes []string, err error)
	// RemoveFrom is t.Remove.
	RemoveFrom(t *lio.Target, lun int) error
	// TakeDown is t.Close.
	TakeDown(t *lio.Target) error
}

// Direct is the Targets of a process that changes them itself.
type Direct struct{}

// AddTo implements Targets.
func (Direct) AddTo(t *lio.Target, u lio.Unit) (notes []string, err error) {
	told := len(t.Notes())
	err = t.Add(u)
	return t.Notes()[told:], err
}

// RemoveFrom implements Targets.
func (Direct) RemoveFrom(t *lio.Target, lun int) error { return t.Remove(lun) }

// TakeDown implements Targets.
func (Direct) TakeDown(t *lio.Target) error { return t.Close() }

// closer is an io.Closer by a function.
type closer func() error

func (c closer) Close() error { return c() }

// kernelTarget is a LIO target and the device that presents it to the guest.
type kernelTarget struct {
	target *lio.Target
	plug   func(lio.Unit) error // Targets.AddTo; nil: the target is not gvm's
	unplug func(lun int) error  // Targets.RemoveFrom
	fixed  bool                 // Provision made it, and this process can neither change it nor have it changed
	device *vhostscsi.Device
	parts  []io.Closer // closed in order: the device, which releases the target, and the target
	specs  []Spec
	units  []lio.Unit // made by gvm, one for each of specs
}

// close releases the target, then removes it if gvm made it.
func (t *kernelTarget) close() error {
	var errs []error
	for _, p := range t.parts {
		errs = append(errs, p.Close())
	}
	return errors.Join(errs...)
}

// endKernels begins to remove the kernel's targets, which waits for storage and for other processes
// that change LIO. wait returns when that is done or ctx is, and adds to busy the backends that the
// kernel still has.
func (ds *Set) endKernels() (wait func(ctx context.Context, busy map[any]bool) error) {
	type result struct {
		kernel *kernelTarget
		err    error
	}
	results := make(chan result, len(ds.kernels))
	for _, k := range ds.kernels {
		panics.Go(func() { results <- result{k, k.close()} }) // ends with the process at the latest
	}
	return func(ctx context.Context, busy map[any]bool) error {
		var errs []error
		left := slices.Clone(ds.kernels)
		for len(left) > 0 {
			var r result
			select {
			case r = <-results:
			case <-ctx.Done():
				select {
				case r = <-results:
				default:
				}
			}
			if r.kernel == nil {
				break
			}
			errs = append(errs, r.err)
			left = slices.DeleteFunc(left, func(k *kernelTarget) bool { return k == r.kernel })
		}
		for _, k := range left {
			name, mend := k.target.WWN, ""
			for i, u := range k.units {
				busy[u.Backend] = true
				if i == 0 {
					name, mend = ds.paths[u.Backend.(*block.File).Path()], "; gvm lio gc removes the rest"
				}
			}
			ds.mishaps.note(fmt.Sprintf("%s: the kernel has not let go of it; gvm ends without that%s", name, mend))
		}
		return errors.Join(errs...)
	}
}

// findKernels returns the target with the disk of gvm's that the kernel serves and that has a LUN,
// a serial number or a path, and the disk's index; nil: there is none. The caller holds mu.
func (ds *Set) findKernels(id string) (k *kernelTarget, i int) {
	n, err := strconv.Atoi(id)
	for _, k := range ds.kernels {
		for _, match := range []func(lio.Unit) bool{
			func(u lio.Unit) bool { return err == nil && u.LUN == n },
			func(u lio.Unit) bool { return u.Serial != "" && u.Serial == id },
			func(u lio.Unit) bool { return ds.paths[u.Backend.(*block.File).Path()] == id },
		} {
			if i := slices.IndexFunc(k.units, match); i >= 0 {
				return k, i
			}
		}
	}
	return nil, -1
}

// ownKernels returns the kernel's target that gvm made; nil: there is none. It does not change
// while the machine runs.
func (ds *Set) ownKernels() *kernelTarget {
	if i := slices.IndexFunc(ds.kernels, func(k *kernelTarget) bool { return k.plug != nil }); i >= 0 {
		return ds.kernels[i]
	}
	return nil
}

// addKernels is the slow part of Add for a disk that the kernel serves.
func (ds *Set) addKernels(d Spec) (_ control.Change, err error) {
	own := &Set{files: ds.files, mishaps: ds.mishaps} // until the disk is added
	defer func() {
		for _, f := range own.open {
			err = errors.Join(err, f.close(false))
		}
	}()
	f, err := own.openAdded(d)
	if err != nil {
		return control.Change{}, err
	}
	file := f.(*block.File) // Add has checked that
	k, u := ds.ownKernels(), lio.Unit{LUN: d.LUN, UnitConfig: d.Unit(file)}
	guest := hearing[k.device.Hearing()] // the kernel tells the guest
	if err := k.plug(u); err != nil {
		if errors.Is(err, lio.ErrUnit) || errors.Is(err, lio.ErrBusy) {
			err = control.Errorf(http.StatusConflict, "--disk %v", err)
		}
		return control.Change{}, err
	}
	ds.mu.Lock()
	defer ds.mu.Unlock()
	if ds.closed { // the process is ending
		return control.Change{}, control.ErrEnded
	}
	ds.paths[file.Path()] = file.Identity()
	k.specs, k.units = append(k.specs, d), append(k.units, u)
	ds.open, own.open = append(ds.open, own.open...), nil
	list := ds.listKernel(k)
	return control.Change{Disk: list[len(list)-1], Guest: guest}, nil
}

// removeKernels is Remove for a disk that the kernel serves. The caller holds mu.
func (ds *Set) removeKernels(ctx context.Context, k *kernelTarget, i int) (control.Change, error) {
	d := ds.listKernel(k)[i]
	b, name := k.units[i].Backend.(*block.File), "removing "+string(d.Path)
	release, err := ds.mark(b, d.LUN, string(d.Path), control.Removing)
	if err != nil {
		return control.Change{}, err
	}
	return ds.change(ctx, name, func(<-chan struct{}) (control.Change, error) {
		// The kernel tells the guest, and finishes its commands however long they take.
		ch := control.Change{Disk: d, Guest: hearing[k.device.Hearing()]}
		if err := k.unplug(d.LUN); err != nil {
			return ch, err
		}
		err := b.Flush() // the guest's writes are in the page cache
		ds.mu.Lock()
		if ds.closed {
			ds.mu.Unlock()
			return ch, control.ErrEnded
		}
		i := slices.IndexFunc(k.units, func(u lio.Unit) bool { return u.LUN == d.LUN })
		k.units, k.specs = slices.Delete(k.units, i, i+1), slices.Delete(k.specs, i, i+1)
		f := ds.taken(b)
		ds.mu.Unlock()
		return ch, errors.Join(err, f.close(true))
	}, release)
}

// hearing reports whether the guest's driver is told of a change by the kernel.
var hearing = map[vhostscsi.Hearing]control.Guest{vhostscsi.NoDriver: control.Absent,
	vhostscsi.Deaf: control.Deaf, vhostscsi.Paused: control.Missed, vhostscsi.Hears: control.Told}

// kernelsTarget is the name of LIO in messages.
const kernelsTarget = "the kernel's SCSI target"

// autoNote is the beginning of the note that reports how backend=auto was resolved.
const autoNote = "backend=auto: served "

// choose resolves backend=auto for this host; auto reports whether the list had such a disk. If the
// kernel then refuses a disk, fallback is the list with all of those disks in-process; it is nil if
// it would equal chosen or if a disk requires the kernel.
func (k kernelOptions) choose(list []Spec) (chosen, fallback []Spec, auto bool) {
	isAuto := func(d Spec) bool { return d.Backend == Auto }
	if !slices.ContainsFunc(list, isAuto) {
		return slices.Clone(list), nil, false
	}
	to := func(b Backend) []Spec {
		out := slices.Clone(list)
		for i := range out {
			if isAuto(out[i]) {
				out[i].Backend = b
			}
		}
		return out
	}
	if err := k.check(); err != nil {
		k.note(fmt.Sprintf("%sin-process: %v", autoNote, err))
		return to(Process), nil, false
	}
	if !slices.ContainsFunc(list, func(d Spec) bool { return d.Backend == Vhost }) {
		fallback = to(Process)
	}
	return to(Vhost), fallback, true
}

// check returns an error if this host's kernel cannot serve disks.
func (k kernelOptions) check() error {
	if err := vhostscsi.Check(k.abi); err != nil {
		return err
	}
	return lio.Check("")
}

// kernelUnits are the disks that become one target of the kernel's.
type kernelUnits struct {
	specs []Spec
	units []lio.Unit
}

func (u *kernelUnits) add(d Spec, f *block.File) error {
	if len(u.specs) > 0 && d.Workers != u.specs[0].Workers {
		return fmt.Errorf("workers= differs from %s's: both are on one target", u.specs[0].Path)
	}
	u.specs = append(u.specs, d)
	u.units = append(u.units, lio.Unit{LUN: d.LUN, UnitConfig: d.Unit(f)})
	return nil
}

// provision makes a target of the units, unless this process has one.
func (u *kernelUnits) provision(done bool) (t *lio.Target, err error) {
	if done {
		t, err = lio.Provisioned()
	} else {
		t, err = lio.Provision(lio.Config{Units: u.units})
	}
	if err == nil {
		return t, nil
	}
	if errors.Is(err, lio.ErrUnit) {
		err = configError{fmt.Errorf("--disk %w", err)}
	}
	return nil, KernelError{err}
}

// Provision makes the kernel's target of the disks with backend=vhost for a later Open in this
// process, with Config.Provisioned and without the rights for that. The images stay open until the
// process executes a program. note takes notes for the user.
func Provision(list []Spec, note func(string)) error {
	list = slices.Clone(list)
	for i := range list {
		if list[i].Backend == Auto { // which Open cannot have the kernel serve
			list[i].Backend = Process
		}
	}
	if err := assignLUNs(list); err != nil {
		return err
	}
	var u kernelUnits
	for _, d := range list {
		if d.Backend != Vhost {
			continue
		}
		f, err := block.Open(d.Path, d.ImageOptions())
		if err == nil {
			err = u.add(d, f)
		}
		if err != nil {
			return ImageError{err}
		}
	}
	t, err := u.provision(false)
	if err != nil {
		return err
	}
	for _, n := range t.Notes() {
		note(n)
	}
	return nil
}

// provision makes the kernel serve the units.
func (k kernelOptions) provision(u kernelUnits) (*kernelTarget, error) {
	if err := vhostscsi.Check(k.abi); err != nil {
		return nil, KernelError{err}
	}
	t, err := u.provision(k.provisioned)
	if err != nil {
		return nil, err
	}
	for _, n := range t.Notes() {
		k.note(n)
	}
	if release := trace.HostKernel(); len(u.units) > 1 && losesResets(release) {
		k.note(fmt.Sprintf("Linux %s has a fault: a guest that resets one of several disks of the kernel's can bring "+
			"this host down when gvm ends; serve one disk, or take backend=process or Linux 6.4", release))
	}
	plug := func(u lio.Unit) error {
		notes, err := k.targets.AddTo(t, u)
		for _, n := range notes {
			k.note(n)
		}
		return err
	}
	unplug := func(lun int) error { return k.targets.RemoveFrom(t, lun) }
	var end io.Closer = t
	if !k.provisioned {
		end = closer(func() error { return k.targets.TakeDown(t) })
	}
	return k.device(&kernelTarget{target: t, plug: plug, unplug: unplug, fixed: k.fixed,
		parts: []io.Closer{end}, specs: u.specs, units: u.units})
}

// losesResets reports whether a kernel's vhost-scsi corrupts its list of control blocks for LOGICAL
// UNIT RESET (docs/backends.md).
func losesResets(release string) bool {
	var major, minor int
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil {
		return false
	}
	return major < 6 || major == 6 && minor < 4
}

// lookup opens an existing target.
func (k kernelOptions) lookup(d Spec) (*kernelTarget, error) {
	if err := vhostscsi.Check(k.abi); err != nil {
		return nil, KernelError{err}
	}
	t, err := lio.Lookup("", d.WWN)
	if err != nil {
		return nil, KernelError{fmt.Errorf("--disk %w", err)}
	}
	return k.device(&kernelTarget{target: t, parts: []io.Closer{t}, specs: []Spec{d}})
}

// device makes the device of a target. On an error the target is closed.
func (k kernelOptions) device(t *kernelTarget) (_ *kernelTarget, err error) {
	t.device, err = vhostscsi.New(vhostscsi.Config{
		WWPN:      t.target.WWN,
		MaxTarget: uint8(t.target.TPGT),
		Queues:    k.queues,
		Workers:   min(t.specs[0].Workers, k.queues),
		ABI:       k.abi,
		Note:      k.note,
	})
	if err != nil {
		return nil, KernelError{errors.Join(err, t.close())}
	}
	t.parts = slices.Insert(t.parts, 0, io.Closer(t.device))
	return t, nil
}

// QueueMemory is about the memory that vhost-scsi allocates for a request queue of 256 entries once
// the guest's driver runs: each entry has a scatterlist of 2,048 segments (vhost_scsi_setup_vq_cmds
// in the kernel's drivers/vhost/scsi.c). It is the kernel's own memory, which no control group of
// gvm's bounds.
const QueueMemory = 21 << 20

// queueNote returns a note about many request queues that the user did not ask for. Each target has
// k.queues of them.
func (k kernelOptions) queueNote(targets int) string {
	n := targets * k.queues
	if k.chosen || n <= 4 {
		return ""
	}
	each := ""
	if targets > 1 {
		each = fmt.Sprintf(" for each of %d targets", targets)
	}
	return fmt.Sprintf("the kernel takes some %s for each of %d request queues, one a CPU%s: "+
		"%s of its memory; --queues N bounds that",
		text.FormatSize(QueueMemory), n, each, text.FormatSize(uint64(n)*QueueMemory))
}
