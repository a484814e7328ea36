package vsock

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"gvm/devices/virtio"
	"gvm/devices/virtio/virtiotest"
	"gvm/devices/virtio/virtqtest"
	"gvm/guestmem"
)

// counting is a stream of bytes in both directions, each one more than the one before.
type counting struct{ n byte }

func (c *counting) fill(p []byte) []byte {
	for i := range p {
		p[i] = c.n
		c.n++
	}
	return p
}

func (c *counting) check(p []byte) error {
	for i, b := range p {
		if b != c.n {
			return fmt.Errorf("byte %d of %d is %d, want %d", i, len(p), b, c.n)
		}
		c.n++
	}
	return nil
}

// traffic is a driver with one connection, over which both sides send all the time.
type traffic struct {
	opened               bool
	tx, rx               counting // of the driver's queues
	txCnt                uint32
	rxCnt, alloc, fwdCnt atomic.Uint32
}

const slotData = 100

// slot is a buffer of the rx queue, or of a packet to send.
type slot struct {
	*traffic
	d  *virtqtest.Driver
	at uint64
	rx bool
}

func (s slot) Next() []virtqtest.Seg {
	if s.rx {
		return []virtqtest.Seg{{Addr: s.at, Len: 20, Write: true}, {Addr: s.at + 20, Len: 24 + slotData, Write: true}}
	}
	h := header{srcCID: guestCID, dstCID: hostCID, srcPort: 1, dstPort: 1024, kind: typeStream, op: opRequest,
		bufAlloc: maxPeerAlloc, fwdCnt: s.rxCnt.Load()}
	if s.opened {
		h.op = opCreditRequest
		if int32(s.alloc.Load())-int32(s.txCnt-s.fwdCnt.Load()) >= slotData {
			h.op, h.len = opRW, slotData
			s.txCnt += slotData
			s.tx.fill(s.d.Bytes(s.at+headerLen, slotData))
		}
	}
	s.opened = true
	h.encode((*[headerLen]byte)(s.d.Bytes(s.at, headerLen)))
	return []virtqtest.Seg{{Addr: s.at, Len: headerLen}, {Addr: s.at + headerLen, Len: slotData}}
}

func (s slot) Check(written uint32) error {
	if !s.rx {
		return nil
	}
	var h header
	h.decode((*[headerLen]byte)(s.d.Bytes(s.at, headerLen)))
	if h.op != opRW && h.op != opResponse && h.op != opCreditUpdate || written != headerLen+h.len {
		return fmt.Errorf("%d bytes: %+v", written, h)
	}
	s.alloc.Store(h.bufAlloc)
	s.fwdCnt.Store(h.fwdCnt)
	s.rxCnt.Add(h.len)
	return s.traffic.rx.check(s.d.Bytes(s.at+headerLen, int(h.len)))
}

func TestStopAndContinue(t *testing.T) {
	for features, rounds := range map[uint64]int{0: 100, virtio.FeatureEventIdx: 1000} {
		var program sync.WaitGroup
		dev, err := New(Config{Accept: func(_ uint32, c *Conn) bool {
			done := func(err error) {
				if !errors.Is(err, syscall.ECONNRESET) {
					t.Error(err)
				}
			}
			program.Go(func() {
				var out counting
				for n := 1; ; n = n*5%331 + 1 {
					if _, err := c.Write(out.fill(make([]byte, n))); err != nil {
						done(err)
						return
					}
				}
			})
			program.Go(func() {
				var in counting
				for b := make([]byte, 70_000); ; {
					n, err := c.Read(b)
					if err == nil {
						err = in.check(b[:n])
					}
					if err != nil {
						done(err)
						return
					}
				}
			})
			return true
		}})
		if err != nil {
			t.Fatal(err)
		}
		driver := new(traffic)
		virtiotest.StopAndContinue(t, dev, guestmem.Heap(0, 3*virtiotest.QueueSpan), virtiotest.Load{
			Rounds: rounds, Features: features,
			Slots: func(queue int, d *virtqtest.Driver) (slots []virtiotest.Slot) {
				if queue == eventQueue {
					return nil
				}
				for range 40 {
					slots = append(slots, slot{driver, d, d.Alloc(headerLen + slotData), queue == rxQueue})
				}
				return slots
			},
		})
		program.Wait()
		t.Logf("%d bytes from the guest, %d to it", driver.txCnt, driver.rxCnt.Load())
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
	var in counting
	got := make([]byte, 200)
	n, err := io.ReadFull(c, got)
	if !errors.Is(err, syscall.ECONNRESET) || n != 100 || in.check(got[:n]) != nil {
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
