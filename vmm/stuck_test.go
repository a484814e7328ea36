package vmm

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/scsi/scsitest"
	"gvm/devices/virtio"
	"gvm/devices/virtio/rng"
	"gvm/devices/virtio/vscsi"
	"gvm/guest/embedded"
	"gvm/guestmem"
	"gvm/kvmapi"
	"gvm/kvmapi/nowait"
	"gvm/vmm/boot"
)

// stuck is a device whose Reset blocks, as if storage did not finish a request.
type stuck struct {
	virtio.Device
	resetting chan struct{}
	until     chan struct{}
}

func (s *stuck) Reset() error {
	select {
	case s.resetting <- struct{}{}:
	default:
	}
	<-s.until
	return s.Device.Reset()
}

// TestStuckDevice: the end's wait for a device is bounded; a restart waits until it is ended.
func TestStuckDevice(t *testing.T) {
	cause := errors.New("told to")
	for _, again := range []bool{false, true} {
		s := &stuck{rng.New(), make(chan struct{}, 1), make(chan struct{})}
		guest, want := script{}.powerOff(), PoweredOff
		if again {
			guest, want = script{}.reset(), Stopped
		}
		ctx, cancel := context.WithCancelCause(t.Context())
		ended, notes := make(chan Outcome, 1), make(chan string, 10)
		go func() {
			out, _ := guest.runContext(ctx, t, false, Config{
				Devices: []virtio.Device{s}, Rebooting: again, Note: func(s string) { notes <- s },
			})
			ended <- out
		}()
		<-s.resetting
		if again {
			cancel(cause)
		}
		select {
		case out := <-ended:
			if out.Ending != want || !out.Left || again && !errors.Is(out.Err, cause) {
				t.Errorf("restarts %v: %+v", again, out)
			}
			const note = "virtio device 0 (type 4) waits for the host and does not end; gvm ends without it"
			if len(notes) != 1 || <-notes != note {
				t.Errorf("%d notes, or another one", len(notes))
			}
		case <-time.After(30 * time.Second):
			t.Errorf("restarts %v: the end waits for the device", again)
			close(s.until)
			<-ended
			cancel(nil)
			continue
		}
		close(s.until)
		cancel(nil)
	}
}

// TestSlowKVM: the end waits for KVM, after all threads and devices, longer than for those, and no
// note says so.
func TestSlowKVM(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, takes := range []time.Duration{2 * time.Second, time.Hour} {
			closing := false
			m := &machine{cfg: Config{Note: func(s string) {
				if closing {
					t.Error(s)
				}
				closing = true // in tellMore, behind the devices
				time.Sleep(takes)
			}}}
			m.troubles.more = 1
			ctx, cancel := context.WithCancel(nowait.WithOneEnd(t.Context()))
			cancel()
			if over, err := m.takeDown(ctx, false); over != (takes < kvmPatience) || err != nil {
				t.Errorf("%v: over %v, %v", takes, over, err)
			}
		}
		time.Sleep(time.Hour)
	})
}

// TestEndHasTime: the end of a guest waits for a device that takes seconds, and for the console's
// reader, which may be a pager.
func TestEndHasTime(t *testing.T) {
	t.Parallel()
	free := make(chan struct{})
	s := &stuck{rng.New(), make(chan struct{}, 1), make(chan struct{})}
	for name, v := range map[string]struct {
		cfg   Config
		let   chan struct{}
		after time.Duration
	}{
		"device":  {Config{Devices: []virtio.Device{s}}, s.until, guestEndPatience / 2},
		"console": {Config{Console: stuckConsole{free}}, free, guestEndPatience + 2*endPatience},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			time.AfterFunc(v.after, func() { close(v.let) })
			v.cfg.Note = func(s string) { t.Error(s) }
			guest := script{}.print("bye\r\n").powerOff()
			if out, _ := guest.run(t, false, v.cfg); out.Ending != PoweredOff || out.Left {
				t.Errorf("%+v", out)
			}
		})
	}
}

// command makes a driver's first command, with data-out, available in the first request queue of
// slot.
func (h *hostile) command(slot int, cdb, data []byte) {
	const q = 2
	at, le := uint64(ringsAt+q<<16), binary.LittleEndian
	header := append([]byte{1, 0, 0x40, 0, 0, 0, 0, 0, 18: 0}, cdb...)
	header = append(header, make([]byte, 51-len(header))...)
	const buffer = uint64(buffersAt)
	h.write(buffer, append(header, data...))
	var table []byte
	for i, d := range []struct{ addr, n, flags uint64 }{{buffer, uint64(51 + len(data)), 1}, {buffer + 8192, 108, 2}} {
		table = le.AppendUint32(le.AppendUint64(table, d.addr), uint32(d.n))
		table = le.AppendUint16(le.AppendUint16(table, uint16(d.flags)), uint16(i)+1)
	}
	h.write(at, table)
	h.write(at+4096+2, []byte{1, 0, 0, 0}) // the available ring's index, and descriptor 0
	h.put(&h.mmio, h.bar(slot, 0)+0x3000+4*q, 2, q)
}

// TestEndOfLongCommands ends a machine whose driver has started commands that take minutes: it is
// taken down with its devices, and the target becomes idle.
func TestEndOfLongCommands(t *testing.T) {
	list := []byte{31, 0, 0, 1, 0xa5} // OVERWRITE COUNT
	same := []byte{0x93, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0}
	for name, v := range map[string]struct{ cdb, data []byte }{
		"SANITIZE":            {[]byte{0x48, 0x01, 0, 0, 0, 0, 0, 0, 5, 0}, list},
		"SANITIZE with IMMED": {[]byte{0x48, 0x81, 0, 0, 0, 0, 0, 0, 5, 0}, list},
		"WRITE SAME":          {same, append([]byte{1}, make([]byte, 4095)...)},
	} {
		target := scsi.NewTarget()
		calls := make(chan struct{}, 1)
		slow := &scsitest.Recorder{Backend: block.Null(1 << 40), OnCall: func(string) {
			select {
			case calls <- struct{}{}:
			default:
			}
			time.Sleep(20 * time.Millisecond)
		}}
		u, err := scsi.NewUnit(scsi.UnitConfig{Backend: slow, Serial: "A", BlockSize: 4096})
		if err != nil {
			t.Fatal(err)
		}
		if err := target.Attach(0, u); err != nil {
			t.Fatal(err)
		}
		disk, err := vscsi.New(vscsi.Config{Target: target, Queues: 2})
		if err != nil {
			t.Fatal(err)
		}
		m, err := newMachine(t.Context(), system(t), Config{
			Memory: guestmem.Config{Size: 64 << 20}, Kernel: embeddedKernel(t), Devices: []virtio.Device{rng.New(), disk},
		})
		if err != nil {
			t.Fatal(err)
		}
		h := &hostile{m, rand.New(rand.NewPCG(1, 2))}
		h.start(2)
		if err := scsitest.Ready(target, 0); err != nil {
			t.Fatal(err)
		}
		h.command(2, v.cdb, v.data)
		select {
		case <-calls:
		case <-time.After(30 * time.Second):
			t.Fatalf("%s does not begin", name)
		}
		if over, err := m.takeDown(t.Context(), false); !over || err != nil {
			t.Errorf("%s: over %v, %v", name, over, err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		if busy := target.End(ctx); len(busy) > 0 {
			t.Errorf("%s: still at it", name)
		}
		cancel()
	}
}

// deaf is a file on storage that answers until it is struck, and then not before it is free.
type deaf struct {
	io.ReaderAt
	struck  atomic.Bool
	reading chan struct{} // takes a word at a read that waits
	free    chan struct{}
}

func (d *deaf) ReadAt(b []byte, off int64) (int, error) {
	if d.struck.Load() {
		select {
		case d.reading <- struct{}{}:
		case <-d.free:
		}
		<-d.free
	}
	return d.ReaderAt.ReadAt(b, off)
}

// TestDeafKernel: storage that does not answer while a kernel or an initrd is loaded, at the start
// or by a restart in place, holds up no end of the machine. The memory that such a read fills stays
// until its end.
func TestDeafKernel(t *testing.T) {
	cause := errors.New("told to")
	for _, where := range []string{"kernel", "initrd", "restart"} {
		before := openFDs(t)
		sys, err := kvmapi.Open()
		if err != nil {
			t.Fatal(err)
		}
		d := &deaf{bytes.NewReader(embedded.Image), atomic.Bool{}, make(chan struct{}), make(chan struct{})}
		file := &boot.File{Name: "deaf", ReaderAt: d, Size: int64(len(embedded.Image))}
		cfg := Config{Memory: guestmem.Config{Size: 64 << 20, Shared: true}, CmdLine: "crash=reset", Rebooting: true,
			Devices: []virtio.Device{rng.New()}}
		if where == "initrd" {
			cfg.Kernel, cfg.Initrds = script{}.kernel(t, false), []*boot.File{file}
		} else if cfg.Kernel, err = boot.NewImage(file); err != nil {
			t.Fatal(err)
		}
		cfg.Phase = func(name string) {
			if name == Entered {
				d.struck.Store(true)
			}
		}
		d.struck.Store(where != "restart")
		ctx, cancel := context.WithCancelCause(t.Context())
		ended := make(chan Outcome, 1)
		go func() {
			out, err := Run(ctx, sys, cfg)
			if err != nil {
				t.Error(err)
			}
			ended <- out
		}()
		<-d.reading
		cancel(cause)
		select {
		case out := <-ended:
			if out.Ending != Stopped || !errors.Is(out.Err, cause) || out.Err.Error() != "told to while deaf was read" {
				t.Errorf("%s: %+v", where, out)
			}
			close(d.free)
		case <-time.After(30 * time.Second):
			t.Errorf("%s: the end waits for the storage", where)
			close(d.free)
			<-ended
		}
		if err := sys.Close(); err != nil {
			t.Error(err)
		}
		for openFDs(t) != before { // among others that of the memory
			time.Sleep(time.Millisecond)
		}
	}
}
