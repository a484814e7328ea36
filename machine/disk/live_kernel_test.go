package disk

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"gvm/control"
	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/scsi/lio"
	"gvm/devices/virtio/vhostscsi"
	"gvm/inspect"
)

// kernelDisks is a Set whose kernel's target has an image for each of luns. unplug is that of the
// target.
func kernelDisks(t *testing.T, unplug func(lun int) error, luns ...int) (ds *Set, paths []string) {
	t.Helper()
	ds = &Set{target: scsi.NewTarget(), mishaps: &mishaps{name: "vm", note: func(string) {}}}
	ds.events, ds.paths = noGuest{}, map[string]string{}
	k := &kernelTarget{target: &lio.Target{WWN: "naa.5001405000000001"}, device: &vhostscsi.Device{},
		plug: func(lio.Unit) error { return nil }, unplug: unplug,
		parts: []io.Closer{closer(func() error { return nil })}}
	for _, lun := range luns {
		path := filepath.Join(t.TempDir(), "image")
		f, err := block.Open(path, block.Options{Size: 1 << 20, BlockSize: 512})
		if err != nil {
			t.Fatal(err)
		}
		d := Spec{Path: path, LUN: lun, BlockSize: 512, Backend: Vhost, Serial: fmt.Sprint("K", lun)}
		ds.open, ds.paths[path] = append(ds.open, opened{backend: f}), path
		k.specs = append(k.specs, d)
		k.units = append(k.units, lio.Unit{LUN: lun, UnitConfig: d.Unit(f)})
		paths = append(paths, path)
	}
	ds.kernels = []*kernelTarget{k}
	return ds, paths
}

// wantChanges checks the changes of disks in the state, the newest first.
func wantChanges(t *testing.T, ds *Set, want ...string) {
	t.Helper()
	root := inspect.Group("", ds.Inspect()...)
	n, err := root.Read(t.Context(), "disk_change")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range n.Nodes {
		line := ""
		for _, v := range e.Nodes {
			if _, ok := v.Value.(inspect.Age); !ok {
				line += fmt.Sprint(" ", v.Value)
			}
		}
		got = append(got, strings.TrimSpace(line))
	}
	if !slices.Equal(got, want) {
		t.Errorf("changes %q, want %q", got, want)
	}
}

// TestRemoveKernelDisk removes disks that the kernel serves, by path and by LUN, and to the last. A
// target that refuses keeps its disk. The state has each change, its outcome and its time.
func TestRemoveKernelDisk(t *testing.T) {
	var refusal error
	var unplugged []int
	ds, paths := kernelDisks(t, func(lun int) error {
		if refusal == nil {
			unplugged = append(unplugged, lun)
		}
		return refusal
	}, 3, 5)
	refusal = errors.New("configfs is busy")
	if _, err := ds.Remove(t.Context(), paths[1]); !errors.Is(err, refusal) || len(ds.List()) != 2 {
		t.Errorf("refused: %v, %+v", err, ds.List())
	}
	wantChanges(t, ds, "removing "+paths[1]+" is over configfs is busy", "removing "+paths[1])
	refusal = nil
	if _, err := ds.Resize(t.Context(), paths[1], control.ResizeDisk{Size: 2 << 20}); err == nil {
		t.Error("it has been resized")
	} else {
		wantConflict(t, err, "has backend=vhost: it keeps its size")
	}
	for i, id := range []string{paths[1], "3"} {
		lun, path := []int{5, 3}[i], paths[1-i]
		ch, err := ds.Remove(t.Context(), id)
		if err != nil || ch.Disk.LUN != lun || ch.Disk.Backend != "vhost" || ch.Guest != control.Absent ||
			unplugged[i] != lun {
			t.Errorf("remove %s: %+v, %v; unplugged %v", id, ch, err, unplugged)
		}
		if list := ds.List(); len(list) != 1-i || i == 0 && list[0].LUN != 3 {
			t.Errorf("the list: %+v", list)
		}
		if f, err := block.Open(path, block.Options{}); err != nil { // gvm's lock is gone
			t.Error(err)
		} else if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
	wantChanges(t, ds, "removing "+paths[0]+" is over 3 vhost 1048576 absent", "removing "+paths[0],
		"removing "+paths[1]+" is over 5 vhost 1048576 absent", "removing "+paths[1],
		"removing "+paths[1]+" is over configfs is busy", "removing "+paths[1])
	var e *control.Error
	if _, err := ds.Remove(t.Context(), "3"); !errors.As(err, &e) || e.Status != 404 {
		t.Errorf("a removed disk: %v", err)
	}
	if err := ds.Close(t.Context(), true); err != nil {
		t.Error(err)
	}
}

// TestAddKernelDisk adds an image to the kernel's target. On an error nothing has changed.
func TestAddKernelDisk(t *testing.T) {
	ds, paths := kernelDisks(t, func(int) error { return nil }, 0)
	k, refusal := ds.kernels[0], errors.New("configfs is busy")
	path := filepath.Join(t.TempDir(), "added")
	d := Spec{Path: path, LUN: -1, BlockSize: 512, Size: 1 << 20, Backend: Vhost}
	var plugged []lio.Unit
	k.plug = func(lio.Unit) error { return refusal }
	if _, err := ds.Add(t.Context(), d); !errors.Is(err, refusal) || len(ds.List()) != 1 {
		t.Errorf("refused: %v, %+v", err, ds.List())
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the image of size= is left: %v", err)
	}
	k.plug = func(u lio.Unit) error { plugged = append(plugged, u); return nil }
	ch, err := ds.Add(t.Context(), d)
	if err != nil || ch.Disk.LUN != 1 || ch.Disk.Backend != "vhost" || string(ch.Disk.Path) != path ||
		ch.Guest != control.Absent || len(plugged) != 1 || plugged[0].LUN != 1 || plugged[0].Backend.Size() != 1<<20 {
		t.Errorf("%+v, %v; plugged %+v", ch, err, plugged)
	}
	if _, err := ds.Add(t.Context(), d); err == nil { // gvm has the lock
		t.Error("it has been added twice")
	} else {
		wantConflict(t, err, path)
	}
	for _, tt := range []struct {
		change func(*Spec)
		want   string
	}{
		{func(d *Spec) { d.LUN = 0 }, "lun=0 is " + paths[0] + "'s already"},
		{func(d *Spec) { d.Workers = 1 }, "workers= is for the disks that the machine starts with"},
		{func(d *Spec) { d.Storage = Memory }, "only images can be added"},
		{func(d *Spec) { d.Path, d.WWN = "", "naa.5001405000000002" }, "only images can be added"},
	} {
		d := d
		d.Path += "2"
		tt.change(&d)
		_, err := ds.Add(t.Context(), d)
		wantConflict(t, err, tt.want)
	}
	if _, err := ds.Remove(t.Context(), path); err != nil || len(ds.List()) != 1 {
		t.Errorf("remove: %v, %+v", err, ds.List())
	}
	k.plug = nil // another's target
	_, err = ds.Add(t.Context(), d)
	wantConflict(t, err, "the machine was started without backend=vhost disks")
	if err := ds.Close(t.Context(), true); err != nil {
		t.Error(err)
	}
}

// TestRemoveKernelDiskWaits: while the kernel finishes a disk's commands the list answers, another
// removal of the disk is refused, and the machine ends.
func TestRemoveKernelDiskWaits(t *testing.T) {
	begun, goOn := make(chan struct{}), make(chan struct{})
	ds, paths := kernelDisks(t, func(int) error { close(begun); <-goOn; return nil }, 0)
	result := make(chan error, 1)
	go func() {
		_, err := ds.Remove(t.Context(), "0")
		result <- err
	}()
	<-begun
	if list := ds.List(); len(list) != 1 || list[0].Change != control.Removing {
		t.Errorf("the list: %+v", list)
	}
	_, err := ds.Remove(t.Context(), paths[0])
	wantConflict(t, err, "removing is under way")
	if err := ds.Close(t.Context(), true); err != nil {
		t.Error(err)
	}
	if err := <-result; err != control.ErrEnded {
		t.Errorf("at the end: %v", err)
	}
	if _, err := ds.Remove(t.Context(), "0"); err != control.ErrEnded {
		t.Errorf("after the end: %v", err)
	}
	close(goOn)
	ds.changes.Wait()
	if err := ds.open[0].backend.Close(); err != nil { // which Close has left to the process
		t.Error(err)
	}
}

// TestRemoveWhichDisk: a LUN that gvm's target and the kernel's both have names no disk.
func TestRemoveWhichDisk(t *testing.T) {
	ds, paths := kernelDisks(t, func(int) error { return nil }, 0, 1)
	if err := ds.Attach(Spec{Path: "own", LUN: 0, BlockSize: 512, Serial: "OWN"}, block.NewMem(1<<20)); err != nil {
		t.Fatal(err)
	}
	_, err := ds.Remove(t.Context(), "0")
	wantConflict(t, err, "gvm serves one disk that is 0, and the kernel another: name it by its path or serial number")
	for _, id := range []string{"OWN", paths[0], "K1"} {
		if _, err := ds.Remove(t.Context(), id); err != nil {
			t.Errorf("%s: %v", id, err)
		}
	}
	if err := ds.Close(t.Context(), true); err != nil {
		t.Error(err)
	}
}
