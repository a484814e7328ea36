package vhostring_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	hostnet "net"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"gvm/devices/virtio"
	"gvm/devices/virtio/net"
	"gvm/devices/virtio/net/tap"
	"gvm/devices/virtio/vhostnet"
	"gvm/devices/virtio/virtiotest"
	"gvm/devices/virtio/virtqtest"
)

const (
	featureMrgRxB = 1 << 15 // VIRTIO_NET_F_MRG_RXBUF
	etherType     = 0x88b5  // for experiments (IEEE 802)
	etherHeader   = 14
	longest       = etherHeader + 4 + 1490 // of numbered's frames
	rxLen         = 700                    // of a receive buffer
)

// numbered returns a frame whose length and bytes follow from its number.
func numbered(n uint32) []byte {
	b := make([]byte, etherHeader+4+n%1491)
	b[0], b[6] = 2, 2 // addresses of stations
	binary.BigEndian.PutUint16(b[12:], etherType)
	binary.LittleEndian.PutUint32(b[etherHeader:], n)
	for i := etherHeader + 4; i < len(b); i++ {
		b[i] = byte(n) + byte(i)
	}
	return b
}

// way is one direction of a link. A sender is at most window frames ahead, so that the host's
// queues drop none.
type way struct {
	mu             sync.Mutex
	changed        sync.Cond
	sent, received uint32
	ended          bool
}

const window = 60

func newWay() *way {
	w := new(way)
	w.changed.L = &w.mu
	return w
}

// next returns the next frame to send, or false at the end.
func (w *way) next() ([]byte, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.sent-w.received >= window && !w.ended {
		w.changed.Wait()
	}
	w.sent++
	return numbered(w.sent - 1), !w.ended
}

// take checks that b is the next frame.
func (w *way) take(b []byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if string(b) != string(numbered(w.received)) {
		return fmt.Errorf("%d bytes are not frame %d: % x", len(b), w.received, b[:min(len(b), 40)])
	}
	w.received++
	w.changed.Broadcast()
	return nil
}

func (w *way) end() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ended = true
	w.changed.Broadcast()
}

// txSlot is a frame to send.
type txSlot struct {
	d  *virtqtest.Driver
	at uint64
	*way
}

func (s txSlot) Next() []virtqtest.Seg {
	frame, _ := s.next()
	clear(s.d.Bytes(s.at, net.HeaderLen))
	copy(s.d.Bytes(s.at+net.HeaderLen, len(frame)), frame)
	return []virtqtest.Seg{{Addr: s.at, Len: net.HeaderLen}, {Addr: s.at + net.HeaderLen, Len: uint32(len(frame))}}
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

// receiver puts frames together.
type receiver struct {
	*way
	frame []byte
	left  uint16 // buffers of the frame to come
}

func (s rxSlot) Next() []virtqtest.Seg { return []virtqtest.Seg{{Addr: s.at, Len: rxLen, Write: true}} }

func (s rxSlot) Check(written uint32) error {
	b := s.d.Bytes(s.at, int(written))
	if s.left == 0 {
		s.frame, s.left = nil, binary.LittleEndian.Uint16(b[10:]) // num_buffers
	}
	s.frame = append(s.frame, b...)
	if s.left--; s.left > 0 {
		return nil
	}
	frame := s.frame[net.HeaderLen:]
	if binary.BigEndian.Uint16(frame[12:]) != etherType {
		return nil // of the host's own protocols
	}
	return s.take(frame)
}

// TestStopNet stops and continues the queues of a network device that the kernel serves: no frame
// is lost, changed, sent twice or out of order.
func TestStopNet(t *testing.T) {
	for features, rounds := range map[uint64]int{0: 100, virtio.FeatureEventIdx: 1000} {
		link, err := tap.Open("gvmstop0", 1)
		must(t, err)
		s, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		must(t, err)
		ifr, err := unix.NewIfreq("gvmstop0")
		must(t, err)
		ifr.SetUint16(unix.IFF_UP)
		must(t, unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, ifr))
		i, err := hostnet.InterfaceByName("gvmstop0")
		must(t, err)
		must(t, unix.SetsockoptInt(s, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20))
		must(t, unix.Bind(s, &unix.SockaddrLinklayer{Protocol: etherType>>8 | etherType&0xff<<8, Ifindex: i.Index}))
		pairs, err := vhostnet.Open(link.Queues(), func(s string) { t.Error(s) })
		must(t, err)
		dev, err := net.New(net.Config{MAC: [6]byte{2}, Queues: link.Queues(), Kernel: pairs})
		must(t, err)
		in, out := newWay(), newWay() // from the guest, and to it
		var host sync.WaitGroup
		host.Go(func() {
			for {
				frame, ok := out.next()
				if !ok {
					return
				}
				if _, err := unix.Write(s, frame); err != nil {
					t.Error(err)
					return
				}
			}
		})
		host.Go(func() { // until the interface is closed
			b := make([]byte, longest+1)
			for {
				n, err := unix.Read(s, b)
				if errors.Is(err, unix.ENETDOWN) {
					return
				}
				if err == nil {
					err = in.take(b[:n])
				}
				if err != nil {
					t.Error(err)
					in.end()
					return
				}
			}
		})
		virtiotest.StopAndContinue(t, dev, newMemory(t), virtiotest.Load{
			Rounds: rounds, Features: virtio.FeatureVersion1 | featureMrgRxB | features,
			Slots: func(queue int, d *virtqtest.Driver) (slots []virtiotest.Slot) {
				to := &receiver{way: out}
				for range 40 {
					switch queue {
					case 0:
						slots = append(slots, rxSlot{d, d.Alloc(rxLen), to})
					case 1:
						slots = append(slots, txSlot{d, d.Alloc(net.HeaderLen + longest), in})
					}
				}
				return slots
			},
			Left: func(queue int) int {
				if queue == 0 {
					return (net.HeaderLen + longest) / rxLen // the next frame may need one more
				}
				return 0
			},
		})
		out.end()
		must(t, pairs.Close())
		must(t, link.Close()) // takes the interface down
		host.Wait()
		must(t, unix.Close(s))
		t.Logf("%d frames from the guest, %d to it", in.received, out.received)
	}
}
