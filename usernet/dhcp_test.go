package usernet

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// dhcpFrame returns a client's message in a frame.
func dhcpFrame(flags uint16, ciaddr string, options string) []byte {
	m := make([]byte, dhcpOptions)
	m[dhcpOp], m[dhcpHType], m[dhcpHLen] = bootRequest, 1, 6
	copy(m[4:], "xid!")
	binary.BigEndian.PutUint16(m[dhcpFlags:], flags)
	copy(m[dhcpCIAddr:], netip.MustParseAddr(ciaddr).AsSlice())
	copy(m[dhcpCHAddr:], guestMAC)
	binary.BigEndian.PutUint32(m[dhcpCookie:], dhcpMagic)
	f := udpFrame(header.EthernetBroadcastAddress, netip.MustParseAddr("255.255.255.255"), append(m, options...))
	header.UDP(f[34:]).SetSourcePort(dhcpClient)
	header.UDP(f[34:]).SetDestinationPort(dhcpServer)
	return f
}

func TestDHCP(t *testing.T) {
	const (
		none     = "0.0.0.0"
		mine     = "\x32\x04\x0a\x00\x02\x0f" // requested: 10.0.2.15
		other    = "\x32\x04\x0a\x00\x02\x10"
		end      = "\xff"
		toServer = "\x36\x04\x0a\x00\x02\x02"
		offered  = "\x36\x04\x0a\x00\x02\x02\x01\x04\xff\xff\xff\x00\x03\x04\x0a\x00\x02\x02\x06\x04\x0a\x00\x02\x03" +
			"\x1a\x02\x05\xdc"
		leased = offered + "\x33\x04\x00\x01\x51\x80\xff"
	)
	for _, test := range []struct {
		name, ciaddr string
		flags        uint16
		options      string
		to, yiaddr   string // "" is no reply
		want         string // the reply's options
	}{
		{"discover", none, 0, "\x35\x01\x01" + end, "10.0.2.15", "10.0.2.15", "\x35\x01\x02" + leased},
		{"broadcast", none, 0x8000, "\x00\x35\x01\x01" + end, "255.255.255.255", "10.0.2.15", "\x35\x01\x02" + leased},
		{"request", none, 0, "\x35\x01\x03" + toServer + mine + end, "10.0.2.15", "10.0.2.15", "\x35\x01\x05" + leased},
		{"renew", "10.0.2.15", 0, "\x35\x01\x03" + end, "10.0.2.15", "10.0.2.15", "\x35\x01\x05" + leased},
		{"another address", none, 0, "\x35\x01\x03" + other + end, "255.255.255.255", none, "\x35\x01\x06" + toServer + end},
		{"another server", none, 0, "\x35\x01\x03\x36\x04\x0a\x00\x02\x09" + mine + end, "", "", ""},
		{"inform", "10.0.2.20", 0, "\x35\x01\x08" + end, "10.0.2.20", none, "\x35\x01\x05" + offered + end},
		{"release", "10.0.2.15", 0, "\x35\x01\x07" + toServer + end, "", "", ""},
		{"no type", none, 0, mine + end, "", "", ""},
		{"cut", none, 0, "\x35\x01\x01\x32\x04\x0a", "10.0.2.15", "10.0.2.15", "\x35\x01\x02" + leased},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := answer(dhcpFrame(test.flags, test.ciaddr, test.options))
			if f == nil || test.to == "" {
				if test.to != "" || f != nil {
					t.Errorf("reply % x", f)
				}
				return
			}
			m := f[42:]
			if got := address(header.IPv4(f[14:]).DestinationAddress()).String(); got != test.to {
				t.Errorf("sent to %s, want %s", got, test.to)
			}
			wantMAC := guestMAC
			if test.to == "255.255.255.255" {
				wantMAC = header.EthernetBroadcastAddress
			}
			if got := header.Ethernet(f).DestinationAddress(); got != wantMAC {
				t.Errorf("sent to %s, want %s", got, wantMAC)
			}
			if got := addr4(m[dhcpYIAddr:]).String(); got != test.yiaddr {
				t.Errorf("yiaddr %s, want %s", got, test.yiaddr)
			}
			if m[dhcpOp] != bootReply || string(m[4:8]) != "xid!" ||
				string(m[dhcpCHAddr:dhcpCHAddr+6]) != string(guestMAC) {
				t.Errorf("% x", m)
			}
			if got := strings.TrimRight(string(m[dhcpOptions:]), "\x00"); got != test.want {
				t.Errorf("options\n% x, want\n% x", got, test.want)
			}
			sums(t, f)
		})
	}
}

// sums checks the sums of a frame of UDP over IPv4.
func sums(t *testing.T, f []byte) {
	ip := header.IPv4(f[14:])
	udp := header.UDP(ip.Payload())
	sum := header.PseudoHeaderChecksum(header.UDPProtocolNumber, ip.SourceAddress(), ip.DestinationAddress(),
		udp.Length())
	if !ip.IsValid(len(ip)) || !ip.IsChecksumValid() || int(udp.Length()) != len(udp) ||
		checksum.Checksum(udp, sum) != 0xffff {
		t.Errorf("lengths or sums are wrong in % x", f)
	}
}

// TestNotDHCP: of other frames the stack gets all.
func TestNotDHCP(t *testing.T) {
	f := dhcpFrame(0, "0.0.0.0", "\x35\x01\x01\xff")
	for at, b := range map[int]byte{12: 9, 14: 0x65, 20: 0x20, 21: 1, 23: 6, 37: 68, 42: 2, 43: 6, 44: 16, 66: 1, 278: 0} {
		bad := append([]byte(nil), f...)
		bad[at] = b
		if got := answer(bad); got != nil {
			t.Errorf("byte %d = %d: % x", at, b, got)
		}
	}
	for n := header.EthernetMinimumSize; n < len(f); n++ {
		if got := answer(f[:n:n]); got != nil {
			t.Errorf("the first %d bytes: % x", n, got)
		}
	}
}

// FuzzAnswer: an answer to any frame is a whole frame.
func FuzzAnswer(f *testing.F) {
	f.Add(dhcpFrame(0, "0.0.0.0", "\x35\x01\x01\xff"))
	f.Add(dhcpFrame(0x8000, "10.0.2.15", "\x35\x01\x03\x32\x04\x0a\x00\x02\x0f\xff"))
	f.Add(routerSolicitation())
	f.Fuzz(func(t *testing.T, frame []byte) {
		if len(frame) < header.EthernetMinimumSize {
			return
		}
		reply := answer(frame)
		switch {
		case reply == nil:
		case header.Ethernet(reply).Type() == header.IPv4ProtocolNumber:
			sums(t, reply)
		default:
			ip := header.IPv6(reply[header.EthernetMinimumSize:])
			if !ip.IsValid(len(ip)) || header.Ethernet(reply).SourceAddress() != gatewayMAC {
				t.Errorf("% x", reply)
			}
		}
	})
}

// pipes is a dialer that leads nowhere.
func pipes(context.Context, string, string) (net.Conn, error) {
	a, b := net.Pipe()
	go func() {
		defer b.Close()
		io.Copy(b, b)
	}()
	return a, nil
}

// FuzzFrames gives a network any frames: each begins with its length. A panic ends the machine's
// network.
func FuzzFrames(f *testing.F) {
	frames := func(list ...[]byte) (all []byte) {
		for _, m := range list {
			all = append(binary.BigEndian.AppendUint16(all, uint16(len(m))), m...)
		}
		return all
	}
	ack := syn(Gateway4, 1, 1000)
	header.TCP(ack[headerSize+34:]).SetFlags(uint8(header.TCPFlagAck))
	echo := append(make([]byte, headerSize), dhcpFrame(0, "0.0.0.0", "")...)
	header.UDP(echo[headerSize+34:]).SetDestinationPort(7)
	arp := make([]byte, headerSize+14+header.ARPSize)
	header.Ethernet(arp[headerSize:]).Encode(&header.EthernetFields{SrcAddr: guestMAC,
		DstAddr: header.EthernetBroadcastAddress, Type: header.ARPProtocolNumber})
	a := header.ARP(arp[headerSize+14:])
	a.SetIPv4OverEthernet()
	a.SetOp(header.ARPRequest)
	copy(a.ProtocolAddressSender(), Guest4.AsSlice())
	copy(a.ProtocolAddressTarget(), Gateway4.AsSlice())
	f.Add(frames(arp, syn(Gateway4, 1, 1000), ack))
	f.Add(frames([]byte{allOffloads, 0, 0, 0}, syn(netip.MustParseAddr("192.0.2.1"), 80, 1000)))
	f.Add(frames(echo, append(make([]byte, headerSize), routerSolicitation()...)))
	f.Fuzz(func(t *testing.T, all []byte) {
		device, gateway := pair(t)
		ctx, cancel := context.WithCancel(context.Background())
		n, err := start(ctx, gateway, Config{Host: true, dialer: pipes})
		if err != nil {
			t.Fatal(err)
		}
		for len(all) >= 2 {
			size := min(int(binary.BigEndian.Uint16(all)), len(all)-2)
			n.link.receive(all[2 : 2+size])
			all = all[2+size:]
		}
		cancel()
		device.Close()
		gateway.Close()
		n.close()
	})
}
