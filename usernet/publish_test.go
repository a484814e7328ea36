package usernet

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"syscall"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
)

func TestPublish(t *testing.T) {
	l, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.MustParseAddrPort("127.0.0.1:0")))
	if err != nil {
		t.Fatal(err)
	}
	u, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort("127.0.0.1:0")))
	if err != nil {
		t.Fatal(err)
	}
	g := newGuest(t, serve(t, Config{Published: []Published{{TCP: l, Port: 80}, {UDP: u, Port: 53}}}), allOffloads)

	// Nothing listens yet.
	c, err := net.Dial("tcp", l.Addr().String())
	if err == nil {
		_, err = c.Read(make([]byte, 1))
		c.Close()
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a port that the guest does not have: %v; want a reset", err)
	}

	gl := g.listen(t, 80)
	go func() {
		for {
			c, err := gl.Accept()
			if err != nil {
				return
			}
			if from := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap(); from != Gateway4 {
				t.Errorf("the guest sees a client at %v", from)
			}
			io.Copy(struct{ io.Writer }{c}, c)
			c.Close()
		}
	}()
	c, err = net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	go func() {
		io.Copy(c, source(3, 10<<20))
		c.(*net.TCPConn).CloseWrite()
	}()
	if got, want := sum(t, transfer{c, t, g}), sum(t, source(3, 10<<20)); got != want {
		t.Errorf("the client received %s, want %s", got, want)
	}

	local := full(netip.AddrPortFrom(Guest4, 53))
	gu, err := gonet.DialUDP(g.Stack, &local, nil, ipv4.ProtocolNumber)
	if err != nil {
		t.Fatal(err)
	}
	defer gu.Close()
	go func() {
		b := make([]byte, 1000)
		for {
			n, from, err := gu.ReadFrom(b)
			if err != nil {
				return
			}
			gu.WriteTo(append([]byte("to "), b[:n]...), from)
		}
	}()
	for i := range 3 { // clients
		c, err := net.Dial("udp", u.LocalAddr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		for range 2 {
			fmt.Fprintf(c, "client %d", i)
			b := make([]byte, 100)
			n, err := c.Read(b)
			if got, want := string(b[:n]), fmt.Sprintf("to client %d", i); err != nil || got != want {
				t.Errorf("%q, %v; want %q", got, err, want)
			}
		}
	}
}
