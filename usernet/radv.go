package usernet

import (
	"encoding/binary"
	"net/netip"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// Router advertisements: RFC 4861, 4.2 and 6.2.1, and RFC 8106, 5.1.
const (
	advertiseEvery = 200 * time.Second
	lifetime       = 1800 // seconds
)

// advertise sends router advertisements until the network ends. Solicited ones are answer's.
func (n *network) advertise() {
	t := time.NewTicker(advertiseEvery)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			n.link.send(routerAdvertisement())
		case <-n.ctx.Done():
			return
		}
	}
}

// routerAdvertisement returns a frame to all nodes: the gateway is a router, the prefix is on the
// link and for addresses of the guest's own choice.
func routerAdvertisement() []byte {
	const ipAt, icmpAt = header.EthernetMinimumSize, header.EthernetMinimumSize + header.IPv6MinimumSize
	all := netip.IPv6LinkLocalAllNodes()
	f := make([]byte, icmpAt+16, 160)
	icmp := f[icmpAt:]
	icmp[0] = byte(header.ICMPv6RouterAdvert)
	icmp[4] = maxHops
	binary.BigEndian.PutUint16(icmp[6:], lifetime)
	f = append(append(f, 1, 1), gatewayMAC...)                          // source link-layer address
	f = binary.BigEndian.AppendUint32(append(f, 5, 1, 0, 0), mtu)       // MTU
	f = append(f, 3, 4, byte(Prefix6.Bits()), 0xc0)                     // prefix, on-link, autonomous
	f = binary.BigEndian.AppendUint32(f, 0xffffffff)                    // valid for ever
	f = binary.BigEndian.AppendUint32(f, 0xffffffff)                    // preferred for ever
	f = append(append(f, 0, 0, 0, 0), Prefix6.Addr().AsSlice()...)      //
	f = binary.BigEndian.AppendUint32(append(f, 25, 3, 0, 0), lifetime) // recursive DNS server
	f = append(f, Resolver6.AsSlice()...)

	header.Ethernet(f).Encode(&header.EthernetFields{SrcAddr: gatewayMAC,
		DstAddr: header.EthernetAddressFromMulticastIPv6Address(tcpip.AddrFromSlice(all.AsSlice())),
		Type:    header.IPv6ProtocolNumber})
	src, dst := tcpip.AddrFromSlice(router6.AsSlice()), tcpip.AddrFromSlice(all.AsSlice())
	header.IPv6(f[ipAt:]).Encode(&header.IPv6Fields{PayloadLength: uint16(len(f) - icmpAt),
		TransportProtocol: header.ICMPv6ProtocolNumber, HopLimit: 255, SrcAddr: src, DstAddr: dst})
	h := header.ICMPv6(f[icmpAt:])
	h.SetChecksum(header.ICMPv6Checksum(header.ICMPv6ChecksumParams{Header: h, Src: src, Dst: dst}))
	return f
}
