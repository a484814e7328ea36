package main

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"gvm/devices/scsi"
	"gvm/devices/scsi/backend"
	"gvm/devices/virtio/vhostscsi"
)

// disk is one --disk.
type disk struct {
	path      string // "" for a target of the kernel's that exists
	wwn       string // of that target
	backend   backendChoice
	workers   int // as in vhostscsi.Config
	readOnly  bool
	serial    string
	lun       int // -1: the next free one
	cache     scsi.CacheMode
	size      int64 // 0: as it is
	blockSize int
}

// name is what messages call the disk.
func (d *disk) name() string {
	if d.path == "" {
		return "wwn=" + d.wwn
	}
	return d.path
}

// backendChoice is who serves a disk.
type backendChoice int

const (
	byProcess backendChoice = iota // gvm's own SCSI target
	byKernel                       // vhost-scsi
	byEither                       // vhost-scsi where this host can
)

var backends = map[string]backendChoice{"process": byProcess, "vhost": byKernel, "auto": byEither}

const diskUsage = "PATH[,readonly][,serial=S][,lun=N][,cache=writeback|writethrough|unsafe][,size=SIZE][,block_size=512|4096][,backend=process|vhost|auto][,workers=N|shared] or wwn=NAME,backend=vhost[,workers=N|shared]"

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
		return d, fmt.Errorf("--disk %q: no path; want %s", s, diskUsage)
	}
	for _, w := range words[1:] {
		key, val, has := strings.Cut(w, "=")
		if has == (key == "readonly") || has && val == "" {
			return d, fmt.Errorf("--disk %s: bad option %q; want %s", d.path, w, diskUsage)
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
				return d, fmt.Errorf("--disk %s: cache=%s: want writeback, writethrough or unsafe", d.path, val)
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
		case "backend":
			var ok bool
			if d.backend, ok = backends[val]; !ok {
				return d, fmt.Errorf("--disk %s: backend=%s: want process, vhost or auto", d.path, val)
			}
		case "workers":
			if err := d.parseWorkers(val); err != nil {
				return d, err
			}
		default:
			return d, fmt.Errorf("--disk %s: unknown option %q; want %s", d.path, key, diskUsage)
		}
	}
	if d.workers != 0 && d.backend == byProcess {
		return d, fmt.Errorf("--disk %s: workers= is for backend=vhost: the threads are the kernel's", d.path)
	}
	return d, nil
}

// parseTarget reads the options of a disk that is a target of the kernel's.
func (d *disk) parseTarget(words []string) error {
	if d.wwn == "" {
		return errors.New("--disk wwn=: no name; want one such as wwn=naa.5001405a1b2c3d4e, see gvm lio list")
	}
	for _, w := range words {
		key, val, _ := strings.Cut(w, "=")
		switch {
		case key == "backend" && backends[val] == byKernel:
			d.backend = byKernel
		case key == "workers":
			if err := d.parseWorkers(val); err != nil {
				return err
			}
		default:
			return fmt.Errorf("--disk %s: bad option %q: a target that exists takes backend=vhost and workers=N; the rest is up to who made it", d.name(), w)
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
		return fmt.Errorf("--disk %s: workers=%s: want a number from 1 to %d, or shared", d.name(), val, maxQueues)
	}
	return nil
}

// disks are the SCSI targets of a run, and the images behind their units.
type disks struct {
	target  *scsi.Target    // gvm's own
	kernels []*kernelTarget // those of the kernel
	open    []*backend.File
	was     []int64 // the size of each before it was opened, -1: there was none
}

// inProcess tells whether the guest has gvm's own target: not if every disk is
// the kernel's.
func (ds *disks) inProcess() bool { return len(ds.kernels) == 0 || len(ds.target.LUNs()) > 0 }

// openDisks opens, checks and locks every image, and gives each its LUN on a
// target: gvm's own, or one that the kernel serves, as its backend= says. On an
// error nothing stays open or provisioned, and what size= made is undone.
func openDisks(list []disk, k kernelOptions) (*disks, error) {
	list, fallback, auto := k.choose(list)
	ds, err := openAll(list, k)
	var refused kernelError
	switch {
	case err == nil && auto:
		k.note(autoNote + "by the kernel: vhost-scsi and LIO are there")
	case fallback != nil && errors.As(err, &refused):
		k.note(fmt.Sprintf("%sin-process: %v", autoNote, err))
		return openAll(fallback, k)
	}
	return ds, err
}

// openAll is openDisks for disks of which none is backend=auto.
func openAll(list []disk, k kernelOptions) (_ *disks, err error) {
	ds := &disks{target: scsi.NewTarget()}
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
			continue
		}
		f, err := ds.openImage(d)
		if err != nil {
			if d.backend == byKernel && errors.Is(err, backend.ErrLocked) {
				err = inUseError{err}
			}
			return nil, err
		}
		if d.backend == byKernel {
			err = provision.add(d, f)
		} else {
			err = ds.attach(d, f)
		}
		if err != nil {
			return nil, configError{fmt.Errorf("--disk %s: %w", d.path, err)}
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

// openImage opens and locks a disk's image.
func (ds *disks) openImage(d disk) (*backend.File, error) {
	was := int64(-1)
	if fi, err := os.Stat(d.path); err == nil {
		was = fi.Size()
	}
	f, err := backend.Open(d.path, backend.Options{ReadOnly: d.readOnly, Size: d.size, BlockSize: d.blockSize})
	if err != nil {
		return nil, diskError{err}
	}
	ds.open, ds.was = append(ds.open, f), append(ds.was, was)
	return f, nil
}

// unit is how a target shows the disk.
func (d *disk) unit(b scsi.Backend) scsi.UnitConfig {
	return scsi.UnitConfig{Backend: b, Serial: d.serial, ReadOnly: d.readOnly, BlockSize: d.blockSize, Cache: d.cache}
}

// attach makes the disk a unit of gvm's own target.
func (ds *disks) attach(d disk, b scsi.Backend) error {
	u, err := scsi.NewUnit(d.unit(b))
	if err != nil {
		return err
	}
	lun, _ := scsi.EncodeLUN(max(d.lun, 0))
	return ds.target.Attach(lun, u)
}

// undo takes back what size= did to images, for a guest that could not be
// started. What holds data by now is left alone.
func (ds *disks) undo() {
	for i, f := range ds.open {
		was := ds.was[i]
		if was == f.Size() {
			continue
		}
		h, err := os.OpenFile(f.Path(), os.O_WRONLY, 0)
		if err != nil {
			continue
		}
		// A block device has data up to its end.
		if _, err := h.Seek(max(was, 0), unix.SEEK_DATA); !errors.Is(err, unix.ENXIO) {
			h.Close()
			continue
		}
		if was < 0 {
			_ = os.Remove(f.Path())
		} else {
			_ = h.Truncate(was)
		}
		h.Close()
	}
}

// close takes down what was provisioned and releases the images; if no guest was
// started, what size= did is undone in between. A guest that flushed has lost
// nothing; what it did not flush is in the page cache, as after a reset of a
// real disk's host.
func (ds *disks) close(started bool) error {
	var errs []error
	for _, k := range ds.kernels {
		errs = append(errs, k.close())
	}
	if !started {
		ds.undo()
	}
	for _, f := range ds.open {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}
