package usernet

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"

	"gvm/kvmapi/nowait"
	"gvm/panics"
)

const (
	dialTime = 20 * time.Second
	flowTime = 60 * time.Second // RFC 4787, REQ-5, wants 2 minutes; a full table wants less
	closing  = 5 * time.Second  // how long a closed connection stays in TIME-WAIT
	silence  = time.Minute      // bounds the end of a connection whose guest does not answer
	dnsPort  = 53
)

var errRefused = errors.New("the guest may not reach this address")

// target returns the host's address for one that the guest sent to, other than the resolver's.
func (n *network) target(dst netip.AddrPort) (netip.AddrPort, error) {
	a := dst.Addr().Unmap()
	switch {
	case n.Host && a == Gateway4:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), dst.Port()), nil
	case n.Host && a == Gateway6:
		return netip.AddrPortFrom(netip.IPv6Loopback(), dst.Port()), nil
	case a.IsLoopback(), a.IsUnspecified(), a.IsMulticast(), a.IsLinkLocalUnicast(),
		a == netip.AddrFrom4([4]byte{255, 255, 255, 255}), Prefix4.Contains(a), Prefix6.Contains(a):
		return netip.AddrPort{}, errRefused
	}
	if !n.Host {
		own, err := net.InterfaceAddrs()
		if err != nil {
			return netip.AddrPort{}, fmt.Errorf("list the host's addresses: %w", err)
		}
		for _, o := range own {
			if o, ok := o.(*net.IPNet); ok && o.IP.Equal(a.AsSlice()) {
				return netip.AddrPort{}, errRefused
			}
		}
	}
	return netip.AddrPortFrom(a, dst.Port()), nil
}

// dial connects to where the guest sent.
func (n *network) dial(protocol string, dst netip.AddrPort) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(n.ctx, dialTime)
	defer cancel()
	if a := dst.Addr(); (a == Resolver4 || a == Resolver6) && dst.Port() == dnsPort {
		err := errors.New("no resolver")
		for _, r := range n.Resolvers() {
			var c net.Conn
			if c, err = n.dialer(ctx, protocol, r.String()); err == nil {
				return c, nil
			}
		}
		return nil, err
	}
	to, err := n.target(dst)
	if err != nil {
		return nil, err
	}
	return n.dialer(ctx, protocol, to.String())
}

// forwardTCP serves a connection that the guest asks for, in a goroutine of the stack's. The guest
// is connected once the host is, and refused if the host is.
func (n *network) forwardTCP(r *tcp.ForwarderRequest) {
	defer panics.Catch()
	if n.ctx.Err() != nil || !n.connections.take() {
		r.Complete(true)
		return
	}
	defer n.connections.give()
	id := r.ID()
	host, err := n.dial("tcp", netip.AddrPortFrom(address(id.LocalAddress), id.LocalPort))
	if err != nil {
		r.Complete(true)
		return
	}
	var wq waiter.Queue
	ep, terr := r.CreateEndpoint(&wq)
	r.Complete(false)
	if terr != nil {
		reset(host)
		return
	}
	n.join(gonet.NewTCPConn(&wq, ep), ep, host)
}

// join copies both ways between a connection of the guest and one of the host until both ends have
// closed it or one has reset it, and closes both.
func (n *network) join(guest *gonet.TCPConn, ep tcpip.Endpoint, host net.Conn) {
	// A guest that restarted answers the probes with a reset; one that is paused has two hours.
	ep.SocketOptions().SetKeepAlive(true)
	idle, interval := tcpip.KeepaliveIdleOption(time.Minute), tcpip.KeepaliveIntervalOption(time.Minute)
	ep.SetSockOpt(&idle)
	ep.SetSockOpt(&interval)
	ep.SetSockOptInt(tcpip.KeepaliveCountOption, 120)

	broken := func() {
		ep.Abort()
		reset(host)
	}
	stop := context.AfterFunc(n.ctx, panics.Func(broken))
	defer stop()
	var far io.ReadWriter = host
	if c, ok := host.(syscall.Conn); ok {
		raw, _ := c.SyscallConn() // fails only if c is nil
		far = stream{raw}
	}
	var out sync.WaitGroup
	out.Go(panics.Func(func() {
		if copyConn(far, guest, copyBuffer) != nil || closeWrite(host) != nil {
			broken()
		}
	}))
	if copyConn(guest, far, toGuest) != nil || guest.CloseWrite() != nil {
		broken()
	}
	out.Wait()
	host.Close()
	guest.Close()
	n.drain(ep)
}

// drain waits until a closed endpoint has given up its buffers: it still sends its data, and a
// guest that does not take it must not have the memory of more connections than there may be. One
// that answers, however slowly it reads, gets all of it.
func (n *network) drain(ep tcpip.Endpoint) {
	answers := &ep.Stats().(*tcp.Stats).SegmentsReceived
	last, end := answers.Value(), time.Now().Add(silence)
	for wait := time.Millisecond; time.Now().Before(end); wait = min(2*wait, 200*time.Millisecond) {
		if v := answers.Value(); v != last {
			last, end = v, time.Now().Add(silence)
		}
		switch tcp.EndpointState(ep.State()) {
		case tcp.StateTimeWait, tcp.StateClose, tcp.StateError:
			return
		}
		select {
		case <-n.ctx.Done():
			return
		case <-time.After(wait):
		}
	}
	ep.Abort()
}

// stream reads and writes a socket of this process.
type stream struct{ raw syscall.RawConn }

// Read implements io.Reader.
func (s stream) Read(b []byte) (n int, err error) {
	closed := s.raw.Read(func(fd uintptr) bool {
		n, err = nowait.Read(int(fd), b)
		return err != unix.EAGAIN
	})
	if n == 0 && err == nil {
		err = io.EOF
	}
	return n, cmp.Or(closed, err)
}

// Write implements io.Writer.
func (s stream) Write(b []byte) (done int, err error) {
	closed := s.raw.Write(func(fd uintptr) bool {
		var n int
		for err = nil; err == nil && done < len(b); done += n {
			n, err = nowait.Write(int(fd), b[done:])
		}
		return err != unix.EAGAIN
	})
	return done, cmp.Or(closed, err)
}

var buffers = sync.Pool{New: func() any { return new([copyBuffer]byte) }}

// copyConn copies until src ends, at most size bytes at once. Buffers are copied through, and not
// the sockets' own ways, which take as much memory and are not bounded here.
func copyConn(dst io.Writer, src io.Reader, size int) error {
	b := buffers.Get().(*[copyBuffer]byte)
	defer buffers.Put(b)
	_, err := io.CopyBuffer(struct{ io.Writer }{dst}, struct{ io.Reader }{src}, b[:size])
	return err
}

// closeWrite sends the end of the data.
func closeWrite(c net.Conn) error {
	if c, ok := c.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return c.Close()
}

// reset ends a connection of the host with a reset, as the guest's ended.
func reset(c net.Conn) {
	if c, ok := c.(*net.TCPConn); ok {
		c.SetLinger(0)
	}
	c.Close()
}

// forwardUDP serves the first datagram of a flow of the guest. False answers it with port
// unreachable.
func (n *network) forwardUDP(r *udp.ForwarderRequest) bool {
	id := r.ID()
	dst := netip.AddrPortFrom(address(id.LocalAddress), id.LocalPort)
	if n.ctx.Err() != nil || !n.flows.take() {
		return true
	}
	serve, ok := n.flow(r, dst)
	if !ok {
		n.flows.give()
		return false
	}
	n.wg.Go(panics.Func(func() {
		defer n.flows.give()
		serve()
	}))
	return true
}

// flow opens both ends of a flow, and returns the function that serves it.
func (n *network) flow(r *udp.ForwarderRequest, dst netip.AddrPort) (serve func(), ok bool) {
	resolver := (dst.Addr() == Resolver4 || dst.Addr() == Resolver6) && dst.Port() == dnsPort
	var host net.Conn
	if !resolver {
		var err error
		if host, err = n.dial("udp", dst); err != nil { // does not wait
			return nil, false
		}
	}
	var wq waiter.Queue
	ep, err := r.CreateEndpoint(&wq)
	if err != nil {
		if host != nil {
			host.Close()
		}
		return nil, false
	}
	guest := gonet.NewUDPConn(&wq, ep)
	if resolver {
		return func() { n.resolve(guest) }, true
	}
	return func() { n.exchange(guest, host) }, true
}

// exchange copies datagrams both ways until there were none for flowTime, and closes both.
func (n *network) exchange(a, b net.Conn) {
	end := sync.OnceFunc(func() {
		a.Close()
		b.Close()
	})
	defer end()
	stop := context.AfterFunc(n.ctx, panics.Func(end))
	defer stop()
	idle := time.AfterFunc(flowTime, panics.Func(end))
	defer idle.Stop()
	var back sync.WaitGroup
	back.Go(panics.Func(func() {
		defer end()
		copyDatagrams(a, b, idle)
	}))
	copyDatagrams(b, a, idle)
	end()
	back.Wait()
}

func copyDatagrams(dst io.Writer, src io.Reader, idle *time.Timer) {
	b := buffers.Get().(*[copyBuffer]byte)
	defer buffers.Put(b)
	for {
		n, err := src.Read(b[:])
		if err != nil {
			return
		}
		idle.Reset(flowTime)
		if _, err := dst.Write(b[:n]); err != nil && !transient(err) {
			return
		}
	}
}

// transient reports whether a datagram was lost, and the flow goes on.
func transient(err error) bool {
	return errors.Is(err, syscall.ENOBUFS) || errors.Is(err, syscall.EMSGSIZE) || errors.Is(err, syscall.ECONNREFUSED)
}
