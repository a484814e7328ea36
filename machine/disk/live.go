package disk

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"
	"time"

	"gvm/control"
	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/scsi/sidecar"
	"gvm/devices/virtio/vscsi"
	"gvm/inspect"
	"gvm/panics"
	"gvm/text"
)

// live is the part of a Set that changes while the machine runs. Before and after that, one
// goroutine has the Set to itself.
//
// A change of a disk is slow: it waits for storage and for commands of the guest. It runs in a
// goroutine of its own, holds no lock, and has an entry in busy meanwhile.
type live struct {
	mu      sync.Mutex        // guards the fields below and Set.open; never held during a wait or I/O
	ended   bool              // no more changes may begin
	closed  bool              // close has begun to close unused disks
	served  []served          // the units of gvm's own target
	events  Notifier          // the device of that target; nil: the guest has none
	adding  []Spec            // disks that are not yet units
	busy    map[any]string    // by unit, or by the backend of a disk that the kernel serves
	over    chan struct{}     // closed when ended is set; made by ending
	paths   map[string]string // absolute paths of the kernel's disks
	changes sync.WaitGroup
	history inspect.Events // of the changes
	bounds
}

// bounds limit waits of the control socket; zero is the default.
type bounds struct {
	commands time.Duration // a resize or removal waits so long for commands that use the disk: 10 s
	answer   time.Duration // a client waits so long for a change, which then goes on: 30 s
}

// ending returns the channel that is closed when the machine ends. The caller holds mu.
func (l *live) ending() chan struct{} {
	if l.over == nil {
		l.over = make(chan struct{})
	}
	return l.over
}

// change runs work, which changes a disk, with mu released, and returns its result. The caller
// holds mu. done is called with mu held when work has ended.
func (l *live) change(
	ctx context.Context, what string, work func(cut <-chan struct{}) (control.Change, error), done func(),
) (control.Change, error) {
	type answer struct {
		control.Change
		error
	}
	answers, over := make(chan answer, 1), l.ending()
	l.history.Add(what)
	l.changes.Add(1)
	panics.Go(func() {
		defer l.changes.Done()
		var a answer
		defer func() {
			if p := recover(); p != nil {
				a.error = fmt.Errorf("a bug in gvm, please report it: %v", p)
			}
			l.mu.Lock()
			done()
			l.mu.Unlock()
			l.history.Add(what+" is over", outcome(a.Change, a.error)...)
			answers <- a
		}()
		a.Change, a.error = work(over)
	})
	l.mu.Unlock()
	defer l.mu.Lock()
	timer := time.NewTimer(cmp.Or(l.bounds.answer, 30*time.Second))
	defer timer.Stop()
	select {
	case a := <-answers:
		return a.Change, a.error
	case <-over:
		return control.Change{}, control.ErrEnded
	case <-ctx.Done():
	case <-timer.C:
	}
	return control.Change{}, control.Errorf(http.StatusGatewayTimeout,
		"%s takes long and goes on: gvm disk list shows when it is over", what)
}

// outcome returns the values of the end of a change, for its event.
func outcome(ch control.Change, err error) []inspect.Node {
	if err != nil {
		return []inspect.Node{inspect.Text("error", err.Error())}
	}
	return []inspect.Node{inspect.Int("lun", ch.Disk.LUN), inspect.Text("backend", ch.Disk.Backend),
		inspect.Int("size", ch.Disk.Size), inspect.Text("guest", string(ch.Guest))}
}

// Notifier sends events to the guest; *vscsi.Device is one.
type Notifier interface {
	Event(vscsi.EventType, scsi.LUN, vscsi.Reason) vscsi.Delivery
}

// resizer is a backend whose size can change; *block.File is one.
type resizer interface {
	Resize(n int64, shrink bool, cut func(*block.File, int64) error) error
}

// served is a disk that is a unit of gvm's own target.
type served struct {
	Spec
	path string // absolute, "" for memory
	at   scsi.LUN
	unit *scsi.Unit
	gone context.CancelFunc // cancels requests that wait for the machine to be resumed
}

func newServed(d Spec, lun scsi.LUN, u *scsi.Unit) served {
	s := served{Spec: d, at: lun, unit: u}
	if d.Path != "" && d.Storage == Image {
		switch b := s.backend().(type) {
		case *block.File:
			s.path = b.Identity()
		case *block.Overlay:
			s.path = b.Base().Identity()
		default:
			s.path = Absolute(d.Path)
		}
	}
	return s
}

// Absolute returns an absolute path that is the same in the client's process and the machine's. It
// resolves links as far as the path exists.
func Absolute(path string) string {
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

// label is the disk's path in messages. The embedded guest's own disk has none.
func (s *served) label() string { return cmp.Or(s.Spec.Path, "(memory)") }

func (s *served) backend() block.Backend { return s.unit.Config().Backend }

// describe returns the disk as the control socket shows it.
func (s *served) describe() control.Disk {
	return control.Disk{
		LUN:       s.number(),
		Path:      text.Name(s.path),
		Storage:   storages.of(s.Storage),
		Serial:    text.Name(s.unit.Serial()),
		Size:      int64(s.unit.Blocks()) * int64(s.unit.BlockSize()),
		BlockSize: s.unit.BlockSize(),
		ReadOnly:  s.unit.Config().ReadOnly,
		Cache:     CacheName(s.unit.Config().Cache),
		Backend:   "process",
		Options:   s.Spec.options(),
	}
}

// List describes every disk: gvm's own by LUN, then those of the kernel.
func (ds *Set) List() []control.Disk {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	var list []control.Disk
	for i := range ds.served {
		d := ds.served[i].describe()
		d.Change = ds.busy[ds.served[i].unit]
		list = append(list, d)
	}
	for _, d := range ds.adding {
		list = append(list, control.Disk{LUN: d.LUN, Path: text.Name(d.Path), Serial: text.Name(d.Serial),
			Size: d.Size, BlockSize: d.BlockSize, ReadOnly: d.ReadOnly,
			Cache: CacheName(d.Cache), Backend: backends.of(d.Backend), Options: d.options(), Change: control.Adding})
	}
	sort.SliceStable(list, func(i, j int) bool { return list[i].LUN < list[j].LUN })
	for _, k := range ds.kernels {
		if len(k.units) == 0 && len(k.specs) > 0 { // not gvm's
			list = append(list, control.Disk{WWN: k.target.WWN, Backend: "vhost", Options: k.specs[0].options()})
		}
		list = append(list, ds.listKernel(k)...)
	}
	return list
}

// listKernel describes the disks that gvm made in a target of the kernel's. The caller holds mu.
func (ds *Set) listKernel(k *kernelTarget) (list []control.Disk) {
	for i, u := range k.units {
		path := text.Name(ds.paths[u.Backend.(*block.File).Path()])
		list = append(list, control.Disk{LUN: u.LUN, Path: path, WWN: k.target.WWN, Serial: text.Name(u.Serial),
			Size: u.Backend.Size(), BlockSize: u.BlockSize, ReadOnly: u.ReadOnly,
			Cache: CacheName(u.Cache), Backend: "vhost", Options: k.specs[i].options(), Change: ds.busy[u.Backend]})
	}
	return list
}

// Add opens a disk's image, assigns a LUN and tells the guest. On an error nothing has changed.
func (ds *Set) Add(ctx context.Context, d Spec) (control.Change, error) {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	switch {
	case ds.ended:
		return control.Change{}, control.ErrEnded
	case d.Backend == Vhost && ds.ownKernels() == nil:
		return control.Change{}, control.Errorf(http.StatusConflict,
			"--disk %s: the machine was started without backend=vhost disks and has no device for them", d.Name())
	case d.Backend == Vhost && ds.ownKernels().fixed:
		return control.Change{}, control.Errorf(http.StatusConflict, "--disk %s: in a jail with --sandbox=off the kernel "+
			"serves the disks of the command line alone: start the machine with this one, or add it without backend=vhost",
			d.Name())
	case d.Backend == Vhost && (d.Storage != Image || d.Path == ""):
		return control.Change{}, control.Errorf(http.StatusConflict,
			"--disk %s: only images can be added with backend=vhost to a machine that runs", d.Name())
	case d.Backend == Vhost && d.Workers != 0:
		return control.Change{}, control.Errorf(http.StatusConflict,
			"--disk %s: workers= is for the disks that the machine starts with", d.Name())
	case d.Backend != Vhost && ds.events == nil:
		return control.Change{}, control.Errorf(http.StatusConflict,
			"--disk %s: the machine was started with backend=vhost disks only and has no device for others", d.Name())
	case d.Storage == Image && slices.ContainsFunc(ds.adding, func(a Spec) bool {
		return a.Storage == Image && filepath.Clean(a.Path) == filepath.Clean(d.Path)
	}):
		return control.Change{}, control.Errorf(http.StatusConflict,
			"--disk %s is being added already: gvm disk list shows when that is over", d.Path)
	}
	k, add := ds.ownKernels(), ds.addKernels
	all := slices.Clone(ds.adding)
	if d.Backend == Vhost {
		all = append(all, k.specs...)
	} else {
		d.Backend, add = Process, ds.addNow
		for _, s := range ds.served {
			s.LUN = s.number()
			all = append(all, s.Spec)
		}
	}
	all = append(all, d)
	if err := assignLUNs(all); err != nil {
		return control.Change{}, control.Errorf(http.StatusConflict, "%v", err)
	}
	d = all[len(all)-1]
	ds.adding = append(ds.adding, d)
	work := func(<-chan struct{}) (control.Change, error) { return add(d) }
	return ds.change(ctx, "adding "+d.Name(), work, func() {
		ds.adding = slices.DeleteFunc(ds.adding, func(a Spec) bool { return a.LUN == d.LUN && a.Backend == d.Backend })
	})
}

// addNow is the slow part of Add.
func (ds *Set) addNow(d Spec) (control.Change, error) {
	own := &Set{target: ds.target, files: ds.files, mishaps: ds.mishaps} // until the disk is added
	f, err := own.openAdded(d)
	if err != nil {
		return control.Change{}, err
	}
	if err := own.Attach(d, f); err != nil {
		ds.mu.Lock()
		err = configError{fmt.Errorf("--disk %s: %w", d.Path, ds.sameSerial(err))}
		ds.mu.Unlock()
		for _, f := range own.open {
			err = errors.Join(err, f.close(false))
		}
		return control.Change{}, refusal(err)
	}
	s := own.served[0]
	ds.mu.Lock()
	defer ds.mu.Unlock()
	if ds.closed { // the process is ending
		s.gone()
		return control.Change{}, control.ErrEnded
	}
	ds.served, ds.open = append(ds.served, s), append(ds.open, own.open...)
	return control.Change{Disk: s.describe(), Guest: ds.tell(&s, vscsi.TransportReset, vscsi.ResetRescan)}, nil
}

// openAdded is openImage for a disk that a client adds.
func (ds *Set) openAdded(d Spec) (block.Backend, error) {
	f, err := ds.openImage(d)
	if locked := (*block.LockedError)(nil); errors.As(err, &locked) && locked.Other != "" {
		locked.Other = Absolute(locked.Other) // the client may have another working directory
	}
	if err != nil {
		return nil, refusal(err)
	}
	return f, nil
}

// claim finds a disk and marks it busy for a change. It fails if another change of the disk is
// under way. The caller holds mu.
func (ds *Set) claim(id, change string) (s served, release func(), err error) {
	i, err := ds.find(id)
	if err != nil {
		return s, nil, err
	}
	s = ds.served[i]
	release, err = ds.mark(s.unit, s.number(), s.label(), change)
	return s, release, err
}

// mark is claim for a disk that has been found, by its key in busy.
func (ds *Set) mark(key any, lun int, path, change string) (release func(), err error) {
	if other := ds.busy[key]; other != "" {
		return nil, control.Errorf(http.StatusConflict,
			"LUN %d, %s: %s is under way: gvm disk list shows when it is over", lun, path, other)
	}
	if ds.busy == nil {
		ds.busy = map[any]string{}
	}
	ds.busy[key] = change
	return func() {
		if !ds.closed {
			delete(ds.busy, key)
		}
	}, nil
}

// Remove tells the guest that a disk is going and removes it without waiting for the guest.
// Commands in flight are finished; those that take longer than bounds.commands are aborted, unless
// the kernel serves the disk. It makes the guest's writes durable, since the guest can no longer
// flush.
func (ds *Set) Remove(ctx context.Context, id string) (control.Change, error) {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	switch k, i := ds.findKernels(id); {
	case ds.ended || k == nil:
	case ds.index(id) < 0 && k.fixed:
		return control.Change{}, control.Errorf(http.StatusConflict,
			"%s: in a jail with --sandbox=off the kernel serves a disk until the machine's end: stop the machine first", id)
	case ds.index(id) < 0:
		return ds.removeKernels(ctx, k, i)
	default:
		return control.Change{}, control.Errorf(http.StatusConflict,
			"gvm serves one disk that is %s, and the kernel another: name it by its path or serial number", id)
	}
	s, release, err := ds.claim(id, control.Removing)
	if err != nil {
		return control.Change{}, err
	}
	ch := control.Change{Disk: s.describe(), Guest: ds.tell(&s, vscsi.TransportReset, vscsi.ResetRemoved)}
	s.gone()
	work := func(over <-chan struct{}) (control.Change, error) { return ch, ds.removeNow(s, over) }
	return ds.change(ctx, "removing "+s.Spec.Name(), work, release)
}

// removeNow is the slow part of Remove.
func (ds *Set) removeNow(s served, over <-chan struct{}) error {
	ctx, cancel := context.WithTimeout(context.Background(), cmp.Or(ds.bounds.commands, 10*time.Second))
	defer cancel()
	panics.Go(func() {
		select {
		case <-over:
			cancel()
		case <-ctx.Done():
		}
	})
	err := ds.target.Remove(ctx, s.at)
	if err != nil {
		return err
	}
	err = s.unit.Sync()
	ds.mu.Lock()
	if ds.closed {
		ds.mu.Unlock()
		return control.ErrEnded
	}
	ds.served = slices.DeleteFunc(ds.served, func(o served) bool { return o.unit == s.unit })
	f := ds.taken(s.backend())
	ds.mu.Unlock()
	return errors.Join(err, f.close(true))
}

// Resize changes the size of a disk, or adopts the present size of its image, and tells the guest.
func (ds *Set) Resize(ctx context.Context, id string, r control.ResizeDisk) (control.Change, error) {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	s, release, err := ds.claim(id, control.Resizing)
	if err != nil {
		return control.Change{}, err
	}
	b, ok := s.backend().(resizer)
	if !ok {
		release()
		return control.Change{}, control.Errorf(http.StatusConflict, "LUN %d, %s, keeps its size",
			s.number(), s.label())
	}
	return ds.change(ctx, "resizing "+s.Spec.Name(), func(over <-chan struct{}) (control.Change, error) {
		return ds.resizeNow(s, over, func() error { return b.Resize(r.Size, r.Shrink, sidecar.Cut) })
	}, release)
}

// resizeNow is the slow part of Resize. It does not wait for commands that wait for the user.
func (ds *Set) resizeNow(s served, over <-chan struct{}, do func() error) (control.Change, error) {
	held := func() bool { return ds.mishaps.holds(s.Spec.Name(), 0) > 0 }
	cut, done := make(chan struct{}), make(chan struct{})
	panics.Go(func() {
		defer close(cut)
		late := time.NewTimer(cmp.Or(ds.bounds.commands, 10*time.Second))
		defer late.Stop()
		for !held() {
			select {
			case <-done:
				return
			case <-over:
				return
			case <-late.C:
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	})
	before := s.unit.Blocks()
	err := s.unit.ResizeUntil(cut, do)
	close(done)
	<-cut
	switch {
	case errors.Is(err, scsi.ErrBusy) && held():
		return control.Change{}, control.Errorf(http.StatusConflict,
			"LUN %d, %s: a command has failed and waits: gvm resume %s first", s.number(), s.label(), ds.mishaps.name)
	case errors.Is(err, scsi.ErrBusy):
		return control.Change{}, control.Errorf(http.StatusConflict, "LUN %d, %s: %v; try again",
			s.number(), s.label(), err)
	case err != nil:
		return control.Change{}, refusal(ImageError{err})
	}
	ds.mu.Lock()
	defer ds.mu.Unlock()
	ch := control.Change{Disk: s.describe(), Guest: control.Unchanged}
	if s.unit.Blocks() != before {
		// This is the additional sense code of CAPACITY DATA HAS CHANGED (SPC-5 4.5.2), as in the
		// unit attention.
		ch.Guest = ds.tell(&s, vscsi.ParamChange,
			vscsi.ParamReason(scsi.CapacityChanged.ASC, scsi.CapacityChanged.ASCQ))
	}
	return ch, nil
}

// find returns the index of the disk with a LUN, a serial number or a path. The caller holds mu.
func (ds *Set) find(id string) (int, error) {
	if ds.ended {
		return 0, control.ErrEnded
	}
	if i := ds.index(id); i >= 0 {
		return i, nil
	}
	n, err := strconv.Atoi(id)
	isLUN := err == nil
	for _, kind := range storages {
		if size, ok := strings.CutPrefix(id, kind.name+":"); ok {
			return ds.findStorage(id, kind.value, size)
		}
	}
	for _, d := range ds.adding {
		if isLUN && d.LUN == n || d.Serial != "" && d.Serial == id || d.Path == id {
			return 0, control.Errorf(http.StatusConflict,
				"LUN %d, %s, is being added: gvm disk list shows when that is over", d.LUN, d.Path)
		}
	}
	if k, _ := ds.findKernels(id); k != nil {
		return 0, control.Errorf(http.StatusConflict,
			"disk %s has backend=vhost: it keeps its size while the machine runs", id)
	}
	return 0, control.Errorf(http.StatusNotFound,
		"no disk of this machine has the LUN, serial number or path %s; gvm disk list shows them", id)
}

// index returns the index of the disk of gvm's own target with a LUN, a serial number or a path, or
// -1. The caller holds mu.
func (ds *Set) index(id string) int {
	n, err := strconv.Atoi(id)
	for _, match := range []func(served) bool{
		func(s served) bool { return err == nil && s.number() == n },
		func(s served) bool { return s.unit.Serial() == id },
		func(s served) bool { return s.path != "" && s.path == id },
	} {
		if i := slices.IndexFunc(ds.served, match); i >= 0 {
			return i
		}
	}
	return -1
}

// findStorage is find for a disk without a path, such as mem:1M. The caller holds mu.
func (ds *Set) findStorage(id string, kind Storage, size string) (int, error) {
	found := -1
	n, err := text.ParseSize(size, 1)
	for i, s := range ds.served {
		if err != nil || s.Storage != kind || s.describe().Size != int64(n) {
			continue
		}
		if found >= 0 {
			first := ds.served[found]
			return 0, control.Errorf(http.StatusConflict,
				"several disks are %s: name one by its LUN or serial number, such as %d or %s",
				id, first.number(), first.unit.Serial())
		}
		found = i
	}
	if found < 0 {
		return 0, control.Errorf(http.StatusNotFound,
			"no disk of this machine has the LUN, serial number or path %s; gvm disk list shows them", id)
	}
	return found, nil
}

// tell sends the guest an event about a disk. The caller holds mu.
func (ds *Set) tell(s *served, t vscsi.EventType, r vscsi.Reason) control.Guest {
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

// taken removes and returns the open files of a backend, for the caller to close. The caller holds
// mu.
func (ds *Set) taken(b block.Backend) (f opened) {
	if i := slices.IndexFunc(ds.open, func(i opened) bool { return any(i.backend) == any(b) }); i >= 0 {
		f = ds.open[i]
		ds.open = slices.Delete(ds.open, i, i+1)
	}
	return f
}

// endChanges ends changes and waits for those under way, for the time of patience. It returns the
// open files that no change uses any more; the rest closes with the process.
func (ds *Set) endChanges(ctx context.Context, patience time.Duration) (open []opened) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	ds.mu.Lock()
	if !ds.ended {
		ds.ended = true
		close(ds.ending())
	}
	ds.mu.Unlock()
	changed := make(chan struct{})
	panics.Go(func() {
		ds.changes.Wait()
		close(changed)
	})
	select {
	case <-changed:
	case <-ctx.Done():
	}
	ds.mu.Lock()
	defer ds.mu.Unlock()
	ds.closed = true
	for _, f := range ds.open {
		used := ds.busy[f.backend] != "" || slices.ContainsFunc(ds.served,
			func(s served) bool { return ds.busy[s.unit] != "" && any(s.backend()) == any(f.backend) })
		if !used {
			open = append(open, f)
		}
	}
	return open
}

// Added returns the disk that a client asks for.
func Added(a control.AddDisk) (Spec, error) {
	d, err := Parse(string(a.Disk))
	if err != nil {
		return d, control.Errorf(http.StatusBadRequest, "%v", err)
	}
	for _, path := range []*string{&d.Path, &d.Overlay} {
		if d.Storage != Image || *path == "" || filepath.IsAbs(*path) || path == &d.Overlay && *path == OverlayOn {
			continue
		}
		if !filepath.IsAbs(string(a.Dir)) {
			return d, control.Errorf(http.StatusBadRequest,
				"--disk %s: a relative path, and no absolute directory that it starts from", *path)
		}
		*path = filepath.Join(string(a.Dir), *path)
	}
	return d, nil
}

// refusal converts an error that the user can correct to a conflict. Any other error is a failure
// of the host.
func refusal(err error) error {
	switch {
	case !IsConfig(err):
		return err
	case errors.Is(err, fs.ErrNotExist):
		return control.Errorf(http.StatusNotFound, "%v", err)
	case errors.Is(err, block.ErrLocked), errors.Is(err, block.ErrSize):
		return control.Errorf(http.StatusConflict, "%v", err)
	}
	return control.Errorf(http.StatusBadRequest, "%v", err)
}
