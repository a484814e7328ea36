package lio

import (
	"errors"
	"io/fs"
	"path/filepath"

	"gvm/text"
)

// Kind is the kind of an Object.
type Kind string

// Kinds of objects.
const (
	KindTarget  Kind = "target"  // a target of vhost-scsi
	KindDisk    Kind = "disk"    // a backstore
	KindAdapter Kind = "adapter" // a directory for backstores, without any
)

// Object is one thing in the kernel's SCSI target.
type Object struct {
	Kind  Kind      `json:"kind"`
	Name  text.Name `json:"name"`            // below the root
	Owner *Owner    `json:"owner,omitempty"` // nil: not gvm's
	Image text.Name `json:"image,omitempty"` // of a disk: its file or block device
	LUNs  []LUN     `json:"luns,omitempty"`  // of a target
}

// Owner is the gvm process that made an object.
type Owner struct {
	PID   int  `json:"pid"`
	Alive bool `json:"alive"`
}

// LUN is a logical unit of a target.
type LUN struct {
	TPGT int       `json:"tpgt"`
	LUN  int       `json:"lun"`
	Disk text.Name `json:"disk"` // the name of the disk's Object, "" without one
}

// List returns the targets of vhost-scsi, all backstores, and gvm's adapters
// that have none.
func List(root string) ([]Object, error) { return newHost(root).objects() }

func (h *host) objects() ([]Object, error) {
	all, owners, err := h.adapters()
	if err == nil && len(all) == 0 {
		_, err = h.list(core)
	}
	if err != nil {
		return nil, noRoot(h.root, err)
	}
	byWWN := make(map[string]*Owner)
	byAdapter := make(map[string]*Owner)
	for o, adapters := range owners {
		alive, err := h.alive(o, adapters)
		if errors.Is(err, fs.ErrNotExist) {
			continue // its gvm has just removed it
		}
		if err != nil {
			return nil, err
		}
		who := &Owner{PID: o.pid, Alive: alive}
		byWWN[o.wwn()] = who
		for _, a := range adapters {
			byAdapter[a] = who
		}
	}
	var out []Object
	wwns, err := h.wwns()
	if err != nil {
		return nil, err
	}
	for _, w := range wwns {
		o := Object{Kind: KindTarget, Name: text.Name(fabric + "/" + w), Owner: byWWN[w]}
		if o.LUNs, err = h.lunsOf(w); err != nil {
			return nil, err
		}
		out = append(out, o)
	}
	for _, a := range all {
		disks, err := h.dirs(core + "/" + a)
		if err != nil {
			return nil, err
		}
		if a == "alua" {
			continue
		}
		for _, d := range disks {
			name := core + "/" + a + "/" + d
			out = append(out, Object{Kind: KindDisk, Name: text.Name(name), Owner: byAdapter[a],
				Image: text.Name(h.image(name))})
		}
		if len(disks) == 0 && byAdapter[a] != nil {
			out = append(out, Object{Kind: KindAdapter, Name: text.Name(core + "/" + a), Owner: byAdapter[a]})
		}
	}
	return out, nil
}

// lunsOf returns the LUNs of all portal groups of a target.
func (h *host) lunsOf(wwn string) ([]LUN, error) {
	tags, err := h.tpgs(wwn)
	if err != nil {
		return nil, err
	}
	var out []LUN
	for _, tag := range tags {
		luns, err := h.luns(tpgDir(wwn, tag))
		if err != nil {
			return nil, err
		}
		for _, n := range luns {
			l := LUN{TPGT: tag, LUN: n}
			_, to, err := h.links(lunDir(tpgDir(wwn, tag), n))
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return nil, err
			}
			if len(to) > 0 {
				l.Disk = text.Name(filepath.Clean(to[0]))
			}
			out = append(out, l)
		}
	}
	return out, nil
}
