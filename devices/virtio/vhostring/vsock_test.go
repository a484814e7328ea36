package vhostring_test

import (
	"encoding/binary"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"gvm/devices/virtio"
	"gvm/devices/virtio/vhostvsock"
	"gvm/devices/virtio/virtiotest"
	"gvm/devices/virtio/virtqtest"
)

// Packets of virtio 1.3, 5.10.6.
const (
	opRequest       = 1
	opResponse      = 2
	opRW            = 5
	opCreditUpdate  = 6
	opCreditRequest = 7

	packetHeader = 44
	packetData   = 100
	guestRoom    = 64 << 10 // buf_alloc

	guestCID, hostCID   = 30, unix.VMADDR_CID_HOST
	guestPort, hostPort = 1, 5000
)

// counting is a stream of bytes, each one more than the one before.
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

// packet is a buffer of the rx queue, or a packet to send.
type packet struct {
	*traffic
	d  *virtqtest.Driver
	at uint64
	rx bool
}

func (p packet) Next() []virtqtest.Seg {
	if p.rx {
		return []virtqtest.Seg{{Addr: p.at, Len: packetHeader, Write: true},
			{Addr: p.at + packetHeader, Len: packetData, Write: true}}
	}
	op, length := uint16(opRequest), uint32(0)
	if p.opened {
		op = opCreditRequest
		if int32(p.alloc.Load())-int32(p.txCnt-p.fwdCnt.Load()) >= packetData {
			op, length = opRW, packetData
			p.txCnt += packetData
			p.tx.fill(p.d.Bytes(p.at+packetHeader, packetData))
		}
	}
	p.opened = true
	le, h := binary.LittleEndian, p.d.Bytes(p.at, packetHeader)
	le.PutUint64(h, guestCID)
	le.PutUint64(h[8:], hostCID)
	le.PutUint32(h[16:], guestPort)
	le.PutUint32(h[20:], hostPort)
	le.PutUint32(h[24:], length)
	le.PutUint16(h[28:], 1) // VIRTIO_VSOCK_TYPE_STREAM
	le.PutUint16(h[30:], op)
	le.PutUint32(h[32:], 0)
	le.PutUint32(h[36:], guestRoom)
	le.PutUint32(h[40:], p.rxCnt.Load())
	return []virtqtest.Seg{{Addr: p.at, Len: packetHeader}, {Addr: p.at + packetHeader, Len: packetData}}
}

func (p packet) Check(written uint32) error {
	if !p.rx {
		return nil
	}
	le, h := binary.LittleEndian, p.d.Bytes(p.at, packetHeader)
	length, op := le.Uint32(h[24:]), le.Uint16(h[30:])
	if op != opRW && op != opResponse && op != opCreditUpdate && op != opCreditRequest || written != packetHeader+length {
		return fmt.Errorf("%d bytes written: % x", written, h)
	}
	p.alloc.Store(le.Uint32(h[36:]))
	p.fwdCnt.Store(le.Uint32(h[40:]))
	p.rxCnt.Add(length)
	return p.traffic.rx.check(p.d.Bytes(p.at+packetHeader, int(length)))
}

// TestStopSocket stops and continues a socket device of the kernel's: no byte of a connection is
// lost, changed or sent twice.
func TestStopSocket(t *testing.T) {
	listener, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(listener)
	must(t, unix.Bind(listener, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: hostPort}))
	must(t, unix.Listen(listener, 1))
	for features, rounds := range map[uint64]int{0: 100, virtio.FeatureEventIdx: 1000} {
		dev, err := vhostvsock.New(vhostvsock.Config{CID: guestCID, Note: func(s string) { t.Error(s) }})
		must(t, err)
		var program sync.WaitGroup
		var closed atomic.Bool // the connection is to end
		program.Go(func() {
			c, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC)
			if err != nil {
				t.Error(err)
				return
			}
			defer unix.Close(c)
			var ways sync.WaitGroup
			defer ways.Wait()
			ended := func(err error) {
				if !closed.Load() {
					t.Error(err)
				}
			}
			ways.Go(func() {
				var out counting
				for n := 1; ; n = n*5%331 + 1 {
					for b := out.fill(make([]byte, n)); len(b) > 0; {
						wrote, err := unix.SendmsgN(c, b, nil, nil, unix.MSG_NOSIGNAL)
						if err != nil {
							ended(err)
							return
						}
						b = b[wrote:]
					}
				}
			})
			ways.Go(func() {
				var in counting
				for b := make([]byte, 70_000); ; {
					n, err := unix.Read(c, b)
					if n <= 0 || err != nil {
						ended(err)
						return
					}
					if err := in.check(b[:n]); err != nil {
						t.Error(err)
						return
					}
				}
			})
		})
		driver := new(traffic)
		virtiotest.StopAndContinue(t, dev, newMemory(t), virtiotest.Load{
			Rounds: rounds, Features: virtio.FeatureVersion1 | features,
			Slots: func(queue int, d *virtqtest.Driver) (slots []virtiotest.Slot) {
				if queue == 2 { // of events, which the kernel does not send
					return nil
				}
				for range 40 {
					slots = append(slots, packet{driver, d, d.Alloc(packetHeader + packetData), queue == 0})
				}
				return slots
			},
		})
		closed.Store(true)
		must(t, dev.Close())
		program.Wait()
		t.Logf("%d bytes from the guest, %d to it", driver.txCnt, driver.rxCnt.Load())
	}
}
