// Package virtqtest is the driver side of the split virtqueue (virtio 1.3,
// 2.7), with rings in guest memory and eventfds for both doorbells: gvm replay,
// unit tests, fuzz targets and benchmarks drive every device through it, and break
// its rules with the raw pokes.
package virtqtest

import (
	"encoding/binary"
	"fmt"

	"gvm/devices/virtio/virtq"
	"gvm/guestmem"
	"gvm/kvmapi/eventfd"
)

// Seg is one buffer of a chain.
type Seg struct {
	Addr  uint64
	Len   uint32
	Write bool // device-writable
}

// Desc is a descriptor as it lies in memory, for raw pokes.
type Desc struct {
	Addr        uint64
	Len         uint32
	Flags, Next uint16
}

// Driver is the driver side of one queue. One goroutine uses it.
type Driver struct {
	Mem *guestmem.Memory
	virtq.Layout
	Kick, Call *eventfd.FD

	desc, avail, used []byte
	eventIdx          bool
	free              []uint16   // unused descriptors, taken from the end
	chains            [][]uint16 // by head: the descriptors of the chain
	tables            []table    // by head: memory for an indirect table
	next, published   uint16     // available idx: ours, and the device's view
	lastUsed          uint16
	arena             uint64 // next free address for Alloc
}

type table struct {
	addr uint64
	len  int // descriptors that fit
}

// New lays a queue of size entries at the start of base's region of mem, with
// the rest of the region as arena for Alloc. features are those negotiated.
func New(mem *guestmem.Memory, base uint64, size uint16, features uint64) (*Driver, error) {
	n := uint64(size)
	d := &Driver{
		Mem:      mem,
		eventIdx: features&virtq.FeatureEventIdx != 0,
		chains:   make([][]uint16, size),
		tables:   make([]table, size),
		arena:    base,
	}
	d.Size = size
	for _, part := range []struct {
		addr  *uint64
		bytes *[]byte
		n     uint64
	}{{&d.Desc, &d.desc, 16 * n}, {&d.Layout.Driver, &d.avail, 6 + 2*n}, {&d.Device, &d.used, 6 + 8*n}} {
		addr, err := d.alloc(int(part.n))
		if err != nil {
			return nil, err
		}
		*part.addr = addr
		*part.bytes = d.Bytes(addr, int(part.n))
		clear(*part.bytes)
	}
	for i := size; i > 0; i-- {
		d.free = append(d.free, i-1)
	}
	var err error
	if d.Kick, err = eventfd.New(); err != nil {
		return nil, err
	}
	if d.Call, err = eventfd.New(); err != nil {
		d.Kick.Close()
		return nil, err
	}
	return d, nil
}

// Close closes both eventfds.
func (d *Driver) Close() {
	d.Kick.Close()
	d.Call.Close()
}

func (d *Driver) alloc(n int) (uint64, error) {
	addr := (d.arena + 15) &^ 15
	if _, err := d.Mem.Slice(addr, uint64(n)); err != nil {
		return 0, fmt.Errorf("virtqtest: arena is full: %w", err)
	}
	d.arena = addr + uint64(n)
	return addr, nil
}

// Alloc takes n bytes, 16-byte aligned, from the arena; it panics when the
// arena is full, which is a mistake of the test.
func (d *Driver) Alloc(n int) uint64 {
	addr, err := d.alloc(n)
	if err != nil {
		panic(err)
	}
	return addr
}

// Bytes returns guest memory, which the driver owns before Publish and after
// Used. It panics on a range outside RAM.
func (d *Driver) Bytes(addr uint64, n int) []byte {
	b, err := d.Mem.Slice(addr, uint64(n))
	if err != nil {
		panic(err)
	}
	return b
}

// Free returns the number of free descriptors.
func (d *Driver) Free() int { return len(d.free) }

// ShuffleFree puts the free descriptors in another order, so that chains
// jump about the table.
func (d *Driver) ShuffleFree(shuffle func(n int, swap func(i, j int))) {
	shuffle(len(d.free), func(i, j int) { d.free[i], d.free[j] = d.free[j], d.free[i] })
}

// Add writes a chain of direct descriptors and its entry in the available
// ring; the device sees it at Publish. ok is false when too few descriptors
// are free.
func (d *Driver) Add(segs ...Seg) (head uint16, ok bool) { return d.add(len(segs), segs) }

// AddIndirect is Add of a chain whose first direct segments have descriptors
// of their own, and the others are in an indirect table at its end.
func (d *Driver) AddIndirect(direct int, segs ...Seg) (head uint16, ok bool) {
	return d.add(direct, segs)
}

func (d *Driver) add(direct int, segs []Seg) (head uint16, ok bool) {
	need := direct
	if direct < len(segs) {
		need++
	}
	if need == 0 || need > len(d.free) {
		return 0, false
	}
	cut := len(d.free) - need
	head = d.free[len(d.free)-1]
	chain := append(d.chains[head][:0], d.free[cut:]...) // walked from its end
	d.free = d.free[:cut]
	d.chains[head] = chain

	for i := range need {
		desc := Desc{}
		if i < direct {
			desc = Desc{Addr: segs[i].Addr, Len: segs[i].Len, Flags: writeFlag(segs[i])}
		} else {
			desc = Desc{Addr: d.table(head, segs[direct:]), Len: uint32(16 * (len(segs) - direct)), Flags: virtq.DescFIndirect}
		}
		if i+1 < need {
			desc.Flags |= virtq.DescFNext
			desc.Next = chain[need-2-i]
		}
		d.SetDesc(chain[need-1-i], desc)
	}
	d.SetAvail(d.next, head)
	d.next++
	return head, true
}

func writeFlag(s Seg) uint16 {
	if s.Write {
		return virtq.DescFWrite
	}
	return 0
}

// table writes segs as the indirect table of head.
func (d *Driver) table(head uint16, segs []Seg) uint64 {
	t := &d.tables[head]
	if t.len < len(segs) {
		*t = table{d.Alloc(16 * len(segs)), len(segs)}
	}
	for i, s := range segs {
		desc := Desc{Addr: s.Addr, Len: s.Len, Flags: writeFlag(s)}
		if i+1 < len(segs) {
			desc.Flags |= virtq.DescFNext
			desc.Next = uint16(i + 1)
		}
		d.PokeDesc(t.addr+uint64(16*i), desc)
	}
	return t.addr
}

// Publish makes the added chains available and kicks the device if it asked for
// that, which kicked tells.
func (d *Driver) Publish() (kicked bool, err error) {
	before := d.published
	if before == d.next {
		return false, nil
	}
	d.published = d.next
	d.SetAvailIdx(d.next) // release and full fence: before the device's wish is read
	if d.eventIdx {
		event := guestmem.LoadUint16(d.used[4+8*int(d.Size):])
		kicked = d.next-event-1 < d.next-before
	} else {
		kicked = guestmem.LoadUint16(d.used)&1 == 0
	}
	if !kicked {
		return false, nil
	}
	return true, d.Kick.Signal()
}

// Used takes one chain that the device has used, and the length it says it
// wrote. It panics when the device uses a chain that is not in flight.
func (d *Driver) Used() (head uint16, written uint32, ok bool) {
	if guestmem.LoadUint16(d.used[2:]) == d.lastUsed {
		return 0, 0, false
	}
	e := d.used[4+8*int(d.lastUsed&(d.Size-1)):]
	id := binary.LittleEndian.Uint32(e)
	if id >= uint32(d.Size) || len(d.chains[id]) == 0 {
		panic(fmt.Sprintf("virtqtest: device used %d, which is not in flight", id))
	}
	d.lastUsed++
	d.free = append(d.free, d.chains[id]...)
	d.chains[id] = d.chains[id][:0]
	return uint16(id), binary.LittleEndian.Uint32(e[4:]), true
}

// EnableCalls asks for an interrupt at the next used chain and reports whether
// one is there already.
func (d *Driver) EnableCalls() (more bool) {
	if d.eventIdx {
		d.SetUsedEvent(d.lastUsed)
	} else {
		guestmem.StoreUint16(d.avail, 0)
	}
	return guestmem.LoadUint16(d.used[2:]) != d.lastUsed
}

// DisableCalls asks for no interrupts.
func (d *Driver) DisableCalls() {
	if d.eventIdx {
		d.SetUsedEvent(d.lastUsed - 1)
	} else {
		guestmem.StoreUint16(d.avail, 1)
	}
}

// Wait is Used that waits for the interrupt when nothing is there yet.
func (d *Driver) Wait() (head uint16, written uint32, err error) {
	for {
		if head, written, ok := d.Used(); ok {
			return head, written, nil
		}
		if d.EnableCalls() {
			continue
		}
		if _, err := d.Call.Wait(); err != nil {
			return 0, 0, err
		}
	}
}

// SetDesc pokes descriptor i of the table.
func (d *Driver) SetDesc(i uint16, desc Desc) { d.PokeDesc(d.Desc+16*uint64(i), desc) }

// PokeDesc writes a descriptor anywhere in RAM.
func (d *Driver) PokeDesc(addr uint64, desc Desc) {
	b := d.Bytes(addr, 16)
	binary.LittleEndian.PutUint64(b, desc.Addr)
	binary.LittleEndian.PutUint32(b[8:], desc.Len)
	binary.LittleEndian.PutUint16(b[12:], desc.Flags)
	binary.LittleEndian.PutUint16(b[14:], desc.Next)
}

// SetAvail pokes the available ring's entry for idx i.
func (d *Driver) SetAvail(i, head uint16) {
	guestmem.StoreUint16(d.avail[4+2*int(i&(d.Size-1)):], head)
}

// SetAvailIdx pokes the available ring's idx.
func (d *Driver) SetAvailIdx(v uint16) { guestmem.StoreUint16(d.avail[2:], v) }

// SetUsedEvent pokes used_event.
func (d *Driver) SetUsedEvent(v uint16) { guestmem.StoreUint16(d.avail[4+2*int(d.Size):], v) }
