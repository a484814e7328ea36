package machine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"gvm/control"
	"gvm/devices/pci"
	"gvm/devices/virtio/console"
	"gvm/guestmem"
	"gvm/vmm"
	"gvm/vmm/boot"
)

// hvcGuest is a driver of the virtio console, behind virtio-scsi and virtio-rng: it prints an x,
// waits for two keys and a size of 9 rows, prints the keys on COM1 and powers off.
func hvcGuest(t *testing.T) *boot.Image {
	const (
		slot, bar, config = 3, 0xd000_0000, 0xd000_2000
		rx, tx            = ringsAt, ringsAt + 0x4000
		avail, used, data = 0x1000, 0x2000, 0x3000
	)
	s := steps{}.configure(slot, 0x10, bar).configure(slot, 0x14, 0).
		configure(slot, 4, pci.CommandMemory|pci.CommandMaster)
	s = append(s, steps{
		{opStore8, bar + 0x14, 0}, {opStore8, bar + 0x14, 1}, {opStore8, bar + 0x14, 3},
		{opStore32, bar + 0x08, 0}, {opStore32, bar + 0x0c, 1}, // VIRTIO_CONSOLE_F_SIZE
		{opStore32, bar + 0x08, 1}, {opStore32, bar + 0x0c, 1}, // VIRTIO_F_VERSION_1
		{opStore8, bar + 0x14, 11},
	}...)
	for queue, at := range []uint32{rx, tx} {
		s = append(s, steps{
			{opStore16, bar + 0x16, uint32(queue)}, {opStore16, bar + 0x18, 2},
			{opStore32, bar + 0x20, at}, {opStore32, bar + 0x28, at + avail}, {opStore32, bar + 0x30, at + used},
			{opStore16, bar + 0x1c, 1},
		}...)
	}
	s = append(s, steps{
		{opStore8, bar + 0x14, 15}, {opAwait16, bar + 0x14, 15},
		{opStore32, rx, rx + data}, {opStore32, rx + 8, 2}, {opStore16, rx + 12, 2}, // a buffer for input
		{opStore16, rx + avail + 2, 1}, {opStore16, bar + 0x3000, 0},
		{opStore8, tx + data, 'x'}, {opStore32, tx, tx + data}, {opStore32, tx + 8, 1},
		{opStore16, tx + avail + 2, 1}, {opStore16, bar + 0x3004, 1}, {opAwait16, tx + used + 2, 1},
		{opAwait16, rx + used + 2, 1}, {opAwait16, config + 2, 9},
	}...)
	s = append(s, printed(rx+data, 2)...)
	return s.kernel(t)
}

// TestHVC: a guest's virtio console is there for all that are attached to it, and the last size of
// a terminal stays. Output that nothing reads holds up neither the guest nor the machine's end.
func TestHVC(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute) // bounds a guest that waits for the device
	defer cancel()
	var com1 bytes.Buffer
	m, err := Start(ctx, Spec{Memory: guestmem.Config{Size: 64 << 20}, Console: Output(&com1), BareCmdLine: true,
		Kernel: hvcGuest(t), HVC: true})
	if err != nil {
		t.Fatal(err)
	}
	var ends []*Attachment
	for range 3 {
		a, err := m.AttachHVC()
		if err != nil {
			t.Fatal(err)
		}
		ends = append(ends, a)
	}
	unread, first, second := ends[0], ends[1], ends[2]
	for _, a := range []*Attachment{first, second} {
		b := make([]byte, 2)
		if n, err := a.Read(b); string(b[:n]) != "x" || err != nil {
			t.Errorf("%q, %v", b[:n], err)
		}
	}
	var refused *control.Error
	for _, s := range []control.TerminalSize{{}, {Columns: 80}, {Rows: 24}} {
		if err := m.ResizeHVC(s); !errors.As(err, &refused) || refused.Status != http.StatusBadRequest {
			t.Errorf("%+v: %v", s, err)
		}
	}
	if err := m.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	for rows := range uint16(9) {
		if err := m.ResizeHVC(control.TerminalSize{Columns: 7, Rows: rows + 1}); err != nil {
			t.Error(err)
		}
	}
	device := "pci/00:03.0/virtio/device"
	for path, want := range map[string]any{"/cols": uint16(7), "/rows": uint16(9), "/port/0/console": true,
		"/port/0/name": "gvm.console", "/port/0/tx_bytes": uint64(1)} {
		n, err := m.Inspect(ctx, device+path)
		if got := n.Value; err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%s is %v, %v; want %v", path, got, err, want)
		}
	}
	if err := m.Resume(); err != nil {
		t.Error(err)
	}
	fmt.Fprint(first, "ok")
	if out, err := m.Wait(); err != nil || out.Ending != vmm.PoweredOff || com1.String() != "ok\n" {
		t.Errorf("%s, %v, %v; %q", out.Ending, out.Err, err, com1.String())
	}
	for a, want := range map[*Attachment]string{unread: "x", first: "", second: ""} {
		if b, err := io.ReadAll(a); string(b) != want || err != nil {
			t.Errorf("%q, %v, want %q", b, err, want)
		}
	}
	fmt.Fprint(unread, "late")
}

// TestHVCAbsent: a machine without a virtio console says so.
func TestHVCAbsent(t *testing.T) {
	m := new(Machine)
	_, err := m.AttachHVC()
	for _, err := range []error{err, m.ResizeHVC(control.TerminalSize{Columns: 80, Rows: 24})} {
		var refused *control.Error
		if !errors.As(err, &refused) || refused.Status != http.StatusNotFound {
			t.Error(err)
		}
	}
}

// TestPorts: two ports of one name are the user's error, and a stream that nothing reads or writes
// is closed at the end of the machine.
func TestPorts(t *testing.T) {
	near, far := net.Pipe()
	spec := Spec{Memory: guestmem.Config{Size: 64 << 20}, Ports: []console.Port{{Name: "a"}, {Name: "a"}}}
	if _, err := Start(t.Context(), spec); err == nil || !IsConfig(err) {
		t.Errorf("two ports of a name: %v", err)
	}
	spec.Ports = []console.Port{{Name: "a", Stream: far}}
	m, err := Start(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Wait(); err != nil {
		t.Error(err)
	}
	if b, err := io.ReadAll(near); err != nil || len(b) > 0 {
		t.Errorf("%q, %v: want a closed stream", b, err)
	}
}
