package usernet

import (
	"encoding/binary"
	"net/netip"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// The message of DHCP: RFC 2131, 2, and the options of RFC 2132.
const (
	dhcpOp      = 0
	dhcpHType   = 1
	dhcpHLen    = 2
	dhcpFlags   = 10
	dhcpCIAddr  = 12
	dhcpYIAddr  = 16
	dhcpSIAddr  = 20
	dhcpGIAddr  = 24
	dhcpCHAddr  = 28
	dhcpCookie  = 236
	dhcpOptions = 240
	dhcpMinimum = 300 // BOOTP's, which some clients insist on

	dhcpMagic     = 0x63825363
	dhcpBroadcast = 0x8000
	bootRequest   = 1
	bootReply     = 2
	dhcpServer    = 67
	dhcpClient    = 68

	optionPad         = 0
	optionMask        = 1
	optionRouter      = 3
	optionResolver    = 6
	optionMTU         = 26
	optionRequested   = 50
	optionLease       = 51
	optionMessageType = 53
	optionServer      = 54
	optionEnd         = 255

	dhcpDiscover = 1
	dhcpOffer    = 2
	dhcpRequest  = 3
	dhcpAck      = 5
	dhcpNak      = 6
	dhcpInform   = 8

	lease = 24 * time.Hour
)

// answer returns the frame that answers a frame of DHCP or a router solicitation, and nil for any
// other. These need no stack: the guest has no address yet.
func answer(frame []byte) []byte {
	eth := header.Ethernet(frame)
	switch eth.Type() {
	case header.IPv4ProtocolNumber:
		ip := header.IPv4(frame[header.EthernetMinimumSize:])
		if !ip.IsValid(len(ip)) || ip.TransportProtocol() != header.UDPProtocolNumber ||
			ip.FragmentOffset() != 0 || ip.More() {
			return nil
		}
		udp := header.UDP(ip.Payload())
		if len(udp) < header.UDPMinimumSize || udp.DestinationPort() != dhcpServer {
			return nil
		}
		return dhcpReply(udp[header.UDPMinimumSize:])
	case header.IPv6ProtocolNumber:
		ip := header.IPv6(frame[header.EthernetMinimumSize:])
		if len(ip) > header.IPv6MinimumSize && ip.NextHeader() == uint8(header.ICMPv6ProtocolNumber) &&
			header.ICMPv6(ip[header.IPv6MinimumSize:]).Type() == header.ICMPv6RouterSolicit {
			return routerAdvertisement()
		}
	}
	return nil
}

// dhcpReply answers a client's message by the one lease there is: RFC 2131, 4.3.
func dhcpReply(m []byte) []byte {
	if len(m) < dhcpOptions || m[dhcpOp] != bootRequest || m[dhcpHType] != 1 ||
		m[dhcpHLen] != header.EthernetAddressSize || binary.BigEndian.Uint32(m[dhcpCookie:]) != dhcpMagic ||
		addr4(m[dhcpGIAddr:]) != netip.IPv4Unspecified() {
		return nil
	}
	options := parseOptions(m[dhcpOptions:])
	if len(options[optionMessageType]) != 1 {
		return nil
	}
	if s := options[optionServer]; len(s) == 4 && addr4(s) != Gateway4 {
		return nil // the client took another server's offer
	}
	ciaddr := addr4(m[dhcpCIAddr:])
	kind, yiaddr := byte(dhcpAck), Guest4
	switch options[optionMessageType][0] {
	case dhcpDiscover:
		kind = dhcpOffer
	case dhcpRequest:
		wanted := ciaddr
		if r := options[optionRequested]; len(r) == 4 {
			wanted = addr4(r)
		}
		if wanted != Guest4 {
			kind, yiaddr = dhcpNak, netip.IPv4Unspecified()
		}
	case dhcpInform:
		yiaddr = netip.IPv4Unspecified()
	default: // DHCPRELEASE, DHCPDECLINE: the lease stays the guest's
		return nil
	}

	r := make([]byte, dhcpOptions, dhcpMinimum)
	copy(r[:dhcpYIAddr], m) // xid, flags, ciaddr
	copy(r[dhcpCHAddr:], m[dhcpCHAddr:dhcpCHAddr+header.EthernetAddressSize])
	r[dhcpOp] = bootReply
	r[3], r[8], r[9] = 0, 0, 0 // hops, secs
	copy(r[dhcpYIAddr:], yiaddr.AsSlice())
	binary.BigEndian.PutUint32(r[dhcpCookie:], dhcpMagic)
	r = append(r, optionMessageType, 1, kind)
	r = append(append(r, optionServer, 4), Gateway4.AsSlice()...)
	if kind != dhcpNak {
		r = append(r, optionMask, 4, 255, 255, 255, 0)
		r = append(append(r, optionRouter, 4), Gateway4.AsSlice()...)
		r = append(append(r, optionResolver, 4), Resolver4.AsSlice()...)
		r = binary.BigEndian.AppendUint16(append(r, optionMTU, 2), mtu)
		if yiaddr == Guest4 {
			r = binary.BigEndian.AppendUint32(append(r, optionLease, 4), uint32(lease/time.Second))
		}
	}
	r = append(r, optionEnd)
	r = append(r, make([]byte, max(0, dhcpMinimum-len(r)))...)

	// RFC 2131, 4.1: to the address that the client has, else to the one it gets, else to all.
	to, mac := yiaddr, tcpip.LinkAddress(r[dhcpCHAddr:dhcpCHAddr+header.EthernetAddressSize])
	switch {
	case kind == dhcpNak || ciaddr.IsUnspecified() &&
		(yiaddr.IsUnspecified() || binary.BigEndian.Uint16(m[dhcpFlags:])&dhcpBroadcast != 0):
		to, mac = netip.AddrFrom4([4]byte{255, 255, 255, 255}), header.EthernetBroadcastAddress
	case !ciaddr.IsUnspecified():
		to = ciaddr
	}
	return udpFrame(mac, to, r)
}

// parseOptions returns the options of a message. Of one that ends early, those before.
func parseOptions(b []byte) map[byte][]byte {
	options := map[byte][]byte{}
	for len(b) > 0 && b[0] != optionEnd {
		if b[0] == optionPad {
			b = b[1:]
			continue
		}
		if len(b) < 2 || len(b) < 2+int(b[1]) {
			break
		}
		options[b[0]] = b[2 : 2+int(b[1])]
		b = b[2+int(b[1]):]
	}
	return options
}

// udpFrame returns a frame from the DHCP server to its client.
func udpFrame(mac tcpip.LinkAddress, to netip.Addr, payload []byte) []byte {
	const ipAt, udpAt = header.EthernetMinimumSize, header.EthernetMinimumSize + header.IPv4MinimumSize
	f := make([]byte, udpAt+header.UDPMinimumSize, udpAt+header.UDPMinimumSize+len(payload))
	f = append(f, payload...)
	header.Ethernet(f).Encode(&header.EthernetFields{
		SrcAddr: gatewayMAC, DstAddr: mac, Type: header.IPv4ProtocolNumber})
	src, dst := tcpip.AddrFromSlice(Gateway4.AsSlice()), tcpip.AddrFromSlice(to.AsSlice())
	ip := header.IPv4(f[ipAt:])
	ip.Encode(&header.IPv4Fields{TotalLength: uint16(len(f) - ipAt), TTL: maxHops,
		Protocol: uint8(header.UDPProtocolNumber), SrcAddr: src, DstAddr: dst})
	ip.SetChecksum(^ip.CalculateChecksum())
	udp, length := header.UDP(f[udpAt:]), uint16(len(f)-udpAt)
	udp.Encode(&header.UDPFields{SrcPort: dhcpServer, DstPort: dhcpClient, Length: length})
	sum := header.PseudoHeaderChecksum(header.UDPProtocolNumber, src, dst, length)
	udp.SetChecksum(^udp.CalculateChecksum(checksum.Checksum(payload, sum)))
	return f
}

func addr4(b []byte) netip.Addr { return netip.AddrFrom4([4]byte(b)) }
