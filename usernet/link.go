package usernet

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/link/ethernet"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"gvm/kvmapi/nowait"
)

// struct virtio_net_hdr_v1: virtio 1.3, 5.1.6.
const (
	headerSize  = 12
	needsCsum   = 1 // VIRTIO_NET_HDR_F_NEEDS_CSUM
	gsoTCPv4    = 1 // VIRTIO_NET_HDR_GSO_TCPV4
	gsoTCPv6    = 4 // VIRTIO_NET_HDR_GSO_TCPV6
	maxFrame    = 65550
	queueLength = 256

	// maxSlices bounds the slices of a message as IOV_MAX does: there is one for each write of the
	// other end, of which the stack merges any number into a segment.
	maxSlices = 1024
)

// The offloads that a guest takes, as in linux/if_tun.h.
const (
	offloadCsum = 1 // TUN_F_CSUM
	offloadTSO4 = 2 // TUN_F_TSO4
	offloadTSO6 = 4 // TUN_F_TSO6
)

// patience is how long the stack waits for a guest that does not receive before a frame is lost.
// A loss costs a connection more: its recovery takes 200 ms.
const patience = 100 * time.Millisecond

// link is the stack's end of the wire. A frame to the guest is sent by the goroutine that has it,
// or waits in a queue if the device does not take it at once, or earlier ones wait.
type link struct {
	*channel.Endpoint // for all but the queue
	conn              *net.UnixConn
	raw               syscall.RawConn // conn's
	offloads          atomic.Uint32
	queue             chan *stack.PacketBuffer
	done              <-chan struct{} // closed at the end of the network

	mu      sync.Mutex // guards the fields below; not held while a goroutine waits
	waiting int        // frames that are to come into the queue, are in it, or that write sends
	message message
}

// message is the memory for the messages of one goroutine.
type message struct {
	head    [headerSize]byte
	slices  [][]byte
	vectors nowait.Vectors
}

func newLink(conn *net.UnixConn, done <-chan struct{}) *link {
	raw, _ := conn.SyscallConn() // fails only if conn is nil
	l := &link{Endpoint: channel.New(0, mtu+header.EthernetMinimumSize, gatewayMAC), conn: conn, raw: raw,
		queue: make(chan *stack.PacketBuffer, queueLength), done: done}
	// The guest's checksums are not checked: memory does not corrupt them, and with
	// VIRTIO_NET_HDR_F_NEEDS_CSUM they are not there.
	l.LinkEPCapabilities = stack.CapabilityRXChecksumOffload
	return l
}

// endpoint returns the link as the stack's.
func (l *link) endpoint() stack.LinkEndpoint { return ethernet.New(l) }

// GSOMaxSize implements stack.GSOEndpoint: the most that the length of an IP packet can say.
func (*link) GSOMaxSize() uint32 { return 65535 }

// SupportedGSO implements stack.GSOEndpoint. The stack asks at the start of a connection.
func (l *link) SupportedGSO() stack.SupportedGSO {
	const all = offloadCsum | offloadTSO4 | offloadTSO6
	if l.offloads.Load()&all == all {
		return stack.HostGSOSupported
	}
	return stack.GVisorGSOSupported
}

// read takes the device's messages until it closes the socket.
func (l *link) read() error {
	message := make([]byte, headerSize+maxFrame)
	device := stream{l.raw}
	for {
		n, err := device.Read(message)
		if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read a frame of the guest: %w", err)
		}
		l.receive(message[:n])
	}
}

// receive takes one message of the device. The header says nothing that the stack needs: a TCP
// segment of any size is one segment to it.
func (l *link) receive(message []byte) {
	if len(message) == 4 {
		l.offloads.Store(binary.LittleEndian.Uint32(message))
		return
	}
	if len(message) < headerSize+header.EthernetMinimumSize {
		return
	}
	frame := message[headerSize:]
	if reply := answer(frame); reply != nil {
		l.send(reply)
		return
	}
	p := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(frame)})
	defer p.DecRef()
	l.InjectInbound(0, p)
}

// send sends or queues a frame that the stack did not make, or loses it.
func (l *link) send(frame []byte) {
	p := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(frame)})
	defer p.DecRef()
	if l.sendNow(p) {
		return
	}
	select {
	case l.queue <- p.IncRef():
	default:
		p.DecRef()
		l.waited()
	}
}

// WritePackets implements stack.LinkEndpoint.
func (l *link) WritePackets(packets stack.PacketBufferList) (int, tcpip.Error) {
	for i, p := range packets.AsSlice() {
		narrow(p)
		if l.sendNow(p) {
			continue
		}
		p = p.Clone()
		select {
		case l.queue <- p:
			continue
		default:
		}
		select {
		case l.queue <- p:
		case <-time.After(patience):
			p.DecRef()
			l.waited()
			return i, &tcpip.ErrNoBufferSpace{}
		case <-l.done:
			p.DecRef()
			return i, &tcpip.ErrClosedForSend{}
		}
	}
	return packets.Len(), nil
}

// sendNow sends a frame if the device takes it now and no other waits. If it reports false, the
// frame is one that waits: the caller queues it, or calls waited.
func (l *link) sendNow(p *stack.PacketBuffer) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.waiting == 0 && l.output(&l.message, p, false) {
		return true
	}
	l.waiting++
	return false
}

// waited says that a frame waits no longer.
func (l *link) waited() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.waiting--
}

// narrow takes one unit from the window of a TCP segment that the stack made.
//
// The stack drops a segment outside its receive window, with the acknowledgment in it, and the end
// of that window moves back by up to a unit of its scale: the announced size is rounded down. A
// peer that sent up to an earlier end, and of which the last bytes were not taken, acknowledges
// from beyond the end. All it acknowledges is lost until the reader makes room. If the reader waits
// for that itself, as a server that echoes does, the connection is stuck. With a unit less the peer
// does not get beyond the end. (The window of a SYN has no scale. The next has more units than it
// had.)
func narrow(p *stack.PacketBuffer) {
	segment := header.TCP(p.TransportHeader().Slice())
	if p.TransportProtocolNumber != header.TCPProtocolNumber || len(segment) < header.TCPMinimumSize ||
		segment.WindowSize() == 0 {
		return
	}
	segment.SetWindowSize(segment.WindowSize() - 1)
	if !p.GSOOptions.NeedsCsum { // or else the sum does not have the window yet
		segment.SetChecksum(checksum.Combine(segment.Checksum(), 1))
	}
}

// write sends queued frames until the network ends.
func (l *link) write() {
	var m message
	for {
		select {
		case p := <-l.queue:
			l.output(&m, p, true)
			p.DecRef()
			l.waited()
		case <-l.done:
			return
		}
	}
}

// output sends a frame as one message, or not at all if the guest does not take it. If the device
// has no room for it, output waits, or reports false.
func (l *link) output(m *message, p *stack.PacketBuffer, wait bool) (sent bool) {
	if !l.describe(p, &m.head) {
		return true
	}
	m.slices = append(append(m.slices[:0], m.head[:]), p.AsSlices()...)
	if len(m.slices) > maxSlices {
		m.slices = append(m.slices[:0], bytes.Join(m.slices, nil))
	}
	sent = true
	l.raw.Write(func(fd uintptr) bool { // fails when the socket is closed, which read sees
		_, err := m.vectors.Writev(int(fd), m.slices)
		sent = err != unix.EAGAIN
		return sent || !wait
	})
	clear(m.slices)
	return sent
}

// describe writes the header of a frame, and reports false if the guest does not take it: one of a
// connection that began when the guest took more.
func (l *link) describe(p *stack.PacketBuffer, head *[headerSize]byte) bool {
	*head = [headerSize]byte{}
	gso := p.GSOOptions
	if !gso.NeedsCsum {
		return true
	}
	kind, need := byte(gsoTCPv4), uint32(offloadCsum|offloadTSO4)
	if gso.Type == stack.GSOTCPv6 {
		kind, need = gsoTCPv6, offloadCsum|offloadTSO6
	}
	if l.offloads.Load()&need != need {
		return false
	}
	head[0] = needsCsum
	binary.LittleEndian.PutUint16(head[6:], header.EthernetMinimumSize+gso.L3HdrLen)
	binary.LittleEndian.PutUint16(head[8:], gso.CsumOffset)
	if p.Data().Size() > int(gso.MSS) {
		head[1] = kind
		binary.LittleEndian.PutUint16(head[2:], uint16(p.HeaderSize()))
		binary.LittleEndian.PutUint16(head[4:], gso.MSS)
	}
	return true
}
