// Package usernet is a network for one guest without privilege: a gateway in user mode, which ends
// the guest's connections in a TCP/IP stack of its own (gVisor's) and makes them again with sockets
// of the host. The other end of its socket is the network device.
//
// The guest gets 10.0.2.15 by DHCP and an address in fd00::/64 by router advertisements. The
// gateway is 10.0.2.2 and fd00::2, the resolver 10.0.2.3 and fd00::3.
//
// Each message on the socket is an Ethernet frame after a struct virtio_net_hdr_v1 (virtio 1.3,
// 5.1.6). A message of four bytes from the device has the offloads that the guest takes, in the
// encoding of TUNSETOFFLOAD (TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6 of linux/if_tun.h), little-endian.
// Before the first, it takes none.
//
// The guest is hostile. It is bounded in connections, memory and the time that a connection which
// ends may take.
package usernet

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"gvm/panics"
)

// The addresses of the network.
var (
	Prefix4   = netip.MustParsePrefix("10.0.2.0/24")
	Gateway4  = netip.MustParseAddr("10.0.2.2")
	Resolver4 = netip.MustParseAddr("10.0.2.3")
	Guest4    = netip.MustParseAddr("10.0.2.15")
	Prefix6   = netip.MustParsePrefix("fd00::/64")
	Gateway6  = netip.MustParseAddr("fd00::2")
	Resolver6 = netip.MustParseAddr("fd00::3")

	router6    = netip.MustParseAddr("fe80::2") // the source of router advertisements
	gatewayMAC = tcpip.LinkAddress("\x52\x55\x0a\x00\x02\x02")
)

// Bounds on the guest's use of the host. A connection has a socket, two buffers in its stack and
// two for copying.
const (
	maxConnections = 512
	maxFlows       = 512 // of UDP
	maxHandshakes  = 128
	maxBuffer      = 512 << 10
	copyBuffer     = 64 << 10

	// toGuest is how much of a stream the stack takes at once: as many whole segments, with
	// timestamps, as it sends in one frame. Of 64 KiB it sends a frame of 65,374 bytes and one of 162.
	toGuest = 45 * (mtu - 52)
	sending = maxBuffer / toGuest * toGuest // no part of toGuest fills it

	mtu     = 1500
	nic     = tcpip.NICID(1)
	maxHops = 64
)

// Config says how the guest meets the host.
type Config struct {
	// Host lets the guest reach the host's loopback by the gateway's address, and the host by any of
	// its own.
	Host bool
	// Published are the ports of the host that lead to the guest. Serve closes them.
	Published []Published
	// Resolvers returns the resolvers to which the guest's queries go, and is called for each query:
	// those of /etc/resolv.conf if it is nil.
	Resolvers func() []netip.AddrPort

	dialer func(ctx context.Context, network, address string) (net.Conn, error) // a test's
	probe  tcp.TCPProbeFunc                                                     // a test's, or nil
}

// network is a running gateway.
type network struct {
	Config
	ctx         context.Context
	stack       *stack.Stack
	link        *link
	connections slots
	flows       slots
	wg          sync.WaitGroup // of goroutines that end with ctx
}

// slots bounds a number.
type slots chan struct{}

// take takes a slot, and reports false if all are taken.
func (s slots) take() bool {
	select {
	case s <- struct{}{}:
		return true
	default:
		return false
	}
}

func (s slots) give() { <-s }

// Serve runs the network until the device closes its end of conn, which is an AF_UNIX socket of
// type SOCK_SEQPACKET, or ctx ends. It closes conn.
func Serve(ctx context.Context, conn *net.UnixConn, c Config) error {
	ctx, cancel := context.WithCancel(ctx)
	n, err := start(ctx, conn, c)
	if err != nil {
		cancel()
		return err
	}
	stop := context.AfterFunc(ctx, panics.Func(func() { conn.Close() }))
	err = n.link.read()
	if ctx.Err() != nil {
		err = nil
	}
	stop()
	cancel()
	conn.Close()
	n.close()
	return err
}

// start makes a network that has not read a frame yet.
func start(ctx context.Context, conn *net.UnixConn, c Config) (*network, error) {
	if c.dialer == nil {
		c.dialer = new(net.Dialer).DialContext
	}
	if c.Resolvers == nil {
		c.Resolvers = func() []netip.AddrPort { return resolvers("/etc/resolv.conf") }
	}
	n := &network{Config: c, ctx: ctx, link: newLink(conn, ctx.Done()),
		connections: make(slots, maxConnections), flows: make(slots, maxFlows)}
	n.stack = stack.New(stack.Options{
		NetworkProtocols: []stack.NetworkProtocolFactory{arp.NewProtocol, ipv4.NewProtocol, ipv6.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{
			tcp.NewProtocolProbe(c.probe), udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6},
	})
	if err := n.configure(); err != nil {
		n.close()
		return nil, fmt.Errorf("set up the network: %w", err)
	}
	n.wg.Go(panics.Func(n.link.write))
	n.wg.Go(panics.Func(n.advertise))
	for _, p := range c.Published {
		n.wg.Go(panics.Func(func() { n.publish(p) }))
	}
	return n, nil
}

func (n *network) configure() error {
	s := n.stack
	errs := []tcpip.Error{s.CreateNIC(nic, n.link.endpoint())}
	for _, a := range []netip.Prefix{
		netip.PrefixFrom(Gateway4, Prefix4.Bits()), netip.PrefixFrom(Resolver4, Prefix4.Bits()),
		netip.PrefixFrom(Gateway6, Prefix6.Bits()), netip.PrefixFrom(Resolver6, Prefix6.Bits()),
		netip.PrefixFrom(router6, 64),
	} {
		errs = append(errs, s.AddProtocolAddress(nic, tcpip.ProtocolAddress{
			Protocol: protocol(a.Addr()),
			AddressWithPrefix: tcpip.AddressWithPrefix{
				Address: tcpip.AddrFromSlice(a.Addr().AsSlice()), PrefixLen: a.Bits()},
		}, stack.AddressProperties{}))
	}
	// The stack takes packets to any address, and answers from it.
	errs = append(errs, s.SetPromiscuousMode(nic, true), s.SetSpoofing(nic, true))
	s.SetRouteTable([]tcpip.Route{
		{Destination: header.IPv4EmptySubnet, NIC: nic}, {Destination: header.IPv6EmptySubnet, NIC: nic}})

	sack, moderate := tcpip.TCPSACKEnabled(true), tcpip.TCPModerateReceiveBufferOption(true)
	// One hop of virtual wire does not reorder: a closed connection need not wait for stray segments.
	wait := tcpip.TCPTimeWaitTimeoutOption(closing)
	// A guest that runs late lost nothing. With RACK the stack would probe for the loss of a
	// connection's last segments after some ms, and send in smaller pieces for long once the guest had
	// them twice.
	var recovery tcpip.TCPRecovery
	for _, o := range []tcpip.SettableTransportProtocolOption{&sack, &moderate, &wait, &recovery,
		&tcpip.TCPSendBufferSizeRangeOption{Min: 4 << 10, Default: sending, Max: sending},
		&tcpip.TCPReceiveBufferSizeRangeOption{Min: 4 << 10, Default: 128 << 10, Max: maxBuffer},
	} {
		errs = append(errs, s.SetTransportProtocolOption(tcp.ProtocolNumber, o))
	}
	s.SetTransportProtocolHandler(tcp.ProtocolNumber, tcp.NewForwarder(s, 0, maxHandshakes, n.forwardTCP).HandlePacket)
	s.SetTransportProtocolHandler(udp.ProtocolNumber, udp.NewForwarder(s, n.forwardUDP).HandlePacket)
	// Over IPv6 the stack would answer an echo request to any address.
	s.SetTransportProtocolHandler(icmp.ProtocolNumber6, func(_ stack.TransportEndpointID, p *stack.PacketBuffer) bool {
		return !own(address(p.Network().DestinationAddress()))
	})
	for _, err := range errs {
		if err != nil {
			return fmt.Errorf("%v", err)
		}
	}
	return nil
}

// close ends the network, whose context has ended, and waits for its goroutines.
func (n *network) close() {
	for _, p := range n.Published {
		p.Close()
	}
	n.wg.Wait()
	// A slot is free once the goroutine of its connection has ended. One that waits for the guest's
	// part of a handshake ends with its endpoint.
	n.stack.Close()
	for ended := 0; ended < maxConnections; {
		select {
		case n.connections <- struct{}{}:
			ended++
		case <-time.After(10 * time.Millisecond):
			n.stack.Close() // endpoints made since
		}
	}
	n.stack.RemoveNIC(nic)
	n.stack.Wait()
}

// own reports whether a is an address of the gateway.
func own(a netip.Addr) bool {
	switch a {
	case Gateway4, Resolver4, Gateway6, Resolver6, router6:
		return true
	}
	return false
}

// address returns a as the standard library has it.
func address(a tcpip.Address) netip.Addr {
	addr, _ := netip.AddrFromSlice(a.AsSlice())
	return addr
}

// full returns a as the stack has it.
func full(a netip.AddrPort) tcpip.FullAddress {
	return tcpip.FullAddress{NIC: nic, Addr: tcpip.AddrFromSlice(a.Addr().AsSlice()), Port: a.Port()}
}

func protocol(a netip.Addr) tcpip.NetworkProtocolNumber {
	if a.Is4() {
		return ipv4.ProtocolNumber
	}
	return ipv6.ProtocolNumber
}
