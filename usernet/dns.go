package usernet

import (
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"

	"gvm/panics"
)

const (
	queryTime  = 5 * time.Second // for one resolver, as resolv.conf(5) has it
	queryFlow  = 10 * time.Second
	maxQueries = 8 // of one flow at a time
	maxServers = 3 // MAXNS of resolv.h
)

// resolvers returns the name servers of a file such as /etc/resolv.conf. Without any it is the host
// itself, as for the C library (resolv.conf(5)).
func resolvers(path string) []netip.AddrPort {
	var servers []netip.AddrPort
	file, _ := os.ReadFile(path)
	for line := range strings.Lines(string(file)) {
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != "nameserver" || len(servers) == maxServers {
			continue
		}
		if a, err := netip.ParseAddr(f[1]); err == nil {
			servers = append(servers, netip.AddrPortFrom(a, dnsPort))
		}
	}
	if servers == nil {
		servers = []netip.AddrPort{netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), dnsPort)}
	}
	return servers
}

// resolve passes the queries of one flow to the host's resolvers, and their replies back.
func (n *network) resolve(guest *gonet.UDPConn) {
	var queries sync.WaitGroup
	defer queries.Wait()
	defer guest.Close()
	stop := n.closeAtEnd(guest)
	defer stop()
	inFlight := make(slots, maxQueries)
	query := make([]byte, copyBuffer)
	for {
		guest.SetReadDeadline(time.Now().Add(queryFlow))
		size, err := guest.Read(query)
		if err != nil {
			return
		}
		if !inFlight.take() {
			continue // lost, and asked again
		}
		q := append([]byte(nil), query[:size]...)
		queries.Go(panics.Func(func() {
			defer inFlight.give()
			if reply := n.ask(q); reply != nil {
				guest.Write(reply)
			}
		}))
	}
}

// ask returns the reply to a query of the first resolver that replies.
func (n *network) ask(query []byte) []byte {
	if len(query) < 2 {
		return nil
	}
	b := buffers.Get().(*[copyBuffer]byte)
	defer buffers.Put(b)
	for _, server := range n.Resolvers() {
		if size := n.askOne(server, query, b[:]); size > 0 {
			return append([]byte(nil), b[:size]...)
		}
	}
	return nil
}

// askOne asks one resolver, and returns the size of its reply in b, or 0.
func (n *network) askOne(server netip.AddrPort, query, b []byte) int {
	c, err := n.dialer(n.ctx, "udp", server.String())
	if err != nil {
		return 0
	}
	defer c.Close()
	stop := n.closeAtEnd(c)
	defer stop()
	c.SetDeadline(time.Now().Add(queryTime))
	if _, err := c.Write(query); err != nil {
		return 0
	}
	for {
		size, err := c.Read(b)
		if err != nil {
			return 0
		}
		if size >= 2 && [2]byte(b) == [2]byte(query) { // the query's ID: RFC 1035, 4.1.1
			return size
		}
	}
}
