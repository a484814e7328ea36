package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"path/filepath"
	"slices"
	"strconv"
	"sync"

	"gvm/control"
	"gvm/devices/scsi"
	"gvm/devices/scsi/backend"
	"gvm/devices/virtio/vscsi"
)

// live is the part of disks that changes while the machine runs. Until it runs
// and after it has ended one goroutine has the disks for itself.
type live struct {
	mu     sync.Mutex // guards what follows, and disks.open
	ended  bool
	served []served // the units of gvm's own target
	events notifier // the device of that target; nil: the guest has none
}

// notifier is the device that tells the guest; *vscsi.Device is one.
type notifier interface {
	Event(vscsi.EventType, scsi.LUN, vscsi.Reason) vscsi.Delivery
}

// resizer is a backend whose size can change; *backend.File is one.
type resizer interface {
	Resize(n int64, shrink bool) error
}

// served is a disk that is a unit of gvm's own target.
type served struct {
	disk
	path string // absolute, "" for memory
	at   scsi.LUN
	unit *scsi.Unit
	gone context.CancelFunc // lets go requests that wait for the machine to be resumed
}

func newServed(d disk, lun scsi.LUN, u *scsi.Unit) served {
	s := served{disk: d, at: lun, unit: u}
	if d.path != "" && d.storage == inImage {
		s.path = absolute(d.path)
	}
	return s
}

// absolute is how a path is called in both processes, the machine's and the
// asking one: without links, as far as it leads anywhere.
func absolute(path string) string {
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	if abs, err := filepath.Abs(path); err == nil {
		path = abs
	}
	return path
}

func (s *served) number() int {
	n, _ := scsi.DecodeLUN(s.at)
	return n
}

func (s *served) backend() scsi.Backend { return s.unit.Config().Backend }

// describe is how the control socket shows the disk.
func (s *served) describe() control.Disk {
	return control.Disk{
		LUN:       s.number(),
		Path:      s.path,
		Serial:    s.unit.Serial(),
		Size:      int64(s.unit.Blocks()) * int64(s.unit.BlockSize()),
		BlockSize: s.unit.BlockSize(),
		ReadOnly:  s.unit.Config().ReadOnly,
		Cache:     cacheName(s.unit.Config().Cache),
		Backend:   "process",
	}
}

func cacheName(m scsi.CacheMode) string {
	for name, mode := range cacheModes {
		if mode == m {
			return name
		}
	}
	return ""
}

// list describes every disk: gvm's own by LUN, then those of the kernel.
func (ds *disks) list() []control.Disk {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	var list []control.Disk
	for i := range ds.served {
		list = append(list, ds.served[i].describe())
	}
	slices.SortFunc(list, func(a, b control.Disk) int { return a.LUN - b.LUN })
	for _, k := range ds.kernels {
		if len(k.units) == 0 {
			list = append(list, control.Disk{WWN: k.target.WWN, Backend: "vhost"})
		}
		for _, u := range k.units {
			list = append(list, control.Disk{LUN: u.LUN, Path: absolute(u.Backend.(*backend.File).Path()), WWN: k.target.WWN, Serial: u.Serial,
				Size: u.Backend.Size(), BlockSize: u.BlockSize, ReadOnly: u.ReadOnly, Cache: cacheName(u.Cache), Backend: "vhost"})
		}
	}
	return list
}

// add opens a disk's image, gives it a LUN and tells the guest. On an error all
// is as before.
func (ds *disks) add(d disk) (control.Change, error) {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	switch {
	case ds.ended:
		return control.Change{}, control.ErrEnded
	case d.backend == byKernel:
		return control.Change{}, control.Errorf(http.StatusConflict, "--disk %s: backend=vhost disks cannot be added to a machine that runs; backend=process ones can", d.name())
	case ds.events == nil:
		return control.Change{}, control.Errorf(http.StatusConflict, "--disk %s: the machine was started with backend=vhost disks only and has no device for others", d.name())
	}
	d.backend = byProcess
	all := []disk{}
	for _, s := range ds.served {
		s.lun = s.number()
		all = append(all, s.disk)
	}
	all = append(all, d)
	if err := assignLUNs(all); err != nil {
		return control.Change{}, control.Errorf(http.StatusConflict, "%v", err)
	}
	d = all[len(all)-1]
	f, err := ds.openImage(d)
	if err != nil {
		return control.Change{}, refusal(err)
	}
	if err := ds.attach(d, f); err != nil {
		err = configError{fmt.Errorf("--disk %s: %w", d.path, err)}
		return control.Change{}, refusal(errors.Join(err, ds.release(f, false)))
	}
	s := &ds.served[len(ds.served)-1]
	return control.Change{Disk: s.describe(), Guest: ds.tell(s, vscsi.TransportReset, vscsi.ResetRescan)}, nil
}

// remove tells the guest that a disk goes, and takes it away without waiting for
// the guest: commands in flight are aborted. What the guest has written is on
// stable storage then, as it gets to flush nothing more.
func (ds *disks) remove(id string) (control.Change, error) {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	i, err := ds.find(id)
	if err != nil {
		return control.Change{}, err
	}
	s := ds.served[i]
	ch := control.Change{Disk: s.describe(), Guest: ds.tell(&s, vscsi.TransportReset, vscsi.ResetRemoved)}
	s.gone()
	if err := ds.target.Detach(s.at); err != nil {
		return ch, err
	}
	ds.served = slices.Delete(ds.served, i, i+1)
	return ch, errors.Join(s.unit.Sync(), ds.release(s.backend(), true))
}

// resize gives a disk another size, or takes the one that its image has by now,
// and tells the guest.
func (ds *disks) resize(id string, r control.ResizeDisk) (control.Change, error) {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	i, err := ds.find(id)
	if err != nil {
		return control.Change{}, err
	}
	s := &ds.served[i]
	b, ok := s.backend().(resizer)
	if !ok {
		return control.Change{}, control.Errorf(http.StatusConflict, "LUN %d, %s, keeps its size", s.number(), s.disk.path)
	}
	before := s.unit.Blocks()
	if err := s.unit.Resize(func() error { return b.Resize(r.Size, r.Shrink) }); err != nil {
		return control.Change{}, refusal(diskError{err})
	}
	ch := control.Change{Disk: s.describe(), Guest: control.Unchanged}
	if s.unit.Blocks() != before {
		// The additional sense code of CAPACITY DATA HAS CHANGED (SPC-5 4.5.2),
		// which the unit attention has too.
		ch.Guest = ds.tell(s, vscsi.ParamChange, vscsi.ParamReason(scsi.CapacityChanged.ASC, scsi.CapacityChanged.ASCQ))
	}
	return ch, nil
}

// find returns the index of the disk with a LUN, a serial number or a path. The
// caller holds mu.
func (ds *disks) find(id string) (int, error) {
	if ds.ended {
		return 0, control.ErrEnded
	}
	n, err := strconv.Atoi(id)
	isLUN := err == nil
	for _, match := range []func(served) bool{
		func(s served) bool { return isLUN && s.number() == n },
		func(s served) bool { return s.unit.Serial() == id },
		func(s served) bool { return s.path != "" && s.path == id },
	} {
		if i := slices.IndexFunc(ds.served, match); i >= 0 {
			return i, nil
		}
	}
	for _, k := range ds.kernels {
		for _, u := range k.units {
			if isLUN && u.LUN == n || u.Serial != "" && u.Serial == id || absolute(u.Backend.(*backend.File).Path()) == id {
				return 0, control.Errorf(http.StatusConflict, "disk %s has backend=vhost: it cannot be changed while the machine runs", id)
			}
		}
	}
	return 0, control.Errorf(http.StatusNotFound, "no disk of this machine has the LUN, serial number or path %s", id)
}

// tell sends the guest an event about a disk. The caller holds mu.
func (ds *disks) tell(s *served, t vscsi.EventType, r vscsi.Reason) control.Guest {
	switch ds.events.Event(t, s.at, r) {
	case vscsi.Delivered:
		return control.Told
	case vscsi.Missed:
		return control.Missed
	case vscsi.Unwanted:
		return control.Deaf
	}
	return control.Absent
}

// release closes what is open for a backend. The caller holds mu.
func (ds *disks) release(b scsi.Backend, had bool) error {
	i := slices.IndexFunc(ds.open, func(i opened) bool { return any(i.backend) == any(b) })
	if i < 0 {
		return nil // it holds nothing open
	}
	f := ds.open[i]
	ds.open = slices.Delete(ds.open, i, i+1)
	return f.close(had)
}

// refusal gives an error of the user's making the status of one; any other is
// the host's failure.
func refusal(err error) error {
	switch {
	case exitStatus(err) != exitUsage:
		return err
	case errors.Is(err, fs.ErrNotExist):
		return control.Errorf(http.StatusNotFound, "%v", err)
	case errors.Is(err, backend.ErrLocked), errors.Is(err, backend.ErrSize):
		return control.Errorf(http.StatusConflict, "%v", err)
	}
	return control.Errorf(http.StatusBadRequest, "%v", err)
}
