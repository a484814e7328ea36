package vmm

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	stdnet "net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvm/devices/acpipm"
	"gvm/devices/block"
	"gvm/devices/debugport"
	"gvm/devices/i6300esb"
	"gvm/devices/i8042"
	"gvm/devices/pci"
	"gvm/devices/pvpanic"
	"gvm/devices/rtc"
	"gvm/devices/scsi"
	"gvm/devices/serial"
	"gvm/devices/statusport"
	"gvm/devices/virtio"
	"gvm/devices/virtio/balloon"
	"gvm/devices/virtio/console"
	"gvm/devices/virtio/fs"
	"gvm/devices/virtio/net"
	"gvm/devices/virtio/rng"
	"gvm/devices/virtio/vscsi"
	"gvm/devices/virtio/vsock"
	"gvm/guestmem"
)

// hostile is the CPU of a malicious guest. It does not run in KVM: it makes the accesses that would
// be exits.
type hostile struct {
	*machine
	*rand.Rand
}

// The addresses of the guests' rings: a page for each part, in 64 KiB for each queue.
const (
	ringsAt   = 1 << 20
	ringSize  = 16
	buffersAt = 2 << 20

	socketSlot = 4 // the socket device's
)

// fuseOpcodes are requests of a file system (linux/fuse.h): LOOKUP, FORGET, GETATTR, SETATTR,
// MKNOD, MKDIR, UNLINK, RENAME, OPEN, READ, WRITE, RELEASE, FLUSH, INIT, OPENDIR, READDIR, CREATE,
// BATCH_FORGET and one that does not exist.
var fuseOpcodes = []uint32{1, 2, 3, 4, 8, 9, 10, 12, 14, 15, 16, 18, 25, 26, 27, 28, 35, 42, 99}

func (h *hostile) put(space interface{ Write(uint64, []byte) bool }, addr uint64, n int, v uint64) {
	space.Write(addr, binary.LittleEndian.AppendUint64(nil, v)[:n:n])
}

func (h *hostile) get(space interface{ Read(uint64, []byte) bool }, addr uint64, n int) uint64 {
	var b [8]byte
	space.Read(addr, b[:n:n])
	return binary.LittleEndian.Uint64(b[:])
}

// write writes to memory at a valid address.
func (h *hostile) write(addr uint64, b []byte) {
	if err := h.mem.Write(addr, b); err != nil {
		panic(err)
	}
}

// kind returns the type of the device in a slot.
func (h *hostile) kind(slot int) virtio.ID {
	return virtio.ID(h.get(&h.mmio, h.config(slot)+2, 2) - 0x1040)
}

// config returns the address of slot's configuration space, bar the memory address in its BAR i.
func (h *hostile) config(slot int) uint64 { return ecamBase + uint64(slot)<<15 }

func (h *hostile) bar(slot, i int) uint64 {
	at := h.config(slot) + 0x10 + 4*uint64(i)
	v := h.get(&h.mmio, at, 4)
	if v&4 != 0 {
		v |= h.get(&h.mmio, at+4, 4) << 32
	}
	return v &^ 15
}

// value returns a number as guests write them: small, arbitrary, or with few bits set.
func (h *hostile) value() uint64 {
	switch h.IntN(3) {
	case 0:
		return h.Uint64N(16)
	case 1:
		return h.Uint64() >> h.UintN(64)
	}
	return 1 << h.UintN(64) >> h.UintN(2)
}

// start initializes a device up to DRIVER_OK (virtio 1.3, 3.1.1), with empty queues at the
// addresses that ring uses. The offsets are those of 4.1.4.3.
func (h *hostile) start(slot int) {
	cfg := h.config(slot)
	h.put(&h.mmio, cfg+4, 2, pci.CommandMemory|pci.CommandMaster)
	features := uint64(6)
	switch {
	case slot == socketSlot:
		features = 1 // VIRTIO_VSOCK_F_STREAM
	case h.kind(slot) == virtio.IDConsole:
		features = 1 | h.Uint64N(2)<<1 // VIRTIO_CONSOLE_F_SIZE, and perhaps VIRTIO_CONSOLE_F_MULTIPORT
	}
	for _, w := range []struct {
		off uint64
		n   int
		v   uint64
	}{{0x14, 1, 0}, {0x14, 1, 3}, {0x08, 4, 0}, {0x0c, 4, h.Uint64N(4)<<28 | h.Uint64N(256)<<15 | features},
		{0x08, 4, 1}, {0x0c, 4, 1}, {0x14, 1, 11}} {
		h.put(&h.mmio, h.bar(slot, 0)+w.off, w.n, w.v)
	}
	for q := range uint64(4) {
		at := ringsAt + q<<16
		h.write(at+4096, make([]byte, 4+2*ringSize))
		for _, w := range []struct {
			off uint64
			n   int
			v   uint64
		}{{0x16, 2, q}, {0x18, 2, ringSize}, {0x1a, 2, q}, {0x20, 8, at}, {0x28, 8, at + 4096}, {0x30, 8, at + 8192},
			{0x1c, 2, 1}} {
			h.put(&h.mmio, h.bar(slot, 0)+w.off, w.n, w.v)
		}
	}
	h.put(&h.mmio, h.bar(slot, 0)+0x14, 1, 15)
}

// ring makes a chain of three descriptors available in one of the queues and rings its doorbell.
// Sometimes a descriptor has arbitrary content.
func (h *hostile) ring(slot int) {
	q, kind := h.Uint64N(4), h.kind(slot)
	switch kind { // whose requests make sense only after others
	case virtio.IDVsock, virtio.IDConsole, virtio.IDFS:
		if h.get(&h.mmio, h.bar(slot, 0)+0x14, 1) != 15 {
			h.start(slot)
		}
	}
	if kind == virtio.IDVsock && h.IntN(4) > 0 {
		q = 1 // few rx buffers: one that is offered twice breaks the device
	}
	at := ringsAt + q<<16
	head := h.Uint64N(ringSize/4) * 4
	request := make([]byte, 51)
	for i := range request {
		request[i] = byte(h.value())
	}
	lun := []byte{1, 0, 0x40, byte(h.IntN(3)), 0, 0, 0, 0}
	switch {
	case slot == socketSlot: // struct virtio_vsock_hdr (5.10.6), of few ports
		word := func(n int) []byte { return []byte{byte(h.IntN(n)), 0, 0, 0} }
		op := []byte{1, 5, byte(h.IntN(9))}[h.IntN(3)] // mostly requests and data
		copy(request, []byte{3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0})
		copy(request[16:], slices.Concat(word(2), word(4), word(8), []byte{1, 0, op, 0}, word(4), word(256), word(2)))
	case kind == virtio.IDFS: // struct fuse_in_header, of few inodes, and two names
		le := binary.LittleEndian
		m := le.AppendUint32(nil, uint32(len(request)))
		m = le.AppendUint32(m, fuseOpcodes[h.IntN(len(fuseOpcodes))])
		m = le.AppendUint64(le.AppendUint64(m, h.Uint64()), 1+h.Uint64N(3))
		copy(request, append(m, make([]byte, 16)...))
		if h.IntN(2) == 0 {
			copy(request[40:], "file\x00other\x00")
		}
	case kind == virtio.IDConsole && q == 3: // struct virtio_console_control (5.3.6.2), of few ports
		copy(request, []byte{byte(h.IntN(3)), 0, 0, 0, byte(h.IntN(9)), 0, byte(h.IntN(3)), 0})
	case q == 0: // task management (virtio 1.3, 5.6.6.2)
		copy(request, []byte{0, 0, 0, 0, byte(h.IntN(9)), 0, 0, 0})
		copy(request[8:], lun)
	default:
		copy(request, lun)
	}
	buffer := buffersAt + q<<16 + head<<10
	h.write(buffer, request)
	le := binary.LittleEndian
	// The queues of these are by turns to the driver and to the device; a network's fourth has both.
	turns := kind == virtio.IDConsole || kind == virtio.IDNet && q < 3
	for i, d := range []struct{ addr, n, flags uint64 }{{buffer, 51, 1}, {buffer + 64, 108, 3},
		{buffer + 4096, 512 * h.Uint64N(8), 2}} {
		if h.IntN(40) == 0 {
			d.addr, d.n, d.flags = h.value(), h.value(), h.Uint64N(8)
		}
		switch {
		case slot == socketSlot && q == 1: // tx
			d.flags = 0
		case kind == virtio.IDFS: // both
		case q == 1, slot == socketSlot: // events and rx: only a buffer
			d.flags = 2
		}
		if turns {
			d.flags = d.flags&^2 | (1-q%2)<<1
		}
		b := le.AppendUint64(nil, d.addr)
		b = le.AppendUint32(b, uint32(d.n))
		b = le.AppendUint16(b, uint16(d.flags))
		h.write(at+16*(head+uint64(i)), le.AppendUint16(b, uint16(head)+uint16(i)+1))
	}
	var idx [2]byte
	if err := h.mem.Read(at+4096+2, idx[:]); err != nil {
		panic(err)
	}
	n := le.Uint16(idx[:])
	h.write(at+4096+4+2*uint64(n%ringSize), le.AppendUint16(nil, uint16(head)))
	h.write(at+4096+2, le.AppendUint16(nil, n+1))
	h.put(&h.mmio, h.bar(slot, 0)+0x3000+4*q, 2, q)
}

// act does one thing: mostly it makes requests, because the rest stops them.
func (h *hostile) act() {
	slot, size := 1+h.IntN(len(h.virtio)), 1<<h.IntN(4)
	aligned := func(n uint64) uint64 { return h.Uint64N(n) &^ uint64(size-1) }
	switch n := h.IntN(100); {
	case n < 5:
		port := []uint64{serial.COM1, rtc.Port, i8042.Port, acpipm.Port, pvpanic.Port, debugport.Port,
			pci.PortBase, serial.COM2, statusport.Port}[h.IntN(9)]
		size = min(size, 4)
		if h.IntN(2) == 0 {
			h.get(&h.pio, port+h.Uint64N(8), size)
		} else {
			h.put(&h.pio, port+h.Uint64N(8), size, h.value())
		}
	case n < 10:
		h.get(&h.mmio, h.config(h.IntN(2+len(h.virtio)))+h.Uint64N(256), size)
	case n < 12:
		h.put(&h.mmio, h.config(slot)+h.Uint64N(256), size, h.value())
	case n < 20:
		h.get(&h.mmio, h.bar(slot, 0)+aligned(0x3020), size)
	case n < 21: // the watchdog, behind the virtio devices
		at := len(h.virtio) + 1
		h.put(&h.mmio, h.config(at)+4, 2, pci.CommandMemory)
		h.put(&h.mmio, h.config(at)+0x60+h.Uint64N(12), size, h.value())
		h.put(&h.mmio, h.bar(at, 0)+0xc, 1, 0x80)
		h.put(&h.mmio, h.bar(at, 0)+0xc, 1, 0x86)
		h.put(&h.mmio, h.bar(at, 0)+aligned(16), size, h.value())
	case n < 22:
		h.put(&h.mmio, h.bar(slot, 0)+aligned(0x40), size, h.value())
	case n < 23: // bus mastering, INTx and MSI-X, whose capability is the first
		h.put(&h.mmio, h.config(slot)+4, 2, pci.CommandMemory|h.Uint64N(2)<<2|h.Uint64N(2)<<10)
		h.put(&h.mmio, h.config(slot)+0x42, 2, h.Uint64N(4)<<14)
	case n < 24:
		h.get(&h.mmio, h.bar(slot, 0)+0x1000, 1)
	case n < 26:
		h.put(&h.mmio, h.bar(slot, 2)+h.Uint64N(96)&^3, 4, 0xfee0_0000|h.value())
	case n < 30:
		h.start(slot)
	default:
		h.ring(slot)
	}
}

// TestHostileCPUs has several CPUs access every device of a machine at random at the same time,
// while the host changes disks, pauses devices and reads the machine's state. It looks for races,
// panics and deadlocks; at the end the devices must start anew.
func TestHostileCPUs(t *testing.T) {
	target := scsi.NewTarget()
	unit := func(lun int, serial string) scsi.LUN {
		u, err := scsi.NewUnit(scsi.UnitConfig{Backend: block.NewVolatile(1 << 20), Serial: serial})
		if err != nil {
			t.Error(err)
			return 0
		}
		at, _ := scsi.EncodeLUN(lun)
		if err := target.Attach(at, u); err != nil {
			t.Error(err)
		}
		return at
	}
	unit(0, "A")
	disk, err := vscsi.New(vscsi.Config{Target: target, Queues: 2})
	if err != nil {
		t.Fatal(err)
	}
	pages := balloon.New()
	var programs sync.WaitGroup
	sockets, err := vsock.New(vsock.Config{Accept: func(port uint32, c *vsock.Conn) bool {
		if port == 3 {
			return false
		}
		c.Hold()
		programs.Go(func() { // until the guest or the test ends it
			defer c.Close()
			if port != 2 && c.Accept() == nil {
				_, _ = io.Copy(c, c)
			}
		})
		return true
	}})
	if err != nil {
		t.Fatal(err)
	}
	sys := system(t)
	before := openFDs(t)
	wires, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	network, err := net.New(net.Config{MAC: [6]byte{2}, Queues: []int{wires[0], wires[0]},
		SetPairs: func(int) error { return nil }})
	if err != nil {
		t.Fatal(err)
	}
	echo := func() stdnet.Conn {
		near, far := stdnet.Pipe()
		programs.Go(func() { // sends back the guest's data
			_, _ = io.Copy(near, near)
			_ = near.Close()
		})
		return far
	}
	ports, err := console.New([]console.Port{{Name: "console", Stream: echo(), Console: true},
		{Name: "echo", Stream: echo()}})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("data"), 0o600); err != nil {
		t.Fatal(err)
	}
	share, err := fs.New(fs.Share{Tag: "tree", Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	m, err := newMachine(t.Context(), sys, Config{
		Memory: guestmem.Config{Size: 64 << 20}, CPUs: 2, Kernel: embeddedKernel(t),
		Devices:  []virtio.Device{rng.New(), disk, pages, sockets, network, ports, share},
		Watchdog: WatchdogNMI, watchdog: new(i6300esb.Kept),
	})
	if err != nil {
		t.Fatal(err)
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	var cpus, host sync.WaitGroup
	for id := range uint64(3) {
		cpus.Go(func() {
			h := &hostile{m, rand.New(rand.NewPCG(seed, id))}
			for range 5000 {
				h.act()
			}
		})
	}
	stop := make(chan struct{})
	host.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(100 * time.Microsecond): // leaves time for the CPUs
			}
			lun := unit(1, "B")
			frame := make([]byte, 1+rand.IntN(10_000))
			_, _ = unix.Write(wires[1], frame) // which may be full, or empty
			for n := 0; n >= 0; {
				n, _ = unix.Read(wires[1], frame)
			}
			pages.Resize(rand.Uint64N(64 << 20))
			ports.Resize(uint16(rand.UintN(1<<16)), uint16(rand.UintN(100)))
			over, cancel := context.WithCancel(t.Context())
			cancel()
			pages.State(over)
			if c, err := sockets.Dial(over, 1); err == nil {
				_ = c.Close()
			}
			if rand.IntN(10) == 0 {
				sockets.TransportReset()
			}
			disk.Event(vscsi.TransportReset, lun, vscsi.ResetRescan)
			if err := target.Detach(lun); err != nil {
				t.Error(err)
			}
			for _, v := range m.virtio {
				ctx, cancel := context.WithTimeout(t.Context(), 50*time.Microsecond)
				v.Pause(ctx)
				if paused := v.Pause(ctx); rand.IntN(2) == 0 {
					<-paused
				}
				v.Resume()
				cancel()
			}
		}
	})
	host.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(100 * time.Microsecond):
			}
			for _, part := range []string{"pci", "com1", "rtc", "acpi_pm"} {
				if _, err := m.state().Read(t.Context(), part); err != nil {
					t.Error(err)
				}
			}
			for _, lun := range target.LUNs() {
				if u := target.Unit(lun); u != nil {
					u.Inspect()
				}
			}
		}
	})
	cpus.Wait()
	close(stop)
	host.Wait()
	if m.stop.Load() && m.outcome.Ending == HostFailed {
		t.Errorf("%s: %v", m.outcome.Ending, m.outcome.Err)
	}
	if err := m.bus.Reset(); err != nil {
		t.Error(err)
	}
	h := &hostile{m, rand.New(rand.NewPCG(seed, 3))}
	for slot := 1; slot <= len(m.virtio); slot++ {
		if h.start(slot); h.get(&m.mmio, h.bar(slot, 0)+0x14, 1) != 15 {
			t.Errorf("slot %d has status %#x after all that", slot, h.get(&m.mmio, h.bar(slot, 0)+0x14, 1))
		}
	}
	if err := errors.Join(m.close(), ports.Close(), unix.Close(wires[0]), unix.Close(wires[1])); err != nil {
		t.Error(err)
	}
	share.Close()
	programs.Wait()
	if after := openFDs(t); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}
