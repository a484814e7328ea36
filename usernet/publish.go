package usernet

import (
	"context"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"gvm/panics"
)

// Published is a port of the host that leads to one of the guest: one of TCP and UDP is set.
type Published struct {
	TCP  *net.TCPListener
	UDP  *net.UDPConn
	Port uint16 // the guest's
}

// Close closes the host's socket.
func (p Published) Close() error {
	if p.TCP != nil {
		return p.TCP.Close()
	}
	return p.UDP.Close()
}

// closeAtEnd closes c when the network ends, unless stop was called.
func (n *network) closeAtEnd(c io.Closer) (stop func() bool) {
	return context.AfterFunc(n.ctx, panics.Func(func() { c.Close() }))
}

// publish serves p until the network ends.
func (n *network) publish(p Published) {
	stop := n.closeAtEnd(p)
	defer stop()
	to := netip.AddrPortFrom(Guest4, p.Port)
	if p.UDP != nil {
		n.publishUDP(p.UDP, to)
		return
	}
	for {
		c, err := p.TCP.AcceptTCP()
		switch {
		case n.ctx.Err() != nil:
			if err == nil {
				reset(c)
			}
			return
		case err != nil: // such as EMFILE: wait for others to end
			n.pause()
		case !n.connections.take():
			reset(c)
		default:
			n.wg.Go(panics.Func(func() {
				defer n.connections.give()
				n.connect(c, to)
			}))
		}
	}
}

// pause waits a moment, or for the end of the network.
func (n *network) pause() {
	select {
	case <-time.After(100 * time.Millisecond):
	case <-n.ctx.Done():
	}
}

// connect leads a connection of the host to the guest.
func (n *network) connect(host *net.TCPConn, to netip.AddrPort) {
	var wq waiter.Queue
	ep, terr := n.stack.NewEndpoint(tcp.ProtocolNumber, protocol(to.Addr()), &wq)
	if terr != nil {
		reset(host)
		return
	}
	entry, connected := waiter.NewChannelEntry(waiter.WritableEvents | waiter.EventHUp)
	wq.EventRegister(&entry)
	terr = ep.Bind(full(netip.AddrPortFrom(Gateway4, 0)))
	if terr == nil {
		terr = ep.Connect(full(to))
	}
	if _, ok := terr.(*tcpip.ErrConnectStarted); ok {
		select {
		case <-connected:
			terr = ep.LastError()
		case <-time.After(dialTime):
			terr = &tcpip.ErrTimeout{}
		case <-n.ctx.Done():
			terr = &tcpip.ErrAborted{}
		}
	}
	wq.EventUnregister(&entry)
	if terr != nil {
		ep.Abort()
		reset(host)
		return
	}
	n.join(gonet.NewTCPConn(&wq, ep), ep, host)
}

// client is the flow of one client of a published UDP port.
type client struct {
	guest *gonet.UDPConn
	idle  *time.Timer // ends the flow
}

// replies writes to a client from the published port.
type replies struct {
	host   *net.UDPConn
	client netip.AddrPort
}

func (r replies) Write(b []byte) (int, error) { return r.host.WriteToUDPAddrPort(b, r.client) }

// publishUDP leads the datagrams of each client of the host to the guest by a flow of its own.
func (n *network) publishUDP(host *net.UDPConn, to netip.AddrPort) {
	var mu sync.Mutex
	clients := map[netip.AddrPort]client{}
	b := make([]byte, copyBuffer)
	for {
		size, from, err := host.ReadFromUDPAddrPort(b)
		if n.ctx.Err() != nil {
			return
		}
		if err != nil {
			n.pause()
			continue
		}
		mu.Lock()
		c, ok := clients[from]
		mu.Unlock()
		if !ok {
			if !n.flows.take() {
				continue
			}
			local, remote := full(netip.AddrPortFrom(Gateway4, 0)), full(to)
			c.guest, err = gonet.DialUDP(n.stack, &local, &remote, protocol(to.Addr()))
			if err != nil {
				n.flows.give()
				continue
			}
			c.idle = time.AfterFunc(flowTime, panics.Func(func() { c.guest.Close() }))
			mu.Lock()
			clients[from] = c
			mu.Unlock()
			n.wg.Go(panics.Func(func() {
				defer n.flows.give()
				stop := n.closeAtEnd(c.guest)
				copyDatagrams(replies{host, from}, c.guest, c.idle)
				stop()
				c.idle.Stop()
				c.guest.Close()
				mu.Lock()
				defer mu.Unlock()
				delete(clients, from)
			}))
		}
		c.idle.Reset(flowTime)
		c.guest.Write(b[:size])
	}
}
