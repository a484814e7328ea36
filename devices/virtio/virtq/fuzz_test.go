package virtq_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"reflect"
	"testing"

	"gvm/devices/virtio/virtq"
	"gvm/devices/virtio/virtqtest"
	"gvm/guestmem"
)

// FuzzQueue gives the device rings made of the input: a queue that is right
// but for the input's changes. Every chain that comes out of Next lies in
// RAM, and there is a bounded amount of it.
func FuzzQueue(f *testing.F) {
	f.Add(uint8(3), uint8(3), []byte{0, 0, 0, 0, 0, 0, 0, 0})
	f.Add(uint8(4), uint8(1), []byte{1, 3, 2, 0, 5, 1, 7, 9, 2, 2, 1, 3, 3, 3, 0xff, 0xff})
	f.Add(uint8(0), uint8(2), bytes.Repeat([]byte{4, 1, 0, 3}, 20))
	f.Add(uint8(5), uint8(3), bytes.Repeat([]byte{2, 6, 0x80, 1, 5, 0, 0, 0}, 30))
	const ramLen = 1 << 16
	f.Fuzz(func(t *testing.T, sizeBits, featureBits uint8, b []byte) {
		size := uint16(1) << (sizeBits % 7)
		features := uint64(featureBits%4) << 28
		mem := guestmem.Heap(base, ramLen)
		d, err := virtqtest.New(mem, base, size, features)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		l := d.Layout
		if sizeBits >= 0xf0 { // rarely: rings at any place
			l.Desc, l.Driver, l.Device = uint64(featureBits)<<12, uint64(sizeBits)<<8, base+uint64(featureBits)
		}
		q, err := virtq.New(mem, l, features, 0)
		if err != nil {
			return
		}
		var g *virtq.GuestError
		u16 := func(p []byte) uint16 { return binary.LittleEndian.Uint16(p) }
		buf := d.Alloc(512)
		ramAt := reflect.ValueOf(mem.Regions()[0].Bytes).Pointer()
		inside := func(views [][]byte) (n int) {
			for _, v := range views {
				off := reflect.ValueOf(v).Pointer() - ramAt
				if len(v) == 0 || cap(v) != len(v) || off >= ramLen || off+uintptr(len(v)) > ramLen {
					t.Fatalf("view of %d bytes, capacity %d, at offset %#x of RAM", len(v), cap(v), off)
				}
				n += len(v)
			}
			return n
		}
		chains := make([]*virtq.Chain, 0, size)
		total := 0
		for ; len(b) >= 8; b = b[8:] {
			n := uint32(b[1])
			switch b[0] % 8 {
			case 0, 1, 2, 3: // a good chain
				segs := []virtqtest.Seg{out(buf, n), {Addr: buf + uint64(b[2]), Len: uint32(b[3]), Write: b[4]&1 != 0},
					in(buf, uint32(b[5]))}
				if features&virtq.FeatureIndirectDesc != 0 && b[0]&8 != 0 {
					if d.Free() > 3 && int(size) > 3 {
						d.AddIndirect(int(b[6]%4), segs...)
					}
				} else {
					d.Add(segs...)
				}
				d.Publish()
			case 4: // any descriptor
				d.SetDesc(uint16(b[1])%size, desc(base+uint64(u16(b[2:]))*16, uint32(b[4])<<(b[5]%25), uint16(b[6]), uint16(b[7])))
			case 5:
				d.PokeDesc(base+uint64(u16(b[1:])%0xff0), desc(base+uint64(u16(b[3:])), uint32(b[5]), uint16(b[6]), uint16(b[7])))
			case 6:
				d.SetAvailIdx(u16(b[1:]) % (2*size + 2))
			case 7:
				d.SetAvail(uint16(b[1]), u16(b[2:]))
				d.SetUsedEvent(u16(b[4:]))
			}
			for {
				c, ok, err := q.Next()
				if err != nil {
					if !errors.As(err, &g) {
						t.Fatalf("not a GuestError: %v", err)
					}
					return
				}
				if !ok {
					break
				}
				if total++; total > 1<<17 {
					t.Fatal("chains without end")
				}
				outLen, inLen := c.Out.Len(), c.In.Len()
				hdr := make([]byte, 19)
				k, _ := c.Out.Read(hdr)
				sum := k + inside(c.Out.Take(outLen))
				k, _ = c.In.Write(hdr[:b[1]%20])
				sum2 := k + inside(c.In.Take(inLen))
				if sum != outLen || sum2 != inLen {
					t.Fatalf("lengths: %d of %d out, %d of %d in", sum, outLen, sum2, inLen)
				}
				chains = append(chains, c)
				if b[0]&16 != 0 || len(chains) == int(size) {
					for _, c := range chains {
						q.Add(c, uint32(inLen))
					}
					chains = chains[:0]
					q.Publish()
				}
			}
			q.EnableKicks()
		}
	})
}
