package virtiotest

import (
	"encoding/binary"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"testing"

	"gvm/devices/virtio/virtqtest"
	"gvm/panics"
)

// Packets of a socket device (virtio 1.3, 5.10.6).
const (
	opRequest       = 1
	opResponse      = 2
	opRW            = 5
	opCreditUpdate  = 6
	opCreditRequest = 7
	typeStream      = 1

	packetHeader = 44
	packetData   = 100
	receiveSpace = 64 << 10 // buf_alloc
)

// Queues of a socket device.
const (
	socketRX    = 0
	socketEvent = 2
)

// Counting is a stream of bytes, each one more than the one before.
type Counting struct{ n byte }

// Fill makes p the next bytes of the stream, and returns it.
func (c *Counting) Fill(p []byte) []byte {
	for i := range p {
		p[i] = c.n
		c.n++
	}
	return p
}

// Check returns an error unless p has the next bytes of the stream.
func (c *Counting) Check(p []byte) error {
	for i, b := range p {
		if b != c.n {
			return fmt.Errorf("byte %d of %d is %d, want %d", i, len(p), b, c.n)
		}
		c.n++
	}
	return nil
}

// Converse sends and receives a Counting over c, a program's end of a connection, until both fail.
// ended gets each of the two errors at once.
func Converse(t *testing.T, c io.ReadWriter, ended func(error)) {
	var out, in Counting
	var sending sync.WaitGroup
	sending.Go(panics.Func(func() {
		for n := 1; ; n = n*5%331 + 1 {
			if _, err := c.Write(out.Fill(make([]byte, n))); err != nil {
				ended(err)
				return
			}
		}
	}))
	defer sending.Wait()
	for b := make([]byte, 70_000); ; {
		n, err := c.Read(b)
		if checkErr := in.Check(b[:n]); checkErr != nil {
			t.Error(checkErr)
			return
		}
		if err != nil {
			ended(err)
			return
		}
	}
}

// Socket is a driver of a socket device with one connection, to Port of the host. Both sides send a
// Counting over it all the time.
type Socket struct {
	GuestCID, HostCID uint64
	Port              uint32

	opened               bool
	tx, rx               Counting
	txCnt                uint32
	rxCnt, alloc, fwdCnt atomic.Uint32 // as in 5.10.6.3; alloc and fwdCnt are the device's
}

// Slots is Load.Slots for the device: n for each queue but that of events.
func (s *Socket) Slots(queue int, d *virtqtest.Driver, n int) (slots []Slot) {
	if queue == socketEvent {
		return nil
	}
	for range n {
		slots = append(slots, packet{s, d, d.Alloc(packetHeader + packetData), queue == socketRX})
	}
	return slots
}

// String says how many bytes the connection had.
func (s *Socket) String() string {
	return fmt.Sprintf("%d bytes from the guest, %d to it", s.txCnt, s.rxCnt.Load())
}

// packet is a buffer of the receive queue, or a packet to send.
type packet struct {
	*Socket
	d  *virtqtest.Driver
	at uint64
	rx bool
}

// Next implements Slot.
func (p packet) Next() []virtqtest.Seg {
	if p.rx { // the header in two pieces
		return []virtqtest.Seg{{Addr: p.at, Len: 20, Write: true},
			{Addr: p.at + 20, Len: packetHeader - 20 + packetData, Write: true}}
	}
	op, length := uint16(opRequest), uint32(0)
	if p.opened {
		op = opCreditRequest
		if int32(p.alloc.Load())-int32(p.txCnt-p.fwdCnt.Load()) >= packetData {
			op, length = opRW, packetData
			p.txCnt += packetData
			p.tx.Fill(p.d.Bytes(p.at+packetHeader, packetData))
		}
	}
	p.opened = true
	le, h := binary.LittleEndian, p.d.Bytes(p.at, packetHeader)
	le.PutUint64(h, p.GuestCID)
	le.PutUint64(h[8:], p.HostCID)
	le.PutUint32(h[16:], 1)
	le.PutUint32(h[20:], p.Port)
	le.PutUint32(h[24:], length)
	le.PutUint16(h[28:], typeStream)
	le.PutUint16(h[30:], op)
	le.PutUint32(h[32:], 0)
	le.PutUint32(h[36:], receiveSpace)
	le.PutUint32(h[40:], p.rxCnt.Load())
	return []virtqtest.Seg{{Addr: p.at, Len: packetHeader}, {Addr: p.at + packetHeader, Len: packetData}}
}

// Check implements Slot.
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
	return p.Socket.rx.Check(p.d.Bytes(p.at+packetHeader, int(length)))
}
