package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"os"
	"slices"
	"strconv"
	"strings"

	"gvm/devices/scsi"
	"gvm/devices/scsi/backend"
	"gvm/devices/virtio/vhostscsi"
	"gvm/text"
)

// disk is one --disk.
type disk struct {
	path      string // "" for a target of the kernel's that exists; else as it was given
	storage   storage
	overlay   string // "": none; overlayOn; else the path of its file
	wwn       string // of that target
	backend   backendChoice
	workers   int // as in vhostscsi.Config
	readOnly  bool
	noLock    bool
	serial    string
	lun       int // -1: the next free one
	cache     scsi.CacheMode
	size      int64 // 0: as it is
	blockSize int
	physical  int  // physical block size, 0: as blockSize
	pi        bool // protection information
	onError   errorPolicy
	iops, bps scsi.Limit
}

// name is what messages call the disk.
func (d *disk) name() string {
	if d.path == "" {
		return "wwn=" + d.wwn
	}
	return d.path
}

// storage is what a disk is kept in.
type storage int

const (
	inImage storage = iota
	inMemory
	inNothing
)

// storages are the beginnings of a path that is none.
var storages = map[string]storage{"mem:": inMemory, "null:": inNothing}

// storageNames are what the control socket calls storages.
var storageNames = map[storage]string{inMemory: "mem", inNothing: "null"}

// overlayOn is an overlay that ends with the machine.
const overlayOn = "on"

// backendChoice is who serves a disk.
type backendChoice int

const (
	byProcess backendChoice = iota // gvm's own SCSI target
	byKernel                       // vhost-scsi
	byEither                       // vhost-scsi where this host can
)

var backends = map[string]backendChoice{"process": byProcess, "vhost": byKernel, "auto": byEither}

var cacheModes = map[string]scsi.CacheMode{
	"writeback":    scsi.WriteBack,
	"writethrough": scsi.WriteThrough,
	"unsafe":       scsi.Unsafe,
}

// splitCommas splits at commas; two in a row are one that belongs to the text.
func splitCommas(s string) []string {
	var out []string
	word := ""
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] != ',':
			word += s[i : i+1]
		case i+1 < len(s) && s[i+1] == ',':
			word += ","
			i++
		default:
			out = append(out, word)
			word = ""
		}
	}
	return append(out, word)
}

// parseDisk reads the value of a --disk.
func parseDisk(s string) (disk, error) {
	words := splitCommas(s)
	d := disk{path: words[0], lun: -1, blockSize: 512}
	if name, ok := strings.CutPrefix(d.path, "wwn="); ok {
		d.path, d.wwn = "", name
		return d, d.parseTarget(words[1:])
	}
	if d.path == "" {
		return d, fmt.Errorf("--disk %q: no path; see gvm help disk", s)
	}
	for prefix, kind := range storages {
		if text, ok := strings.CutPrefix(d.path, prefix); ok {
			n, err := diskSize("--disk "+d.path, text)
			if err != nil {
				return d, fmt.Errorf("%w (./%s is a file of that name)", err, d.path)
			}
			d.storage, d.size = kind, n
		}
	}
	if near := nearStorage(d.path); d.storage == inImage && near != "" {
		return d, fmt.Errorf("--disk %s: did you mean %s? ./%s is a file of that name", d.path, near, d.path)
	}
	given := map[string]bool{}
	for n, w := range words[1:] {
		key, val, has := strings.Cut(w, "=")
		i := slices.IndexFunc(diskOptions, func(o diskOption) bool { return o.key == key })
		if i < 0 {
			return d, unknownOption(words, n+1, key)
		}
		if o := diskOptions[i]; has == (o.value == "") || has && val == "" {
			return d, fmt.Errorf("--disk %s: %q: want %s; see gvm help disk", d.path, w, o.word())
		}
		if err := d.once(given, key, has); err != nil {
			return d, err
		}
		var err error
		switch key {
		case "readonly":
			d.readOnly = true
		case "serial":
			d.serial = val
		case "lun":
			d.lun, err = strconv.Atoi(val)
			if _, ok := scsi.EncodeLUN(d.lun); err != nil || !ok {
				return d, fmt.Errorf("--disk %s: lun=%s: want a number from 0 to 16383", d.path, val)
			}
		case "cache":
			var ok bool
			if d.cache, ok = cacheModes[val]; !ok {
				return d, oneOf("--disk "+d.path+": cache=", val, cacheModes)
			}
		case "overlay":
			d.overlay = val
		case "lock":
			if d.noLock = val == "off"; !d.noLock && val != "on" {
				return d, oneOfNames("--disk "+d.path+": lock=", val, []string{"on", "off"})
			}
		case "size":
			var n uint64
			if n, err = parseSize(val, 1); err != nil {
				return d, fmt.Errorf("--disk %s: %w", d.path, err)
			}
			if d.size = int64(n); n == 0 {
				return d, fmt.Errorf("--disk %s: size=%s: a disk cannot be empty", d.path, val)
			}
		case "block_size":
			if d.blockSize, err = strconv.Atoi(val); err != nil || d.blockSize != 512 && d.blockSize != 4096 {
				return d, fmt.Errorf("--disk %s: block_size=%s: want 512 or 4096", d.path, val)
			}
		case "physical_block_size":
			if d.physical, err = strconv.Atoi(val); err != nil {
				return d, fmt.Errorf("--disk %s: physical_block_size=%s: want a number of bytes", d.path, val)
			}
		case "pi":
			if d.pi = val == "1"; !d.pi && val != "0" {
				return d, fmt.Errorf("--disk %s: pi=%s: want 0 or 1", d.path, val)
			}
		case "error":
			var ok bool
			if d.onError, ok = errorPolicies[val]; !ok {
				return d, oneOf("--disk "+d.path+": error=", val, errorPolicies)
			}
		case "iops":
			if d.iops, err = parseLimit(val); err != nil {
				return d, fmt.Errorf("--disk %s: iops=%s: %w, such as 1000 or 1000:5000", d.path, val, err)
			}
		case "bps":
			if d.bps, err = parseLimit(val); err != nil {
				return d, fmt.Errorf("--disk %s: bps=%s: %w, such as 10M or 10M:100M", d.path, val, err)
			}
		case "backend":
			var ok bool
			if d.backend, ok = backends[val]; !ok {
				return d, oneOf("--disk "+d.path+": backend=", val, backends)
			}
		case "workers":
			if err := d.parseWorkers(val); err != nil {
				return d, err
			}
		}
	}
	if err := d.consistent(words[1:]); err != nil {
		return d, err
	}
	if d.workers != 0 && d.backend == byProcess {
		return d, fmt.Errorf("--disk %s: workers= is for backend=vhost: the threads are the kernel's", d.path)
	}
	return d, nil
}

// nearStorage returns what a path that is none was probably meant to be, or "": mem:1M for men:1M. A
// file that exists is meant.
func nearStorage(path string) string {
	i := strings.IndexAny(path, ":=")
	if i < 0 {
		return ""
	}
	near, rest := text.Nearest(path[:i], []string{"mem", "null", "wwn"}), path[i+1:]
	switch _, err := parseSize(rest, 1); {
	case near == "wwn" && strings.HasPrefix(rest, "naa."):
		near += "="
	case (near == "mem" || near == "null") && err == nil:
		near += ":"
	default:
		return ""
	}
	if _, err := os.Lstat(path); err == nil {
		return ""
	}
	return near + rest
}

// once refuses an option that was given before.
func (d *disk) once(given map[string]bool, key string, valued bool) error {
	if given[key] && valued {
		key += "="
	} else if !given[key] {
		given[key] = true
		return nil
	}
	return fmt.Errorf("--disk %s: %s is given twice", d.name(), key)
}

// consistent refuses options that exclude each other.
func (d *disk) consistent(words []string) error {
	sized := slices.ContainsFunc(words, func(w string) bool { return strings.HasPrefix(w, "size=") })
	switch {
	case d.storage != inImage && (d.overlay != "" || sized || d.readOnly || d.noLock):
		return fmt.Errorf("--disk %s: readonly, size=, overlay= and lock= are for images", d.path)
	case d.overlay != "" && (d.readOnly || sized):
		return fmt.Errorf("--disk %s: overlay= makes the image read-only and keeps its size: neither readonly nor size= goes with it", d.path)
	case (d.overlay != "" || d.storage != inImage) && d.backend != byProcess:
		return fmt.Errorf("--disk %s: overlay=, mem: and null: are for backend=process", d.path)
	case (d.physical != 0 || d.onError != reportErrors || d.iops.Rate+d.bps.Rate > 0) && d.backend != byProcess:
		return fmt.Errorf("--disk %s: physical_block_size=, error=, iops= and bps= are for backend=process", d.path)
	case d.pi && (d.backend != byProcess || d.overlay != "" || d.storage == inNothing):
		return fmt.Errorf("--disk %s: pi=1 is for images and mem:, with backend=process and without overlay=", d.path)
	case d.physical != 0 && (d.physical < d.blockSize || d.physical > d.blockSize<<15 || d.physical&(d.physical-1) != 0):
		return fmt.Errorf("--disk %s: physical_block_size=%d: want a power of 2 from %d, the block size, to %d", d.path, d.physical, d.blockSize, d.blockSize<<15)
	}
	return nil
}

// parseLimit reads RATE or RATE:BURST.
func parseLimit(s string) (l scsi.Limit, err error) {
	rate, burst, has := strings.Cut(s, ":")
	if l.Rate, err = parseSize(rate, 1); err == nil && has {
		l.Burst, err = parseSize(burst, 1)
	}
	if err != nil || l.Rate == 0 || has && l.Burst == 0 || max(l.Rate, l.Burst) > scsi.MaxRate {
		err = errors.New("want a rate in a second and perhaps a burst, from 1 to 1T")
	}
	return l, err
}

// parseTarget reads the options of a disk that is a target of the kernel's.
func (d *disk) parseTarget(words []string) error {
	if d.wwn == "" {
		return errors.New("--disk wwn=: no name; want one such as wwn=naa.5001405a1b2c3d4e, see gvm lio list")
	}
	given := map[string]bool{}
	for _, w := range words {
		key, val, has := strings.Cut(w, "=")
		if err := d.once(given, key, has); err != nil {
			return err
		}
		var ok bool
		switch key {
		case "backend":
			if d.backend, ok = backends[val]; !ok {
				return oneOf("--disk "+d.name()+": backend=", val, backends)
			}
		case "workers":
			if err := d.parseWorkers(val); err != nil {
				return err
			}
		default:
			return fmt.Errorf("--disk %s: bad option %q: a target that exists takes backend=vhost and workers=N; its maker chose the rest%s",
				d.name(), w, text.Suggest(key, []string{"backend", "workers"}))
		}
	}
	if d.backend != byKernel {
		return fmt.Errorf("--disk %s: a target of the kernel's needs backend=vhost", d.name())
	}
	return nil
}

func (d *disk) parseWorkers(val string) error {
	var err error
	d.workers, err = strconv.Atoi(val)
	switch {
	case val == "shared":
		d.workers = vhostscsi.SharedWorker
	case err != nil || d.workers < 1 || d.workers > maxQueues:
		return fmt.Errorf("--disk %s: workers=%s: want a number from 1 to %d, or shared%s", d.name(), val, maxQueues, text.Suggest(val, []string{"shared"}))
	}
	return nil
}

// disks are the SCSI targets of a run, and the images behind their units.
type disks struct {
	target  *scsi.Target    // gvm's own
	kernels []*kernelTarget // those of the kernel
	open    []opened
	mishaps *mishaps
	given   []rootDisk // in the order of --disk

	live // what changes while the machine runs
}

// opened is what a disk of gvm's has open.
type opened struct {
	backend io.Closer // what the unit has; it closes all
	tuples  io.Closer // its protection information, nil: none
	undo    func()    // takes back what size= and overlay= did, nil: nothing
}

// inProcess tells whether the guest has gvm's own target: not if every disk is
// the kernel's.
func (ds *disks) inProcess() bool { return len(ds.kernels) == 0 || len(ds.target.LUNs()) > 0 }

// openDisks opens, checks and locks every image, and gives each its LUN on a
// target: gvm's own, or one that the kernel serves, as its backend= says. On an
// error nothing stays open or provisioned, and what size= made is undone.
func openDisks(list []disk, k kernelOptions, m *mishaps) (*disks, error) {
	list, fallback, auto := k.choose(list)
	ds, err := openAll(list, k, m)
	var refused kernelError
	switch {
	case err == nil && auto:
		k.note(autoNote + "by the kernel: vhost-scsi and LIO are there")
	case fallback != nil && errors.As(err, &refused):
		k.note(fmt.Sprintf("%sin-process: %v", autoNote, err))
		return openAll(fallback, k, m)
	}
	return ds, err
}

// openAll is openDisks for disks of which none is backend=auto.
func openAll(list []disk, k kernelOptions, m *mishaps) (_ *disks, err error) {
	ds := &disks{target: scsi.NewTarget(), mishaps: m}
	defer func() {
		if err != nil {
			err = errors.Join(err, ds.close(false))
		}
	}()
	if err := assignLUNs(list); err != nil {
		return nil, err
	}
	var provision kernelUnits
	for _, d := range list {
		if d.path == "" {
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
		ds.given = append(ds.given, rootDisk{f, d.blockSize})
		if file, ok := f.(*backend.File); ok && d.backend == byKernel {
			if ds.paths == nil {
				ds.paths = map[string]string{}
			}
			ds.paths[file.Path()] = absolute(file.Path())
			err = provision.add(d, file)
		} else {
			err = ds.attach(d, f)
		}
		if err != nil {
			return nil, configError{fmt.Errorf("--disk %s: %w", d.path, ds.sameSerial(err))}
		}
	}
	if len(provision.units) > 0 {
		t, err := k.provision(provision)
		if err != nil {
			return nil, err
		}
		ds.kernels = append(ds.kernels, t)
	}
	return ds, nil
}

// assignLUNs gives those disks that name no LUN the next free one of their
// target.
func assignLUNs(list []disk) error {
	taken := map[backendChoice]map[int]string{byProcess: {}, byKernel: {}}
	for _, d := range list {
		if d.lun < 0 {
			continue
		}
		if other, ok := taken[d.backend][d.lun]; ok {
			return configError{fmt.Errorf("--disk %s: lun=%d is %s's already", d.path, d.lun, other)}
		}
		taken[d.backend][d.lun] = d.path
	}
	for i := range list {
		d := &list[i]
		for n := 0; d.lun < 0 && d.path != ""; n++ {
			if _, ok := taken[d.backend][n]; !ok {
				d.lun = n
				taken[d.backend][n] = d.path
			}
		}
	}
	return nil
}

// openImage opens and locks a disk's image, or makes what it has instead.
func (ds *disks) openImage(d disk) (scsi.Backend, error) {
	switch d.storage {
	case inMemory:
		if d.size%int64(d.blockSize) != 0 {
			return nil, configError{fmt.Errorf("--disk %s: not a multiple of the block size %d", d.path, d.blockSize)}
		}
		f, err := backend.OpenMemory(d.size)
		if err != nil {
			return nil, err
		}
		ds.open = append(ds.open, opened{backend: f})
		return f, nil
	case inNothing:
		return backend.Null(d.size), nil
	}
	f, err := backend.Open(d.path, backend.Options{
		ReadOnly: d.readOnly || d.overlay != "", Size: d.size, BlockSize: d.blockSize,
		NoLock: d.noLock, Lend: d.backend == byKernel, Note: ds.mishaps.note,
	})
	if err != nil {
		return nil, diskError{err}
	}
	if d.overlay == "" {
		ds.open = append(ds.open, opened{backend: f, undo: f.Undo})
		return f, nil
	}
	path := d.overlay
	if path == overlayOn {
		path = ""
	}
	o, err := backend.OpenOverlay(f, path)
	if err != nil {
		return nil, errors.Join(diskError{fmt.Errorf("overlay: %w", err)}, f.Close())
	}
	ds.open = append(ds.open, opened{backend: o, undo: o.Undo})
	return o, nil
}

// unit is how a target shows the disk.
func (d *disk) unit(b scsi.Backend) scsi.UnitConfig {
	serial := d.serial
	if serial == "" && d.storage != inImage {
		serial = fmt.Sprintf("gvm-memory-%d", max(d.lun, 0))
	}
	physical := max(d.physical/max(d.blockSize, 1), 1)
	return scsi.UnitConfig{Backend: b, Serial: serial, ReadOnly: d.readOnly, BlockSize: d.blockSize, Cache: d.cache,
		PhysicalBlockExponent: bits.TrailingZeros(uint(physical)), IOPS: d.iops, Bandwidth: d.bps}
}

// attach makes the disk a unit of gvm's own target.
func (ds *disks) attach(d disk, b scsi.Backend) (err error) {
	cfg, keeper := d.unit(b), (*backend.Reservations)(nil)
	ctx, gone := context.WithCancel(context.Background())
	defer func() {
		if err != nil {
			gone()
		}
	}()
	cfg.OnError, cfg.Retry = ds.mishaps.watch(ctx, d)
	if f, ok := b.(*backend.File); ok && d.storage == inImage && !d.readOnly {
		if keeper = f.Reservations(); keeper != nil {
			cfg.Reservations = keeper
		}
	}
	if d.pi {
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
	lun, _ := scsi.EncodeLUN(max(d.lun, 0))
	if err := ds.target.Attach(lun, u); err != nil {
		return err
	}
	s := newServed(d, lun, u)
	s.gone = gone
	ds.served = append(ds.served, s)
	return nil
}

// sameSerial names the other disk where the error is that two have one serial number. The caller holds mu.
func (ds *disks) sameSerial(err error) error {
	same := (*scsi.SerialError)(nil)
	if !errors.As(err, &same) {
		return err
	}
	other := ""
	if i := slices.IndexFunc(ds.served, func(s served) bool { return s.number() == same.Other }); i >= 0 {
		other = ", " + ds.served[i].disk.name() + ","
	}
	return fmt.Errorf("it has the serial %q, as LUN %d%s has: give one of them another with serial=", same.Serial, same.Other, other)
}

// tuples opens the protection information of an image that is open.
func (ds *disks) tuples(b scsi.Backend) (scsi.Protection, error) {
	t, err := b.(*backend.File).Tuples()
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(ds.open, func(i opened) bool { return any(i.backend) == any(b) })
	ds.open[i].tuples = t
	return t, nil
}

// close closes the image. For a guest that never had it, what size= and overlay= did
// is taken back, unless there is data by now.
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

// close takes down what was provisioned and releases the images; if no guest was
// started, what size= did is undone in between. What a guest has not flushed is made durable as far as
// settlePatience goes, the rest is in the page cache. Nothing can be changed afterwards.
func (ds *disks) close(started bool) error {
	ctx, cancel := context.WithTimeout(context.Background(), settlePatience)
	defer cancel()
	open := ds.endChanges(ctx)
	busy := ds.end(ctx)
	var errs []error
	if started {
		errs = append(errs, ds.settle(ctx))
	}
	for _, k := range ds.kernels {
		errs = append(errs, k.close())
	}
	for _, f := range open {
		if !busy[f.backend] { // else it is in use, and the end of the process closes it
			errs = append(errs, f.close(started))
		}
	}
	return errors.Join(errs...)
}
