package lio

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Config describes the target that Provision makes.
type Config struct {
	// Root is the directory of the kernel's SCSI target; "" is DefaultRoot.
	Root string
	// Units are the disks. There may be none, for Add.
	Units []Unit
}

// Target is a target of vhost-scsi: one that Provision made, until Close, or one
// that Lookup found. Its methods may be called at the same time.
type Target struct {
	// WWN is the name for VHOST_SCSI_SET_ENDPOINT. TPGT is the tag of its portal
	// group, which is the SCSI target id that the guest sees: 0 after Provision,
	// the highest of those in use after Lookup.
	WWN  string
	TPGT int

	h     *host
	owner owner
	own   bool // Provision made it
	other bool // in another process

	mu         sync.Mutex
	locks      map[string]io.Closer // by adapter, or the path of a found target
	madeFabric bool
	notes      []string
	disks      map[int]string // LUN to backstore, in core
}

// tag of the only portal group of a Target: the guest sees its disks on SCSI target 0, as with
// package scsi.
const tag = 0

// Provision has LIO serve the units. It first removes the objects of dead gvms. On an error it
// removes everything that it made, or the error names the rest. The target exists when it returns;
// a process that dies without Close leaves it for Collect.
func Provision(c Config) (*Target, error) { return newHost(c.Root).provision(c.Units) }

func (h *host) provision(units []Unit) (_ *Target, err error) {
	t := &Target{TPGT: tag, h: h, own: true, locks: make(map[string]io.Closer), disks: make(map[int]string)}
	if t.owner, err = h.self(); err != nil {
		return nil, err
	}
	unlock, err := h.change()
	if err != nil {
		return nil, err
	}
	defer unlock()
	if _, err := h.collect(); err != nil {
		t.notes = append(t.notes, fmt.Sprintf("the objects of a dead gvm cannot be removed: %v", err))
	}
	all, owners, err := h.adapters()
	if err != nil {
		return nil, noRoot(h.root, err)
	}
	for ; owners[t.owner] != nil; t.owner.seq++ {
		if t.owner.seq == maxSeq {
			return nil, fail(ErrBusy, nil, "this process has %d targets already", maxSeq)
		}
	}
	t.WWN = t.owner.wwn()
	if _, err := h.list(fabric); errors.Is(err, fs.ErrNotExist) {
		t.madeFabric = true
	}
	for _, a := range all {
		_, made, _ := parseAdapter(a)
		t.madeFabric = t.madeFabric || made
	}
	var plans []*plan
	for _, u := range units {
		p, err := newPlan(u)
		if err != nil {
			return nil, err
		}
		for _, q := range plans {
			switch {
			case q.LUN == p.LUN:
				return nil, unsuitable(p.path, "LUN %d is %s's already", p.LUN, q.path)
			case sameImage(q.stat, p.stat) && !(q.ReadOnly && p.ReadOnly):
				return nil, fail(ErrBusy, nil, "%s: given twice: LIO would serve it as two disks", p.path)
			}
		}
		plans = append(plans, p)
	}
	defer func() {
		if err != nil {
			_, undo := h.tearDown(t.owner)
			err = errors.Join(err, undo)
			t.unlock()
		}
	}()
	first := fileio
	if len(plans) > 0 {
		first = plans[0].plugin
	}
	if _, err := t.adapter(first); err != nil {
		return nil, err
	}
	if err := t.makeTPG(); err != nil {
		return nil, err
	}
	for _, p := range plans {
		if err := t.add(p); err != nil {
			return nil, err
		}
	}
	return t, nil
}

// adapter makes and locks the adapter directory for a backstore, if need be.
func (t *Target) adapter(plugin string) (string, error) {
	name := t.owner.adapter(plugin, t.madeFabric)
	if t.locks[name] != nil {
		return core + "/" + name, nil
	}
	module := "/sys/module/" + backstores[plugin].module
	_, before := os.Stat(module)
	if err := t.h.mkdir(core + "/" + name); err != nil {
		return "", noBackstore(plugin, err)
	}
	if _, after := os.Stat(module); before != nil && after == nil {
		t.notes = append(t.notes, "the kernel has loaded "+backstores[plugin].module)
	}
	for deadline := time.Now().Add(t.h.patience); ; time.Sleep(time.Millisecond) {
		l, err := t.h.lock(core + "/" + name)
		if err == nil {
			t.locks[name] = l
			break
		}
		// A gvm of another PID namespace may just look whether the owner lives.
		if !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(deadline) {
			return "", err
		}
	}
	return core + "/" + name, nil
}

// makeTPG makes the fabric directory, the WWN, its portal group and nexus.
func (t *Target) makeTPG() error {
	if err := t.h.mkdir(fabric); err != nil && !errors.Is(err, fs.ErrExist) {
		return noFabric(err)
	}
	tpg := tpgDir(t.WWN, t.TPGT)
	for _, dir := range []string{filepath.Dir(tpg), tpg} {
		if err := t.h.mkdir(dir); err != nil {
			return explain(err, filepath.Join(t.h.root, dir))
		}
	}
	if err := t.h.write(tpg+"/nexus", t.owner.initiator()); err != nil {
		return explain(err, filepath.Join(t.h.root, tpg, "nexus"))
	}
	return nil
}

// add makes a disk and gives it its LUN. On an error the caller removes the objects that it made.
func (t *Target) add(p *plan) error {
	all, _, err := t.h.adapters()
	if err != nil {
		return err
	}
	if other, err := t.h.served(p, all); err != nil {
		return err
	} else if other != "" {
		return fail(ErrBusy, nil, "%s: LIO serves it already, as %s: see gvm lio list", p.path, other)
	}
	a, err := t.adapter(p.plugin)
	if err != nil {
		return err
	}
	disk := a + "/" + t.owner.disk(p.LUN)
	t.disks[p.LUN] = disk
	if err := t.h.makeDisk(disk, p); err != nil {
		return err
	}
	lun := lunDir(tpgDir(t.WWN, t.TPGT), p.LUN)
	if err := t.h.mkdir(lun); err != nil {
		return explain(err, filepath.Join(t.h.root, lun))
	}
	if err := t.h.symlink(disk, lun+"/"+filepath.Base(disk)); err != nil {
		return explain(err, filepath.Join(t.h.root, lun))
	}
	t.notes = append(t.notes, p.notes...)
	return nil
}

// Add plugs in one more disk; the guest gets an event if it has negotiated VIRTIO_SCSI_F_HOTPLUG.
func (t *Target) Add(u Unit) error {
	p, err := newPlan(u)
	if err != nil {
		return err
	}
	unlock, err := t.begin()
	if err != nil {
		return err
	}
	defer unlock()
	if luns, err := t.h.luns(tpgDir(t.WWN, t.TPGT)); err != nil {
		return err
	} else if slices.Contains(luns, u.LUN) {
		return unsuitable(p.path, "LUN %d is taken", u.LUN)
	}
	if err := t.add(p); err != nil {
		return errors.Join(err, t.remove(u.LUN))
	}
	return nil
}

// Remove unplugs a disk; the guest gets an event as with Add. Commands under way are finished
// first.
func (t *Target) Remove(lun int) error {
	unlock, err := t.begin()
	if err != nil {
		return err
	}
	defer unlock()
	if t.disks[lun] == "" {
		return t.noLUN(lun)
	}
	return t.remove(lun)
}

func (t *Target) noLUN(lun int) error {
	return fail(ErrNoLUN, nil, "%s: no LUN %d of this gvm", t.WWN, lun)
}

func (t *Target) remove(lun int) error {
	disk, ok := t.disks[lun]
	if !ok {
		return nil
	}
	if err := t.h.removeLUN(tpgDir(t.WWN, t.TPGT), lun); err != nil {
		return err
	}
	if err := t.h.remove(t.h.rmdir, disk); err != nil {
		return err
	}
	delete(t.disks, lun)
	return nil
}

// begin starts a change of the target's disks.
func (t *Target) begin() (end func(), err error) {
	t.mu.Lock()
	defer func() {
		if err != nil {
			t.mu.Unlock()
		}
	}()
	if !t.own {
		return nil, fail(ErrUnit, nil, "%s: is not gvm's: change it with the tool that made it", t.WWN)
	}
	unlock, err := t.h.change()
	if err != nil {
		return nil, err
	}
	if t.other { // the owner's lock on its first adapter is enough
		release := unlock
		unlock = func() { t.unlock(); release() }
		// Without that lock its end could have come.
		if _, owners, err := t.h.adapters(); err != nil || owners[t.owner] == nil {
			unlock()
			return nil, errors.Join(err, noTargetOf(t.owner.pid, t.WWN))
		}
	}
	return func() { unlock(); t.mu.Unlock() }, nil
}

// Close removes a target that Provision made, and leaves one that Lookup found. The descriptor of
// /dev/vhost-scsi that has the endpoint must be closed, or the endpoint cleared. An error names the
// remaining objects, and Close may be called again.
func (t *Target) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.locks) == 0 {
		return nil
	}
	if !t.own {
		t.unlock()
		return nil
	}
	unlock, err := t.h.change()
	if err != nil {
		return err
	}
	defer unlock()
	if _, err := t.h.tearDown(t.owner); err != nil {
		return fmt.Errorf("take down %s: %w", t.WWN, err)
	}
	t.unlock()
	return nil
}

func (t *Target) unlock() {
	for _, l := range t.locks {
		l.Close()
	}
	clear(t.locks)
}

// Notes returns a line for each difference from package scsi that a unit's options cause, and for
// each module that the kernel has loaded.
func (t *Target) Notes() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.notes)
}

// Lookup finds an existing target that another tool made. It has to have a nexus and a LUN with a
// disk, and no process may have its endpoint. Close leaves it unchanged.
func Lookup(root, wwn string) (*Target, error) { return newHost(root).lookup(wwn) }

func (h *host) lookup(wwn string) (_ *Target, err error) {
	unlock, err := h.change()
	if err != nil {
		return nil, err
	}
	defer unlock()
	wwns, err := h.wwns()
	if err != nil {
		return nil, noRoot(h.root, err)
	}
	if !slices.Contains(wwns, wwn) {
		return nil, fail(ErrNoTarget, nil, "%s: no such target under %s/vhost: see gvm lio list", wwn, h.root)
	}
	_, owners, err := h.adapters()
	if err != nil {
		return nil, err
	}
	for o := range owners {
		if o.wwn() == wwn { // also before its guest, or a gc, has come to it
			return nil, fail(ErrBusy, nil, "%s: belongs to gvm %d: see gvm lio list", wwn, o.pid)
		}
	}
	tags, err := h.tpgs(wwn)
	if err != nil {
		return nil, err
	}
	t := &Target{WWN: wwn, h: h, locks: make(map[string]io.Closer), disks: make(map[int]string)}
	defer func() {
		if err != nil {
			t.unlock()
		}
	}()
	err = fail(ErrNoNexus, nil, "%s: no portal group: mkdir %s/%s/%[1]s/tpgt_1", wwn, h.root, fabric)
	for _, tag := range tags {
		tpg := tpgDir(wwn, tag)
		if nexus, e := h.read(tpg + "/nexus"); e != nil || nexus == "" {
			err = fail(ErrNoNexus, nil, "%s: no nexus: echo naa.5001405000000001 > %s/%s/nexus", wwn, h.root, tpg)
			continue
		}
		disks, e := h.disksOf(tpg)
		if e != nil {
			return nil, e
		}
		if len(disks) == 0 {
			err = fail(ErrNoLUN, nil, "%s: no LUN with a disk: ln -s BACKSTORE %s/%s/lun/lun_0/", wwn, h.root, tpg)
			continue
		}
		// A group that is the endpoint of a process fails with EBUSY first, and one with a LUN is
		// not empty: this removes nothing.
		if errors.Is(h.rmdir(tpg), unix.EBUSY) {
			return nil, fail(ErrBusy, nil, "%s: another process serves a guest with it", wwn)
		}
		l, e := h.lock(tpg)
		if e != nil {
			return nil, fail(ErrBusy, nil, "%s: another gvm has it", wwn)
		}
		t.TPGT, t.locks[tpg] = tag, l
		maps.Copy(t.disks, disks)
	}
	if len(t.locks) == 0 {
		return nil, err
	}
	return t, nil
}

// disksOf returns the disks of a portal group by LUN.
func (h *host) disksOf(tpg string) (map[int]string, error) {
	luns, err := h.luns(tpg)
	if err != nil {
		return nil, err
	}
	disks := make(map[int]string)
	for _, n := range luns {
		_, to, err := h.links(lunDir(tpg, n))
		if err != nil {
			return nil, err
		}
		if len(to) > 0 {
			disks[n] = to[0]
		}
	}
	return disks, nil
}

// LUNs returns the target's LUNs with a disk, ascending.
func (t *Target) LUNs() []int {
	t.mu.Lock()
	defer t.mu.Unlock()
	var out []int
	for n := range t.disks {
		out = append(out, n)
	}
	slices.Sort(out)
	return out
}
