package net

import (
	"encoding/binary"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"gvm/devices/virtio"
	"gvm/devices/virtio/virtiotest"
	"gvm/devices/virtio/virtqtest"
	"gvm/guestmem"
)

// numbered fills a frame whose length and bytes follow from its number.
func numbered(b []byte, n uint32) []byte {
	b = b[:HeaderLen+4+n%(longest-HeaderLen-4)]
	binary.LittleEndian.PutUint32(b[HeaderLen:], n)
	for i := HeaderLen + 4; i < len(b); i++ {
		b[i] = byte(n) + byte(i)
	}
	return b
}

// check checks that b is the next frame, but for its header.
func check(b []byte, next *uint32) error {
	want := numbered(make([]byte, 4000), *next)
	*next++
	if string(b[HeaderLen:]) != string(want[HeaderLen:]) {
		return fmt.Errorf("%d bytes are not frame %d", len(b), *next-1)
	}
	return nil
}

// txSlot is a frame to send.
type txSlot struct {
	d      *virtqtest.Driver
	at     uint64
	number *uint32
}

func (s txSlot) Next() []virtqtest.Seg {
	n := len(numbered(s.d.Bytes(s.at, 4000), *s.number))
	*s.number++
	return []virtqtest.Seg{{Addr: s.at, Len: HeaderLen}, {Addr: s.at + HeaderLen, Len: uint32(n - HeaderLen)}}
}

func (txSlot) Check(written uint32) error {
	if written != 0 {
		return fmt.Errorf("%d bytes written to a frame", written)
	}
	return nil
}

// rxSlot is a receive buffer.
type rxSlot struct {
	d  *virtqtest.Driver
	at uint64
	*receiver
}

const (
	rxLen   = 700
	longest = HeaderLen + 4 + 3000 // the bound of numbered's frames
)

// receiver puts frames together.
type receiver struct {
	frame []byte
	left  uint16 // buffers of the frame to come
	next  uint32
	done  atomic.Uint32 // is next
}

func (s rxSlot) Next() []virtqtest.Seg {
	return []virtqtest.Seg{{Addr: s.at, Len: HeaderLen, Write: true},
		{Addr: s.at + HeaderLen, Len: rxLen - HeaderLen, Write: true}}
}

func (s rxSlot) Check(written uint32) error {
	b := s.d.Bytes(s.at, int(written))
	if s.left == 0 {
		s.frame, s.left = nil, binary.LittleEndian.Uint16(b[numBuffersOff:])
	}
	s.frame = append(s.frame, b...)
	if s.left--; s.left > 0 {
		if written != rxLen {
			return fmt.Errorf("%d bytes, and %d more buffers", written, s.left)
		}
		return nil
	}
	err := check(s.frame, &s.next)
	s.done.Store(s.next)
	return err
}

// TestStopAndContinue: no frame is lost, changed or out of order.
func TestStopAndContinue(t *testing.T) {
	for features, rounds := range map[uint64]int{0: 100, virtio.FeatureEventIdx: 1000} {
		ours, peer := socketpair(t)
		dev, err := New(Config{MAC: [6]byte{2}, Queues: []int{ours}})
		if err != nil {
			t.Fatal(err)
		}
		var backend sync.WaitGroup
		backend.Go(func() { // until the other end is shut down
			b := make([]byte, 4000)
			for n := uint32(0); ; n++ {
				if _, err := unix.Write(peer, numbered(b, n)); err != nil {
					return
				}
			}
		})
		backend.Go(func() {
			b := make([]byte, 4000)
			for next := uint32(0); ; {
				n, err := unix.Read(peer, b)
				if n <= 0 || err != nil {
					return
				}
				if err := check(b[:n], &next); err != nil {
					t.Error(err)
				}
			}
		})
		var number uint32
		in := new(receiver)
		virtiotest.StopAndContinue(t, dev, guestmem.Heap(0, 3*virtiotest.QueueSpan), virtiotest.Load{
			Rounds: rounds, Features: features | featureMrgRxB,
			Slots: func(queue int, d *virtqtest.Driver) (slots []virtiotest.Slot) {
				for range 40 {
					switch queue {
					case 0:
						slots = append(slots, rxSlot{d, d.Alloc(rxLen), in})
					case 1:
						slots = append(slots, txSlot{d, d.Alloc(4000), &number})
					}
				}
				return slots
			},
			Left: func(queue int) int {
				if queue == 0 {
					return longest / rxLen // the next frame may need one more
				}
				return 0
			},
		})
		unix.Shutdown(ours, unix.SHUT_RDWR)
		backend.Wait()
		t.Logf("%d frames from the guest, %d to it", number, in.done.Load())
	}
}
