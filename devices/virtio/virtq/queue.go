package virtq

import (
	"encoding/binary"
	"fmt"

	"gvm/guestmem"
)

// Feature bits that change how the split ring works (virtio 1.3, 6).
const (
	FeatureIndirectDesc = 1 << 28 // VIRTIO_F_INDIRECT_DESC
	FeatureEventIdx     = 1 << 29 // VIRTIO_F_EVENT_IDX
)

// Descriptor flags (virtio 1.3, 2.7.5).
const (
	DescFNext     = 1 // VIRTQ_DESC_F_NEXT
	DescFWrite    = 2 // VIRTQ_DESC_F_WRITE
	DescFIndirect = 4 // VIRTQ_DESC_F_INDIRECT
)

const (
	availFNoInterrupt = 1 // VIRTQ_AVAIL_F_NO_INTERRUPT (2.7.6)
	usedFNoNotify     = 1 // VIRTQ_USED_F_NO_NOTIFY (2.7.8)

	maxSize   = 32768   // 2.7
	maxBytes  = 1 << 32 // of one chain (2.7.5.2)
	descBytes = 16
	idxOff    = 2 // of idx in either ring
	ringOff   = 4 // of the first entry in either ring
)

// GuestError says that the driver broke a rule: the device answers with
// DEVICE_NEEDS_RESET, and no other guest or device is touched by it.
type GuestError struct {
	Rule string // the section that states the rule, "virtio 1.3, 2.7.6.1"
	What string // the driver's fault
}

func (e *GuestError) Error() string { return e.What + " (" + e.Rule + ")" }

// Queue is the device side of one split virtqueue. Its methods are not safe
// for concurrent use; chains that Next has handed out may be worked on by
// other goroutines until they are given back to Add.
type Queue struct {
	mem      *guestmem.Memory
	size     uint16
	indirect bool
	eventIdx bool

	desc, avail, used     []byte // the three parts in guest RAM, resolved once
	usedEvent, availEvent []byte // where the two event fields lie in them
	asked                 uint16 // used_event as Asked last read it

	availIdx  uint16 // the driver's idx as last read
	nextAvail uint16 // the next available entry to take
	usedIdx   uint16 // the next used entry to write
	published uint16 // the used idx that the driver can see
	inFlight  int    // chains taken and not yet given back

	free   []*Chain
	large  int // of free, those with room for more than keepSegs segments
	broken error
}

// What a queue keeps for its next chains: room for so many segments in each, and for more in so
// many. One burst of long chains must not cost memory for ever.
const (
	keepSegs  = 16
	keepLarge = 16
)

// New checks where the driver put a queue and returns its device side. features
// are the bits the driver accepted. The queue continues at base, an earlier
// Queue's Base; after a reset that is 0. The error is a *GuestError.
func New(mem *guestmem.Memory, l Layout, features uint64, base uint16) (*Queue, error) {
	if l.Size == 0 || l.Size > maxSize || l.Size&(l.Size-1) != 0 {
		return nil, &GuestError{"virtio 1.3, 2.7", fmt.Sprintf("queue size %d", l.Size)}
	}
	n := int(l.Size)
	q := &Queue{
		mem:      mem,
		size:     l.Size,
		indirect: features&FeatureIndirectDesc != 0,
		eventIdx: features&FeatureEventIdx != 0,

		availIdx: base, nextAvail: base, usedIdx: base, published: base,
	}
	for _, part := range []struct {
		name        string
		addr, align uint64
		len         int
		dst         *[]byte
	}{
		{"descriptor table", l.Desc, 16, descBytes * n, &q.desc},
		{"available ring", l.Driver, 2, ringOff + 2*n + 2, &q.avail},
		{"used ring", l.Device, 4, ringOff + 8*n + 2, &q.used},
	} {
		if part.addr%part.align != 0 {
			what := fmt.Sprintf("%s at %#x is not aligned to %d", part.name, part.addr, part.align)
			return nil, &GuestError{"virtio 1.3, 2.7.1", what}
		}
		b, err := mem.Slice(part.addr, uint64(part.len))
		if err != nil {
			return nil, &GuestError{"virtio 1.3, 2.7", fmt.Sprintf("%s: %v", part.name, err)}
		}
		*part.dst = b
	}
	q.usedEvent = q.avail[ringOff+2*n:]
	q.availEvent = q.used[ringOff+8*n:]
	return q, nil
}

// Next takes the next chain that the driver made available. ok is false when
// there is none, and also when err says that the driver broke a rule: the
// queue is then broken, and every later Next returns the same *GuestError.
// The chain belongs to the caller until Add.
func (q *Queue) Next() (c *Chain, ok bool, err error) {
	if q.broken != nil {
		return nil, false, q.broken
	}
	if q.nextAvail == q.availIdx {
		// Acquire: pairs with the driver's release of idx, so the ring entry
		// and the descriptors behind it are seen as they were before it.
		q.availIdx = guestmem.LoadUint16(q.avail[idxOff:])
		pending := q.availIdx - q.nextAvail
		if pending == 0 {
			return nil, false, nil
		}
		// Each chain holds a descriptor until it is used, so a driver can
		// never be further ahead than the queue is long.
		if int(pending)+q.inFlight > int(q.size) {
			return q.fail("virtio 1.3, 2.7.6.1", "available idx %d, %d taken and %d in flight: more than the queue's %d",
				q.availIdx, q.nextAvail, q.inFlight, q.size)
		}
	}
	// The entry may share its 32-bit word with used_event, which the driver
	// may be storing to: hence the atomic load.
	head := guestmem.LoadUint16(q.avail[ringOff+2*int(q.nextAvail&(q.size-1)):])
	if n := len(q.free); n > 0 {
		c, q.free = q.free[n-1], q.free[:n-1]
		if c.large() {
			q.large--
		}
	} else {
		c = new(Chain)
	}
	if err := q.walk(c, head); err != nil {
		q.broken = err
		return nil, false, err
	}
	c.live = true
	q.nextAvail++
	q.inFlight++
	return c, true, nil
}

func (q *Queue) fail(rule, format string, args ...any) (*Chain, bool, error) {
	q.broken = guestErr(rule, format, args...)
	return nil, false, q.broken
}

func guestErr(rule, format string, args ...any) error {
	return &GuestError{rule, fmt.Sprintf(format, args...)}
}

// walk fills c with the chain that starts at head. Each descriptor is read
// once, in two loads, and only the copy is looked at.
func (q *Queue) walk(c *Chain, head uint16) error {
	c.head = head
	c.segs = c.segs[:0]
	table, entries := q.desc, int(q.size)
	inTable, writable := false, false
	outSegs, outLen, inLen := 0, uint64(0), uint64(0)
	for i, count := int(head), 0; ; {
		if i >= entries {
			return guestErr("virtio 1.3, 2.7.5", "descriptor index %d in a table of %d", i, entries)
		}
		// A loop is a chain without end, so the count finds it.
		if count++; count > int(q.size) {
			return guestErr("virtio 1.3, 2.7.5.3.1", "descriptor chain longer than the queue's %d", q.size)
		}
		d := table[i*descBytes:][:descBytes]
		addr, rest := binary.LittleEndian.Uint64(d), binary.LittleEndian.Uint64(d[8:])
		n, flags, next := uint64(uint32(rest)), uint16(rest>>32), uint16(rest>>48)

		if flags&DescFIndirect != 0 {
			switch {
			case !q.indirect:
				return guestErr("virtio 1.3, 2.7.5.3.1", "indirect descriptor without VIRTIO_F_INDIRECT_DESC")
			case inTable:
				return guestErr("virtio 1.3, 2.7.5.3.1", "indirect descriptor within an indirect table")
			case flags&DescFNext != 0:
				return guestErr("virtio 1.3, 2.7.5.3.1", "descriptor with both INDIRECT and NEXT")
			case n == 0 || n%descBytes != 0:
				return guestErr("virtio 1.3, 2.7.5.3", "indirect table of %d bytes", n)
			}
			t, err := q.mem.Slice(addr, n)
			if err != nil {
				return guestErr("virtio 1.3, 2.7.5.3", "indirect table: %v", err)
			}
			// The write flag of this descriptor means nothing (2.7.5.3.2), and
			// the descriptor itself is not one of the chain's buffers.
			table, entries, inTable, i = t, len(t)/descBytes, true, 0
			count--
			continue
		}
		write := flags&DescFWrite != 0
		if writable && !write {
			return guestErr("virtio 1.3, 2.7.4.2", "device-readable descriptor after a device-writable one")
		}
		if writable = write; write {
			inLen += n
		} else {
			outLen += n
		}
		if outLen+inLen > maxBytes {
			return guestErr("virtio 1.3, 2.7.5.2", "descriptor chain of more than 2^32 bytes")
		}
		// No rule forbids an empty descriptor; it names no memory.
		if n > 0 {
			b, err := q.mem.Slice(addr, n)
			if err != nil {
				return guestErr("virtio 1.3, 2.7.5", "descriptor %d: %v", i, err)
			}
			c.segs = append(c.segs, b)
			if !write {
				outSegs++
			}
		}
		if flags&DescFNext == 0 {
			break
		}
		i = int(next)
	}
	c.Out.set(c.segs[:outSegs:outSegs], int(outLen))
	c.In.set(c.segs[outSegs:], int(inLen))
	c.writable = inLen
	return nil
}

// Add gives a chain back: it writes the used entry, which the driver sees at
// the next Publish. written is the number of bytes written to the front of
// the chain's device-writable part (virtio 1.3, 2.7.8.2); more than that part
// holds is cut to it. c is not the caller's afterwards.
func (q *Queue) Add(c *Chain, written uint32) {
	if !c.live {
		panic("virtq: chain given back twice")
	}
	e := q.used[ringOff+8*int(q.usedIdx&(q.size-1)):][:8]
	binary.LittleEndian.PutUint32(e, uint32(c.head))
	binary.LittleEndian.PutUint32(e[4:], uint32(min(uint64(written), c.writable)))
	q.usedIdx++
	q.recycle(c)
}

// Drop gives a chain back unused: before a reset any chain, whose buffers are
// the driver's again then, and before the queue stops the chains that were taken
// last, which stay available.
func (q *Queue) Drop(c *Chain) {
	q.recycle(c)
	q.nextAvail--
	q.availIdx = q.nextAvail // Next reads it again
}

func (q *Queue) recycle(c *Chain) {
	c.live = false
	q.inFlight--
	if c.large() {
		if q.large < keepLarge {
			q.large++
		} else {
			c.segs, c.Out, c.In = nil, Buffer{}, Buffer{}
		}
	}
	q.free = append(q.free, c)
}

// Publish makes every chain given to Add since the last Publish visible to
// the driver, and reports whether the driver asked to be interrupted for them.
func (q *Queue) Publish() (signal bool) {
	if q.usedIdx == q.published {
		return false
	}
	before := q.published
	q.published = q.usedIdx
	// Release: the used entries and the data are seen before idx. The store is
	// also a full fence (StoreLoad), which pairs with the driver's own between
	// its store of used_event or flags and its last look at idx: one of the
	// two sides sees the other, and no interrupt is lost (2.7.7.2).
	guestmem.StoreUint16(q.used[idxOff:], q.usedIdx)
	if q.eventIdx {
		// Did idx step over used_event+1? All in 16-bit arithmetic, which wraps.
		event := guestmem.LoadUint16(q.usedEvent)
		return q.usedIdx-event-1 < q.usedIdx-before
	}
	return guestmem.LoadUint16(q.avail)&availFNoInterrupt == 0
}

// Asked reports whether the driver has asked for interrupts since the last call: it has moved
// used_event, or, without VIRTIO_F_EVENT_IDX, VIRTQ_AVAIL_F_NO_INTERRUPT is clear now (2.7.7).
func (q *Queue) Asked() bool {
	if !q.eventIdx {
		return guestmem.LoadUint16(q.avail)&availFNoInterrupt == 0
	}
	last := q.asked
	q.asked = guestmem.LoadUint16(q.usedEvent)
	return q.asked != last
}

// DisableKicks advises the driver that the device waits for no notifications, while
// the caller polls Next. With VIRTIO_F_EVENT_IDX there is nothing to write:
// avail_event stays behind, so the driver sends no more (2.7.10).
func (q *Queue) DisableKicks() {
	if !q.eventIdx {
		guestmem.StoreUint16(q.used, usedFNoNotify)
	}
}

// EnableKicks asks for a notification of the next chain and reports whether one
// is there already: the driver may have added it before it saw the request,
// so the caller that gets true polls again instead of waiting.
func (q *Queue) EnableKicks() (more bool) {
	// Full fence (StoreLoad): pairs with the driver's between its store of idx
	// and its load of avail_event or flags.
	if q.eventIdx {
		guestmem.StoreUint16(q.availEvent, q.nextAvail)
	} else {
		guestmem.StoreUint16(q.used, 0)
	}
	return q.Available() != q.nextAvail
}

// Available returns the driver's available idx as it is now. It counts chains since the queue was
// set up, modulo 65536.
func (q *Queue) Available() uint16 { return guestmem.LoadUint16(q.avail[idxOff:]) }

// Position returns the available idx that Next has reached, which counts as Available does.
func (q *Queue) Position() uint16 { return q.nextAvail }

// Base returns the index of the next available entry to take by a Queue that
// continues here. Every chain has been given back, so the used index is the same.
func (q *Queue) Base() uint16 { return q.usedIdx }
