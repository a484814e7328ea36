package disk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"slices"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/scsi/sidecar"
	"gvm/devices/virtio/vhostscsi"
	"gvm/kvmapi/nowait"
)

// Config has the settings that the disks of a machine share.
type Config struct {
	Queues       int  // request queues of a device
	QueuesChosen bool // the user chose Queues, and knows the cost
	ABI          vhostscsi.ABIPolicy
	Provisioned  bool        // Provision has made the kernel's target, which Files can change if it has Targets
	Files        block.Files // opens the images, now and later; nil: block.System. See also Targets

	Machine string                     // its name, for messages
	Hold    func(context.Context) bool // pauses the machine, as vmm.Pauser.Hold does; nil: nothing can resume it
	Note    func(string)               // takes notes for the user that a guest can cause
	Paused  func(string)               // takes the reason for a pause of the machine
}

// Set is the disks of a machine: the SCSI targets, and the images behind their units.
type Set struct {
	target  *scsi.Target    // gvm's own
	kernels []*kernelTarget // the kernel's
	open    []opened
	files   block.Files
	mishaps *mishaps
	given   []rootDisk // in the order of --disk

	provisioned bool // Config.Provisioned; not of a disk that is added

	live // the state that changes while the machine runs
}

// opened has the open files of a disk of gvm's.
type opened struct {
	backend io.Closer // the unit's backend; it closes everything
	tuples  io.Closer // protection information; nil: none
	undo    func()    // undoes size= and overlay=; nil: nothing to undo
}

// Target returns gvm's own SCSI target.
func (ds *Set) Target() *scsi.Target { return ds.target }

// Notify makes n, the device of Target, tell the guest about changes of disks.
func (ds *Set) Notify(n Notifier) { ds.events = n }

// Protected reports whether a disk of gvm's own target has protection information.
func (ds *Set) Protected() bool {
	return slices.ContainsFunc(ds.served, func(s served) bool { return s.PI })
}

// KernelDevices returns the devices of the disks that the kernel serves.
func (ds *Set) KernelDevices() (devices []*vhostscsi.Device) {
	for _, k := range ds.kernels {
		devices = append(devices, k.device)
	}
	return devices
}

// Root returns root= for a kernel without an initrd. If no word is sure to name the first disk,
// word is "" and why is the reason.
func (ds *Set) Root() (word, why string) { return rootWord(ds.given) }

// InProcess reports whether the guest has gvm's own target. It has none if every disk is the
// kernel's.
func (ds *Set) InProcess() bool { return len(ds.kernels) == 0 || len(ds.target.LUNs()) > 0 }

// Open opens, checks and locks every image, and gives each its LUN on a target: gvm's own or the
// kernel's, as its Backend says. On an error nothing stays open or provisioned, and the effects of
// size= are undone. IsConfig reports whether the user can correct the error.
//
// Storage, and other processes that change the kernel's target, may block Open: see nowait.Until.
// The error names the image or target that it waited for, and its work is undone once that wait is
// over.
func Open(ctx context.Context, list []Spec, c Config) (*Set, error) {
	m := &mishaps{name: c.Machine, hold: c.Hold, note: c.Note, paused: c.Paused}
	what := func() string {
		what, _ := m.opening.Load().(string)
		return what + " was opened"
	}
	return nowait.Until(ctx, what, func() (*Set, error) {
		k := kernelOptions{queues: c.Queues, chosen: c.QueuesChosen, abi: c.ABI, note: c.Note,
			provisioned: c.Provisioned}
		if k.targets, _ = c.Files.(Targets); k.targets == nil {
			k.targets, k.fixed = Direct{}, c.Provisioned
		}
		return openDisks(list, c.Files, k, m)
	}, func(ds *Set) { _ = ds.Close(context.Background(), false) })
}

func openDisks(list []Spec, files block.Files, k kernelOptions, m *mishaps) (*Set, error) {
	m.opening.Store(kernelsTarget)
	list, fallback, auto := k.choose(list)
	ds, err := openAll(list, files, k, m)
	var refused KernelError
	switch {
	case err == nil && auto:
		k.note(autoNote + "by the kernel: vhost-scsi and LIO are there")
	case fallback != nil && errors.As(err, &refused):
		k.note(fmt.Sprintf("%sin-process: %v", autoNote, err))
		return openAll(fallback, files, k, m)
	}
	return ds, err
}

// openAll opens disks without backend=auto.
func openAll(list []Spec, files block.Files, k kernelOptions, m *mishaps) (_ *Set, err error) {
	ds := &Set{target: scsi.NewTarget(), files: files, mishaps: m}
	defer func() {
		if err != nil {
			err = errors.Join(err, ds.Close(context.Background(), false))
		}
	}()
	if err := assignLUNs(list); err != nil {
		return nil, err
	}
	ds.provisioned = k.provisioned
	var provision kernelUnits
	for _, d := range list {
		m.opening.Store(d.Name())
		if d.Path == "" {
			t, err := k.lookup(d)
			if err != nil {
				return nil, err
			}
			ds.kernels = append(ds.kernels, t)
			ds.given = append(ds.given, rootDisk{})
			continue
		}
		f, err := ds.openImage(d)
		if err != nil {
			return nil, err
		}
		ds.given = append(ds.given, rootDisk{f, d.BlockSize})
		if file, ok := f.(*block.File); ok && d.Backend == Vhost {
			if ds.paths == nil {
				ds.paths = map[string]string{}
			}
			ds.paths[file.Path()] = Absolute(file.Path())
			err = provision.add(d, file)
		} else {
			err = ds.Attach(d, f)
		}
		if err != nil {
			return nil, configError{fmt.Errorf("--disk %s: %w", d.Path, ds.sameSerial(err))}
		}
	}
	if len(provision.units) > 0 {
		m.opening.Store(kernelsTarget)
		t, err := k.provision(provision)
		if err != nil {
			return nil, err
		}
		ds.kernels = append(ds.kernels, t)
	}
	if n := k.queueNote(len(ds.kernels)); n != "" {
		k.note(n)
	}
	return ds, nil
}

// assignLUNs gives disks without a LUN the next free one of their target.
func assignLUNs(list []Spec) error {
	taken := map[Backend]map[int]string{Process: {}, Vhost: {}}
	for _, d := range list {
		if d.LUN < 0 {
			continue
		}
		if other, ok := taken[d.Backend][d.LUN]; ok {
			return configError{fmt.Errorf("--disk %s: lun=%d is %s's already", d.Path, d.LUN, other)}
		}
		taken[d.Backend][d.LUN] = d.Path
	}
	for i := range list {
		d := &list[i]
		for n := 0; d.LUN < 0 && d.Path != ""; n++ {
			if _, ok := taken[d.Backend][n]; !ok {
				d.LUN = n
				taken[d.Backend][n] = d.Path
			}
		}
	}
	return nil
}

// openImage opens and locks a disk's image, or makes its memory or null backend.
func (ds *Set) openImage(d Spec) (block.Backend, error) {
	switch d.Storage {
	case Memory, Temporary:
		if d.Size%int64(d.BlockSize) != 0 {
			return nil, configError{fmt.Errorf("--disk %s: not a multiple of the block size %d", d.Path, d.BlockSize)}
		}
		f, err := ds.openNameless(d)
		if err != nil {
			return nil, ImageError{fmt.Errorf("%s: %w%s", d.Path, err, nowait.LimitMend(err))}
		}
		ds.open = append(ds.open, opened{backend: f})
		return f, nil
	case Null:
		return block.Null(d.Size), nil
	}
	options := d.ImageOptions()
	options.Note, options.Files = ds.mishaps.note, ds.files
	options.Lent = options.Lend && ds.provisioned
	f, err := block.Open(d.Path, options)
	if err != nil {
		return nil, ImageError{err}
	}
	if d.Overlay == "" {
		ds.open = append(ds.open, opened{backend: f, undo: f.Undo})
		return f, nil
	}
	path := d.Overlay
	if path == OverlayOn {
		path = ""
	}
	o, err := block.OpenOverlay(f, path)
	if err != nil {
		return nil, errors.Join(ImageError{fmt.Errorf("overlay: %w", err)}, f.Close())
	}
	ds.open = append(ds.open, opened{backend: o, undo: o.Undo})
	return o, nil
}

// openNameless makes the storage of a disk of mem: or temp:.
func (ds *Set) openNameless(d Spec) (*block.File, error) {
	if d.Storage == Temporary {
		return block.OpenTemporary(d.Size, ds.files)
	}
	return block.OpenMemory(d.Size)
}

// ImageOptions returns how the disk's image is opened.
func (s *Spec) ImageOptions() block.Options {
	return block.Options{
		ReadOnly: s.ReadOnly || s.Overlay != "", Size: s.Size, BlockSize: s.BlockSize,
		NoLock: s.NoLock, Lend: s.Backend == Vhost, Cut: sidecar.Cut,
	}
}

// Unit returns the target's configuration of the disk's unit.
func (s *Spec) Unit(b block.Backend) scsi.UnitConfig {
	serial := s.Serial
	if serial == "" && s.Storage != Image {
		serial = fmt.Sprintf("gvm-memory-%d", max(s.LUN, 0))
	}
	physical := max(s.Physical/max(s.BlockSize, 1), 1)
	return scsi.UnitConfig{Backend: b, Serial: serial, ReadOnly: s.ReadOnly, BlockSize: s.BlockSize, Cache: s.Cache,
		PhysicalBlockExponent: bits.TrailingZeros(uint(physical)), IOPS: s.IOPS, Bandwidth: s.BPS,
		Waiting: s.Waiting}
}

// Attach makes the disk a unit of gvm's own target.
func (ds *Set) Attach(d Spec, b block.Backend) (err error) {
	cfg, keeper := d.Unit(b), (*sidecar.Reservations)(nil)
	ctx, gone := context.WithCancel(context.Background())
	defer func() {
		if err != nil {
			gone()
		}
	}()
	cfg.OnError, cfg.Retry = ds.mishaps.watch(ctx, d)
	if f, ok := b.(*block.File); ok && d.Storage == Image && !d.ReadOnly {
		if keeper = sidecar.NewReservations(f); keeper != nil {
			cfg.Reservations = keeper
		}
	}
	if d.PI {
		if cfg.Protection, err = ds.tuples(b); err != nil {
			return fmt.Errorf("pi=1: %w", err)
		}
	}
	u, err := scsi.NewUnit(cfg)
	if keeper != nil && errors.Is(err, scsi.ErrReservationState) {
		return fmt.Errorf("%w (move %s away to begin without reservations)", err, keeper.Path())
	}
	if err != nil {
		return err
	}
	lun, _ := scsi.EncodeLUN(max(d.LUN, 0))
	if err := ds.target.Attach(lun, u); err != nil {
		return err
	}
	s := newServed(d, lun, u)
	s.gone = gone
	ds.served = append(ds.served, s)
	return nil
}

// sameSerial adds the name of the other disk to an error about two equal serial numbers. The caller
// holds mu.
func (ds *Set) sameSerial(err error) error {
	same := (*scsi.SerialError)(nil)
	if !errors.As(err, &same) {
		return err
	}
	other := ""
	if i := slices.IndexFunc(ds.served, func(s served) bool { return s.number() == same.Other }); i >= 0 {
		other = ", " + ds.served[i].Spec.Name() + ","
	}
	return fmt.Errorf("it has the serial %q, as LUN %d%s has: give one of them another with serial=",
		same.Serial, same.Other, other)
}

// tuples opens the protection information of an open image.
func (ds *Set) tuples(b block.Backend) (scsi.Protection, error) {
	t, err := sidecar.OpenTuples(b.(*block.File))
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(ds.open, func(i opened) bool { return any(i.backend) == any(b) })
	ds.open[i].tuples = t
	return t, nil
}

// close closes the image. If no guest had it, close undoes size= and overlay= too, unless data has
// been written.
func (i opened) close(had bool) error {
	if i.undo != nil && !had {
		i.undo()
	}
	if i.backend == nil {
		return nil // it holds nothing open
	}
	err := i.backend.Close()
	if i.tuples != nil {
		err = errors.Join(err, i.tuples.Close())
	}
	return err
}

// Close removes the kernel's targets and closes the images; if no guest was started, it undoes
// size= in between. It makes the guest's unflushed writes durable as far as settlePatience allows,
// or nowait.Left of ctx; the rest stays in the page cache. The Set cannot be changed afterwards.
func (ds *Set) Close(ctx context.Context, started bool) error {
	left := nowait.Left(ctx, settlePatience)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), left)
	defer cancel()
	kernels := ds.endKernels()
	open := ds.endChanges(ctx, left/3) // the rest is for the disks
	busy := ds.end(ctx)
	var errs []error
	if started {
		errs = append(errs, ds.settle(ctx))
	}
	errs = append(errs, kernels(ctx, busy))
	for _, f := range open {
		if !busy[f.backend] { // a busy backend closes with the process
			errs = append(errs, f.close(started))
		}
	}
	return errors.Join(errs...)
}
