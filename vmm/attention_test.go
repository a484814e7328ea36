package vmm

import (
	"fmt"
	"strings"
	"sync/atomic"
	"testing"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/virtio"
	"gvm/devices/virtio/rng"
	"gvm/devices/virtio/vscsi"
	"gvm/guestmem"
)

// growing adds disks to its target while the guest reads.
type growing struct {
	block.Backend
	add   func()
	reads atomic.Int32
}

// ReadAt adds a disk at the second block, which only the guest's check of a queue reads, and at one
// of a benchmark's reads.
func (g *growing) ReadAt(p []byte, off int64) (int, error) {
	if n := g.reads.Add(1); off == 512 || n == 100 {
		g.add()
	}
	return g.Backend.ReadAt(p, off)
}

// TestDiskAdded: the embedded guest repeats a command that finds the unit attention of an added
// disk.
func TestDiskAdded(t *testing.T) {
	for _, words := range []string{"", "bench bench-ms=20"} {
		target := scsi.NewTarget()
		added := 0
		attach := func(b block.Backend) {
			unit, err := scsi.NewUnit(scsi.UnitConfig{Backend: b, Serial: fmt.Sprint(added)})
			if err != nil {
				t.Error(err)
				return
			}
			lun, _ := scsi.EncodeLUN(added)
			if added++; target.Attach(lun, unit) != nil {
				t.Errorf("no unit %d", added)
			}
		}
		var one atomic.Bool
		disk := &growing{Backend: block.NewVolatile(1 << 20)}
		disk.add = func() {
			if one.CompareAndSwap(false, true) {
				attach(block.NewVolatile(1 << 20))
			}
		}
		attach(disk)
		dev, err := vscsi.New(vscsi.Config{Target: target, Queues: 2})
		if err != nil {
			t.Fatal(err)
		}
		console := &testConsole{}
		out, err := Run(t.Context(), system(t), Config{
			Memory: guestmem.Config{Size: 64 << 20}, Kernel: embeddedKernel(t), CmdLine: words,
			Devices: []virtio.Device{dev, rng.New()}, Console: console,
		})
		text := console.out.String()
		if err != nil || out.Ending != PoweredOff || !strings.Contains(text, "PASS") || added != 2 {
			t.Errorf("%s\n%q: %s, %v, %v, %d disks", text, words, out.Ending, out.Err, err, added)
		}
	}
}
