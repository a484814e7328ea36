package disk

import (
	"context"
	"fmt"

	"gvm/control"
	"gvm/inspect"
)

// Inspect returns the state of the disks: groups disk, of those that gvm serves by LUN, lio, of the
// kernel's by WWN and LUN, and disk_change, the last changes while the machine runs.
func (ds *Set) Inspect() []inspect.Node {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	own, kernels := inspect.Group("disk"), inspect.Group("lio")
	for _, s := range ds.served {
		own.Nodes = append(own.Nodes, inspect.Lazy(fmt.Sprint(s.number()), func(context.Context) ([]inspect.Node, bool) {
			d := append(inspectDisk(s.describe()), inspect.Int("held", ds.mishaps.holds(s.Spec.Name(), 0)))
			return append(d, s.unit.Inspect()...), true
		}))
	}
	for _, k := range ds.kernels {
		target := inspect.Group(k.target.WWN)
		for _, d := range ds.listKernel(k) {
			target.Nodes = append(target.Nodes, inspect.Group(fmt.Sprint(d.LUN), inspectDisk(d)...))
		}
		kernels.Nodes = append(kernels.Nodes, target)
	}
	return []inspect.Node{own, kernels, ds.history.Node("disk_change")}
}

// inspectDisk returns the description of a disk.
func inspectDisk(d control.Disk) []inspect.Node {
	storage := inspect.Text("path", string(d.Path))
	if d.Path == "" {
		storage = inspect.Text("storage", d.Storage)
	}
	return []inspect.Node{storage, inspect.Text("serial", string(d.Serial)), inspect.Int("size", d.Size),
		inspect.Int("block_size", d.BlockSize), inspect.Bool("readonly", d.ReadOnly), inspect.Text("cache", d.Cache)}
}
