package usernet

import (
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
)

// TestDNS: the first resolver is silent, one that answers is asked next.
func TestDNS(t *testing.T) {
	silent := hostUDP(t, func([]byte) []byte { return nil })
	refuses, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort("127.0.0.1:0")))
	if err != nil {
		t.Fatal(err)
	}
	closed := refuses.LocalAddr().(*net.UDPAddr).AddrPort()
	refuses.Close()
	good := hostUDP(t, func(b []byte) []byte { return append(b[:2:2], "reply"...) })
	servers := []netip.AddrPort{closed, good}
	port := hostTCP(t, "127.0.0.1:0", func(c net.Conn) { io.WriteString(c, "by TCP") })
	var mu sync.Mutex
	g := newGuest(t, serve(t, Config{Resolvers: func() []netip.AddrPort {
		mu.Lock()
		defer mu.Unlock()
		return servers
	}}), allOffloads)
	for _, resolver := range []netip.Addr{Resolver4, Resolver6} {
		c := g.udp(t, netip.AddrPortFrom(resolver, 53))
		for _, id := range []string{"ab", "cd"} {
			c.Write([]byte(id + "query"))
			b := make([]byte, 100)
			n, err := c.Read(b)
			if got := string(b[:n]); err != nil || got != id+"reply" {
				t.Errorf("%v: %q, %v", resolver, got, err)
			}
		}
	}
	mu.Lock()
	servers = []netip.AddrPort{netip.AddrPortFrom(good.Addr(), port), silent}
	mu.Unlock()
	c, err := g.dial(t, netip.AddrPortFrom(Resolver4, 53))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if b, err := io.ReadAll(c); string(b) != "by TCP" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
}

func TestResolvers(t *testing.T) {
	path := filepath.Join(t.TempDir(), "resolv.conf")
	one := []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:53")}
	if got := resolvers(path); !slices.Equal(got, one) {
		t.Errorf("without a file: %v", got)
	}
	err := os.WriteFile(path, []byte("# nameserver 1.1.1.1\nsearch example\nnameserver 192.0.2.1\n"+
		"nameserver x\nnameserver fe80::1%eth0\nnameserver\nnameserver 192.0.2.2\nnameserver 192.0.2.3"), 0o666)
	if err != nil {
		t.Fatal(err)
	}
	want := []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:53"), netip.MustParseAddrPort("[fe80::1%eth0]:53"),
		netip.MustParseAddrPort("192.0.2.2:53")}
	if got := resolvers(path); !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}
