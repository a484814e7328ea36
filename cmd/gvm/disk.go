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
)

// disk is one --disk.
type disk struct {
	path      string
	readOnly  bool
	serial    string
	lun       int // -1: the next free one
	cache     scsi.CacheMode
	size      int64 // 0: as it is
	blockSize int
}

const diskUsage = "PATH[,readonly][,serial=S][,lun=N][,cache=writeback|writethrough|unsafe][,size=SIZE][,block_size=512|4096]"

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
		default:
			return d, fmt.Errorf("--disk %s: unknown option %q; want %s", d.path, key, diskUsage)
		}
	}
	return d, nil
}

// disks is a SCSI target and the images behind its units.
type disks struct {
	target *scsi.Target
	open   []*backend.File
	was    []int64 // the size of each before it was opened, -1: there was none
}

// openDisks opens, checks and locks every image, and attaches them at their
// LUNs. On an error nothing stays open, and what size= made is undone.
func openDisks(list []disk) (_ *disks, err error) {
	ds := &disks{target: scsi.NewTarget()}
	defer func() {
		if err != nil {
			ds.undo()
			err = errors.Join(err, ds.close())
		}
	}()
	taken := map[int]string{}
	for _, d := range list {
		if d.lun < 0 {
			continue
		}
		if other, ok := taken[d.lun]; ok {
			return nil, configError{fmt.Errorf("--disk %s: lun=%d is %s's already", d.path, d.lun, other)}
		}
		taken[d.lun] = d.path
	}
	for _, d := range list {
		for n := 0; d.lun < 0; n++ {
			if _, ok := taken[n]; !ok {
				d.lun = n
				taken[n] = d.path
			}
		}
		was := int64(-1)
		if fi, err := os.Stat(d.path); err == nil {
			was = fi.Size()
		}
		f, err := backend.Open(d.path, backend.Options{ReadOnly: d.readOnly, Size: d.size, BlockSize: d.blockSize})
		if err != nil {
			return nil, diskError{err}
		}
		ds.open, ds.was = append(ds.open, f), append(ds.was, was)
		if err := ds.attach(d, f); err != nil {
			return nil, configError{fmt.Errorf("--disk %s: %w", d.path, err)}
		}
	}
	return ds, nil
}

func (ds *disks) attach(d disk, b scsi.Backend) error {
	u, err := scsi.NewUnit(scsi.UnitConfig{
		Backend:   b,
		Serial:    d.serial,
		ReadOnly:  d.readOnly,
		BlockSize: d.blockSize,
		Cache:     d.cache,
	})
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

// close releases the images. A guest that flushed has lost nothing; what it
// did not flush is in the page cache, as after a reset of a real disk's host.
func (ds *disks) close() error {
	var errs []error
	for _, f := range ds.open {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}
