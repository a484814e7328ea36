package usernet

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

func routerSolicitation() []byte {
	f := make([]byte, 14+40+8)
	header.Ethernet(f).Encode(&header.EthernetFields{SrcAddr: guestMAC, Type: header.IPv6ProtocolNumber,
		DstAddr: "\x33\x33\x00\x00\x00\x02"})
	header.IPv6(f[14:]).Encode(&header.IPv6Fields{PayloadLength: 8, TransportProtocol: header.ICMPv6ProtocolNumber,
		HopLimit: 255, SrcAddr: header.IPv6Any, DstAddr: header.IPv6AllRoutersLinkLocalMulticastAddress})
	f[54] = byte(header.ICMPv6RouterSolicit)
	return f
}

// TestRouterAdvertisement: a host that follows RFC 4862 takes an address of the prefix and the
// gateway's router.
func TestRouterAdvertisement(t *testing.T) {
	ra := answer(routerSolicitation())
	ip := header.IPv6(ra[14:])
	if !ip.IsValid(len(ip)) || ip.HopLimit() != 255 || ip.SourceAddress() != tcpip.AddrFromSlice(router6.AsSlice()) {
		t.Fatalf("% x", ra)
	}
	m := header.ICMPv6(ip.Payload())
	if header.ICMPv6Checksum(header.ICMPv6ChecksumParams{
		Header: m, Src: ip.SourceAddress(), Dst: ip.DestinationAddress()}) != m.Checksum() {
		t.Error("the checksum is wrong")
	}
	body := header.NDPRouterAdvert(m.MessageBody())
	if body.RouterLifetime() != lifetime*time.Second || body.ManagedAddrConfFlag() {
		t.Errorf("% x", body)
	}
	it, err := body.Options().Iter(true)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for {
		o, done, err := it.Next()
		if err != nil {
			t.Fatal(err)
		}
		if done {
			break
		}
		got = append(got, fmt.Sprint(o))
	}
	text := strings.Join(got, "\n")
	for _, want := range []string{"fd00::", "fd00::3", "52:55:0a:00:02:02"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %s in %s", want, text)
		}
	}
}
