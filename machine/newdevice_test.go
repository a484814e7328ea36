package machine

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"gvm/devices/acpipm"
	"gvm/devices/pci"
	"gvm/devices/serial"
	"gvm/devices/virtio"
	"gvm/devices/virtio/example"
	"gvm/guestmem"
	"gvm/vmm"
	"gvm/vmm/boot"
)

// steps is the program of a guest: its actions, one after the other.
type steps []step

type step struct{ op, at, value uint32 }

// Operations of a step.
const (
	opOut32 = iota + 1 // writes value to the port
	opOut8
	opStore8 // stores value in memory
	opStore16
	opStore32
	opAwait16 // waits until memory holds value
	opPrint   // prints the byte in memory
)

// interpreter is the guest that does steps, from its entry in 32-bit protected mode without paging.
var interpreter = []byte{
	0xbe, 0x00, 0x01, 0x20, 0x00, // mov $stepsAt, %esi
	0x8b, 0x06, // 1: mov (%esi), %eax
	0x8b, 0x56, 0x04, // mov 4(%esi), %edx
	0x8b, 0x4e, 0x08, // mov 8(%esi), %ecx
	0x83, 0xc6, 0x0c, // add $12, %esi
	0x48, 0x74, 0x16, // dec %eax; jz out32
	0x48, 0x74, 0x18, // dec %eax; jz out8
	0x48, 0x74, 0x1a, // dec %eax; jz store8
	0x48, 0x74, 0x1b, // dec %eax; jz store16
	0x48, 0x74, 0x1d, // dec %eax; jz store32
	0x48, 0x74, 0x1e, // dec %eax; jz await16
	0x48, 0x74, 0x24, // dec %eax; jz print
	0xfa, 0xf4, 0xeb, 0xfc, // 2: cli; hlt; jmp 2b
	0x89, 0xc8, 0xef, 0xeb, 0xd7, // out32: mov %ecx, %eax; out %eax, (%dx); jmp 1b
	0x89, 0xc8, 0xee, 0xeb, 0xd2, // out8: mov %ecx, %eax; out %al, (%dx); jmp 1b
	0x88, 0x0a, 0xeb, 0xce, // store8: mov %cl, (%edx); jmp 1b
	0x66, 0x89, 0x0a, 0xeb, 0xc9, // store16: mov %cx, (%edx); jmp 1b
	0x89, 0x0a, 0xeb, 0xc5, // store32: mov %ecx, (%edx); jmp 1b
	0x66, 0x39, 0x0a, 0x74, 0xc0, // await16: cmp %cx, (%edx); je 1b
	0xf3, 0x90, 0xeb, 0xf7, // pause; jmp await16
	0x8a, 0x02, 0x66, 0xba, 0xf8, 0x03, 0xee, 0xeb, 0xb3, // print: mov (%edx), %al; mov $COM1, %dx; out; jmp 1b
}

const (
	guestAt = 2 << 20
	stepsAt = guestAt + 0x100
	ringsAt = 3 << 20
)

// kernel returns an ELF file with a PVH note that does the steps.
func (s steps) kernel(t *testing.T) *boot.Image {
	t.Helper()
	le := binary.LittleEndian
	program := append(interpreter, make([]byte, stepsAt-guestAt-len(interpreter))...)
	for _, x := range append(s, step{}) {
		program = le.AppendUint32(le.AppendUint32(le.AppendUint32(program, x.op), x.at), x.value)
	}
	const segments, note = 64 + 2*56, 20 // where the segments begin in the file, and the note's length
	f := []byte("\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00")
	f = le.AppendUint32(f, 62<<16|2)             // EM_X86_64, ET_EXEC
	f = le.AppendUint32(f, 1)                    // EV_CURRENT
	for _, v := range []uint64{guestAt, 64, 0} { // entry, program headers, sections
		f = le.AppendUint64(f, v)
	}
	f = le.AppendUint32(f, 0)
	for _, v := range []uint16{64, 56, 2, 0, 0, 0} {
		f = le.AppendUint16(f, v)
	}
	for _, p := range []struct{ kind, off, at, n uint64 }{
		{7<<32 | 1, segments + note, guestAt, uint64(len(program))}, // PT_LOAD, RWX
		{4<<32 | 4, segments, 0, note},                              // PT_NOTE
	} {
		for _, v := range []uint64{p.kind, p.off, p.at, p.at, p.n, p.n, 4} {
			f = le.AppendUint64(f, v)
		}
	}
	f = append(f, "\x04\x00\x00\x00\x04\x00\x00\x00\x12\x00\x00\x00Xen\x00"...)
	f = append(le.AppendUint32(f, guestAt), program...)
	k, err := boot.NewImage(&boot.File{Name: "steps", ReaderAt: bytes.NewReader(f), Size: int64(len(f))})
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// configure writes a register of the function in a slot.
func (s steps) configure(slot, reg, value uint32) steps {
	return append(s, step{opOut32, pci.PortBase, 1<<31 | slot<<11 | reg}, step{opOut32, pci.PortBase + 4, value})
}

// driver is a driver of the device in a slot: it sends text in one request, waits for the answer,
// which has the same length, prints it and powers off. It expects the first queue to be the one of
// requests.
func driver(slot uint32, text string) (s steps) {
	const (
		bar, notify             = 0xd000_0000, 0x3000
		desc, avail, used, data = ringsAt, ringsAt + 0x1000, ringsAt + 0x2000, ringsAt + 0x3000
	)
	s = s.configure(slot, 0x10, bar).configure(slot, 0x14, 0).configure(slot, 4, pci.CommandMemory|pci.CommandMaster)
	n := uint32(len(text))
	for i := range n {
		s = append(s, step{opStore8, data + i, uint32(text[i])})
	}
	return append(s, append(steps{
		// virtio 1.3, 3.1.1, with the registers of 4.1.4.3.
		{opStore8, bar + 0x14, 0}, {opStore8, bar + 0x14, 1}, {opStore8, bar + 0x14, 3},
		{opStore32, bar + 0x08, 1}, {opStore32, bar + 0x0c, 1}, // VIRTIO_F_VERSION_1
		{opStore8, bar + 0x14, 11},
		{opStore16, bar + 0x16, 0}, {opStore16, bar + 0x18, 2},
		{opStore32, bar + 0x20, desc}, {opStore32, bar + 0x28, avail}, {opStore32, bar + 0x30, used},
		{opStore16, bar + 0x1c, 1},
		{opStore8, bar + 0x14, 15}, {opAwait16, bar + 0x14, 15},
		// A request of two descriptors (2.7.5), the entry of the available ring, and the notification.
		{opStore32, desc, data}, {opStore32, desc + 8, n}, {opStore16, desc + 12, 1}, {opStore16, desc + 14, 1},
		{opStore32, desc + 16, data + n}, {opStore32, desc + 24, n}, {opStore16, desc + 28, 2},
		{opStore16, avail + 2, 1}, {opStore16, bar + notify, 0}, {opAwait16, used + 2, 1},
	}, printed(data, 2*n)...)...)
}

// printed prints n bytes of memory and powers off.
func printed(at, n uint32) (s steps) {
	for i := range n {
		s = append(s, step{opPrint, at + i, 0})
	}
	s = append(s, step{opOut8, serial.COM1, '\n'})
	return append(s, step{opOut8, acpipm.Port + acpipm.OffControl + 1, acpipm.SleepTypeS5<<2 | 1<<5})
}

// TestNewDevice: a package and a row are all that a new device needs. A guest's driver uses it.
func TestNewDevice(t *testing.T) {
	rows := deviceTable
	defer func() { deviceTable = rows }()
	deviceTable = func(c deviceConfig) []deviceKind {
		return append(rows(c), deviceKind{"example", example.ID, optional(&example.Device{})})
	}

	ctx, cancel := context.WithTimeout(t.Context(), time.Minute) // bounds a guest that waits for the device
	defer cancel()
	var console bytes.Buffer
	m, err := Start(ctx, Spec{
		Memory: guestmem.Config{Size: 64 << 20}, Console: Output(&console), BareCmdLine: true,
		Kernel: driver(3, "stressed ").kernel(t), // after virtio-scsi and virtio-rng
	})
	if err != nil {
		t.Fatal(err)
	}
	out, err := m.Wait()
	if err != nil || out.Ending != vmm.PoweredOff || !strings.HasPrefix(console.String(), "stressed  desserts") {
		t.Errorf("%s, %v, %v: %q", out.Ending, out.Err, err, console.String())
	}
}

// TestDeviceTable: a row whose device has another type is a mistake that Start reports.
func TestDeviceTable(t *testing.T) {
	rows := deviceTable
	defer func() { deviceTable = rows }()
	deviceTable = func(c deviceConfig) []deviceKind {
		return append(rows(c), deviceKind{"console", 3, optional(&example.Device{})})
	}
	want := fmt.Sprintf("console: its row has device ID 3, the device has %d", example.ID)
	if _, err := Start(t.Context(), Spec{Memory: guestmem.Config{Size: 64 << 20}}); err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
}

// TestEachDevice: docs/devices.md has a row for each kind of device, and no other of virtio's or
// vhost's, and TestHostileCPUs of vmm has the device of each package below devices/virtio that a
// machine uses, but those of the kernel.
func TestEachDevice(t *testing.T) {
	read := func(path string) string {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	rows, kinds := map[string]bool{}, map[string]bool{}
	row := regexp.MustCompile(`(?m)^\| ((virtio|vhost)-\w+) \|`)
	for _, m := range row.FindAllStringSubmatch(read("../docs/devices.md"), -1) {
		rows[m[1]] = true
	}
	for _, k := range deviceTable(deviceConfig{}) {
		kinds[k.name] = true
	}
	if !maps.Equal(rows, kinds) {
		t.Errorf("documented: %v; devices: %v", slices.Sorted(maps.Keys(rows)), slices.Sorted(maps.Keys(kinds)))
	}
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	hostile, used := read("../vmm/hostile_test.go"), map[string]bool{}
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		for _, m := range regexp.MustCompile(`"gvm/devices/virtio/(\w+)"`).FindAllStringSubmatch(read(file), -1) {
			if strings.HasPrefix(m[1], "vhost") {
				continue
			}
			if used[m[1]] = true; !strings.Contains(hostile, m[0]) {
				t.Errorf("%s uses %s, and TestHostileCPUs does not", file, m[1])
			}
		}
	}
	if len(used) < len(kinds)-1 { // of the kernel's disks
		t.Errorf("packages %v for devices %v", used, kinds)
	}
}

// brokenDevice is a device that has something to say of each life of its guest.
type brokenDevice struct {
	example.Device
	activated func()
}

func (d *brokenDevice) Activate(a virtio.Activation) error {
	a.Broken(errors.New("trouble"))
	d.activated()
	return nil
}

// TestNotesOfMachine: the notes that a guest causes are limited over all its restarts.
func TestNotesOfMachine(t *testing.T) {
	rows := deviceTable
	defer func() { deviceTable = rows }()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	lives := 0 // each has one note
	d := &brokenDevice{activated: func() {
		if lives++; lives == notesAtOnce+5 {
			cancel()
		}
	}}
	deviceTable = func(c deviceConfig) []deviceKind {
		return append(rows(c), deviceKind{"example", example.ID, optional(d)})
	}

	guest := driver(3, "")
	end := slices.Index(guest, step{opStore8, 0xd000_0014, 15}) // DRIVER_OK
	guest = append(guest[:end+1], step{opOut8, acpipm.ResetPort, acpipm.ResetValue})
	var notes []string
	m, err := Start(ctx, Spec{
		Memory: guestmem.Config{Size: 64 << 20}, BareCmdLine: true, Rebooting: true, Kernel: guest.kernel(t),
		Note: func(s string) { notes = append(notes, s) },
	})
	if err != nil {
		t.Fatal(err)
	}
	if out, err := m.Wait(); err != nil || out.Ending != vmm.Stopped || lives != notesAtOnce+5 {
		t.Errorf("%s, %v, %v after %d lives", out.Ending, out.Err, err, lives)
	}
	if n := len(notes); n != notesAtOnce+1 || notes[n-1] != "and 5 more notes, of which there were too many" {
		t.Errorf("%d notes, want %d: %q", n, notesAtOnce+1, notes)
	}
}
