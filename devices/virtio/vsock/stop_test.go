package vsock

import (
	"errors"
	"io"
	"sync"
	"syscall"
	"testing"

	"gvm/devices/virtio"
	"gvm/devices/virtio/virtiotest"
	"gvm/devices/virtio/virtqtest"
	"gvm/guestmem"
)

func TestStopAndContinue(t *testing.T) {
	for features, rounds := range map[uint64]int{0: 100, virtio.FeatureEventIdx: 1000} {
		var program sync.WaitGroup
		dev, err := New(Config{Accept: func(_ uint32, c *Conn) bool {
			program.Go(func() {
				virtiotest.Converse(t, c, func(err error) {
					if !errors.Is(err, syscall.ECONNRESET) {
						t.Error(err)
					}
				})
			})
			return true
		}})
		if err != nil {
			t.Fatal(err)
		}
		driver := &virtiotest.Socket{GuestCID: guestCID, HostCID: hostCID, Port: 1024}
		virtiotest.StopAndContinue(t, dev, guestmem.Heap(0, 3*virtiotest.QueueSpan), virtiotest.Load{
			Rounds: rounds, Features: features,
			Slots: func(queue int, d *virtqtest.Driver) []virtiotest.Slot { return driver.Slots(queue, d, 40) },
		})
		program.Wait()
		t.Log(driver)
	}
}

// TestEventWaits: an event that is due while the device is stopped is sent when it continues, and a
// connection lives on.
func TestEventWaits(t *testing.T) {
	r := newRig(t, 8)
	d := r.q[eventQueue]
	d.Add(virtqtest.Seg{Addr: d.Alloc(4), Len: 4, Write: true})
	if _, err := d.Publish(); err != nil {
		t.Fatal(err)
	}
	c := r.connect(1, 1024, 100)
	r.stop()
	wrote := make(chan error)
	go func() {
		_, err := io.WriteString(c, "patience")
		wrote <- err
	}()
	r.activate()
	if _, b := r.expect(opRW, 1, 1024); string(b) != "patience" {
		t.Errorf("%q", b)
	}
	if err := <-wrote; err != nil {
		t.Error(err)
	}
	r.stop()
	r.dev.TransportReset()
	r.quiet()
	r.activate()
	if _, n, err := d.Wait(); n != 4 || err != nil {
		t.Error(n, err)
	}
}

// TestLastWords: bytes that a guest has sent before its end arrive.
func TestLastWords(t *testing.T) {
	r := newRig(t, 8)
	c := r.connect(1, 1024, 100)
	d := r.q[txQueue]
	for i := range byte(100) {
		at := d.Alloc(headerLen + 1)
		h := header{srcCID: guestCID, dstCID: hostCID, srcPort: 1, dstPort: 1024, kind: typeStream, op: opRW, len: 1}
		h.encode((*[headerLen]byte)(d.Bytes(at, headerLen)))
		d.Bytes(at+headerLen, 1)[0] = i
		d.Add(virtqtest.Seg{Addr: at, Len: headerLen + 1})
	}
	if _, err := d.Publish(); err != nil {
		t.Fatal(err)
	}
	if err := r.dev.Reset(); err != nil {
		t.Fatal(err)
	}
	var in virtiotest.Counting
	got := make([]byte, 200)
	n, err := io.ReadFull(c, got)
	if !errors.Is(err, syscall.ECONNRESET) || n != 100 || in.Check(got[:n]) != nil {
		t.Errorf("%d bytes, %v", n, err)
	}
}

// stop stops the device; activate continues.
func (r *rig) stop() {
	r.t.Helper()
	bases, err := r.dev.Stop(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	for i, base := range bases {
		r.a.Queues[i].Base = base
	}
}
