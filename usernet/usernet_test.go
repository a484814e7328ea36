package usernet

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

const (
	allOffloads = offloadCsum | offloadTSO4 | offloadTSO6
	guestMAC    = tcpip.LinkAddress("\x52\x54\x00\x12\x34\x56")
)

var guest6 = netip.MustParseAddr("fd00::15")

// pair returns both ends of a socket as gvm makes it.
func pair(t testing.TB) (device, gateway *net.UnixConn) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_SEQPACKET|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(f)
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
		ends[i] = c.(*net.UnixConn)
		t.Cleanup(func() { c.Close() })
	}
	return ends[0], ends[1]
}

// serve runs a network until the test ends, and returns the device's end of its socket. The test
// fails if the network does not end.
func serve(t testing.TB, c Config) *net.UnixConn {
	device, gateway := pair(t)
	c.probe = probe(t, "gateway")
	done := make(chan error, 1)
	go func() { done <- Serve(context.Background(), gateway, c) }()
	t.Cleanup(func() {
		device.Close()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return device
}

// guest is a driver and a kernel: a stack on the device's end.
type guest struct {
	*stack.Stack
	link *link
}

// stalled is how long a transfer may be without a byte: then it has ended. The stack gives up after
// 15 minutes.
const stalled = time.Minute

// ends has the state of each end of each connection after its last segment.
var ends sync.Map

// probe returns the function that records the states of one side. Benchmarks have none.
func probe(t testing.TB, side string) tcp.TCPProbeFunc {
	if _, ok := t.(*testing.B); ok {
		return nil
	}
	ends.Clear()
	return func(s *tcp.TCPEndpointState) {
		ends.Store([3]any{side, s.ID.LocalPort, s.ID.RemotePort}, s)
	}
}

// transfer is an end of a connection through the gateway which a test reads. If that stalls, the
// test fails with the states of both ends of it in the stacks, and the network ends.
type transfer struct {
	net.Conn
	testing.TB
	guest *guest
}

func (c transfer) Read(b []byte) (int, error) {
	c.SetReadDeadline(time.Now().Add(stalled))
	n, err := c.Conn.Read(b)
	if e, ok := err.(net.Error); ok && e.Timeout() {
		ends.Range(func(end, state any) bool {
			c.Errorf("no byte for %v: %v %+v", stalled, end, state)
			return true
		})
		c.guest.link.conn.Close()
		c.guest.Close()
	}
	return n, err
}

// newGuest returns a guest that takes offloads, and that checks the sums of all else.
func newGuest(t testing.TB, device *net.UnixConn, offloads uint32) *guest {
	ctx, cancel := context.WithCancel(context.Background())
	l := newLink(device, ctx.Done())
	l.SetLinkAddress(guestMAC)
	if offloads == 0 {
		l.LinkEPCapabilities = 0
	}
	l.offloads.Store(offloads)
	g := &guest{link: l, Stack: stack.New(stack.Options{
		NetworkProtocols: []stack.NetworkProtocolFactory{arp.NewProtocol, ipv4.NewProtocol, ipv6.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{
			tcp.NewProtocolProbe(probe(t, "guest")), udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6},
	})}
	check := func(err tcpip.Error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	check(g.CreateNIC(nic, l.endpoint()))
	for _, a := range []netip.Prefix{netip.PrefixFrom(Guest4, 24), netip.PrefixFrom(guest6, 64)} {
		check(g.AddProtocolAddress(nic, tcpip.ProtocolAddress{Protocol: protocol(a.Addr()),
			AddressWithPrefix: tcpip.AddressWithPrefix{
				Address: tcpip.AddrFromSlice(a.Addr().AsSlice()), PrefixLen: a.Bits()}}, stack.AddressProperties{}))
	}
	subnet := func(p netip.Prefix) tcpip.Subnet {
		return tcpip.AddressWithPrefix{Address: tcpip.AddrFromSlice(p.Addr().AsSlice()), PrefixLen: p.Bits()}.Subnet()
	}
	g.SetRouteTable([]tcpip.Route{
		{Destination: subnet(Prefix4), NIC: nic}, {Destination: subnet(Prefix6), NIC: nic},
		{Destination: header.IPv4EmptySubnet, Gateway: tcpip.AddrFromSlice(Gateway4.AsSlice()), NIC: nic},
		{Destination: header.IPv6EmptySubnet, Gateway: tcpip.AddrFromSlice(Gateway6.AsSlice()), NIC: nic},
	})
	sack := tcpip.TCPSACKEnabled(true)
	check(g.SetTransportProtocolOption(tcp.ProtocolNumber, &sack))
	var wg sync.WaitGroup
	wg.Go(l.write)
	wg.Go(func() {
		message := make([]byte, headerSize+maxFrame)
		for {
			n, err := device.Read(message)
			if err != nil {
				return
			}
			p := stack.NewPacketBuffer(stack.PacketBufferOptions{
				Payload: buffer.MakeWithData(message[headerSize:n])})
			l.InjectInbound(0, p)
			p.DecRef()
		}
	})
	t.Cleanup(func() {
		cancel()
		device.Close()
		wg.Wait()
		g.Destroy()
	})
	tell(t, device, offloads)
	return g
}

// tell sends the offloads of a guest.
func tell(t testing.TB, device *net.UnixConn, offloads uint32) {
	if _, err := device.Write(binary.LittleEndian.AppendUint32(nil, offloads)); err != nil {
		t.Fatal(err)
	}
}

func (g *guest) dial(t testing.TB, to netip.AddrPort) (*gonet.TCPConn, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return gonet.DialContextTCP(ctx, g.Stack, full(to), protocol(to.Addr()))
}

func (g *guest) listen(t testing.TB, port uint16) *gonet.TCPListener {
	t.Helper()
	l, err := gonet.ListenTCP(g.Stack, full(netip.AddrPortFrom(Guest4, port)), ipv4.ProtocolNumber)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func (g *guest) udp(t testing.TB, to netip.AddrPort) *gonet.UDPConn {
	t.Helper()
	remote := full(to)
	c, err := gonet.DialUDP(g.Stack, nil, &remote, protocol(to.Addr()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// hostTCP serves each connection of the host's loopback by f.
func hostTCP(t testing.TB, addr string, f func(net.Conn)) (port uint16) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				f(c)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	return l.Addr().(*net.TCPAddr).AddrPort().Port()
}

// hostUDP answers each datagram to the host's loopback by f, if that is not nil.
func hostUDP(t testing.TB, f func([]byte) []byte) netip.AddrPort {
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort("127.0.0.1:0")))
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		b := make([]byte, 1<<16)
		for {
			n, from, err := c.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			if reply := f(b[:n]); reply != nil {
				c.WriteToUDPAddrPort(reply, from)
			}
		}
	})
	t.Cleanup(func() {
		c.Close()
		wg.Wait()
	})
	return c.LocalAddr().(*net.UDPAddr).AddrPort()
}

// source yields size bytes of a seed, and their sum.
func source(seed byte, size int64) io.Reader {
	return io.LimitReader(rand.NewChaCha8([32]byte{seed}), size)
}

func sum(t testing.TB, r io.Reader) string {
	h := sha256.New()
	n, err := io.Copy(h, r)
	if err != nil {
		t.Error(err)
	}
	return fmt.Sprintf("%d bytes %x", n, h.Sum(nil))
}

// TestTCP moves data both ways, of a guest with offloads and of one without, over IPv4 and IPv6.
func TestTCP(t *testing.T) {
	const size = 100 << 20
	for _, test := range []struct {
		name, host string
		gateway    netip.Addr
		offloads   uint32
		size       int64
	}{
		{"IPv4", "127.0.0.1:0", Gateway4, allOffloads, size},
		{"IPv6", "[::1]:0", Gateway6, allOffloads, size / 4},
		{"IPv4 without offloads", "127.0.0.1:0", Gateway4, 0, size / 10},
		{"IPv6 without offloads", "[::1]:0", Gateway6, 0, size / 10},
		{"TSO4 alone", "127.0.0.1:0", Gateway4, offloadCsum | offloadTSO4, size / 10},
	} {
		t.Run(test.name, func(t *testing.T) {
			g := newGuest(t, serve(t, Config{Host: true}), test.offloads)
			sent := make(chan string, 1)
			port := hostTCP(t, test.host, func(c net.Conn) {
				if _, err := io.Copy(c, source(1, test.size)); err != nil {
					t.Error(err)
				}
				c.(*net.TCPConn).CloseWrite()
				sent <- sum(t, transfer{c, t, g})
			})
			c, err := g.dial(t, netip.AddrPortFrom(test.gateway, port))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if got, want := sum(t, transfer{c, t, g}), sum(t, source(1, test.size)); got != want {
				t.Errorf("the guest received %s, want %s", got, want)
			}
			if _, err := io.Copy(struct{ io.Writer }{c}, source(2, test.size/4)); err != nil {
				t.Error(err)
			}
			c.CloseWrite()
			if got, want := <-sent, sum(t, source(2, test.size/4)); got != want {
				t.Errorf("the host received %s, want %s", got, want)
			}
		})
	}
}

// TestOffloadsLost: a connection that began with offloads does not send a guest frames that it does
// not take any longer.
func TestOffloadsLost(t *testing.T) {
	device, _ := pair(t)
	l := newLink(device, nil)
	p := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(make([]byte, 3000))})
	defer p.DecRef()
	p.GSOOptions = stack.GSO{Type: stack.GSOTCPv6, NeedsCsum: true, CsumOffset: 16, MSS: 1440, L3HdrLen: 40}
	var head [headerSize]byte
	if l.describe(p, &head) {
		t.Error("sent without offloads")
	}
	l.receive([]byte{allOffloads, 0, 0, 0})
	want := [headerSize]byte{needsCsum, gsoTCPv6, 0, 0, 1440 & 255, 1440 >> 8, 14 + 40, 0, 16}
	if !l.describe(p, &head) || head != want {
		t.Errorf("header % x, want % x", head, want)
	}
}

// TestParallel: 200 connections at a time, each with its own bytes.
func TestParallel(t *testing.T) {
	const connections = 200
	g := newGuest(t, serve(t, Config{Host: true}), allOffloads)
	var all sync.WaitGroup // each waits until all are there
	all.Add(connections)
	port := hostTCP(t, "127.0.0.1:0", func(c net.Conn) {
		all.Done()
		all.Wait()
		io.Copy(c, c)
		c.(*net.TCPConn).CloseWrite()
	})
	var wg sync.WaitGroup
	for i := range connections {
		wg.Go(func() {
			c, err := g.dial(t, netip.AddrPortFrom(Gateway4, port))
			if err != nil {
				t.Error(err)
				all.Done()
				return
			}
			defer c.Close()
			wg.Go(func() {
				io.Copy(struct{ io.Writer }{c}, source(byte(i), 100_000))
				c.CloseWrite()
			})
			if got, want := sum(t, transfer{c, t, g}), sum(t, source(byte(i), 100_000)); got != want {
				t.Errorf("connection %d: %s, want %s", i, got, want)
			}
		})
	}
	wg.Wait()
}

// TestRefused: the guest learns at once that the host has no such port, and that a server reset.
func TestRefused(t *testing.T) {
	g := newGuest(t, serve(t, Config{Host: true}), allOffloads)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).AddrPort().Port()
	l.Close()
	if _, err := g.dial(t, netip.AddrPortFrom(Gateway4, port)); err == nil ||
		!strings.Contains(err.Error(), "refused") {
		t.Errorf("dial a closed port: %v", err)
	}
	port = hostTCP(t, "127.0.0.1:0", func(c net.Conn) {
		c.Read(make([]byte, 1))
		c.(*net.TCPConn).SetLinger(0)
	})
	c, err := g.dial(t, netip.AddrPortFrom(Gateway4, port))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.Write([]byte("x"))
	if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil || errors.Is(err, io.EOF) {
		t.Errorf("read of a reset connection: %d, %v", n, err)
	}
}

// BenchmarkTCP is a stream of one connection, with the guest in the same process.
func BenchmarkTCP(b *testing.B) {
	for _, offloads := range []uint32{allOffloads, 0} {
		for _, down := range []bool{true, false} {
			b.Run(fmt.Sprintf("offloads=%d/down=%v", offloads, down), func(b *testing.B) {
				const size = 64 << 20
				g := newGuest(b, serve(b, Config{Host: true}), offloads)
				data := make([]byte, 1<<20)
				send := func(c net.Conn) {
					for range size / len(data) {
						if _, err := c.Write(data); err != nil {
							b.Error(err)
						}
					}
					c.(interface{ CloseWrite() error }).CloseWrite()
				}
				port := hostTCP(b, "127.0.0.1:0", func(c net.Conn) {
					if down {
						send(c)
					}
					io.Copy(io.Discard, c)
				})
				b.SetBytes(size)
				for b.Loop() {
					c, err := g.dial(b, netip.AddrPortFrom(Gateway4, port))
					if err != nil {
						b.Fatal(err)
					}
					if !down {
						send(c)
					}
					io.CopyBuffer(io.Discard, struct{ io.Reader }{c}, data)
					c.Close()
				}
			})
		}
	}
}

func TestUDP(t *testing.T) {
	g := newGuest(t, serve(t, Config{Host: true}), allOffloads)
	to := hostUDP(t, func(b []byte) []byte { return append([]byte("echo "), b...) })
	c := g.udp(t, netip.AddrPortFrom(Gateway4, to.Port()))
	for _, size := range []int{0, 1, 1400, 20_000} { // the last in fragments
		sent := bytes.Repeat([]byte("u"), size)
		if _, err := c.Write(sent); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 1<<16)
		n, err := c.Read(b)
		if err != nil || string(b[:n]) != "echo "+string(sent) {
			t.Errorf("%d bytes: %q, %v", size, b[:n], err)
		}
	}
	none := g.udp(t, netip.MustParseAddrPort("10.0.2.3:99"))
	for { // until the stack has the answer
		if _, err := none.Write([]byte("x")); err != nil {
			if !strings.Contains(err.Error(), "refused") {
				t.Errorf("a port that the resolver does not have: %v, want refused", err)
			}
			break
		}
		time.Sleep(time.Millisecond)
	}
}

// TestTarget: which addresses of the host's network the guest reaches, with and without the host.
func TestTarget(t *testing.T) {
	for _, test := range []struct {
		to        string
		with, not string // "" is refused
	}{
		{"10.0.2.2", "127.0.0.1", ""},
		{"fd00::2", "::1", ""},
		{"192.0.2.1", "192.0.2.1", "192.0.2.1"},
		{"2001:db8::1", "2001:db8::1", "2001:db8::1"},
		{"::ffff:192.0.2.1", "192.0.2.1", "192.0.2.1"},
		{"10.0.2.3", "", ""},
		{"10.0.2.77", "", ""},
		{"fd00::77", "", ""},
		{"127.0.0.1", "", ""},
		{"127.1.2.3", "", ""},
		{"::1", "", ""},
		{"::ffff:127.0.0.1", "", ""},
		{"0.0.0.0", "", ""},
		{"::", "", ""},
		{"169.254.169.254", "", ""},
		{"fe80::1", "", ""},
		{"224.0.0.1", "", ""},
		{"ff02::1", "", ""},
		{"255.255.255.255", "", ""},
	} {
		for _, host := range []bool{true, false} {
			want := test.not
			if host {
				want = test.with
			}
			n := network{Config: Config{Host: host}}
			got, err := n.target(netip.AddrPortFrom(netip.MustParseAddr(test.to), 80))
			if err != nil && want == "" {
				continue
			}
			if err != nil || got.Port() != 80 || got.Addr().String() != want {
				t.Errorf("%s, host=%v: %v, %v; want %q", test.to, host, got, err, want)
			}
		}
	}
	own, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	n := network{}
	for _, o := range own {
		a, _ := netip.AddrFromSlice(o.(*net.IPNet).IP)
		if got, err := n.target(netip.AddrPortFrom(a, 80)); err == nil {
			t.Errorf("without the host, %v leads to %v", a, got)
		}
	}
}

// TestEcho: the gateway answers pings, and does not for others.
func TestEcho(t *testing.T) {
	g := newGuest(t, serve(t, Config{}), allOffloads)
	ping := func(to netip.Addr) (func(), <-chan struct{}) {
		number, kind := icmp.ProtocolNumber4, byte(header.ICMPv4Echo)
		if to.Is6() {
			number, kind = icmp.ProtocolNumber6, byte(header.ICMPv6EchoRequest)
		}
		var wq waiter.Queue
		ep, err := g.NewEndpoint(number, protocol(to), &wq)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(ep.Close)
		entry, replied := waiter.NewChannelEntry(waiter.ReadableEvents)
		wq.EventRegister(&entry)
		if err := ep.Connect(full(netip.AddrPortFrom(to, 0))); err != nil {
			t.Fatal(err)
		}
		return func() {
			b := make([]byte, 16)
			b[0] = kind
			ep.Write(bytes.NewReader(b), tcpip.WriteOptions{})
		}, replied
	}
	for _, none := range []string{"192.0.2.1", "2001:db8::1"} {
		send, replied := ping(netip.MustParseAddr(none))
		send()
		for _, to := range []netip.Addr{Gateway4, Gateway6, Resolver4, Resolver6} {
			send, replied := ping(to)
			send()
			<-replied
		}
		select { // frames keep their order
		case <-replied:
			t.Errorf("the gateway answers for %s", none)
		default:
		}
	}
}

// TestEnd ends networks in the middle of all that they do, from either side: with connections in
// use, in their handshake and on their way to the host, with flows, and with a guest that does not
// read.
func TestEnd(t *testing.T) {
	for _, end := range []string{"device", "context"} {
		t.Run(end, func(t *testing.T) {
			l, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.MustParseAddrPort("127.0.0.1:0")))
			if err != nil {
				t.Fatal(err)
			}
			silent := hostUDP(t, func([]byte) []byte { return nil })
			echo := hostUDP(t, func(b []byte) []byte { return b })
			accepted := make(chan net.Conn, 1000)
			port := hostTCP(t, "127.0.0.1:0", func(c net.Conn) {
				accepted <- c
				io.Copy(io.Discard, c) // until the network ends it
			})
			device, gateway := pair(t)
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			done := make(chan error, 1)
			go func() {
				done <- Serve(ctx, gateway, Config{Host: true, Published: []Published{{TCP: l, Port: 80}},
					Resolvers: func() []netip.AddrPort { return []netip.AddrPort{silent} }})
			}()
			g := newGuest(t, device, allOffloads)
			if _, err := g.dial(t, netip.AddrPortFrom(Gateway4, port)); err != nil {
				t.Fatal(err)
			}
			<-accepted
			g.udp(t, netip.AddrPortFrom(Resolver4, 53)).Write([]byte("query"))
			c := g.udp(t, netip.AddrPortFrom(Gateway4, echo.Port()))
			c.Write([]byte("x"))
			if _, err := c.Read(make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			g.listen(t, 80)
			client, err := net.Dial("tcp", l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			for i := range 100 { // half of a handshake, which the host has accepted
				device.Write(syn(Gateway4, port, uint16(10000+i)))
			}
			for range 9 {
				<-accepted
			}
			if end == "device" {
				device.Close()
			} else {
				cancel()
			}
			if err := <-done; err != nil {
				t.Error(err)
			}
			if _, err := client.Read(make([]byte, 1)); err == nil {
				t.Error("the client of a published port goes on")
			}
			if _, err := net.Dial("tcp", l.Addr().String()); err == nil {
				t.Error("the published port is still there")
			}
		})
	}
}

// syn returns the message of a segment that asks for a connection.
func syn(to netip.Addr, port, from uint16) []byte {
	m := make([]byte, headerSize+14+20+20)
	f := m[headerSize:]
	header.Ethernet(f).Encode(&header.EthernetFields{
		SrcAddr: guestMAC, DstAddr: gatewayMAC, Type: header.IPv4ProtocolNumber})
	header.IPv4(f[14:]).Encode(&header.IPv4Fields{TotalLength: 40, TTL: 64, Protocol: uint8(header.TCPProtocolNumber),
		SrcAddr: tcpip.AddrFromSlice(Guest4.AsSlice()), DstAddr: tcpip.AddrFromSlice(to.AsSlice())})
	header.TCP(f[34:]).Encode(&header.TCPFields{SrcPort: from, DstPort: port, SeqNum: 1,
		DataOffset: 20, Flags: header.TCPFlagSyn, WindowSize: 1000})
	return m
}

// TestDeaf: a guest that does not receive does not keep the network from ending.
func TestDeaf(t *testing.T) {
	device, gateway := pair(t)
	port := hostTCP(t, "127.0.0.1:0", func(c net.Conn) { io.Copy(io.Discard, c) })
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, gateway, Config{Host: true}) }()
	request := append(make([]byte, headerSize), routerSolicitation()...)
	for range 10_000 { // more answers than the socket and the queue hold
		if _, err := device.Write(request); err != nil {
			t.Fatal(err)
		}
	}
	device.Write(syn(Gateway4, port, 1000))
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
