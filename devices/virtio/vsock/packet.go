package vsock

import (
	"encoding/binary"
	"fmt"

	"gvm/devices/virtio/virtq"
)

// Operations (virtio 1.3, 5.10.6).
const (
	opInvalid       = 0 // VIRTIO_VSOCK_OP_INVALID
	opRequest       = 1 // VIRTIO_VSOCK_OP_REQUEST
	opResponse      = 2 // VIRTIO_VSOCK_OP_RESPONSE
	opRST           = 3 // VIRTIO_VSOCK_OP_RST
	opShutdown      = 4 // VIRTIO_VSOCK_OP_SHUTDOWN
	opRW            = 5 // VIRTIO_VSOCK_OP_RW
	opCreditUpdate  = 6 // VIRTIO_VSOCK_OP_CREDIT_UPDATE
	opCreditRequest = 7 // VIRTIO_VSOCK_OP_CREDIT_REQUEST
)

const (
	hostCID    = 2 // 5.10.4
	typeStream = 1 // VIRTIO_VSOCK_TYPE_STREAM

	// Flags of opShutdown (5.10.6.5): the sender will not receive, or not send, any more.
	shutReceive = 1 << 0
	shutSend    = 1 << 1
	shutBoth    = shutReceive | shutSend

	headerLen = 44
	// maxPacket bounds the payload of a packet to the guest, as drivers bound theirs.
	maxPacket = 64 << 10
)

// header is struct virtio_vsock_hdr.
type header struct {
	srcCID, dstCID   uint64
	srcPort, dstPort uint32
	len              uint32
	kind, op         uint16 // kind is the field type
	flags            uint32
	bufAlloc, fwdCnt uint32
}

func (h *header) decode(b *[headerLen]byte) {
	le := binary.LittleEndian
	*h = header{
		srcCID: le.Uint64(b[0:]), dstCID: le.Uint64(b[8:]), srcPort: le.Uint32(b[16:]), dstPort: le.Uint32(b[20:]),
		len: le.Uint32(b[24:]), kind: le.Uint16(b[28:]), op: le.Uint16(b[30:]), flags: le.Uint32(b[32:]),
		bufAlloc: le.Uint32(b[36:]), fwdCnt: le.Uint32(b[40:]),
	}
}

func (h *header) encode(b *[headerLen]byte) {
	le := binary.LittleEndian
	le.PutUint64(b[0:], h.srcCID)
	le.PutUint64(b[8:], h.dstCID)
	le.PutUint32(b[16:], h.srcPort)
	le.PutUint32(b[20:], h.dstPort)
	le.PutUint32(b[24:], h.len)
	le.PutUint16(b[28:], h.kind)
	le.PutUint16(b[30:], h.op)
	le.PutUint32(b[32:], h.flags)
	le.PutUint32(b[36:], h.bufAlloc)
	le.PutUint32(b[40:], h.fwdCnt)
}

func guestErr(rule, format string, args ...any) error {
	return &virtq.GuestError{Rule: "virtio 1.3, " + rule, What: fmt.Sprintf(format, args...)}
}

// ring holds the bytes that the guest sent and the program has not read.
type ring struct {
	buf      []byte
	start, n int
}

// fill moves n bytes from b to the ring, which grows to limit at most. The caller has checked that
// they fit, and that b has them.
func (r *ring) fill(b *virtq.Buffer, n, limit int) {
	if need := r.n + n; need > len(r.buf) {
		grown := make([]byte, min(max(2*len(r.buf), need, 4096), limit))
		r.n, r.start = r.take(grown), 0
		r.buf = grown
	}
	for n > 0 {
		free := r.buf[(r.start+r.n)%len(r.buf):]
		k, _ := b.Read(free[:min(n, len(free))])
		r.n += k
		n -= k
	}
}

// take moves bytes from the ring to p, and returns how many.
func (r *ring) take(p []byte) (n int) {
	for n < len(p) && r.n > 0 {
		k := copy(p[n:], r.buf[r.start:min(r.start+r.n, len(r.buf))])
		r.start = (r.start + k) % len(r.buf)
		r.n -= k
		n += k
	}
	return n
}
