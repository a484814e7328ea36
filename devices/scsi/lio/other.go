package lio

import "io"

// A process that may not open an image has another one change its Target, with that one's rights.

// AddTo is Target.Add for the target of a living process that Provision made there. It returns the
// notes of the change.
func AddTo(pid int, wwn string, u Unit) (notes []string, err error) {
	return newHost("").addTo(pid, wwn, u)
}

// Provisioned returns the first target of this process, which Provision made there before the
// process gave up the rights to LIO. No method of it changes LIO: another process does, by AddTo
// and RemoveFrom, and by Collect after the end of this one.
func Provisioned() (*Target, error) {
	o, err := newHost("").self()
	return &Target{WWN: o.wwn(), TPGT: tag, owner: o}, err
}

// RemoveFrom is Target.Remove for the target of a living process that Provision made there.
func RemoveFrom(pid int, wwn string, lun int) error { return newHost("").removeFrom(pid, wwn, lun) }

// TakeDown is Target.Close for the target of a living process that Provision made there.
func TakeDown(pid int, wwn string) error { return newHost("").takeDown(pid, wwn) }

// Owns reports whether a process has objects of Provision's.
func Owns(pid int) bool { return newHost("").owns(pid) }

func (h *host) owns(pid int) bool {
	_, owners, _ := h.adapters() // where there is no LIO, there are none
	for o := range owners {
		if o.pid == pid {
			return true
		}
	}
	return false
}

func (h *host) addTo(pid int, wwn string, u Unit) (notes []string, err error) {
	t, err := h.of(pid, wwn)
	if err != nil {
		return nil, err
	}
	err = t.Add(u)
	return t.Notes(), err
}

func (h *host) removeFrom(pid int, wwn string, lun int) error {
	t, err := h.of(pid, wwn)
	if err != nil {
		return err
	}
	if t.disks[lun] == "" { // before the lock, which a process that asks in vain again and again would take from others
		return t.noLUN(lun)
	}
	return t.Remove(lun)
}

func (h *host) takeDown(pid int, wwn string) error {
	t, err := h.of(pid, wwn)
	if err != nil {
		return err
	}
	return t.Close()
}

// unlocked stands for the lock of another process.
type unlocked struct{}

func (unlocked) Close() error { return nil }

// of returns the target of a living process for one change. It is not to be closed.
func (h *host) of(pid int, wwn string) (*Target, error) {
	_, owners, err := h.adapters()
	if err != nil {
		return nil, noRoot(h.root, err)
	}
	start, running := h.running(pid)
	for o, adapters := range owners {
		if !running || o.pid != pid || o.start != start || o.wwn() != wwn {
			continue
		}
		disks, err := h.disksOf(tpgDir(wwn, tag))
		if err != nil {
			return nil, err
		}
		t := &Target{WWN: wwn, TPGT: tag, h: h, owner: o, own: true, other: true, locks: make(map[string]io.Closer),
			disks: disks}
		for _, a := range adapters {
			_, made, _ := parseAdapter(a)
			t.madeFabric = t.madeFabric || made
			t.locks[a] = unlocked{}
		}
		return t, nil
	}
	return nil, noTargetOf(pid, wwn)
}

func noTargetOf(pid int, wwn string) error {
	return fail(ErrNoTarget, nil, "%.40q: process %d has no such target: see gvm lio list", wwn, pid)
}
