package machine

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net/http"
	"testing"
	"time"

	"gvm/control"
	"gvm/devices/acpipm"
	"gvm/devices/pci"
	"gvm/devices/serial"
	"gvm/guestmem"
	"gvm/vmm"
)

// TestBalloon: a guest's driver puts a page into the balloon, whose contents go, and finds the size
// that the host asks for.
func TestBalloon(t *testing.T) {
	const (
		slot, bar, config = 3, 0xd000_0000, 0xd000_2000 // after virtio-scsi and virtio-rng
		desc, avail, used = ringsAt, ringsAt + 0x1000, ringsAt + 0x2000
		data, page        = ringsAt + 0x3000, ringsAt + 0x4000
	)
	guest := append(steps{}.configure(slot, 0x10, bar).configure(slot, 0x14, 0).
		configure(slot, 4, pci.CommandMemory|pci.CommandMaster), steps{
		{opStore8, bar + 0x14, 0}, {opStore8, bar + 0x14, 1}, {opStore8, bar + 0x14, 3},
		{opStore32, bar + 0x08, 1}, {opStore32, bar + 0x0c, 1}, // VIRTIO_F_VERSION_1
		{opStore8, bar + 0x14, 11},
		{opStore16, bar + 0x16, 0}, {opStore16, bar + 0x18, 2},
		{opStore32, bar + 0x20, desc}, {opStore32, bar + 0x28, avail}, {opStore32, bar + 0x30, used},
		{opStore16, bar + 0x1c, 1},
		{opStore8, bar + 0x14, 15}, {opAwait16, bar + 0x14, 15},
		{opStore8, page, '-'}, {opStore8, page + 4096, '+'}, {opPrint, page, 0},
		{opStore32, data, page / 4096}, {opStore32, desc, data}, {opStore32, desc + 8, 4},
		{opStore16, avail + 2, 1}, {opStore16, bar + 0x3000, 0}, {opAwait16, used + 2, 1},
		{opStore32, config + 4, 1}, // actual
		{opPrint, page, 0}, {opPrint, page + 4096, 0}, {opOut8, serial.COM1, '\n'},
		{opAwait16, config, 5}, // num_pages
		{opOut8, acpipm.Port + acpipm.OffControl + 1, acpipm.SleepTypeS5<<2 | 1<<5},
	}...)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute) // bounds a guest that waits for the device
	defer cancel()
	out, in := io.Pipe()
	m, err := Start(ctx, Spec{Memory: guestmem.Config{Size: 64 << 20}, Console: Output(in), BareCmdLine: true,
		Kernel: guest.kernel(t), Balloon: true})
	if err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "-\x00+\n" {
		t.Errorf("%q, %v", line, err)
	}
	b, err := m.Balloon(t.Context())
	if err != nil || b.Size != 0 || b.Actual != 4096 || b.Guest != control.Told {
		t.Errorf("%+v, %v", b, err)
	}
	var refused *control.Error
	if _, err := m.ResizeBalloon(control.ResizeBalloon{Size: 64<<20 + 1}); !errors.As(err, &refused) ||
		refused.Status != http.StatusBadRequest {
		t.Error(err)
	}
	if b, err := m.ResizeBalloon(control.ResizeBalloon{Size: 5 * 4096}); err != nil || b.Size != 5*4096 {
		t.Errorf("%+v, %v", b, err)
	}
	if out, err := m.Wait(); err != nil || out.Ending != vmm.PoweredOff {
		t.Errorf("%s, %v, %v", out.Ending, out.Err, err)
	}
}
