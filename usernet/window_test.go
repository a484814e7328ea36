package usernet

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// peer is the guest's end of one connection, frame by frame.
type peer struct {
	testing.TB
	device *net.UnixConn
	port   uint16 // the guest's
	scale  int    // of the gateway's windows
	next   uint32 // the first byte that the peer has not sent
	end    uint32 // the latest end of the windows that the gateway announced
	got    uint32 // the first byte that the peer has not received
	taken  uint32 // the first byte of the peer's that the gateway has not acknowledged
	window uint16 // the last that the gateway announced
	room   uint16 // the window that the peer announces, of a scale of 7
	frame  [headerSize + maxFrame]byte
}

// send sends a segment of the peer, from seq.
func (p *peer) send(flags header.TCPFlags, seq uint32, options, payload []byte) {
	m := make([]byte, headerSize+14+20+20, headerSize+14+20+20+len(options)+len(payload))
	m = append(append(m, options...), payload...)
	f := m[headerSize:]
	header.Ethernet(f).Encode(&header.EthernetFields{
		SrcAddr: guestMAC, DstAddr: gatewayMAC, Type: header.IPv4ProtocolNumber})
	ip := header.IPv4(f[14:])
	ip.Encode(&header.IPv4Fields{TotalLength: uint16(len(ip)), TTL: 64, Protocol: uint8(header.TCPProtocolNumber),
		SrcAddr: tcpip.AddrFromSlice(Guest4.AsSlice()), DstAddr: tcpip.AddrFromSlice(Gateway4.AsSlice())})
	ip.SetChecksum(^ip.CalculateChecksum())
	header.TCP(f[34:]).Encode(&header.TCPFields{SrcPort: p.port, DstPort: 80, SeqNum: seq, AckNum: p.got,
		DataOffset: uint8(20 + len(options)), Flags: flags, WindowSize: p.room})
	if _, err := p.device.Write(m); err != nil {
		p.Fatal(err)
	}
}

// resolve answers f, in which the gateway asks for the guest's hardware address.
func (p *peer) resolve(f []byte) {
	a := header.ARP(f[14:])
	reply := make([]byte, headerSize+14+header.ARPSize)
	header.Ethernet(reply[headerSize:]).Encode(&header.EthernetFields{
		SrcAddr: guestMAC, DstAddr: gatewayMAC, Type: header.ARPProtocolNumber})
	r := header.ARP(reply[headerSize+14:])
	r.SetIPv4OverEthernet()
	r.SetOp(header.ARPReply)
	copy(r.HardwareAddressSender(), guestMAC)
	copy(r.ProtocolAddressSender(), a.ProtocolAddressTarget())
	copy(r.HardwareAddressTarget(), gatewayMAC)
	copy(r.ProtocolAddressTarget(), a.ProtocolAddressSender())
	if _, err := p.device.Write(reply); err != nil {
		p.Fatal(err)
	}
}

// receive waits for a segment of the gateway's, checks its length and sum, and returns its data,
// which the next call overwrites.
func (p *peer) receive() (seq uint32, data []byte) {
	b := p.frame[:]
	for {
		p.device.SetReadDeadline(time.Now().Add(stalled))
		n, err := p.device.Read(b)
		if err != nil {
			p.Fatal(err)
		}
		f := b[headerSize:n]
		if header.Ethernet(f).Type() == header.ARPProtocolNumber {
			p.resolve(f)
			continue
		}
		ip := header.IPv4(f[14:])
		if header.Ethernet(f).Type() != header.IPv4ProtocolNumber || ip.TransportProtocol() != header.TCPProtocolNumber {
			continue
		}
		if len(ip) != int(ip.TotalLength()) {
			p.Fatalf("a frame with %d bytes of a packet of %d", len(ip), ip.TotalLength())
		}
		s := header.TCP(ip.Payload())
		data = s.Payload()
		sum := header.PseudoHeaderChecksum(header.TCPProtocolNumber, ip.SourceAddress(), ip.DestinationAddress(),
			uint16(len(s)))
		if b[0] == needsCsum { // the host of a guest that has such a device adds the rest
			if s.Checksum() != sum {
				p.Errorf("a sum to complete of %#x, want %#x", s.Checksum(), sum)
			}
		} else if checksum.Checksum(s, sum) != 0xffff {
			p.Errorf("a segment of %d bytes has a wrong sum", len(data))
		}
		scale := p.scale
		if s.Flags().Contains(header.TCPFlagSyn) {
			scale = 0
			p.scale = header.ParseSynOptions(s.Options(), true).WS
			p.got = s.SequenceNumber() + 1
			p.end = s.AckNumber()
		}
		p.taken, p.window = s.AckNumber(), s.WindowSize()
		if end := p.taken + uint32(p.window)<<scale; int32(end-p.end) > 0 {
			p.end = end
		}
		return s.SequenceNumber(), data
	}
}

// connect connects a peer through a gateway to far, which has no buffer.
func connect(t *testing.T, offloads uint32) (p *peer, far net.Conn) {
	host, far := net.Pipe()
	t.Cleanup(func() { far.Close() })
	device := serve(t, Config{Host: true, dialer: func(context.Context, string, string) (net.Conn, error) {
		return host, nil
	}})
	tell(t, device, offloads)
	p = &peer{TB: t, device: device, port: 1000, next: 5000, room: 0xffff}
	p.send(header.TCPFlagSyn, p.next, []byte{
		header.TCPOptionMSS, 4, 1460 >> 8, 1460 & 255, header.TCPOptionNOP, header.TCPOptionWS, 3, 7,
		header.TCPOptionNOP, header.TCPOptionNOP, header.TCPOptionSACKPermitted, 2}, nil)
	p.receive()
	p.next++
	p.send(header.TCPFlagAck, p.next, nil, nil)
	return p, far
}

// TestFullWindow: a guest that has filled the window of the gateway, and whose last byte was lost,
// acknowledges the data that the gateway sends.
func TestFullWindow(t *testing.T) {
	for _, offloads := range []uint32{0, allOffloads} {
		t.Run(fmt.Sprint("offloads=", offloads), func(t *testing.T) { testFullWindow(t, offloads) })
	}
}

func testFullWindow(t *testing.T, offloads uint32) {
	p, far := connect(t, offloads)
	if p.scale == 0 {
		t.Fatal("the gateway does not scale its windows")
	}

	// Each segment ends one byte further in a unit, so that one of the windows announced is not
	// rounded.
	unit := 1 << p.scale
	segment := make([]byte, 64*unit+1)
	for {
		size := int(p.end-p.next) - 1 // but the last byte
		if size <= 0 {
			break
		}
		size = min(size, len(segment))
		p.send(header.TCPFlagAck|header.TCPFlagPsh, p.next, nil, segment[:size])
		p.next += uint32(size)
		for p.taken != p.next {
			p.receive()
		}
	}
	if p.window != 0 {
		t.Fatalf("a window of %d units is left", p.window)
	}
	p.next++ // sent and lost

	const size = 2 * maxBuffer // more than the gateway holds
	go far.Write(make([]byte, size))
	first := p.got
	again := map[uint32]int{} // segments that the peer had acknowledged
	for p.got != first+size {
		seq, data := p.receive()
		if len(data) == 0 {
			continue
		}
		if seq == p.got {
			p.got += uint32(len(data))
		} else if again[seq]++; again[seq] == 5 && int32(seq-p.got) < 0 {
			t.Fatalf("the gateway sends byte %d for the fifth time after it was acknowledged", seq-first)
		}
		p.send(header.TCPFlagAck, p.next, nil, nil)
	}
}

// TestLateGuest: of data that a guest does not acknowledge, the first byte comes again first,
// after the time for that. Its end does not come as a probe before.
func TestLateGuest(t *testing.T) {
	p, far := connect(t, 0)
	first := p.got
	for range 2 {
		if _, err := far.Write(make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
	}
	for next := first; next != first+2000; {
		seq, data := p.receive()
		if seq != next {
			t.Fatalf("byte %d, want %d", seq-first, next-first)
		}
		next += uint32(len(data))
	}
	if seq, data := p.receive(); seq != first || len(data) == 0 {
		t.Errorf("%d bytes from byte %d come again, want the first", len(data), seq-first)
	}
}

// TestManyWrites: data that the host wrote in many pieces while the guest's window was closed comes
// in whole frames. writev takes 1,024 pieces at once, and the rest would be a frame of the writer's
// making.
func TestManyWrites(t *testing.T) {
	for _, offloads := range []uint32{0, allOffloads} {
		t.Run(fmt.Sprint("offloads=", offloads), func(t *testing.T) {
			p, far := connect(t, offloads)
			p.room = 0
			p.send(header.TCPFlagAck, p.next, nil, nil)
			first := p.got
			want := make([]byte, 1300)
			for i := range want {
				want[i] = byte(i * 7)
				if _, err := far.Write(want[i:][:1]); err != nil {
					t.Fatal(err)
				}
			}
			p.room = 0xffff
			p.send(header.TCPFlagAck, p.next, nil, nil)
			for at := 0; at < len(want); at = int(p.got - first) {
				seq, data := p.receive()
				if seq != p.got {
					continue
				}
				if !bytes.Equal(data, want[at:][:len(data)]) {
					t.Fatalf("%d bytes at %d are not those of the host", len(data), at)
				}
				p.got += uint32(len(data))
				p.send(header.TCPFlagAck, p.next, nil, nil)
			}
		})
	}
}

// TestOrder: frames that a device had no room for come before later ones, whichever goroutine sends
// them.
func TestOrder(t *testing.T) {
	device, gateway := pair(t)
	done := make(chan struct{})
	l := newLink(gateway, done)
	go l.write()
	defer close(done)
	const batch, size = queueLength / 2, 8 << 10 // more than the socket has room for, less than the queue
	b := make([]byte, headerSize+size)
	next := byte(0)
	read := func(n int) {
		for range n {
			device.SetReadDeadline(time.Now().Add(stalled))
			if _, err := device.Read(b); err != nil {
				t.Fatal(err)
			}
			if b[headerSize] != next {
				t.Fatalf("frame %d, want %d", b[headerSize], next)
			}
			next++
		}
	}
	send := func(at, n int) {
		for i := range n {
			l.send(bytes.Repeat([]byte{byte(at + i)}, size))
		}
	}
	for at := 0; at < 8*batch; at += batch {
		send(at, batch/2)
		read(batch / 4) // makes room while frames wait
		send(at+batch/2, batch/2)
		read(batch * 3 / 4)
	}
}
